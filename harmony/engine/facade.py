"""What a wrapped module shows of the module inside: its names, its state, its modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from harmony.core.warn import warn
from harmony.engine.bypass import Bypass
from harmony.engine.engine import Engine
from harmony.errors import HarmonyError
from harmony.runtime.interrupts import held_back
from harmony.weights.meta_init import make_room

Self = TypeVar("Self", bound="Wrapper")


class Wrapper(nn.Module):
    """A module in front of another, whose names are seen without a prefix."""

    _net: nn.Module
    _engine: Engine
    _bypass: Bypass

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the modules of the wrapped one."""
        yield from self._net.named_modules(memo, prefix, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the children of the wrapped module."""
        return self._net.named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the wrapped module's state, as plain PyTorch names it."""
        return self._net.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state of the wrapped module, as PyTorch does."""
        if not assign:
            make_room(self._net, state_dict)
        with held_back():
            result = self._net.load_state_dict(state_dict, strict=strict, assign=assign)
            self._engine.restored(getattr(result, "missing_keys", ()))
        return result

    def train(self: Self, mode: bool = True) -> Self:
        """Set training or evaluation mode, here and in the wrapped module."""
        self.training = mode
        self._net.train(mode)
        return self

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Freeze or unfreeze all parameters."""
        self._net.requires_grad_(requires_grad)
        return self

    def __getattr__(self, name: str) -> Any:
        net = self.__dict__.get("_net")
        if net is None:
            raise AttributeError(name)
        if name == "generate" and hasattr(net, name):
            return self._engine.generate
        return getattr(net, name)

    def extra_repr(self) -> str:
        """Show the wrapped module's class."""
        return type(self._net).__name__

    def __repr__(self) -> str:
        return f"Harmony({self._net!r})"

    def __copy__(self) -> Any:
        raise HarmonyError(
            "copy.copy of a Harmony model would be two models with the same parameters. "
            "copy.deepcopy(model) makes one of its own"
        )

    def __getstate__(self) -> Any:
        raise HarmonyError(
            "a Harmony model cannot be pickled. Save model.state_dict() with torch.save"
        )

    def _apply(
        self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> Self:
        """Do what PyTorch does, but for moves: Harmony moves parameters by itself."""
        tensors = (*self._net.parameters(), *self._net.buffers())
        found = {t.dtype: fn(torch.empty(0, dtype=t.dtype)) for t in tensors}
        devices = {made.device for made in found.values() if made.device.type != "cpu"}
        if devices:
            warn(
                f"parameters of a Harmony model stay on the host; .to({min(map(str, devices))}) "
                "moves nothing",
            )
            dtypes = {dtype: made.dtype for dtype, made in found.items()}
            fn = lambda tensor: tensor.to(dtypes[tensor.dtype])  # noqa: E731
        self._net._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
