"""Signatures of layers: equal for layers that do the same work on other weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harmony.capture.graph.trace import Constant, ModuleRef, StateRef, Step, Trace, ValueRef
from harmony.capture.replay.shell import ModuleShell, plain_tensors

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Blocks of a model are told their position, which would make each of them unique.
_POSITION = re.compile(r"(^|_)(idx|index|layer_id|layer_number|block_id|block_number)$")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size)


def layer_signature(
    steps: Sequence[Step], trace: Trace, shell: ModuleShell, crossing: Container[int]
) -> str:
    """Return a text that is equal for layers of equal work.

    It covers the classes and plain attributes of modules, the shapes and types of parameters and
    inputs, which of them require gradients, and all other arguments; names and values of
    parameters do not enter.

    Args:
        crossing: numbers of the values that cross layers.
    """
    numbers: dict[Any, int] = {}
    lines = [line for step in steps for line in _describe(step, trace, shell, numbers)]
    made = (number for step in steps for number in step.made)
    lines.append(f"hands on {[numbers[number] for number in made if number in crossing]}")
    digest = hashlib.sha1("\n".join(lines).encode()).hexdigest()[:12]
    modules = [step for step in steps if isinstance(step.target, str)]
    anchor = max(modules, key=lambda step: _size(step, shell), default=steps[0])
    kind = anchor.name
    if isinstance(anchor.target, str):
        kind = type(shell.modules[anchor.target]).__name__
    return f"{kind}:{digest}"


def _describe(
    step: Step, trace: Trace, shell: ModuleShell, numbers: dict[Any, int]
) -> Iterator[str]:
    target = step.target
    yield f"{step.kind.value} {step.context} {step.structure.spec} {step.random}"
    if isinstance(target, str):
        yield from _describe_module(shell.modules[target])
    else:
        yield f"{step.name} {getattr(target, '__qualname__', '')}"
    for leaf in step.leaves:
        yield _describe_leaf(leaf, trace, shell, numbers)
    for number in step.made:
        yield f"makes %{numbers.setdefault(number, len(numbers))}"


def _describe_leaf(leaf: Any, trace: Trace, shell: ModuleShell, numbers: dict[Any, int]) -> str:
    if isinstance(leaf, ValueRef):
        value = trace.values[leaf.id]
        number = numbers.setdefault(leaf.id, len(numbers))
        return f"%{number} {value.shape} {value.stride} {value.dtype} {value.requires_grad}"
    if isinstance(leaf, StateRef):
        number = numbers.setdefault(leaf.name, len(numbers))
        return f"@{number} {_describe_tensor(shell.placeholder(leaf.name))}"
    if isinstance(leaf, Constant):
        return f"constant {_describe_tensor(leaf.tensor)}"
    if isinstance(leaf, ModuleRef):
        return "\n".join(_describe_module(shell.modules[leaf.name]))
    return f"{type(leaf).__name__} {_ADDRESS.sub('', repr(leaf))}"


def _describe_module(module: nn.Module) -> Iterator[str]:
    for name, inner in module.named_modules():
        yield f"{name}: {type(inner).__module__}.{type(inner).__qualname__} {inner.extra_repr()}"
        for attribute, held in sorted(inner.__dict__.items()):
            if _is_plain(held) and not _POSITION.search(attribute):
                yield f"{attribute}={held}"
        hooks = (inner._forward_hooks, inner._forward_pre_hooks)
        yield f"hooks {[len(registered) for registered in hooks]}"
        tensors: list[Mapping[str, Any]] = [inner._parameters, inner._buffers]
        tensors.append(dict(plain_tensors(inner)))
        for group in tensors:
            for attribute, tensor in group.items():
                yield f"{attribute} {'none' if tensor is None else _describe_tensor(tensor)}"


def _describe_tensor(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"


def _is_plain(held: Any) -> bool:
    if isinstance(held, (tuple, list)):
        return all(map(_is_plain, held))
    return isinstance(held, _PLAIN)


def _size(step: Step, shell: ModuleShell) -> int:
    return sum(shell.placeholder(name).numel() for name in step.state)
