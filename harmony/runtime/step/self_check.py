"""The self-check of a first step: does the recompute give what the forward gave?

Two figures of every value (its sum and its norm, for integers the sum) are taken on the device
when FORWARD has made it and when BACKWARD has recomputed it, and compared before anything is
updated. A figure is one number, so that the check needs no memory to speak of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch

from harmony.core.layergraph import LayerGraph
from harmony.errors import RecomputeError
from harmony.planner.ir.schedule import Schedule
from harmony.planner.ir.tasks import Pack, Samples, Task, TaskKind
from harmony.runtime import native
from harmony.runtime.host.pinned_memory import HostBuffer

_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}
"""Relative difference that kernels of a real GPU may have between two runs (atomic additions)."""

_CELL_NBYTES = 16

Key = tuple[TaskKind, int, Samples]
"""Who made it (FORWARD or BACKWARD), which value, which samples."""


class SelfCheck:
    """The figures of one step.

    Where FORWARD and BACKWARD have different microbatches the figures are of the ranges of
    samples that lie in one microbatch of both.
    """

    def __init__(
        self, graph: LayerGraph, device: torch.device, schedules: Iterable[Schedule]
    ) -> None:
        """Make room for the figures of the tasks of these schedules: of a forward and a backward.

        Args:
            device: where they run.
        """
        steps = [s for schedule in schedules for program in schedule.programs for s in program]
        tasks = [s.task for s in steps if s.task is not None and s.task.samples is not None]
        self._graph = graph
        self._cuts = sorted({end for task in tasks for end in _samples(task)})
        made = dict.fromkeys(
            (ref.first, part)
            for s in steps
            if s.task is not None and s.task.kind is TaskKind.FORWARD
            for ref in s.writes
            if ref.is_value and ref.samples is not None
            for part in self._parts(ref.samples)
        )
        kinds = (TaskKind.FORWARD, TaskKind.BACKWARD)
        keys = [(kind, value, part) for kind in kinds for value, part in made]
        self._cells = {key: index * _CELL_NBYTES for index, key in enumerate(keys)}
        self._buffer = HostBuffer(len(keys) * _CELL_NBYTES, device, "the self-check")
        self._exact = native.is_virtual(device)
        self._recorded: dict[Key, _Record] = {}

    def record(self, task: Task, values: Mapping[int, torch.Tensor]) -> None:
        """Take the figures of what a task has just made, on the stream that made it."""
        samples = _samples(task)
        for value, tensor in values.items():
            dim = self._graph.values[value].batch_dim
            for low, high in self._parts(samples):
                key = (task.kind, value, (low, high))
                if key not in self._cells:
                    continue
                part = tensor
                if dim is not None and (low, high) != samples:
                    part = tensor.narrow(dim, low - samples[0], high - low)
                elif (low, high) != samples:
                    continue  # not of these samples only: no two tasks have to agree on it
                self._record(key, task, part)

    def _record(self, key: Key, task: Task, tensor: torch.Tensor) -> None:
        try:
            figures = _figures(tensor)
        except torch.OutOfMemoryError:  # the plan fills the device: this one is not checked
            return
        cell = self._buffer.tensor[self._cells[key] : self._cells[key] + _CELL_NBYTES]
        targets = []
        for index, figure in enumerate(figures):
            size = figure.element_size()
            target = cell[8 * index : 8 * index + size].view(figure.dtype)[0]
            target.copy_(figure, non_blocking=True)
            targets.append(target)
        self._recorded[key] = _Record(task, tensor, targets, _samples(task) == key[2])

    def compare(self) -> None:
        """Compare all that was made twice; the devices must be done.

        Raises:
            RecomputeError: naming the layer, the value, and what was found.
        """
        native.trace_host_access("the self-check", self._buffer.tensor, write=False)
        both = (key for key in self._recorded if key[0] is TaskKind.BACKWARD)
        for kind, value, samples in sorted(both, key=lambda key: key[1:]):
            first = self._recorded.get((TaskKind.FORWARD, value, samples))
            again = self._recorded[kind, value, samples]
            if first is None:
                continue
            exact = self._exact and first.whole and again.whole
            if not first.agrees(again, exact):
                raise RecomputeError(self._explain(value, samples, first, again))

    def _parts(self, samples: Samples) -> list[Samples]:
        cuts = [cut for cut in self._cuts if samples[0] <= cut <= samples[1]]
        return list(pairwise(cuts))

    def _explain(self, value: int, samples: Samples, first: _Record, again: _Record) -> str:
        known = self._graph.values[value]
        last = known.producer
        return (
            f"{self._suspects(again.task.pack, last)} not compute the same twice: value {value} "
            f"({known.name}, made by layer {last}, {self._graph.layers[last].name}) of samples "
            f"{samples[0]}:{samples[1]} had {first} in the forward, and {again} when it was "
            "recomputed for the backward, so that its gradients would be wrong. Nothing was "
            "updated. Likely causes: random numbers from a generator of its own (use the default "
            "ones), a counter or a cache in a closure or a global (keep it in an attribute or a "
            "buffer of the module), a custom kernel that gives other results each time"
        )

    def _suspects(self, pack: Pack, last: int) -> str:
        names = [self._graph.layers[index].name for index in pack if index <= last]
        if len(names) == 1:
            return f"layer {names[0]} does"
        shown = ", ".join(names if len(names) <= 8 else [*names[:4], "...", *names[-3:]])
        return f"one of the layers {shown} does"


class _Record:
    """The figures of one value, on the host once the device is done.

    Attributes:
        whole: whether they are of a whole microbatch.
    """

    def __init__(
        self, task: Task, tensor: torch.Tensor, figures: list[torch.Tensor], whole: bool
    ) -> None:
        self.task = task
        self.whole = whole
        self._figures = figures
        self._numel = tensor.numel()
        self._tolerance = _TOLERANCE.get(tensor.dtype, 0.0)

    def agrees(self, other: _Record, exact: bool) -> bool:
        """Whether two figures are the same, bit for bit or up to rounding."""
        pairs = list(zip(self._numbers(), other._numbers(), strict=True))
        if exact or len(pairs) < 2:
            return all(a == b or (a != a and b != b) for a, b in pairs)
        scale = max(abs(pairs[1][0]), abs(pairs[1][1]))
        # The norm bounds what a difference of that relative size can do to the sum.
        allowed = (self._tolerance * scale * math.sqrt(self._numel), self._tolerance * scale)
        return all(
            abs(a - b) <= most or a == b or (a != a and b != b)
            for (a, b), most in zip(pairs, allowed, strict=True)
        )

    def _numbers(self) -> list[float]:
        return [figure.item() for figure in self._figures]

    def __str__(self) -> str:
        names = zip(("sum", "norm"), self._numbers(), strict=False)
        return " and ".join(f"{name} {number:.9g}" for name, number in names)


def _figures(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return (tensor.sum(),)
    wide = torch.float32 if tensor.element_size() < 4 else tensor.dtype
    norm = torch.linalg.vector_norm(tensor, dtype=wide)
    return tensor.sum(dtype=wide), norm


def _samples(task: Task) -> Samples:
    assert task.samples is not None, "only tasks with a microbatch make values"
    return task.samples
