"""A step in outline: one stage per pack and kind of task, with what it moves and how.

The outline of a candidate takes microseconds a pack. `sketch` estimates its time, `footprint` its
memory. It follows the same rules as the passes that lower a step, without naming microbatches.
"""

from __future__ import annotations

from dataclasses import dataclass

from harmony.core.machine import Machine
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import Pack, Phase, StepSpec, TaskKind
from harmony.planner.search.packing import Packer, PackFacts


@dataclass(slots=True)
class StageOutline:
    """All microbatches of one pack in a round, FORWARD or BACKWARD, in one replica.

    Attributes:
        seat: the device in the ring of its replica.
        run_s: seconds of one microbatch.
        weights: bytes that come in for it; 0 if they are there already.
        slot: bytes of its weights, wherever they come from.
        gradients: bytes of gradients that it makes.
        inputs: bytes that come from the host for each microbatch.
        outputs: bytes that go to the host for each microbatch.
        passed: bytes of each microbatch that the next stage reads.
        way: how those get there: they ``"stay"``, or go to a ``"peer"`` or over the ``"host"``.
        update_s: seconds of its update on the host.
        resident: whether its weights stay on its device between steps.
        updates_here: whether the update runs on its device instead.
        holds: whether its weights stay for the BACKWARD, in a slot of their own.
        saved: bytes of each saved microbatch that stay on the device from FORWARD to BACKWARD.
        saved_runs: how many microbatches save what their BACKWARD would recompute.
        products: bytes of the results of products of each microbatch of which no more is saved
            that stay on the device from FORWARD to BACKWARD.
        product_runs: how many microbatches those are, wherever they stay.
        burst: bytes that a microbatch which leaves most moves at once, where others leave less.
        bursts: how many microbatches those are.
        shares: whether other packs may use some of its parameters too.
    """

    kind: TaskKind
    pack: Pack
    seat: int
    run_s: float
    num_runs: int
    weights: int
    slot: int
    gradients: int
    inputs: int = 0
    outputs: int = 0
    passed: int = 0
    way: str = "stay"
    update_s: float = 0.0
    resident: bool = False
    updates_here: bool = False
    holds: bool = False
    saved: int = 0
    saved_runs: int = 0
    products: int = 0
    product_runs: int = 0
    burst: int = 0
    bursts: int = 0
    shares: bool = False


@dataclass(frozen=True)
class Outline:
    """The stages of one replica in order, and how many devices it wraps around.

    Attributes:
        interleaved: whether the next round's FORWARD stages run between the BACKWARD stages.
    """

    stages: tuple[StageOutline, ...]
    ring: int
    replicas: int
    interleaved: bool = False


def outline(packer: Packer, machine: Machine, spec: StepSpec, policy: Policy) -> Outline:
    """Return the outline of a step."""
    replicas = len(spec.shares)
    sequence = _sequence(packer, spec)
    is_apart = policy.mirror and spec.phase is Phase.BACKWARD
    turns = len(spec.forward_packs) if is_apart else len(sequence)
    ring = min(machine.num_devices // replicas, max(1, turns))
    maker = _Maker(packer, spec, policy)
    stages = [maker.stage(kind, pack, turn % ring) for turn, (kind, pack) in enumerate(sequence)]
    if policy.mirror:
        seats = {pack.first: turn % ring for turn, pack in enumerate(spec.forward_packs)}
        for stage in stages:
            if is_apart or stage.pack != spec.backward_packs[-1]:
                stage.seat = seats.get(stage.pack.first, stage.seat)
    _keep_weights(stages, policy, ring)
    maker.connect(stages)
    return Outline(tuple(stages), ring, replicas, spec.interleaved)


def _sequence(packer: Packer, spec: StepSpec) -> list[tuple[TaskKind, Pack]]:
    """The packs in the order of the paper's sequence."""
    found: list[tuple[TaskKind, Pack]] = []
    if spec.phase is not Phase.BACKWARD:
        found += [(TaskKind.FORWARD, pack) for pack in spec.forward_packs]
    if spec.phase in (Phase.TRAIN, Phase.BACKWARD):
        found += [(TaskKind.BACKWARD, pack) for pack in reversed(with_backward(packer, spec))]
    return found


def with_backward(packer: Packer, spec: StepSpec) -> list[Pack]:
    """The packs that run backward: where nothing is trained, and nothing before it, none does."""
    lowest, end = _first_trained(packer, spec), packer.graph.num_layers
    fused = end if spec.phase is Phase.TRAIN else end + 1
    return [p for p in spec.backward_packs if p.last > lowest or p.last == fused]


def _first_trained(packer: Packer, spec: StepSpec) -> int:
    graph = packer.graph
    given = spec.phase is not Phase.TRAIN  # in a whole step nobody takes gradients of inputs
    if given and any(graph.values[v].requires_grad for v in graph.input_ids):
        return 0
    own = (layer.index for layer in graph.layers if layer.gradient_nbytes)
    tied = (s.layers[0] for s in graph.shared if s.gradient_nbytes)
    return min(min(own, default=graph.num_layers), min(tied, default=graph.num_layers))


class _Maker:
    """Makes the stages of one step."""

    def __init__(self, packer: Packer, spec: StepSpec, policy: Policy) -> None:
        self.packer, self.spec, self.policy = packer, spec, policy
        # By their first layers; packs of the other kind that begin there may end elsewhere.
        self.saved = {pack.first: pack.last for pack in spec.saved}
        self.products = {pack.first: pack.last for pack in spec.products}
        self.offload = {pack.first for pack in policy.offload}
        self.resident = {pack.first: pack.last for pack in policy.resident}
        kinds = (TaskKind.FORWARD, TaskKind.BACKWARD)
        self.size = {kind: _size(spec, kind) for kind in kinds}
        self.num_runs = {kind: spec.num_microbatches(0, kind) for kind in kinds}
        self.fused = spec.backward_packs[-1].first if spec.phase is Phase.TRAIN else -1
        self.stashed = self._stashed()

    def stage(self, kind: TaskKind, pack: Pack, seat: int) -> StageOutline:
        """A stage, with nothing said yet about what comes and goes."""
        backward, first = kind is TaskKind.BACKWARD, pack.first
        facts = self.packer.facts(pack, self.size[kind])
        count = self.num_runs[kind]
        runs = (self.spec.saved_runs or count) if self.saved.get(first) == pack.last else 0
        given = count - runs if self.products.get(first) == pack.last else 0
        given = min(given, self.spec.products_runs or given)
        resident = self.resident.get(first) == pack.last
        seconds = facts.forward_s
        if backward:
            seconds = facts.backward_s + (count - runs) / count * facts.forward_s
            seconds -= given / count * facts.products_s
        weights = facts.weights
        stage = StageOutline(
            kind,
            pack,
            seat,
            seconds,
            count,
            0 if resident else weights,
            weights,
            facts.gradients if backward else 0,
            resident=resident,
            saved_runs=runs,
            product_runs=given,
            shares=facts.shares,
        )
        if first not in self.offload:
            stage.saved = facts.saved if runs else 0
            stage.products = facts.products if given else 0
        if backward and self.spec.phase is Phase.TRAIN and facts.gradients:
            stage.updates_here = resident
            stage.update_s = 0.0 if resident else facts.update_s
        return stage

    def connect(self, stages: list[StageOutline]) -> None:
        """Say what each stage gets from the host and from the stage before, and leaves there."""
        before: StageOutline | None = None
        for stage in stages:
            facts = self.packer.facts(stage.pack, self.size[stage.kind])
            backward, first = stage.kind is TaskKind.BACKWARD, stage.pack.first
            if (stage.saved_runs or stage.product_runs) and first in self.offload:
                moved = facts.saved * stage.saved_runs + facts.products * stage.product_runs
                moved //= stage.num_runs
                if 0 < stage.saved_runs < stage.num_runs:
                    stage.burst, stage.bursts = facts.saved, stage.saved_runs
                elif 0 < stage.product_runs < stage.num_runs:
                    stage.burst, stage.bursts = facts.products, stage.product_runs
                if backward:
                    stage.inputs += moved
                else:
                    stage.outputs += moved
            if not backward:
                places = range(first + 1, stage.pack.last + 1)
                stage.outputs += sum(self.stashed.get(place, 0) for place in places)
            if first == 0 or (backward and first != self.fused):
                runs = stage.num_runs - (stage.saved_runs if backward else 0)
                stage.inputs += facts.inputs * runs // stage.num_runs
            if before is not None:
                self._pass_on(before, stage, facts)
            elif backward and self.spec.phase is Phase.BACKWARD:
                stage.inputs += facts.outputs
            before = stage

    def _stashed(self) -> dict[int, int]:
        """Per place the bytes of a FORWARD microbatch that wait on the host for the BACKWARD."""
        if self.spec.phase not in (Phase.TRAIN, Phase.FORWARD):
            return {}
        size = self.size[TaskKind.FORWARD]
        count = self.num_runs[TaskKind.FORWARD]
        rest = count - (self.spec.saved_runs or count)
        if self.spec.phase is Phase.FORWARD:  # what is kept may be gone when the backward runs
            rest = count
        return {
            pack.first: self.packer.facts(pack, size).inputs
            * (rest if pack.first in self.saved else count)
            // count
            for pack in self.spec.backward_packs
            if pack.first and pack.first != self.fused
        }

    def _pass_on(self, before: StageOutline, stage: StageOutline, facts: PackFacts) -> None:
        """Set what goes from one stage to the next, and how."""
        turns = stage.kind is not before.kind
        forward = stage.kind is TaskKind.FORWARD
        before.passed = facts.inputs if turns or forward else facts.outputs
        resized = turns and self.spec.forward_size != self.spec.backward_size
        if self.policy.boundary == "host" or resized:
            before.way = "host"
        elif before.seat != stage.seat:
            before.way = "peer"
        elif self.policy.boundary == "swap":
            before.way = "host"
        if before.way == "host":
            stage.inputs += before.passed
            before.outputs += before.passed * stage.num_runs // before.num_runs


def _size(spec: StepSpec, kind: TaskKind) -> int:
    size = spec.backward_size if kind is TaskKind.BACKWARD else spec.forward_size
    return min(size, spec.shares[0][1] - spec.shares[0][0])


def _keep_weights(stages: list[StageOutline], policy: Policy, ring: int) -> None:
    """Nothing comes in for the second of two stages on a device that share weights."""
    for seat in range(ring):
        here = [stage for stage in stages if stage.seat == seat and stage.weights]
        pairs: list[tuple[StageOutline, StageOutline]] = []
        earlier: dict[tuple[int, int], StageOutline] = {}
        for before, stage in zip([None, *here], here, strict=False):
            if before is not None and before.pack == stage.pack:
                stage.weights = 0
                continue
            key = (stage.pack.first, stage.pack.last)
            # A shared parameter is wanted by other packs meanwhile.
            if key in earlier and not stage.shares:
                pairs.append((earlier[key], stage))
            earlier[key] = stage
        pairs.reverse()
        for forward, backward in sorted(pairs, key=lambda p: -p[0].pack.first)[: policy.hold]:
            backward.weights = 0
            forward.holds = backward.holds = True
