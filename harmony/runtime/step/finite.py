"""Losses and gradients that are not finite: heard before an update, and where they come from.

The check looks at losses and gradients on the host. Only where it finds something the step is
repeated, and looked at operation by operation.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from harmony.capture.graph.trace import Step
from harmony.core.layergraph import LayerGraph
from harmony.errors import NonFiniteError
from harmony.planner.ir.tasks import Samples, Task
from harmony.runtime import native

_FORWARD, _INPUT, _BACKWARD = range(3)
"""Where something was found, in the order of what explains most."""


def check_finite(
    losses: Iterable[tuple[Samples, torch.Tensor]], params: Mapping[str, torch.Tensor]
) -> None:
    """Refuse losses of microbatches, and gradients on the host, that are not finite.

    Raises:
        NonFiniteError: naming the first.
    """
    for (low, high), loss in losses:
        if not bool(loss.isfinite().all()):
            raise NonFiniteError(f"the loss of samples {low}:{high} is {loss.tolist()}")
    gradients = {n: p.grad for n, p in params.items() if p.grad is not None}
    found = first_not_finite(gradients)
    if found is not None:
        raise NonFiniteError(f"the gradient of {found} is not finite")


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor on the host that is not finite; None if all are."""
    for name, tensor in tensors.items():
        native.trace_host_access("detect_nonfinite", tensor, write=False)
        # One sum is a look at all; that of large finite numbers may be infinite, too.
        if not _sum_is_finite(tensor) and not bool(tensor.isfinite().all()):
            return name
    return None


class FirstBad:
    """Looks at all that the operations of one step make, forward and backward."""

    def __init__(self, graph: LayerGraph) -> None:
        self._graph = graph
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._notes: list[tuple[tuple[int, Samples, int], str]] = []

    def run_of(self, task: Task) -> RunLook:
        """Return what looks at the run of a task."""
        assert task.samples is not None, "only tasks with a microbatch compute"
        return RunLook(self._note, self._graph, task.samples)

    @property
    def in_forward(self) -> bool:
        """Whether a value is not finite, and not only gradients."""
        return any(kind < _BACKWARD for (kind, _, _), _ in self._notes)

    def found(self) -> str | None:
        """Say what made the first value, or else the first gradient, that is not finite."""
        return min(self._notes)[1] if self._notes else None

    def _note(self, kind: int, samples: Samples, text: str) -> None:
        with self._lock:
            self._notes.append(((kind, samples, next(self._order)), text))


class RunLook:
    """Looks at one run of a pack.

    Minus infinity is left alone in a forward: masks are made of it.
    """

    def __init__(
        self, note: Callable[[int, Samples, str], None], graph: LayerGraph, samples: Samples
    ) -> None:
        self._note, self._graph, self._samples = note, graph, samples
        self._bad: set[int] = set()

    def begin(self, values: Mapping[int, torch.Tensor]) -> None:
        """Look at what the pack reads."""
        self._bad = {number for number, tensor in values.items() if _is_bad(tensor)}
        for number in sorted(self._bad.intersection(self._graph.input_ids)):
            low, high = self._samples
            name = self._graph.values[number].name
            said = f"the input {name} is not finite itself, in samples {low}:{high}"
            self._note(_INPUT, self._samples, said)

    def after(self, layer: int, step: Step, made: Mapping[int, torch.Tensor]) -> None:
        """Look at what an operation has made, and have its backward looked at."""
        name, where = step.name, self._graph.layers[layer].name
        text = f"{name} ({step.where}), in layer {layer} ({where})"
        got_bad = any(number in self._bad for number in step.inputs)
        for number, tensor in made.items():
            if _is_bad(tensor):
                self._bad.add(number)
                if not got_bad:
                    low, high = self._samples
                    said = f"made first by {text}, in the forward of samples {low}:{high}"
                    self._note(_FORWARD, self._samples, said)
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_hook(self._look_at_backward(text))

    def _look_at_backward(self, text: str) -> Callable[[Any, Any], None]:
        def look(made: Any, came: Any) -> None:
            low, high = self._samples
            if any(t is not None and not _sum_is_finite(t) for t in came):
                said = f"first in the backward of what reads the result of {text}"
            elif any(t is not None and not _sum_is_finite(t) for t in made):
                said = f"made first by the backward of {text}"
            else:
                return
            self._note(_BACKWARD, self._samples, f"{said}, of samples {low}:{high}")

        return look


def _is_bad(tensor: torch.Tensor) -> bool:
    found = _sum(tensor)
    return math.isnan(found) or found == math.inf


def _sum_is_finite(tensor: torch.Tensor) -> bool:
    return math.isfinite(_sum(tensor))


def _sum(tensor: torch.Tensor) -> float:
    """The sum of all entries, which needs no memory; 0 for types that are always finite."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        return 0.0
    wide = torch.float32 if tensor.element_size() < 4 else tensor.dtype
    return float(tensor.sum(dtype=wide))
