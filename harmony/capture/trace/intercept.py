"""Hands calls of modules, custom functions, TorchScript and vmap to a mode while it is on.

No mode of PyTorch's sees these as what they are, so their methods are replaced meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._functorch import apis as _apis
from torch.amp.autocast_mode import autocast


@contextmanager
def recording(recorder: Any) -> Iterator[None]:
    """Let a mode, such as the recorder, handle the calls of modules and custom functions."""
    call = nn.Module.__call__
    apply = torch.autograd.Function.__dict__["apply"]
    scripted = torch.jit.ScriptFunction.__call__
    apis: Any = _apis
    vmap = apis.vmap_impl

    def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_module(module, call, args, kwargs)

    def call_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_custom(cls, apply.__get__(None, cls), args, kwargs)

    def call_script(script: Any, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_script(script, scripted, args, kwargs)

    def call_vmap(function: Any, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_vmap(function, vmap, args, kwargs)

    setattr(nn.Module, "__call__", call_module)  # noqa: B010
    setattr(torch.autograd.Function, "apply", classmethod(call_apply))  # noqa: B010
    setattr(torch.jit.ScriptFunction, "__call__", call_script)  # noqa: B010
    apis.vmap_impl = call_vmap
    try:
        with _autocast_on_both(), recorder:
            yield
    finally:
        setattr(nn.Module, "__call__", call)  # noqa: B010
        setattr(torch.autograd.Function, "apply", apply)  # noqa: B010
        setattr(torch.jit.ScriptFunction, "__call__", scripted)  # noqa: B010
        apis.vmap_impl = vmap


@contextmanager
def _autocast_on_both() -> Iterator[None]:
    """Let autocast for the CPU or the accelerator be on, or off, for both in the block.

    A forward that was written for one of them runs on the other.
    """
    accelerator = torch.accelerator.current_accelerator()
    there = "cpu" if accelerator is None else accelerator.type
    other = {"cpu": there, there: "cpu"} if there != "cpu" else {}
    enter, leave = autocast.__enter__, autocast.__exit__

    def enter_both(self: Any) -> Any:
        if self.device in other:
            twin = autocast(other[self.device], dtype=self.fast_dtype, enabled=self._enabled)
            self.__dict__["_other"] = twin
            enter(twin)  # type: ignore[no-untyped-call]
        return enter(self)  # type: ignore[no-untyped-call]

    def leave_both(self: Any, *error: Any) -> Any:
        left = leave(self, *error)
        twin = self.__dict__.pop("_other", None)
        if twin is not None:
            leave(twin, *error)
        return left

    setattr(autocast, "__enter__", enter_both)  # noqa: B010
    setattr(autocast, "__exit__", leave_both)  # noqa: B010
    try:
        yield
    finally:
        setattr(autocast, "__enter__", enter)  # noqa: B010
        setattr(autocast, "__exit__", leave)  # noqa: B010
