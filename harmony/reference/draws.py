"""Random numbers that microbatches drew, drawn again by the whole batch in one forward.

A batch that runs in microbatches draws other random numbers than one that runs at once, so their
results cannot be compared. Here the microbatches' draws are recorded, and the whole batch gets
them, put together along the dimension that counts samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_IN_PLACE = (
    "bernoulli_",
    "normal_",
    "uniform_",
    "random_",
    "exponential_",
    "geometric_",
    "cauchy_",
    "log_normal_",
)
_NEW = (
    "bernoulli",
    "rand",
    "randn",
    "randint",
    "rand_like",
    "randn_like",
    "randint_like",
    "normal",
    "poisson",
    "multinomial",
)


def drawn_state(device: torch.device) -> torch.Tensor:
    """Return the states of the CPU's generator and of the device's: equal if nothing was drawn."""
    state = torch.get_rng_state()
    if device.type == "cpu":
        return state
    return torch.cat([state, torch.get_device_module(device).get_rng_state(device)])


class CannotJoinError(Exception):
    """The draws of the microbatches are none of a whole batch: what was drawn, in words."""


class DrawRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is drawn, microbatch by microbatch.

    Attributes:
        device: where the microbatches run.
        drawn: per microbatch what was drawn, in order: name of the operator and values.
        odd: an operator whose draws cannot be told from what it computes; None if there is none.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.drawn: list[list[tuple[str, torch.Tensor]]] = []
        self.odd: str | None = None

    def begin(self) -> None:
        """The next microbatch."""
        self.drawn.append([])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it draws."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        name, before = func.overloadpacket.__name__, drawn_state(self.device)
        result = func(*args, **(kwargs or {}))
        if name in _IN_PLACE or name in _NEW:
            self.drawn[-1].append((name, result.detach().clone()))
        elif not torch.equal(
            before, drawn_state(self.device)
        ):  # attention without dropout is none
            self.odd = name
        return result


class DrawPlayer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets the whole batch draw what its microbatches drew."""

    def __init__(self, recorder: DrawRecorder) -> None:
        """Take what was recorded.

        Raises:
            CannotJoinError: if the microbatches drew other things, or nothing that can be joined.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        if recorder.odd is not None:
            raise CannotJoinError(f"{recorder.odd} draws and computes in one")
        kinds = [[name for name, _ in drawn] for drawn in recorder.drawn]
        if any(kind != kinds[0] for kind in kinds):
            raise CannotJoinError("they drew from other operators")
        self._queue = [
            (kinds[0][index], [drawn[index][1] for drawn in recorder.drawn])
            for index in range(len(kinds[0]))
        ]
        self._next = 0

    def finish(self) -> None:
        """Make sure that everything was drawn.

        Raises:
            CannotJoinError: if not: the whole batch went another way.
        """
        if self._next != len(self._queue):
            raise CannotJoinError("the whole batch draws less often")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or give what was drawn instead."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _IN_PLACE and name not in _NEW:
            return func(*args, **(kwargs or {}))
        if self._next >= len(self._queue) or self._queue[self._next][0] != name:
            raise CannotJoinError(f"the whole batch draws {name} where they did not")
        chunks = self._queue[self._next][1]
        self._next += 1
        shape = args[0].shape if name in _IN_PLACE else func(*args, **(kwargs or {})).shape
        joined = _joined(chunks, tuple(shape), name)
        return args[0].copy_(joined) if name in _IN_PLACE else joined.clone()


def _joined(chunks: Sequence[torch.Tensor], shape: tuple[int, ...], name: str) -> torch.Tensor:
    for dim in range(len(shape)):
        others = {(*c.shape[:dim], *c.shape[dim + 1 :]) for c in chunks if c.dim() == len(shape)}
        if others == {(*shape[:dim], *shape[dim + 1 :])} and (
            sum(chunk.shape[dim] for chunk in chunks) == shape[dim]
        ):
            return torch.cat(list(chunks), dim)
    raise CannotJoinError(
        f"{name} draws {tuple(chunks[0].shape)} for a microbatch, {shape} for the batch"
    )
