"""Runs a module on a device as it is, with parameters that come when they are needed.

Nothing is recorded or planned, so anything may happen in the forward: caches that grow, shapes
that change with each call. The device needs the memory of one leaf module and of the values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from harmony.capture.eager.lender import Lender
from harmony.capture.graph.structure import flatten
from harmony.capture.replay.replay import FACTORIES
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.trace.intercept import recording
from harmony.capture.trace.leaves import choose_leaves


class StreamedModule:
    """A module whose forward runs on a device while its parameters stay on the host."""

    def __init__(
        self, module: nn.Module, device: torch.device, param_dtype: torch.dtype | None = None
    ) -> None:
        """Run on ``device``; ``param_dtype`` as for a `ModuleShell`."""
        self._module = module
        self._device = device
        self._twin = ModuleShell(module, device, param_dtype)
        self._leaves = choose_leaves(self._twin.root)
        buffers = {name: buffer.to(device) for name, buffer in module.named_buffers()}
        self._twin.bind(buffers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward without gradients; tensors come back on the device of the first input.

        What is no tensor (a cache, for instance) is handed to the module as it is.
        """
        leaves, structure = flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        home = tensors[0].device if tensors else torch.device("cpu")
        args, kwargs = structure.unflatten([_moved(leaf, self._device) for leaf in leaves])
        streaming = _Streaming(self._module, self._twin, self._leaves)
        with torch.no_grad(), recording(streaming):
            out = self._twin.root(*args, **kwargs)
        self._keep_buffers()
        made, structure = flatten(out)
        return structure.unflatten([_moved(leaf, home) for leaf in made])

    def _keep_buffers(self) -> None:
        for name, buffer in self._module.named_buffers():
            now = self._twin.root.get_buffer(name)
            if buffer.shape == now.shape and not torch.equal(buffer, now.cpu()):
                buffer.copy_(now)


class _Streaming(TorchFunctionMode):
    """Lends parameters to whoever needs them."""

    def __init__(self, source: nn.Module, twin: ModuleShell, leaves: set[str]) -> None:
        super().__init__()
        self._lender = Lender(source, twin)
        twin.bind(self._lender.fakes)
        self._device = twin.device
        self._leaf_ids = {id(twin.modules[name]) for name in leaves}
        self._thread = threading.get_ident()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if threading.get_ident() != self._thread:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in FACTORIES and "device" not in kwargs:
            kwargs = {**kwargs, "device": self._device}
        with self._lender.among(args, kwargs) as (args, kwargs, real):
            return self._lender.handed_on(func(*args, **kwargs), real)

    def call_module(
        self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Handle a call of a module: a leaf gets its parameters."""
        if threading.get_ident() != self._thread or id(module) not in self._leaf_ids:
            return call(module, *args, **kwargs)
        with self._lender.lent(self._lender.names_in(module)) as real:
            return self._lender.handed_on(call(module, *args, **kwargs), real)

    def call_custom(self, function: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle ``apply`` of a custom ``autograd.Function``: nothing special."""
        return apply(*args, **kwargs)

    def call_script(self, script: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle a TorchScript function, which this mode does not see inside."""
        with self._lender.among(args, kwargs) as (args, kwargs, _):
            return call(script, *args, **kwargs)

    def call_vmap(self, function: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle ``torch.vmap``: nothing special."""
        return call(function, *args, **kwargs)


def _moved(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf
