"""Decides what becomes of a call while a forward is recorded: a step, an opened module, neither.

Below this come the steps themselves (`harmony.capture.trace.record`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointFunction

from harmony.capture.graph.structure import tensors_in
from harmony.capture.guards.checkpoints import checkpointed
from harmony.capture.guards.custom_backward import check_custom_backward
from harmony.capture.guards.observe import heard, unheard
from harmony.capture.trace.graph_changes import CHANGES_GRAPH, check_graph_change
from harmony.capture.trace.isolation import user_frame
from harmony.capture.trace.kernels import KernelWatch, Noticed
from harmony.capture.trace.leaf_watch import LeafCall, LeafMustOpenError
from harmony.capture.trace.references import References
from harmony.capture.trace.refuse import UnrecordableError, check_custom, in_transform
from harmony.capture.trace.transforms import MappedCall


class CallHandler(TorchFunctionMode):
    """Sees the calls of one thread; what runs inside of a step, or of a leaf module, is its."""

    def __init__(self, leaves: set[str], references: References, kernels: KernelWatch) -> None:
        super().__init__()
        self._leaves = leaves
        self._references = references
        self._kernels = kernels
        self._thread = threading.get_ident()
        self._busy = False  # inside of a step
        self._handling = False
        self._leaf: LeafCall | None = None
        self._unseen: str | None = None
        kernels.on_kernel = self._notice_kernel

    def _call_function(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function of functional code as a step."""
        raise NotImplementedError

    def _call_leaf(
        self, module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Call a leaf module as a step."""
        raise NotImplementedError

    def _is_parameter(self, tensor: Any) -> bool:
        return id(tensor) in self._references.state

    def _is_input(self, tensor: Any) -> bool:
        return False

    def _elsewhere(self) -> bool:
        """Whether what is called now is no concern of the recording's."""
        return threading.get_ident() != self._thread or self._busy or self._leaf is not None

    @unheard
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if threading.get_ident() != self._thread or self._busy:
            return heard(func, *args, **kwargs)
        if func in CHANGES_GRAPH:
            check_graph_change(func, args, kwargs, self._is_parameter, self._is_input)
        if self._leaf is not None:
            return self._leaf.call(func, args, kwargs)
        name = getattr(func, "__name__", str(func))
        return self._handle(lambda: self._call_function(func, name, args, kwargs))

    @unheard
    def call_module(
        self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Handle a call of a module: a leaf becomes a step, another one is opened."""
        module = self._references.own_module(module)
        name = self._references.module_names.get(id(module))
        if name is None or self._elsewhere():
            return heard(call, module, *args, **kwargs)
        if name not in self._leaves:
            return self._call_opened(module, name, call, args, kwargs)
        with torch._C.DisableTorchFunction():  # no detour through this mode for what we look at
            return self._handle(lambda: self._call_leaf(module, name, call, args, kwargs))

    def _call_opened(
        self, module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Call a module whose forward is recorded; what cannot be is said to be inside it."""
        try:
            self._check_unseen()  # of the caller's
            try:
                return heard(call, module, *args, **kwargs)
            finally:
                self._check_unseen()
        except (UnrecordableError, LeafMustOpenError) as error:
            if error.inside is None:
                error.inside = name
            raise

    def _handle(self, call: Callable[[], Any]) -> Any:
        """Run what this mode was called for; kernels outside of that are nobody's."""
        self._check_unseen()
        before, self._handling = self._handling, True
        try:
            return call()
        finally:
            self._handling = before

    def _notice_kernel(self, name: str, args: Any) -> None:
        """A kernel runs: below autograd, if no function that this mode sees has led to it.

        One that gets nothing of the forward only makes a constant.
        """
        if self._handling or self._unseen is not None:
            return
        known = self._references
        if any(id(t) in known.numbers or id(t) in known.state for t in tensors_in(args)):
            self._unseen = f"{name} at {user_frame()}"

    def _check_unseen(self) -> None:
        if self._unseen is not None:
            seen, self._unseen = self._unseen, None
            raise UnrecordableError(
                f"{seen} is called from below PyTorch's Python functions (by a C++ extension, for "
                "instance), where a recording does not see it: call it inside a module that is "
                "recorded as a layer"
            )

    @unheard
    def call_custom(self, function: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle ``apply`` of a custom ``autograd.Function``: a step, in functional code."""
        if threading.get_ident() == self._thread:
            check_custom_backward(function)
        if self._elsewhere():
            with checkpointed(args[1]) if function is CheckpointFunction else nullcontext():
                return heard(apply, *args, **kwargs)
        name = f"{function.__name__}.apply"
        check_custom(name, args)
        return self._handle(lambda: self._call_function(apply, name, args, kwargs))

    @unheard
    def call_script(self, script: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle a TorchScript function, which no mode sees inside: a step, in functional code."""
        if self._elsewhere():
            return heard(call, script, *args, **kwargs)
        return self._handle(lambda: self._call_function(script, script.name, args, kwargs))

    @unheard
    def call_vmap(self, function: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle a call of a function mapped by ``torch.vmap``: a step, in functional code."""
        if self._elsewhere() or in_transform():
            return heard(call, function, *args, **kwargs)
        modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        mapped = MappedCall(call, function, modes[modes.index(self) + 1 :])
        given = (mapped.captured, *args)
        return self._handle(lambda: self._call_function(mapped, "vmap", given, kwargs))

    def _opaque(self, call: Callable[[], Any]) -> tuple[Any, Noticed]:
        """Run without recording; tell what the kernels did."""
        self._busy = True
        self._kernels.take()
        try:
            return call(), self._kernels.take()
        finally:
            self._busy = False
