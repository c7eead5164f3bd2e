"""What is changed inside of `torch.utils.checkpoint`, which plain PyTorch runs once more.

Its backward runs the checkpointed function again: running statistics move twice, counters count
twice. Harmony recomputes by its own plan, without a second effect, so such a function is refused.
So is one that draws random numbers and is not to find the same ones again: plain PyTorch takes the
gradients of other numbers than those of its loss.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harmony.capture.graph.params import version_of
from harmony.capture.state.python_state import PlainState
from harmony.capture.trace.isolation import user_frame
from harmony.capture.trace.kernels import draws
from harmony.errors import ConfigError

Changes = Callable[[], Iterable[str]]
"""Names what has been changed outside of the model so far."""

_watched = threading.local()


class CheckpointWatch:
    """Compares a model before and after each checkpointed function."""

    def __init__(self, modules: Iterable[nn.Module], outside: Changes) -> None:
        self._modules = list(modules)
        self._outside = outside

    @contextmanager
    def around(self, preserve_rng_state: bool) -> Iterator[None]:
        """Refuse the function that runs in the block if running it again does something else.

        Raises:
            ConfigError: naming what it changes or draws, and the line of the call.
        """
        where = user_frame()
        plain, buffers, outside = PlainState(self._modules), self._buffers(), set(self._outside())
        with nullcontext() if preserve_rng_state else _NothingDrawn(where):
            yield
        now = self._buffers()
        changed = [f"the buffer {key[1]}" for key in now if now[key] != buffers.get(key)]
        changed += [f"the attribute {name}" for _, name in plain.changes()]
        changed += [f"the attribute {name}" for name in plain.grown()]
        changed += [name for name in self._outside() if name not in outside]
        if changed:
            raise ConfigError(
                f"torch.utils.checkpoint at {where} runs a function that changes {changed[0]}. "
                "Plain PyTorch runs it once more in the backward, and changes it twice; Harmony "
                "recomputes layers without that. Switch checkpointing off (Harmony decides itself "
                "what is recomputed), or keep the change out of the checkpointed function"
            )

    def _buffers(self) -> dict[tuple[int, str], tuple[int, int]]:
        return {
            (id(module), name): (id(buffer), version_of(buffer))
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        }


@contextmanager
def checkpoints_watched(watch: CheckpointWatch) -> Iterator[None]:
    """Let a watch see the checkpointed functions of this thread inside the block."""
    before = getattr(_watched, "watch", None)
    _watched.watch = watch
    try:
        yield
    finally:
        _watched.watch = before


class _NothingDrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses kernels that draw random numbers."""

    def __init__(self, where: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws(func, args, kwargs):
            raise ConfigError(
                f"torch.utils.checkpoint at {self._where} runs a function that draws random "
                f"numbers ({func._schema.name}) with preserve_rng_state=False. Plain PyTorch "
                "draws others in the backward than in the forward, so that its gradients are not "
                "those of its loss; Harmony draws the same. Pass preserve_rng_state=True, or "
                "switch checkpointing off (Harmony decides itself what is recomputed)"
            )
        return func(*args, **kwargs)


@contextmanager
def checkpointed(preserve_rng_state: bool) -> Iterator[None]:
    """A checkpointed function runs in the block."""
    watch: CheckpointWatch | None = getattr(_watched, "watch", None)
    if watch is None or not torch.is_grad_enabled():
        yield
        return
    with watch.around(preserve_rng_state):
        yield
