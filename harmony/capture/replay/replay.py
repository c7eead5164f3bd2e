"""Runs steps of a trace again, on any device, with a shell's modules.

No patches, no global state: several threads replay at once, each with its own shell.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._device import _device_constructors

from harmony.capture.graph.saved_hooks import differentiating
from harmony.capture.graph.structure import flatten
from harmony.capture.graph.trace import (
    DEVICE,
    Constant,
    Context,
    LeftBehind,
    ModuleRef,
    StateRef,
    Step,
    StepKind,
    ValueRef,
    assign_buffer,
)
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.trace.isolation import is_machinery
from harmony.core.files import PACKAGE
from harmony.errors import CaptureError

Values = dict[int, torch.Tensor]
"""Tensors by their number on the trace."""

_MISSING = object()
# Factories that make their tensor on the default device unless told otherwise: in functional code
# they follow the inputs, so that a model written for one device runs on any.
FACTORIES = frozenset(function.__name__ for function in _device_constructors())
_ON_HOST = {"_pack_padded_sequence": 1}
"""Functions that want one of their arguments on the CPU, and its place."""


class GuardError(CaptureError):
    """The forward has read another value from a tensor, or got other results, than recorded.

    Attributes:
        where: file and line of the read.
    """

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


def run_step(step: Step, values: Values, shell: ModuleShell) -> None:
    """Run one step, adding what it makes to ``values``; guards are checked.

    Raises:
        GuardError: if a guard's read differs from the recorded one, or a call returns another
            number of tensors.
    """
    alone = bool(step.with_graph) and not torch.is_grad_enabled()
    args, kwargs = _arguments(step, values, shell, alone)
    target = step.target
    if isinstance(target, str):  # what a class's own ``__call__`` adds are steps by themselves
        target = partial(nn.Module.__call__, shell.modules[target])
    if step.differentiates:
        target = differentiating()(target)
    before_call = [_attribute(left, shell) for left in step.left_behind]
    if step.python_random is not None:
        step.python_random.restore()
    if target is assign_buffer:
        shell.put(step.changes[0], args[1])
        return
    context = step.context
    if alone:
        with surroundings(context, shell.device), torch.enable_grad():
            leaves, structure = flatten(target(*args, **kwargs))
        out = structure.unflatten(map(_without_graph, leaves))
    elif context.grad_enabled and context.autocast is None:
        out = target(*args, **kwargs)
    else:
        with surroundings(context, shell.device):
            out = target(*args, **kwargs)
    if step.kind is StepKind.GUARD:
        _check_guard(step, out)
        return
    for before, after in step.mutated:
        values[after] = values[before]
    _keep_outputs(step, out, values)
    for left, held in zip(step.left_behind, before_call, strict=True):
        values[left.value] = _take_back(left, held, shell)


def call_in_progress() -> str:
    """File and line of the user's call that this thread runs now; empty if it runs none."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is run_step.__code__:
            return str(frame.f_locals["step"].where)
        if not is_machinery(code.co_filename) and not code.co_filename.startswith(str(PACKAGE)):
            return f"{code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _arguments(
    step: Step, values: Values, shell: ModuleShell, alone: bool
) -> tuple[Any, dict[str, Any]]:
    leaves = [resolve(leaf, values, shell) for leaf in step.leaves]
    if alone:  # with a graph of its own
        leaves = [
            leaf.detach().requires_grad_() if learns and not leaf.requires_grad else leaf
            for leaf, learns in zip(leaves, step.with_graph, strict=True)
        ]
    args, kwargs = step.structure.call(leaves)
    if step.kind is StepKind.FUNCTION and step.name in FACTORIES and "device" not in kwargs:
        kwargs = {**kwargs, "device": shell.device}
    if step.name in _ON_HOST:  # an input that plain PyTorch's user leaves on the CPU
        place = _ON_HOST[step.name]
        args = (*args[:place], args[place].cpu(), *args[place + 1 :])
    return args, kwargs


def resolve(leaf: Any, values: Values, shell: ModuleShell) -> Any:
    """Return what a leaf of arguments stands for in a replay."""
    kind = type(leaf)
    if kind is ValueRef:
        return values[leaf.id]
    if kind is StateRef:
        return shell.tensor(leaf.name)
    if leaf is DEVICE:
        return shell.device
    if kind is Constant:
        return leaf.on(shell.device)
    if kind is ModuleRef:
        return shell.modules[leaf.name]
    return leaf


def _without_graph(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _keep_outputs(step: Step, out: Any, values: Values) -> None:
    numbers = step.outputs
    leaves = (out,) if isinstance(out, torch.Tensor) else flatten(out)[0]
    if len(leaves) != len(numbers):
        raise GuardError(
            f"{step.name} at {step.where} returned {len(leaves)} values, {len(numbers)} when it "
            "was captured",
            step.where,
        )
    for leaf, number in zip(leaves, numbers, strict=True):
        if number is not None:
            values[number] = leaf


def _attribute(left: LeftBehind, shell: ModuleShell) -> Any:
    return shell.modules[left.module].__dict__.get(left.attribute, _MISSING)


def _take_back(left: LeftBehind, held: Any, shell: ModuleShell) -> torch.Tensor:
    """Return a tensor left on an attribute, and clear that: it would keep its graph alive."""
    attributes = shell.modules[left.module].__dict__
    tensor: torch.Tensor = attributes.pop(left.attribute)
    if held is not _MISSING:
        attributes[left.attribute] = held
    return tensor


def surroundings(context: Context, device: torch.device) -> ExitStack:
    """Return what a call has to run in.

    Raises:
        CaptureError: if the device has no autocast, and it had been recorded under one.
    """
    stack = ExitStack()
    if not context.grad_enabled:
        stack.enter_context(torch.no_grad())
    if context.autocast is not None:
        if not torch.amp.is_autocast_available(device.type):
            raise CaptureError(f"the forward uses autocast, which {device.type} does not have")
        stack.enter_context(torch.autocast(device.type, dtype=context.autocast))
    return stack


def _check_guard(step: Step, found: Any) -> None:
    same = found is step.expected or equal(found, step.expected)
    if not same:
        raise GuardError(
            f"the forward reads a tensor ({step.name}) at {step.where}: it gave {step.expected!r} "
            f"when the model was captured, now it gives {found!r}",
            step.where,
        )


def equal(left: Any, right: Any) -> bool:
    """Whether two things that Python has read are equal; NaN equals NaN."""
    same = left == right
    if hasattr(same, "all"):
        return bool(same.all())
    return bool(same) or (left != left and right != right)
