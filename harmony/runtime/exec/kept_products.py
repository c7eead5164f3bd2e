"""What the forward of a pack leaves for its backward where only its products are kept.

The dear operators of a forward (matrix products, convolutions, attention; see
`harmony.capture.cost.products`) are seen as they are dispatched, below autograd, and what they
make is held. The recompute runs the same layers, with autograd, and is given those results in
their order, so that it computes the rest only, random numbers included: no product draws any. That
is PyTorch's selective checkpointing, whose contexts (`torch.utils.checkpoint`) keep to themselves
what they save; here its memory has to leave for the host, and come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from harmony.capture import is_product
from harmony.errors import RecomputeError
from harmony.runtime.exec.saved_forward import SavedMemory


class _Made(NamedTuple):
    """What one product has made: where its tensors lie, or what else it returned."""

    func: Any
    leaves: list[object]
    structure: TreeSpec


class KeptProducts:
    """The results of the products of one forward of a pack, in the order in which they were made.

    Attributes:
        memory: where they lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory = SavedMemory(device)
        self._made: list[_Made] = []

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Hold what the products make that run meanwhile."""
        with _Keeping(self):
            yield

    @contextmanager
    def giving(self) -> Iterator[None]:
        """Give the products that run meanwhile what they have made before, one after the other.

        Raises:
            RecomputeError: if they are others than those.
        """
        with _Giving(self) as mode:
            yield
        if mode.given != len(self._made):
            raise _differs(f"{mode.given} products, not {len(self._made)}")

    def keep(self, func: Any, out: Any) -> None:
        """Hold what a product has made."""
        leaves, structure = tree_flatten(out)
        held = [self._held(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._made.append(_Made(func, held, structure))

    def _held(self, tensor: torch.Tensor) -> object:
        return self.memory.hold(tensor) if self.memory.is_plain(tensor) else tensor.detach()

    def give(self, number: int, func: Any) -> Any:
        """Return what the product of a number has made.

        Raises:
            RecomputeError: if it was another one.
        """
        if number >= len(self._made):
            raise _differs(f"{func} as one more product")
        made = self._made[number]
        if made.func is not func:
            raise _differs(f"{func} in the place of {made.func}")
        leaves = [
            self.memory.unpack(leaf) if self.memory.holds(leaf) else leaf for leaf in made.leaves
        ]
        return tree_unflatten(leaves, made.structure)

    def let_go(self) -> None:
        """Give the memory back; `take_memory` and `memory.copy_from` bring what was in it back."""
        self.memory.let_go()

    def take_memory(self) -> None:
        """Take memory for what comes back, in the order of the current stream."""
        self.memory.take()


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, kept: KeptProducts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        for tensor in _written(func, args, named):
            self.kept.memory.keep_as_is(tensor)
        out = func(*args, **named)
        if is_product(func, args, named):
            self.kept.keep(func, out)
        return out


class _Giving(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, kept: KeptProducts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.given = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if not is_product(func, args, named):
            return func(*args, **named)
        self.given += 1
        return self.kept.give(self.given - 1, func)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors that an operator writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for at, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[at] if at < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))


def _differs(found: str) -> RecomputeError:
    return RecomputeError(
        f"the layers do not compute the same twice: the recompute for the backward runs {found},"
        " in the order of the forward, so that its gradients would be wrong. Likely causes: a"
        " forward whose Python decides by something that changes from call to call (a counter in"
        " a closure or a global, random numbers of its own)"
    )
