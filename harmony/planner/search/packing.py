"""Layers to packs: the fewest packs, balanced in time, that fit a device.

FORWARD and BACKWARD pack the layers independently (PVLDB 15(11), 2022): a BACKWARD keeps what
its layers save, so it needs smaller packs. A partition is found by dynamic programming over the
places where a pack may end: for every number of packs it is the one whose slowest pack is
fastest; where that leaves a choice, boundaries that carry few bytes are preferred.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from harmony.core.layergraph import LayerGraph
from harmony.core.units import format_bytes
from harmony.errors import DoesNotFitError
from harmony.planner.ir.policy import LEAN, Policy
from harmony.planner.ir.tasks import Pack, TaskKind, state
from harmony.planner.predict.cost import CostTable, update_s
from harmony.planner.predict.memory import arena_nbytes, resident_nbytes
from harmony.planner.search.partition import PackingTable, Window
from harmony.planner.search.ranges import Ranges, SizedCosts, slot_nbytes

MAX_CUTS = 512
"""A model of more layers is cut only at this many places, those where the fewest bytes cross."""


@dataclass(frozen=True)
class Budget:
    """What a device offers to the tasks of one kind.

    Attributes:
        microbatches: how many microbatches the device runs of each pack.
        parked: microbatches whose boundary values may wait on the device for their next pack.
        weight_nbytes, gradient_nbytes: slots are at least this large, for the other kind's packs.
    """

    memory_nbytes: int
    policy: Policy
    microbatches: int = 1
    parked: int = 0
    weight_nbytes: int = 0
    gradient_nbytes: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes that one pack needs on a device while its tasks run."""

    slots: int
    values: int
    workspace: int

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.slots + self.values + self.workspace

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.nbytes)} (weights and gradients {format_bytes(self.slots)},"
            f" values {format_bytes(self.values)}, workspace {format_bytes(self.workspace)})"
        )


class PackFacts(NamedTuple):
    """What a search asks about a pack at one microbatch size: seconds and bytes.

    ``backward_s`` is without the recompute of the forward; ``saved`` is what a FORWARD leaves for
    its BACKWARD, ``products`` the results of its products and ``products_s`` the seconds that the
    recompute is spared by them; ``update_s`` is the update on the host; ``shares`` says whether
    other packs use some of its parameters too. ``transient`` is the workspace of a BACKWARD beside
    what was saved, ``resident`` what stays on the device of a pack whose weights stay between
    steps, and ``updating`` what their update takes there while it runs.
    """

    forward_s: float
    backward_s: float
    update_s: float
    weights: int
    gradients: int
    inputs: int
    outputs: int
    saved: int
    shares: bool
    forward_workspace: int
    backward_workspace: int
    transient: int
    resident: int
    updating: int
    products: int
    products_s: float


class Packer:
    """Packs the layers of one model, for any kind of task, microbatch size and budget."""

    def __init__(self, graph: LayerGraph, costs: CostTable) -> None:
        self.graph = graph
        self.costs = costs
        self.ranges = Ranges(graph)
        self._sizes: dict[int, SizedCosts] = {}
        self._facts: dict[tuple[int, int, int], PackFacts] = {}
        self._tables: dict[tuple[object, ...], PackingTable] = {}

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Places where a pack may begin or end."""
        return _choose_cuts(self.ranges)

    @cached_property
    def finest(self) -> tuple[Pack, ...]:
        """The smallest packs there are."""
        return tuple(Pack(first, last) for first, last in pairwise(self.cuts))

    @cached_property
    def arena_nbytes(self) -> int:
        """Bytes of host memory for parameters, gradients and optimizer state."""
        return arena_nbytes(self.graph)

    def need(self, kind: TaskKind, pack: Pack, num_samples: int, budget: Budget) -> Need:
        """Bytes that a pack's tasks need on a device, estimated from above.

        The checker has the last word, since it knows what else is on the device at that moment.
        """
        first, last = pack.first, pack.last
        inputs, outputs = self.boundary_nbytes(pack, num_samples)
        slots, workspace = self._growing(kind, first, last, num_samples, budget)
        ahead = 1 + min(budget.policy.lookahead, budget.microbatches - 1)
        # The gradients of inputs and outputs are as large as they are.
        in_, out = (1, 1) if kind is TaskKind.FORWARD else (2, 1)
        values = ahead * (in_ * inputs + out * outputs)
        values += budget.parked * max(inputs, outputs)
        return Need(slots, values, workspace)

    def _growing(
        self, kind: TaskKind, first: int, last: int, num_samples: int, budget: Budget
    ) -> tuple[int, int]:
        """Bytes of slots and workspace: never less for a larger range."""
        policy = budget.policy
        weights, gradients = slot_nbytes(self.ranges, first, last)
        if kind is TaskKind.FORWARD:
            gradients = 0
        workspace = self._workspace(kind, first, last, num_samples)
        slots = policy.weight_slots * max(weights, budget.weight_nbytes)
        slots += policy.gradient_slots * max(gradients, budget.gradient_nbytes)
        return slots, workspace

    def _workspace(self, kind: TaskKind, first: int, last: int, num_samples: int) -> int:
        sized = self.sized(num_samples)
        if kind is TaskKind.FORWARD:
            return max(sized.forward[first:last])
        found = sized.saved[last] - sized.saved[first]
        found += sized.nbytes(self.ranges.made(first, last))
        return found + max(sized.backward[first:last])

    def seconds(self, kind: TaskKind, pack: Pack, num_samples: int) -> float:
        """Seconds of one task of the pack; a BACKWARD recomputes its forward."""
        sized = self.sized(num_samples)
        found = sized.forward_s[pack.last] - sized.forward_s[pack.first]
        if kind is TaskKind.BACKWARD:
            found += sized.backward_s[pack.last] - sized.backward_s[pack.first]
        return found

    def slot_nbytes(self, pack: Pack) -> tuple[int, int]:
        """Bytes of the pack's weights and of its gradients, shared parameters included."""
        return slot_nbytes(self.ranges, pack.first, pack.last)

    def boundary_nbytes(self, pack: Pack, num_samples: int) -> tuple[int, int]:
        """Bytes of the values that enter the pack and of those that leave it."""
        sized, ranges = self.sized(num_samples), self.ranges
        inputs = ranges.inputs(pack.first, pack.last)
        return sized.nbytes(inputs), sized.nbytes(ranges.outputs(pack.first, pack.last))

    def facts(self, pack: Pack, num_samples: int) -> PackFacts:
        """All of it at once, remembered: a search asks for the same packs many times."""
        key = (pack.first, pack.last, num_samples)
        found = self._facts.get(key)
        if found is None:
            sized = self.sized(num_samples)
            found = self._facts[key] = PackFacts(
                sized.forward_s[pack.last] - sized.forward_s[pack.first],
                sized.backward_s[pack.last] - sized.backward_s[pack.first],
                update_s(self.costs, pack),
                *self.slot_nbytes(pack),
                *self.boundary_nbytes(pack, num_samples),
                self.saved_nbytes(pack, num_samples),
                self.ranges.uses_shared(pack.first, pack.last),
                self._workspace(TaskKind.FORWARD, pack.first, pack.last, num_samples),
                self._workspace(TaskKind.BACKWARD, pack.first, pack.last, num_samples),
                max(sized.backward[pack.first : pack.last]),
                self._resident_nbytes(pack),
                self.graph.update_nbytes(pack.first, pack.last),
                sized.products[pack.last] - sized.products[pack.first],
                sized.products_s[pack.last] - sized.products_s[pack.first],
            )
        return found

    def _resident_nbytes(self, pack: Pack) -> int:
        weights, gradients = self.slot_nbytes(pack)
        return weights + gradients + (gradients and resident_nbytes(state(pack), self.graph))

    def saved_nbytes(self, pack: Pack, num_samples: int) -> int:
        """Bytes that a FORWARD of the pack leaves for its BACKWARD: `LayerGraph.saved_nbytes`."""
        sized, ranges = self.sized(num_samples), self.ranges
        found = sized.kept[pack.last] - sized.kept[pack.first]
        found += sized.nbytes(ranges.made(pack.first, pack.last))
        return found + sized.nbytes(ranges.inputs(pack.first, pack.last))

    def sized(self, num_samples: int) -> SizedCosts:
        """Costs of the layers at one microbatch size."""
        if num_samples not in self._sizes:
            self._sizes[num_samples] = SizedCosts(self.ranges, self.costs, num_samples)
        return self._sizes[num_samples]

    def table(self, kind: TaskKind, num_samples: int, budget: Budget) -> PackingTable:
        """The best partitions, for every end and every number of packs."""
        windows = self._windows(kind, num_samples, budget)
        key = (kind, num_samples, tuple(windows))
        # Budgets that differ a little mostly allow the same packs.
        if key not in self._tables:
            sized = self.sized(num_samples)
            seconds = [sized.forward_s[cut] for cut in self.cuts]
            if kind is TaskKind.BACKWARD:
                seconds = [sized.forward_s[cut] + sized.backward_s[cut] for cut in self.cuts]

            def entering(pack: Pack) -> int:
                return sized.nbytes(self.ranges.inputs(pack.first, pack.last))

            self._tables[key] = PackingTable(self.cuts, seconds, windows, entering)
        return self._tables[key]

    def _windows(self, kind: TaskKind, num_samples: int, budget: Budget) -> list[Window]:
        """Per cut the packs that end there and fit.

        Slots and workspace only grow with a pack, what enters it may shrink. So below some first
        cut no pack fits, above another one every pack does, and those between are tried.
        """
        cuts, memory, never, always = self.cuts, budget.memory_nbytes, 0, 0
        sized = self.sized(num_samples)
        crossing = sized.crossing
        ahead = 1 + min(budget.policy.lookahead, budget.microbatches - 1)
        times = ahead * (2 if kind is TaskKind.FORWARD else 3) + budget.parked
        windows = [Window(0, ())]
        for end in range(1, len(cuts)):
            last = cuts[end]

            def growing(first: int, last: int = last) -> int:
                return sum(self._growing(kind, cuts[first], last, num_samples, budget))

            while never < end and growing(never) > memory:
                never += 1
            most = max(crossing[cuts[never] : last + 1])
            most += sized.nbytes(self.ranges.returned(last))
            room = memory - times * most
            # Both move little from one end to the next.
            always = max(never, min(always, end))
            while always < end and growing(always) > room:
                always += 1
            while always > never and growing(always - 1) <= room:
                always -= 1
            odd = [
                first
                for first in range(always - 1, never - 1, -1)
                if self.need(kind, Pack(cuts[first], last), num_samples, budget).nbytes <= memory
            ]
            while odd and odd[0] == always - 1:
                always = odd.pop(0)
            windows.append(Window(always, tuple(odd)))
        return windows


def check_layers(packer: Packer, num_samples: int, budget: Budget) -> None:
    """Refuse a layer that does not fit on a device even alone.

    Raises:
        DoesNotFitError: with the layer, its bytes, the limit and what to change.
    """
    lean = replace(budget, policy=LEAN, parked=0)
    for at, first in enumerate(packer.cuts[:-1]):
        pack = Pack(first, packer.cuts[at + 1])
        need = packer.need(TaskKind.BACKWARD, pack, num_samples, lean)
        if need.nbytes > budget.memory_nbytes:
            name = packer.graph.layers[first].name
            limit = format_bytes(budget.memory_nbytes)
            smaller = "" if num_samples == 1 else "use a microbatch of 1, or "
            raise DoesNotFitError(
                f"layer {first} ({name}) alone needs {need} at a microbatch of {num_samples};"
                f" the limit is {limit}. {smaller.capitalize()}give it more GPU memory"
                f" (--gpu-memory {suggest_memory(need.nbytes)}) or split the layer"
            )


def suggest_memory(nbytes: int) -> str:
    """A size to type, a little above ``nbytes``: ``"96MiB"``."""
    mib = -(-nbytes // 2**20)
    step = max(1, 2 ** (mib.bit_length() - 4))
    return f"{-(-mib // step) * step}MiB"


def _choose_cuts(ranges: Ranges) -> tuple[int, ...]:
    """All places of a small model; of a large one the cheapest place of each stretch."""
    num_layers = ranges.graph.num_layers
    if num_layers <= MAX_CUTS:
        return tuple(range(num_layers + 1))
    crossing = [sum(ranges.crossing(place)) for place in range(num_layers + 1)]
    cuts = [0]
    for stretch in range(1, MAX_CUTS):
        low = max(cuts[-1] + 1, (stretch * num_layers - num_layers // 2) // MAX_CUTS)
        high = min(num_layers, (stretch * num_layers + num_layers // 2) // MAX_CUTS + 1)
        if low < high:
            cuts.append(min(range(low, high), key=lambda place: (crossing[place], place)))
    return (*cuts, num_layers)
