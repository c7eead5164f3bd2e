"""Chooses the leaf modules: what is recorded as one opaque step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm

_SCRIPTED: Any = torch.jit.ScriptModule
_PRIMITIVES = (OptimizedModule, _SCRIPTED, nn.RNNBase, nn.MultiheadAttention, _BatchNorm)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LARGE_SHARE = 1 / 8


def choose_leaves(root: nn.Module, max_layer_nbytes: int | None = None) -> set[str]:
    """Return the names of the leaf modules.

    A leaf is a *block* (a module with children whose class repeats inside a ``Sequential``, or
    that sits in a ``ModuleList``), or a module outside of blocks that is simple or small. A block
    is opened if it is larger than ``max_layer_nbytes``, or if it is a stage: a large part of the
    model that consists of blocks itself. The root is opened if it has children.
    """
    rule = _Rule(root, max_layer_nbytes)
    names = {id(module): name for name, module in root.named_modules()}
    if not list(root.children()) or isinstance(root, torch.jit.ScriptModule):
        return {""}
    return {names[id(leaf)] for child in root.children() for leaf in rule.leaves(child)}


def open_leaf(root: nn.Module, name: str) -> set[str] | None:
    """Return what takes the place of a leaf that must be opened; None if it cannot be."""
    leaf = root.get_submodule(name)
    if isinstance(leaf, _PRIMITIVES) or not list(leaf.children()):
        return None
    names = {id(module): name for name, module in root.named_modules()}
    return {names[id(inner)] for child in leaf.children() for inner in _callable_parts(child)}


def nbytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(param.numel() * param.element_size() for param in module.parameters())


class _Rule:
    """The choice, for one model."""

    def __init__(self, root: nn.Module, max_layer_nbytes: int | None) -> None:
        self._max_nbytes = max_layer_nbytes
        self._large_nbytes = nbytes_of(root) * _LARGE_SHARE
        self._blocks = {id(block) for block in _blocks(root)}

    def leaves(self, module: nn.Module) -> Iterator[nn.Module]:
        if self._is_leaf(module):
            yield module
            return
        for child in module.children():
            yield from self.leaves(child)

    def _is_leaf(self, module: nn.Module) -> bool:
        if not _has_forward(module):
            return False
        if isinstance(module, _PRIMITIVES) or not list(module.children()):
            return True
        size = nbytes_of(module)
        if self._max_nbytes is not None and size > self._max_nbytes:
            return False
        if id(module) in self._blocks:
            return not (self._contains_blocks(module) and size > self._large_nbytes)
        return not self._contains_blocks(module) and size <= self._large_nbytes

    def _contains_blocks(self, module: nn.Module) -> bool:
        inner = (child for child in module.modules() if child is not module)
        return any(id(child) in self._blocks for child in inner)


def _blocks(root: nn.Module) -> Iterator[nn.Module]:
    """Modules with children that repeat in a container."""
    for container in root.modules():
        if not isinstance(container, _CONTAINERS):
            continue
        composite = [c for c in container.children() if _has_forward(c) and list(c.children())]
        classes = [type(child) for child in composite]
        for child in composite:
            listed = not isinstance(container, nn.Sequential)
            if listed or classes.count(type(child)) > 1:
                yield child


def _has_forward(module: nn.Module) -> bool:
    """Whether it can be called: a ``ModuleList`` cannot."""
    own = inspect.getattr_static(type(module), "forward", None)  # of a script it is a property
    inherited = own is nn.Module.forward
    return not inherited or "forward" in module.__dict__


def _callable_parts(module: nn.Module) -> Iterator[nn.Module]:
    if _has_forward(module):
        yield module
        return
    for child in module.children():
        yield from _callable_parts(child)
