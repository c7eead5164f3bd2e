"""Groups the Runs of a device by pack and gives each group its weight and gradient slots.

Input-batch grouping (PVLDB 15(11), 2022): all microbatches of a task run while its pack's weights
are on the device, so weights move once a group. With a second slot the next group's weights can
arrive meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from harmony.core.layergraph import LayerGraph
from harmony.core.units import aligned
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Slots
from harmony.planner.ir.tasks import Samples, Task, TaskKind, TensorKind, TensorRef
from harmony.planner.lower.place import Placement, TaskGroup
from harmony.planner.lower.steps import StepList


@dataclass(frozen=True)
class Group:
    """Consecutive Runs of one device that share weights.

    Attributes:
        first, last: positions of its first and last Run on the device.
        weights: ``W`` and ``T`` tensors that must be there.
        gradients: ``dW`` and ``dT`` parts that it makes.
        grown: those of them that an earlier group of the step has begun.
    """

    first: int
    last: int
    weights: tuple[TensorRef, ...]
    gradients: tuple[TensorRef, ...]
    grown: tuple[TensorRef, ...] = ()


def group_runs(
    placement: Placement, device: int, resident: Collection[TensorRef] = ()
) -> list[Group]:
    """Split the Runs of a device where the pack changes; what is resident needs no slot."""
    return list(_groups(placement, placement.runs[device], frozenset(resident)))


def _groups(
    placement: Placement, runs: Sequence[Task], resident: frozenset[TensorRef]
) -> Iterator[Group]:
    tasks, first = placement.tasks, 0
    for at, task in enumerate(runs):
        if at + 1 < len(runs) and _stage(runs[at + 1]) == _stage(task):
            continue
        begun = tasks.reads[runs[first]]
        gradients = tuple(
            r for r in tasks.writes[task] if r.is_gradient_part and r not in resident
        )
        yield Group(
            first,
            at,
            weights=tuple(r for r in tasks.reads[task] if r.is_parameter and r not in resident),
            gradients=gradients,
            grown=tuple(r for r in gradients if r in begun),
        )
        first = at + 1


def _stage(task: Task) -> TaskGroup:
    return task.kind, task.pack


def slot_nbytes(refs: Iterable[TensorRef], graph: LayerGraph) -> int:
    """Bytes that tensors take side by side in a slot."""
    return sum(aligned(ref.nbytes(graph)) for ref in refs)


def _middles(groups: Sequence[Group]) -> dict[int, Group]:
    """Positions at which gradients that have begun to grow are fetched, if there is a slot.

    In the middle of the group before, when what was in the slot has left; where rounds are
    interleaved that is a FORWARD, which may be short, so in the BACKWARD in front of it.
    """
    found, earlier = {}, None
    for before, group in pairwise(groups):
        if group.grown:
            into = earlier if earlier and earlier.gradients and not before.gradients else before
            found[(into.first + into.last + 1) // 2] = group
        earlier = before
    return found


@dataclass(eq=False)
class _Holding:
    """Weights that stay in one slot for one group, or for neighbours that share them."""

    weights: tuple[TensorRef, ...]
    first: int
    last: int
    slot: int = -1
    missing: list[TensorRef] = field(default_factory=list)


class SlotWriter:
    """Writes what happens to the weights and gradients of one device.

    Weights are fetched in the order of their groups, at the start of a group, as many as there
    are free slots: with two, those of the next group. Weights that the next group needs too stay;
    so do, in slots of their own, those that the policy holds from FORWARD to BACKWARD. Gradients
    leave at the end of their group, and their slot is dropped only when it is taken again, so
    that compute does not wait for the copy. Those that an earlier round has begun come back: with
    a second slot in the middle of the group before, when what was in the slot has left.

    Where the step begins with the updates that the one before has left, the first copy of new
    weights is written as late as it can be: whoever issues it is held until the host has them, and
    the Runs before it are to be under way by then.
    """

    def __init__(
        self,
        steps: StepList,
        placement: Placement,
        device: int,
        policy: Policy,
        resident: Collection[TensorRef] = (),
    ) -> None:
        graph = placement.tasks.layers
        self.graph = graph
        self.steps = steps
        self.device = device
        groups = group_runs(placement, device, resident)
        self.starts = {group.first: group for group in groups}
        self.ends = {group.last: group for group in groups}
        self.held = [group for group in groups if group.weights]
        self.making = [group for group in groups if group.gradients]
        self.taken = 0
        self.runs = placement.runs[device]
        self.holdings, held = _holdings(self.held, policy.hold, self.runs)
        self.weight_slots = _slots(
            policy.weight_slots + held, [h.weights for h in self.holdings], graph
        )
        # One of a pack's own in each round, but never two at once.
        made = list(dict.fromkeys(group.gradients for group in self.making))
        self.gradient_slots = _slots(policy.gradient_slots, made, graph)
        self.free = list(range(self.weight_slots.count))
        self.here: set[TensorRef] = set()
        self.fetched = 0
        self.middles = _middles(groups)
        self.written_late = _written_late(placement)
        self.expected: list[TensorRef] = []
        self.stages = StagePool()

    def before(self, position: int) -> None:
        """Write what the Run at ``position`` needs, if it opens a group."""
        group = self.starts.get(position)
        if group is not None:
            if group.weights:
                self._fetch_up_to(self.held.index(group))
            if group.gradients:
                self._take_gradient_slot(self.making.index(group))
        coming = self.middles.get(position)
        if coming is not None and self.gradient_slots.count > 1:
            self._take_gradient_slot(self.making.index(coming))

    def arrive(self, position: int) -> None:
        """Write the copies that were put off, if the Run at ``position`` opens a group."""
        if position in self.starts:
            for ref in self.expected:
                self.steps.swap_in(self.device, ref, source=ref)
            self.expected.clear()

    def prefetch(self, position: int) -> None:
        """Write the fetches for later groups, if the Run at ``position`` opens a group."""
        if position in self.starts:
            while self.free and self.fetched < len(self.holdings):
                self._fetch_next()

    def after(self, position: int) -> None:
        """Write what follows the Run at ``position``, if it closes a group."""
        group = self.ends.get(position)
        if group is None:
            return
        for ref in group.gradients:
            self.steps.swap_out(self.device, ref, self._stage(ref, ref in group.grown))
        if group.weights:
            self._let_go(self.held.index(group))

    def _stage(self, ref: TensorRef, goes_on: bool) -> int | None:
        """The staging buffer of a part of a gradient: the one that it has, if it goes on."""
        if not ref.part:
            return None
        return self.steps.stage_of[ref][1] if goes_on else self.stages.take(self._nbytes(ref))

    def _nbytes(self, ref: TensorRef) -> int:
        return aligned(ref.nbytes(self.graph))

    def finish(self) -> None:
        """Write the drops of the gradients that are still there."""
        for group in self.making[max(0, len(self.making) - self.gradient_slots.count) :]:
            self._drop_gradients(group)

    def _fetch_up_to(self, number: int) -> None:
        """Fetch the weights of the groups up to ``number`` that are not on their way yet."""
        while self.fetched < len(self.holdings) and self.holdings[self.fetched].first <= number:
            self._fetch_next()

    def _fetch_next(self) -> None:
        holding = self.holdings[self.fetched]
        holding.slot = self.free.pop(0)
        holding.missing = list(holding.weights)
        self.fetched += 1
        self._fetch_missing(holding)

    def _fetch_missing(self, holding: _Holding) -> None:
        # What an earlier group still holds comes when that is over: one device cannot tell two
        # tensors of one name apart. It happens to shared parameters, and with three slots.
        refs = [ref for ref in holding.missing if ref not in self.here]
        for ref in refs:
            self.steps.alloc(self.device, ref, holding.slot)
        for ref in refs:
            if self._is_new(ref, holding):
                self.expected.append(ref)
            else:
                self.steps.swap_in(self.device, ref, source=ref)
        self.here.update(refs)
        holding.missing = [ref for ref in holding.missing if ref not in refs]

    def _is_new(self, ref: TensorRef, holding: _Holding) -> bool:
        """Whether an update at the start of the step may still be making what a copy will take."""
        task = self.runs[self.held[holding.first].first]
        is_first = task.kind is TaskKind.FORWARD or task.pack.last == self.graph.num_layers
        return is_first and not self.written_late.isdisjoint(_cells(ref))

    def _let_go(self, number: int) -> None:
        """Drop the weights that no group after ``number`` holds on to."""
        for holding in self.holdings[: self.fetched]:
            if holding.last == number:
                for ref in holding.weights:
                    self.steps.drop(self.device, ref)
                self.here.difference_update(holding.weights)
                self.free.append(holding.slot)
        for holding in self.holdings[: self.fetched]:
            self._fetch_missing(holding)

    def _take_gradient_slot(self, number: int) -> None:
        if number < self.taken:
            return
        self.taken, count = number + 1, self.gradient_slots.count
        if number >= count:
            self._drop_gradients(self.making[number - count])
        for ref in self.making[number].gradients:
            self.steps.alloc(self.device, ref, number % count)
        for ref in self.making[number].grown:
            self.steps.swap_in(self.device, ref, source=ref)

    def _drop_gradients(self, group: Group) -> None:
        for ref in group.gradients:
            self.steps.drop(self.device, ref)


def _holdings(
    held: Sequence[Group], hold: int, runs: Sequence[Task]
) -> tuple[list[_Holding], int]:
    """Merge neighbours that share weights, such as the last F and the first B of a device.

    Returns:
        The holdings by their first group, and how many at once last beyond other groups' turns: of
        the packs with a FORWARD and a BACKWARD here the last ``hold`` of each round. Their wait is
        the shortest.
    """
    holdings: list[_Holding] = []
    for number, group in enumerate(held):
        if holdings and holdings[-1].weights == group.weights:
            holdings[-1].last = number
        else:
            holdings.append(_Holding(group.weights, number, number))
    latest: dict[tuple[TensorRef, ...], _Holding] = {}
    pairs: dict[Samples | None, list[tuple[_Holding, _Holding]]] = defaultdict(list)
    for holding in holdings:
        first = runs[held[holding.first].first]
        earlier = latest.get(holding.weights)
        # A shared parameter is wanted by other packs meanwhile, in another slot.
        if (
            earlier is not None
            and first.kind is TaskKind.BACKWARD
            and not any(ref.kind is TensorKind.SHARED for ref in holding.weights)
        ):
            pairs[first.samples].append((earlier, holding))
        latest[holding.weights] = holding
    most, part_of = 0, dict[_Holding, _Holding]()
    for of_round in pairs.values():
        of_round.sort(key=lambda pair: -pair[0].first)
        most = max(most, len(of_round[:hold]))
        for earlier, later in of_round[:hold]:
            whole = part_of.get(earlier, earlier)  # one that has lasted since the round before
            whole.last = later.last
            part_of[later] = whole
    return [holding for holding in holdings if holding not in part_of], most


class StagePool:
    """Staging buffers of one device on the host; two at least, to fill one while one is added."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.slots = Slots()

    def take(self, nbytes: int) -> int:
        """Return the buffer that has been free the longest, or a new one."""
        count = self.slots.count
        if self.free and count > 1:
            stage = self.free.pop(0)
        else:
            stage, count = count, count + 1
        self.slots = Slots(count, max(self.slots.nbytes, nbytes))
        return stage


def _written_late(placement: Placement) -> frozenset[TensorRef]:
    """Weights that are updated at the start of the step, layer by layer, since packs differ."""
    tasks = placement.tasks
    late = (task for task in tasks.tasks if task.kind is TaskKind.LATE_UPDATE)
    return frozenset(cell for task in late for ref in tasks.writes[task] for cell in _cells(ref))


def _cells(ref: TensorRef) -> list[TensorRef]:
    if ref.kind is not TensorKind.WEIGHTS:
        return [ref]
    return [TensorRef(ref.kind, layer, layer + 1) for layer in range(ref.first, ref.last)]


def _slots(wanted: int, contents: Sequence[tuple[TensorRef, ...]], graph: LayerGraph) -> Slots:
    nbytes = max((slot_nbytes(refs, graph) for refs in contents), default=0)
    return Slots(min(wanted, len(contents)), nbytes)
