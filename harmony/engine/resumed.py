"""What of a plan decides the last bits of a step, kept for the plan of a run that is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from harmony.core.files import check_types
from harmony.core.layergraph import LayerGraph
from harmony.core.warn import warn
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import Pack, Phase, StepSpec
from harmony.planner.search.candidates import Candidate
from harmony.planner.search.numerics import Numerics, numerics_of


@dataclass(frozen=True)
class BitChoices:
    """How a batch was parted, and the layers.

    Attributes:
        minibatch: its samples.
        forward_size, backward_size: samples of a microbatch.
        shares: the samples of each replica, as ranges.
        mode: of the plan.
        packs: BACKWARD packs, as ranges of layers, as far as the bits depend on them: joined but
            for those between which a weight is shared, whose gradient is added up pack by pack.
            Empty in a file that is older than this.
        updated: those that were updated on a GPU, where that rounds otherwise than on the host.
    """

    minibatch: int
    forward_size: int
    backward_size: int
    shares: tuple[tuple[int, int], ...]
    mode: str
    packs: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    updated: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @staticmethod
    def of(plan: Plan, graph: LayerGraph) -> BitChoices:
        """Those of a plan for a graph."""
        spec, alike = plan.spec, plan.machine.updates_alike
        packs = _joined(spec.backward_packs, graph) if alike else spec.backward_packs
        return BitChoices(
            spec.minibatch,
            spec.forward_size,
            spec.backward_size,
            spec.shares,
            plan.mode,
            _bounds(packs),
            () if alike else _bounds(plan.policy.resident),
        )

    @staticmethod
    def of_data(data: Mapping[str, Any]) -> BitChoices:
        """Those of a file.

        Raises:
            TypeError: if it holds something else.
        """
        made = BitChoices(**data)
        check_types(made, BitChoices)
        return made

    def as_data(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    def like(self, graph: LayerGraph, phase: Phase) -> Candidate | None:
        """A way to train the minibatch that computes the same bits; None if it is not known.

        Args:
            graph: of the model as it is captured now, in which there may be other layers.
        """
        if not self.packs or self.packs[-1][1] != graph.num_layers:
            return None
        packs = tuple(Pack(*bounds) for bounds in self.packs)
        first = packs[:-1] if phase is Phase.TRAIN else packs
        sizes = self.forward_size, self.backward_size
        spec = StepSpec(self.minibatch, *sizes, first, packs, self.shares, phase)
        updated = tuple(Pack(*bounds) for bounds in self.updated)
        return Candidate(self.mode, spec, Policy(resident=updated))

    def compare(self, plan: Plan, graph: LayerGraph) -> None:
        """Warn if a plan for a batch of this size computes other bits."""
        now, like = BitChoices.of(plan, graph), self.like(graph, plan.spec.phase)
        said = [] if now._parts() == self._parts() else [f"with {now}; before it was {self}"]
        if like is not None and not said:
            alike = plan.machine.updates_alike
            ways = (plan.spec, plan.policy), (like.spec, like.policy)
            said += _differences(*(numerics_of(graph, *w, updates_alike=alike) for w in ways))
        if said:
            warn(
                f"the run is resumed {' and '.join(said)}: sums are taken in another order, so "
                "the last bits may differ from those of a run that was not interrupted. To keep "
                f"them, give microbatch_size={self.backward_size} and mode={self.mode!r} with as "
                "many GPUs, of as much memory, as before"
            )

    def _parts(self) -> tuple[object, ...]:
        return self.forward_size, self.backward_size, self.shares

    def __str__(self) -> str:
        replicas = "1 replica" if len(self.shares) == 1 else f"{len(self.shares)} replicas"
        return f"microbatches of {self.backward_size} samples in {replicas}"


def _differences(now: Numerics, before: Numerics) -> Iterator[str]:
    if now.ties != before.ties:
        yield "with other layers in a pack with those that share a weight with them"
    if now.updated != before.updated:
        yield "with other layers updated on GPUs, where the optimizer rounds otherwise"


def _joined(packs: tuple[Pack, ...], graph: LayerGraph) -> tuple[Pack, ...]:
    """Join packs as long as the layers that share a weight are in one pack, or not, as before."""
    pairs = [pair for shared in graph.shared for pair in pairwise(shared.layers)]
    cuts: list[int] = []
    for pack in packs[:-1]:
        parted = [low < pack.last <= high for low, high in pairs]
        done = [any(low < cut <= high for cut in cuts) for low, high in pairs]
        if any(now and not before for now, before in zip(parted, done, strict=True)):
            cuts.append(pack.last)
    return tuple(Pack(low, high) for low, high in pairwise((0, *cuts, packs[-1].last)))


def _bounds(packs: tuple[Pack, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((pack.first, pack.last) for pack in packs)
