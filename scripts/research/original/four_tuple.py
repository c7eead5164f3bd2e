"""The original's plan of a step: a mode, and the four-tuple (U_F, P_F, U_B, P_B)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from harmony.errors import PlanError
from harmony.planner.ir.tasks import Pack, TaskKind

Mode = Literal["DP", "PP"]


@dataclass(frozen=True)
class PackTask:
    """A FORWARD or BACKWARD of one pack, all of its microbatches; BACKWARD updates as well."""

    kind: TaskKind
    pack: Pack
    gpu: int


@dataclass(frozen=True)
class FourTuple:
    """A plan of the original Harmony.

    Attributes:
        mode: DP, where each GPU runs all packs on its share of the minibatch; or PP, where pack i
            runs on GPU i mod N.
        num_gpus: N.
        minibatch: D, samples of a step.
        forward_size, backward_size: U_F and U_B, samples of a microbatch.
        forward_packs: P_F, ascending; they end where the last BACKWARD pack begins.
        backward_packs: P_B, ascending; all layers.
    """

    mode: Mode
    num_gpus: int
    minibatch: int
    forward_size: int
    forward_packs: tuple[Pack, ...]
    backward_size: int
    backward_packs: tuple[Pack, ...]

    @property
    def simulates_one(self) -> bool:
        """Whether all GPUs do the same: DP, and PP with one GPU, which counts as DP."""
        return self.mode == "DP" or self.num_gpus == 1

    @property
    def share(self) -> int:
        """Samples of a step that a GPU sees."""
        return self.minibatch // self.num_gpus if self.simulates_one else self.minibatch

    @property
    def gpus_in_use(self) -> int:
        """GPUs that have any task, which share the links to the host."""
        num_tasks = len(self.forward_packs) + len(self.backward_packs)
        return self.num_gpus if self.mode == "DP" else min(self.num_gpus, num_tasks)

    @property
    def converts(self) -> bool:
        """Whether FORWARD and BACKWARD use other microbatches, so that samples are regrouped."""
        return self.forward_size != self.backward_size

    @cached_property
    def tasks(self) -> tuple[PackTask, ...]:
        """The step's tasks in order, each with its GPU; of DP those of one GPU."""
        packs = [(TaskKind.FORWARD, pack) for pack in self.forward_packs]
        packs += [(TaskKind.BACKWARD, pack) for pack in reversed(self.backward_packs)]
        ring = 1 if self.simulates_one else self.num_gpus
        return tuple(PackTask(kind, p, i % ring) for i, (kind, p) in enumerate(packs))

    def microbatches(self, kind: TaskKind) -> list[int]:
        """Sizes of a task's microbatches; the last is smaller where they do not come out even."""
        size = self.forward_size if kind is TaskKind.FORWARD else self.backward_size
        whole, rest = divmod(self.share, size)
        return [size] * whole + [rest] * (rest > 0)

    def check(self, num_layers: int) -> None:
        """Refuse a plan that does not cover a model of ``num_layers`` layers.

        Raises:
            PlanError: naming what is wrong.
        """
        if self.num_gpus < 1 or self.minibatch < 1:
            raise PlanError(f"{self.num_gpus} GPUs and {self.minibatch} samples make no step")
        if self.simulates_one and self.minibatch % self.num_gpus:
            raise PlanError(f"{self.num_gpus} GPUs get no equal shares of {self.minibatch}")
        sizes = (self.forward_size, self.backward_size)
        if min(sizes) < 1 or max(sizes) > self.share:
            raise PlanError(f"microbatches of {sizes} samples of a share of {self.share}")
        _check_packs(self.backward_packs, num_layers, "BACKWARD")
        _check_packs(self.forward_packs, self.backward_packs[-1].first, "FORWARD")


def covering(forward: Sequence[int], backward: Sequence[int]) -> list[int]:
    """Per BACKWARD microbatch the FORWARD microbatch that holds its last sample."""
    ends = list(accumulate(forward))
    found, at = [], 0
    for end in accumulate(backward):
        while ends[at] < end:
            at += 1
        found.append(at)
    return found


def _check_packs(packs: Sequence[Pack], end: int, name: str) -> None:
    at = 0
    for pack in packs:
        if pack.first != at or pack.last <= pack.first:
            raise PlanError(f"{name} packs: {pack} where a pack from layer {at} should follow")
        at = pack.last
    if at != end:
        raise PlanError(f"{name} packs end at layer {at}; they should end at layer {end}")
