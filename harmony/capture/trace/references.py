"""Tells what the leaves of arguments are on the trace: values, parameters, modules, constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from harmony.capture.graph.structure import flatten
from harmony.capture.graph.trace import (
    DEVICE,
    UNKNOWN,
    Constant,
    ModuleRef,
    StateRef,
    Step,
    ValueRef,
)
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.trace.identity import IdentityMap
from harmony.capture.trace.leaf_watch import LeafCall, LeafMustOpenError
from harmony.capture.trace.numbering import Numbering
from harmony.capture.trace.refuse import check_unknown_tensor
from harmony.errors import CaptureError

_MOVES = frozenset({"to", "type_as", "cuda", "xpu", "as_tensor", "asarray"})
"""Functions that return their argument itself if it is where, and what, it should be."""


class References:
    """What the tensors and modules of one forward are, while it is recorded.

    Attributes:
        numbers: the numbers of tensors that the forward was given or has made.
        made_in: the call of a leaf module that made a tensor, and may not have returned it.
        state: names of parameters and buffers, by the id of the tensor.
        module_names: names of modules, by id.
        made_of_nothing: numbers of tensors that depend on no input, parameter or buffer.
        of_data: tensors that leaf modules have made of the content of others.
    """

    def __init__(
        self, shell: ModuleShell, device: torch.device, stand_ins: Mapping[int, Any]
    ) -> None:
        self.numbers = Numbering()
        self.made_in: IdentityMap[LeafCall] = IdentityMap()
        self.state = {id(shell.tensor(name)): name for name in shell.names}
        self._parameters = {name for name, _ in shell.root.named_parameters()}
        self.module_names = {id(module): name for name, module in shell.modules.items()}
        self.made_of_nothing: set[int] = set()
        self.of_data: IdentityMap[bool] = IdentityMap()
        self._aliases: dict[int, str] = {}
        self._device = device
        self._stand_ins = stand_ins
        self._constants: dict[int, Constant] = {}
        self._alive: list[torch.Tensor] = []

    def watch(self, name: str, module: nn.Module, arguments: Sequence[torch.Tensor]) -> LeafCall:
        """Return what watches a call of a leaf module."""
        known = (self.state, self.made_in, self.numbers, self.of_data)
        return LeafCall(name, module, arguments, *known)

    def stand_in(self, args: Any, kwargs: Any) -> Any:
        """Replace the user's own parameters and modules, reached through a closure, by ours.

        Returns:
            The arguments, their leaves, and the structure that the leaves make.
        """
        leaves, structure = flatten((args, kwargs))
        if any(id(leaf) in self._stand_ins for leaf in leaves):
            leaves = [self._stand_ins.get(id(leaf), leaf) for leaf in leaves]
            args, kwargs = structure.unflatten(leaves)
        return (args, kwargs), leaves, structure

    def own_module(self, module: nn.Module) -> nn.Module:
        """Return our module in the place of the user's."""
        found: nn.Module = self._stand_ins.get(id(module), module)
        return found

    def of_all(self, leaves: Sequence[Any], user: str) -> tuple[Any, ...]:
        """Return what each leaf is on the trace; see `of`."""
        return tuple(self.of(leaf, user) for leaf in leaves)

    def of(self, leaf: Any, user: str) -> Any:
        """Return what a leaf is on the trace; itself, if it is no tensor, module or device of
        ours.

        Args:
            user: what uses it, for errors.

        Raises:
            LeafMustOpenError: if a leaf module has made the tensor and not returned it.
            CaptureError: if nothing tells where the tensor comes from.
        """
        if isinstance(leaf, torch.device):
            return DEVICE if leaf.type == self._device.type else leaf
        if isinstance(leaf, nn.Module) and id(leaf) in self.module_names:
            return ModuleRef(self.module_names[id(leaf)])
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in self.numbers:
            return ValueRef(self.numbers.of(leaf))
        if id(leaf) in self.state:
            return StateRef(self.state[id(leaf)])
        origin = self.made_in.get(id(leaf))
        if origin is not None:
            raise LeafMustOpenError(
                [origin.name], f"a tensor made inside {origin.name} reaches {user} unreturned"
            )
        return self._constant(leaf, user)

    def given(self, leaf: Any) -> Any:
        """Return what a leaf of the loss function's arguments is; `UNKNOWN` for any other tensor.

        What it gets is no use of a tensor yet.
        """
        known = id(leaf) in self.numbers or id(leaf) in self.state
        if isinstance(leaf, (torch.Tensor, nn.Module, torch.device)) and not known:
            return UNKNOWN
        return self.of(leaf, "the loss")

    def number_output(self, leaf: Any, name: str) -> int | None:
        """Number a result, unless it is not a tensor or an object that is known already.

        A constant that the trace makes where it runs, and moves to where it is already, is another
        tensor in the replay: what follows reads the moved one.
        """
        if not isinstance(leaf, torch.Tensor):
            return None
        if name in _MOVES and id(leaf) in self.numbers:
            number = self.numbers.of(leaf)
            return self.numbers.number(leaf, name) if number in self.made_of_nothing else None
        if id(leaf) in self.numbers or id(leaf) in self.state or id(leaf) in self._constants:
            return None
        return self.numbers.number(leaf, name)

    def note_aliases(self, state: Mapping[str, torch.Tensor], made: Sequence[Any]) -> None:
        """Note which results are in the memory of parameters or buffers: views, ``.data``."""
        names = {_memory(tensor): name for name, tensor in state.items()}
        for leaf in made if names else ():
            if id(leaf) in self.numbers and _memory(leaf) in names:
                number = self.numbers.of(leaf)
                self._aliases[self.numbers.values[number].storage] = names[_memory(leaf)]

    def alias_of(self, number: int) -> str | None:
        """Return the name of the parameter or buffer in whose memory a value is, or None."""
        return self._aliases.get(self.numbers.values[number].storage)

    def changed_state(self, tensor: torch.Tensor) -> str | None:
        """Return the name of the parameter or buffer that changes with a tensor, or None."""
        if id(tensor) in self.state:
            return self.state[id(tensor)]
        return self.alias_of(self.numbers.of(tensor)) if id(tensor) in self.numbers else None

    def check_buffer(self, name: str, step: Step) -> str:
        """Return the name of what a step changes.

        Raises:
            CaptureError: if it is a parameter, which is not to be changed.
        """
        if name in self._parameters:
            raise CaptureError(
                f"{step.name} at {step.where} changes the parameter {name} in the forward, which "
                "the recompute would do once more. Change it between two steps, or compute a "
                "new tensor from it"
            )
        return name

    def renumber(self, tensor: torch.Tensor, step: Step) -> tuple[int, int]:
        """Give a value that a step has changed in place a new number; return old and new.

        Raises:
            CaptureError: if it is no value of the forward.
        """
        if id(tensor) not in self.numbers:
            raise CaptureError(
                f"{step.name} at {step.where} changes a tensor in place that is no buffer of the "
                "model: register it as one (register_buffer)"
            )
        return self.numbers.renumber(tensor, step.name)

    @contextmanager
    def lent(self, real: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Know parameters that are lent until the block ends, by name, for what they are."""
        self.state.update({id(tensor): name for name, tensor in real.items()})
        try:
            yield
        finally:
            for tensor in real.values():
                self.state.pop(id(tensor), None)

    def _constant(self, tensor: torch.Tensor, user: str) -> Constant:
        if id(tensor) not in self._constants:
            check_unknown_tensor(tensor, user, isinstance(tensor, FakeTensor))
            self._constants[id(tensor)] = Constant(tensor.detach())
            self._alive.append(tensor)
        return self._constants[id(tensor)]


def _memory(tensor: torch.Tensor) -> int:
    """Identify the memory of a tensor; that of one without a storage is its own."""
    dense = tensor.layout is torch.strided and not tensor.is_nested
    return int(tensor.untyped_storage()._cdata) if dense else -id(tensor)


def with_devices(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments in which a device that is given by name is one that can be replaced."""
    if isinstance(kwargs.get("device"), str):
        kwargs = {**kwargs, "device": torch.device(kwargs["device"])}
    if name == "to" and len(args) > 1 and isinstance(args[1], str):
        args = (args[0], torch.device(args[1]), *args[2:])
    return args, kwargs
