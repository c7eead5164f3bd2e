"""Hooks on what autograd saves, put aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_hooks = torch._C._autograd


@contextmanager
def hooks_aside() -> Iterator[None]:
    """Let autograd save tensors as if this thread had no hooks for them, until the block ends.

    A forward that computes a gradient reads what it has just saved, and `torch.func` refuses to
    run under hooks.
    """
    held = []
    while (top := _hooks._top_saved_tensors_default_hooks(False)) is not None:
        _hooks._pop_saved_tensors_default_hooks()
        held.append(top)
    try:
        yield
    finally:
        for pack, unpack in reversed(held):
            _hooks._push_saved_tensors_default_hooks(pack, unpack)


@contextmanager
def differentiating() -> Iterator[None]:
    """Run a call that computes gradients of its own as plain PyTorch does on the CPU.

    Its backward stays in this thread: autograd adds gradients in the order in which their nodes
    were made, and counts those in each thread.
    """
    with hooks_aside(), torch.autograd.set_multithreading_enabled(False):
        yield


@contextmanager
def transforms_allowed() -> Iterator[None]:
    """Let the block compute gradients; what `torch.func` does runs without the hooks around it."""
    graph: Any = torch.autograd.graph
    plain = graph.disable_saved_tensors_hooks

    @contextmanager
    def without_hooks(message: str) -> Iterator[None]:
        with hooks_aside(), plain(message):
            yield

    graph.disable_saved_tensors_hooks = without_hooks
    try:
        with torch.autograd.set_multithreading_enabled(False):  # as in `differentiating`
            yield
    finally:
        graph.disable_saved_tensors_hooks = plain
