"""Notices when a part of a wrapped module is called by itself, and so computes past Harmony.

What it computes is right, gradients included, since the parameters live on the host; but nothing
of it is planned or runs on a GPU, which nobody should have to find out by the clock.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmony.core.files import PACKAGE
from harmony.core.warn import warn
from harmony.errors import HarmonyError

_inside = threading.local()
_TORCH = Path(torch.__file__).parent
_LIBRARIES = (str(_TORCH), str(PACKAGE))
_CALLS = (str(_TORCH / "nn"), __file__)
_EXPORTS = tuple(str(_TORCH / name) for name in ("jit", "onnx", "fx", "export", "_export"))


@contextmanager
def within(net: nn.Module) -> Iterator[None]:
    """Let parts of ``net`` be called: Harmony itself does, or a call has been noticed."""
    before = _running()
    _inside.nets = (*before, net)
    try:
        yield
    finally:
        _inside.nets = before


def runs(net: nn.Module) -> bool:
    """Whether ``net`` is being run on this thread, by Harmony or by itself."""
    return any(running is net for running in _running())


def _running() -> tuple[nn.Module, ...]:
    return getattr(_inside, "nets", ())


class Bypass:
    """Watches the parts of a module that have parameters, for as long as this object lives.

    Attributes:
        net: the module.
        is_over: whether it watches no longer.
    """

    def __init__(self, net: nn.Module, updates_itself: bool, casts: bool = False) -> None:
        """Watch ``net``.

        Args:
            casts: whether steps compute in another type than the parameters' own.
            updates_itself: whether steps set the gradients anew, so that those of a call by
                itself would be lost.
        """
        self.net = net
        self._updates_itself = updates_itself
        self._casts = casts
        self._has_warned: set[str] = set()
        self._generation = -1
        self.is_over = False
        self.watch(0)

    def watch(self, generation: int) -> None:
        """Watch all parts; nothing new is to be seen as long as ``generation`` is the same."""
        if generation == self._generation:
            return
        self._generation = generation
        for name, module in self.net.named_modules():
            watched = module._compiled_call_impl is None
            if watched and next(module.parameters(), None) is not None:
                # Not a hook: those are the user's, and are copied with the module.
                module.__dict__["_compiled_call_impl"] = _Watch(module, name, self)

    def noticed(self, name: str, module: nn.Module) -> None:
        """Say that a part is called by itself.

        Raises:
            HarmonyError: if gradients of it would be lost.
        """
        caller = _caller()
        if torch.compiler.is_compiling() or caller.startswith(_EXPORTS):
            return
        what = f"{type(self.net).__name__}.{name}" if name else "the wrapped module"
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        if self._updates_itself and trains:
            raise HarmonyError(
                f"{what} was called by itself, with gradients: it would compute on the CPU, past "
                "Harmony, and train_step would not know of its gradients. Call it under "
                "torch.no_grad() if you want its values only; to train by it, make it part of "
                "the module's forward"
            )
        if what in self._has_warned:
            return
        self._has_warned.add(what)
        where = "the CPU, in fp32" if self._casts else "the CPU"
        warn(
            f"{what} was called by itself, not through the Harmony model: it computes on {where}. "
            "Results are right, but this is not planned, and no GPU runs it. To have it run by "
            "Harmony, let the module's forward call it, chosen by an argument",
        )


class _Watch:
    """Stands in a module's place when it is called."""

    def __init__(self, module: nn.Module, name: str, owner: Bypass) -> None:
        self._module = weakref.ref(module)
        self._name = name
        self._owner = weakref.ref(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, owner = self._module(), self._owner()
        assert module is not None, "it is called by the module"
        if owner is None or owner.is_over:  # the Harmony model is gone
            module.__dict__.pop("_compiled_call_impl", None)
        elif not _running() and torch._C._current_graph_task_id() == -1:  # nor in a backward
            owner.noticed(self._name, module)
            with within(owner.net):
                return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the module is a module of its own."""

    def __reduce__(self) -> Any:
        return type(None), ()


def _caller() -> str:
    """Which file has called the module, if that is not the user's own code."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
        if not frame.f_code.co_filename.startswith(_CALLS):
            return frame.f_code.co_filename
    return ""
