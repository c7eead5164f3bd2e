"""Code that may write only to tensors which it has made itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MAKERS = (torch.ops.aten.lift_fresh, torch.ops.aten.set_)
"""What takes memory that was made without an operator: `torch.tensor` and `copy.deepcopy` do."""


class ForeignWriteError(Exception):
    """A tensor that was there before would have been written to."""


class OwnWritesOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises before an operator writes to memory that was not made while it is active.

    So a trial of somebody's code leaves alone what this reaches in closures and globals: weights
    of the model, averages of them, counters.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, torch.UntypedStorage] = {}  # held, so that no id comes twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            if _key(tensor) not in self._made:
                raise ForeignWriteError(f"{func} would write to a tensor of somebody else")
        made = func(*args, **kwargs)
        if func.overloadpacket in _MAKERS or not _aliases(func):
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor):
                    self._made[_key(tensor)] = _storage(tensor)
        return made


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (t for t in tree_leaves(given) if isinstance(t, torch.Tensor))


def _aliases(func: Any) -> bool:
    """Whether an operator returns memory of its arguments, and makes none."""
    return any(returned.alias_info is not None for returned in func._schema.returns)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return torch.Tensor.untyped_storage(tensor)


def _key(tensor: torch.Tensor) -> int:
    return int(_storage(tensor)._cdata)
