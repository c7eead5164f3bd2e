"""ModuleShells: copies of a module tree that hold no parameter memory.

The parameters of a shell are placeholders on the meta device until tensors are bound in their
place. Each device thread has a shell of its own.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from harmony.capture.replay.kept_types import names_kept
from harmony.errors import CaptureError

_DEEPEST = 4
"""Functions inside of functions that are followed to a module."""

Slot = tuple[Any, Any]
"""A container and a key or index in it: where a parameter is stored."""


class ModuleShell:
    """A copy of ``module`` whose parameters take no memory.

    Attributes:
        root: the copy.
        device: where its tensors will live.
        modules: every module by name.
        masters: the type that the module itself has of each parameter that is another here.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, param_dtype: torch.dtype | None = None
    ) -> None:
        """Copy ``module``.

        Args:
            param_dtype: what parameters of floating point are in the copy, but for those of
                modules that keep theirs (`keep_fp32`); None: what they are.
        """
        self.device = device
        memo, placeholders = _placeholders(module, device, param_dtype)
        self.masters = {
            name: param.dtype
            for name, param in module.named_parameters()
            if param.dtype != placeholders[name].dtype
        }
        try:
            self.root: nn.Module = copy.deepcopy(module, memo)
        except Exception as error:
            raise CaptureError(
                f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}). "
                "Keep locks, files and process groups off the module, or give it __deepcopy__"
            ) from error
        self.modules = dict(self.root.named_modules())
        self._placeholders = placeholders
        self._slots = _find_slots(self.root, placeholders)
        self._bound = dict(placeholders)
        self._lent: dict[str, torch.Tensor] = {}
        scripted = _scripted_slots(self.root, module)
        for name, slots in scripted.items():
            self._slots[name] += slots
        self.release(scripted)  # TorchScript makes copies of its own
        for inner in self.modules.values():
            if isinstance(inner, nn.RNNBase):
                _leave_where_bound(inner)

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the parameters and buffers."""
        return tuple(self._placeholders)

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put tensors in the place of parameters and buffers, under all their names."""
        for name, tensor in tensors.items():
            self._bound[name] = tensor
            for container, key in self._slots[name]:
                container[key] = tensor

    def release(self, names: Iterable[str]) -> None:
        """Put the placeholders back."""
        self.bind({name: self._placeholders[name] for name in names})

    def lend(self, names: Iterable[str]) -> None:
        """Put copies in the place of buffers, until they are settled.

        So what autograd saves of them is what plain PyTorch has there: the tensor of this run,
        with what is written to it later, and not what is put in its place.
        """
        for name in names:
            self._lent[name] = self._bound[name]
            self.bind({name: self._bound[name].clone()})

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in the place of a buffer, as an assignment does, until it is settled."""
        for container, key in self._slots[name]:
            container[key] = tensor.detach()

    def settle(self, names: Iterable[str]) -> None:
        """Copy what was put in the place of buffers into the buffers, and put those back."""
        for name in names:
            found = bound = self._bound[name]
            for container, key in self._slots[name]:
                found = found if container[key] is bound else container[key]
            home = self._lent.pop(name, bound)
            if found is not home:
                with torch.no_grad():
                    home.copy_(found)
                self.bind({name: home})

    def tensor(self, name: str) -> torch.Tensor:
        """What is bound for a parameter or buffer now."""
        return self._bound[name]

    def placeholder(self, name: str) -> torch.Tensor:
        """What stands for a parameter (on the meta device) or buffer (its captured value)."""
        return self._placeholders[name]


def _leave_where_bound(module: nn.RNNBase) -> None:
    """Let a recurrent module take its weights as they are bound, and leave them there.

    By itself it makes a new list of them in each forward that finds others, which would hold
    device memory for good; and it has cuDNN move them to one piece of memory, so that what is
    copied to where they were bound is never read.
    """
    known = weakref.ref(module)

    def take() -> None:
        found = known()
        if found is not None:
            names = found._flat_weights_names
            found._flat_weights[:] = [getattr(found, name, None) for name in names]

    module.__dict__["_update_flat_weights"] = take


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` has made a module, or its method ``compile()`` was called."""
    return isinstance(module, OptimizedModule) or isinstance(
        module._compiled_call_impl, FunctionType
    )


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that are ordinary attributes of one module, with their names."""
    for name, held in module.__dict__.items():
        if isinstance(held, torch.Tensor):
            yield name, held


def _placeholders(
    module: nn.Module, device: torch.device, param_dtype: torch.dtype | None
) -> tuple[dict[int, Any], dict[str, torch.Tensor]]:
    """Return what replaces each tensor when the module is copied, by id and by name."""
    memo: dict[int, Any] = {}
    by_name: dict[str, torch.Tensor] = {}
    kept = names_kept(module)
    for name, param in module.named_parameters():
        dtype = None if name in kept else param_dtype
        memo[id(param)] = by_name[name] = _on_meta(param, dtype)
    for name, buffer in module.named_buffers():
        # They are small, and functional code may compute with them before anything is bound.
        memo[id(buffer)] = by_name[name] = buffer.detach().clone()
    for owner in module.modules():
        for _, tensor in plain_tensors(owner):
            memo.setdefault(id(tensor), tensor.detach().to(device, copy=True))
    return memo, by_name


def _on_meta(param: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    if dtype is None or not param.is_floating_point():
        dtype = param.dtype
    meta = torch.empty_strided(param.shape, param.stride(), dtype=dtype, device="meta")
    return nn.Parameter(meta, requires_grad=param.requires_grad)


def _find_slots(root: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Slot]]:
    """Every place that holds a tensor: module attributes, and lists and dicts in attributes."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    slots: dict[str, list[Slot]] = {name: [] for name in tensors}
    for module in root.modules():
        for container in _containers(module):
            pairs = container.items() if isinstance(container, Mapping) else enumerate(container)
            for key, held in pairs:
                if id(held) in names:
                    slots[names[id(held)]].append((container, key))
    return slots


class _Scripted:
    """The parameters and buffers of a TorchScript module, which it keeps out of Python's reach."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getitem__(self, name: str) -> torch.Tensor:
        found: torch.Tensor = getattr(self._module, name)
        return found

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        setattr(self._module, name, tensor)


def _scripted_slots(root: nn.Module, source: nn.Module) -> dict[str, list[Slot]]:
    """Places of tensors in the TorchScript modules of a copy, by their name in the source."""
    named = (*source.named_parameters(), *source.named_buffers())
    names = {id(tensor): name for name, tensor in named}
    slots: dict[str, list[Slot]] = {}
    sources = dict(source.named_modules(remove_duplicate=False))
    for place, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            original = sources[place]
            for group in (original._parameters, original._buffers):
                for key, tensor in group.items():
                    if tensor is not None:
                        slots.setdefault(names[id(tensor)], []).append((_Scripted(module), key))
    return slots


def _containers(module: nn.Module) -> Iterator[Any]:
    """Yield the dict of a module's attributes, and the lists and dicts in it."""
    yield module.__dict__
    for name, held in module.__dict__.items():
        if name != "_modules" and isinstance(held, (MutableMapping, MutableSequence)):
            yield held


def closes_over_module(module: nn.Module) -> str | None:
    """Name an attribute whose function captured a module: it would use the original weights.

    A copy of the module has a method of its own in the place of a method, and a partial with
    arguments of its own, but the same function.
    """
    for name, owner in module.named_modules():
        for attribute, held in owner.__dict__.items():
            if _is_of_compiler(owner, attribute):
                continue
            function = held.func if isinstance(held, functools.partial) else held
            if isinstance(function, FunctionType) and _leads_to_module(function, _DEEPEST):
                return f"{name}.{attribute}".lstrip(".")
    return None


def _is_of_compiler(owner: nn.Module, attribute: str) -> bool:
    """Whether `torch.compile` has set an attribute; a copy of the module has its own, or none."""
    if isinstance(owner, OptimizedModule):
        return attribute in ("forward", "_forward")
    return attribute == "_compiled_call_impl"


def _leads_to_module(held: Any, depth: int) -> bool:
    if isinstance(held, nn.Module):
        return True
    inside: Iterable[Any] = ()
    if isinstance(held, MethodType):
        inside = (held.__self__,)
    elif isinstance(held, functools.partial):
        inside = (held.func, *held.args, *held.keywords.values())
    elif isinstance(held, FunctionType):
        inside = _cells(held)
    elif isinstance(held, (list, tuple)):
        inside = held
    return depth > 0 and any(_leads_to_module(inner, depth - 1) for inner in inside)


def _cells(function: FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell that is still empty
            continue
