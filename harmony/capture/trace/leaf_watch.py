"""Watches the inside of a leaf module: tensors must come in as arguments and go out as results."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from harmony.capture.graph.structure import tensors_in
from harmony.capture.guards.module_hooks import check_tensor_hook
from harmony.capture.guards.observe import heard
from harmony.capture.replay.shell import plain_tensors
from harmony.capture.state.python_state import PlainState
from harmony.capture.trace.identity import IdentityMap
from harmony.capture.trace.refuse import NEED_A_GRAPH, check_in_layer

_SIMPLE = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size)


class LeafMustOpenError(Exception):
    """Leaf modules exchange a tensor behind the trace's back: open them and trace again.

    Attributes:
        names: the modules to open.
        inside: name of the module whose forward calls the last of them.
    """

    inside: str | None = None

    def __init__(self, names: list[str], why: str) -> None:
        super().__init__(why)
        self.names = names


class LeafCall:
    """One call of a leaf module, while it runs.

    Attributes:
        name: the module's name.
        needs_graph: whether it calls something that is possible only while gradients are recorded.
        differentiates: whether that is the gradient of something.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        arguments: Sequence[torch.Tensor],
        state: dict[int, str],
        made_in: IdentityMap[LeafCall],
        outside: Container[int],
        of_data: IdentityMap[bool],
    ) -> None:
        """Watch a call.

        Args:
            of_data: gets the tensors that depend on the content of arguments or parameters.
        """
        self.name = name
        self.needs_graph = self.differentiates = False
        self._module = module
        self._state_names = state
        self._made_in = made_in
        self._outside = outside
        self._of_data = of_data
        self._attributes = {
            (id(owner), attribute): tensor
            for owner in module.modules()
            for attribute, tensor in plain_tensors(owner)
        }
        self._given = {id(tensor) for tensor in arguments}
        self._data = self._given.union(map(id, module.parameters()))
        self._given |= {id(tensor) for tensor in self._attributes.values()}
        self._buffers = [
            (owner, key, buffer)
            for owner in module.modules()
            for key, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._plain = PlainState(module.modules())
        own = (*module.parameters(), *module.buffers())
        self._used = {id(tensor): state[id(tensor)] for tensor in own if id(tensor) in state}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a torch function of the leaf, looking at what goes in and out."""
        name = getattr(func, "__name__", "")
        check_in_layer(name, func)
        if name in NEED_A_GRAPH and "__get__" not in str(func):
            check_tensor_hook(name, args)
            self.needs_graph = True
            self.differentiates |= name == "grad"
        of_data = False
        for tensor in _tensors((*args, *kwargs.values())):
            self._check_known(tensor)
            of_data |= id(tensor) in self._data or id(tensor) in self._of_data
        of_data &= not by_shape_only(getattr(func, "__name__", ""))
        out = heard(func, *args, **kwargs)
        for tensor in _tensors(out):
            if of_data:
                self._of_data[tensor] = True
            known = id(tensor) in self._state_names or id(tensor) in self._outside
            if not known and id(tensor) not in self._given and id(tensor) not in self._made_in:
                self._made_in[tensor] = self
        return out

    def state(self) -> tuple[str, ...]:
        """Names of the parameters and buffers of the module, and others that it used."""
        return tuple(self._used.values())

    def left_behind(self) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
        """Yield tensors that the call left on attributes: module, attribute, tensor."""
        for owner in self._module.modules():
            for attribute, tensor in plain_tensors(owner):
                if self._attributes.get((id(owner), attribute)) is not tensor:
                    yield owner, attribute, tensor

    def replaced(self) -> list[torch.Tensor]:
        """Return buffers in whose place the call put others; the old ones are put back."""
        replaced = []
        for owner, key, buffer in self._buffers:
            if getattr(owner, key, None) is not buffer:
                setattr(owner, key, buffer)
                replaced.append(buffer)
        return replaced

    def counted(self) -> list[tuple[nn.Module, str]]:
        """Return the Python attributes that the call changed."""
        return self._plain.changes()

    def kept(self) -> list[str]:
        """Return attributes that are containers to which the call added something."""
        return self._plain.grown()

    def _check_known(self, tensor: torch.Tensor) -> None:
        key = id(tensor)
        if key in self._given:
            return
        if key in self._state_names:
            self._used[key] = self._state_names[key]
            return
        origin = self._made_in.get(key)
        if origin is not None and origin is not self:
            raise LeafMustOpenError(
                [self.name, origin.name],
                f"{self.name} uses a tensor made inside {origin.name} that was not passed to it",
            )
        if origin is None and key in self._outside:
            raise LeafMustOpenError(
                [self.name], f"{self.name} uses a tensor of the forward that was not passed to it"
            )


def by_shape_only(name: str) -> bool:
    """Whether a function takes the form of its argument alone, not its content."""
    return name.startswith("new_") or name.endswith("_like")


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a structure; what arguments mostly are without the general way."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif type(tree) in (tuple, list):
        for inner in tree:
            yield from _tensors(inner)
    elif type(tree) not in _SIMPLE:
        yield from tensors_in(tree)
