"""Runs a module as it is, for training: its own Python, once, on a device.

Nothing is recorded and nothing is run twice, so whatever the forward reads, writes and calls
happens as in plain PyTorch. Parameters and other tensors stay where they are and come to the
device for each call that needs them; what the backward needs waits on the host. The device holds
the values that the forward has in its hands, and the operands of one call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

from harmony.capture.graph.saved_hooks import transforms_allowed
from harmony.capture.graph.structure import flatten, tensors_in
from harmony.capture.guards.checkpoints import checkpointed
from harmony.capture.replay.replay import FACTORIES
from harmony.capture.trace.intercept import recording
from harmony.capture.trace.irregular import is_packed, moves
from harmony.capture.trace.isolation import autocast_dtype
from harmony.capture.trace.kernels import KernelWatch
from harmony.capture.trace.refuse import in_transform
from harmony.errors import CaptureError, HarmonyError

_ON_HOST = {"_pack_padded_sequence": 1, "_pad_packed_sequence": 1}
"""Functions that want one of their arguments on the CPU, and its place."""

_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})

_SPARSE = frozenset({"embedding", "embedding_bag"})
"""Functions whose gradients may be sparse, which nothing takes to another device."""

_DEEPEST = 3
"""Objects inside of objects that a forward returns."""

_DIFFERENTIATE = (torch.autograd.grad, torch.autograd.backward)

_COMPUTING = frozenset({"T", "H", "mT", "mH", "real", "imag"})


@dataclass(frozen=True)
class _Borrowed:
    """What is kept of a saved tensor that is a copy of a parameter, or a view of the copy."""

    origin: torch.Tensor
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _OnHost:
    """What is kept of any other saved tensor: its entries, and the form it had."""

    entries: torch.Tensor
    size: torch.Size


class OnDevice(TorchFunctionMode):
    """Brings tensors of the host to the device where a call mixes them with the device's.

    What a call changes in place goes back to where it came from.
    """

    def __init__(self, device: torch.device) -> None:
        """Run calls on ``device``."""
        super().__init__()
        self._device = device
        self._thread = threading.get_ident()
        self._lent: dict[int, tuple[StorageWeakRef, torch.Tensor, int]] = {}

    @functools.cached_property
    def _kernels(self) -> KernelWatch:
        """Made when a call mixes tensors; most losses mix none."""
        return KernelWatch(fake=False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and generator.device.type == "cpu":
            return self._drawn_on_host(func, args, kwargs)
        if name in FACTORIES and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": self._device}
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name not in _COMPUTING:
                return func(*args, **kwargs)
        if name == "__set__":
            return func(args[0], *(_beside(args[0], value) for value in args[1:]))
        return self.call(func, name, args, kwargs)

    def _drawn_on_host(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Draw by a generator of the host, where plain PyTorch draws too; results go along."""
        host = torch.device("cpu")
        args_there, kwargs_there = moved((args, kwargs), host)
        if "device" in kwargs:
            kwargs_there["device"] = host
        out = func(*args_there, **kwargs_there)
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and out is args_there[0] and out is not first:
            return first.copy_(out)
        return moved(out, self._device)

    def call(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        """Run a function on the device, if any of its tensors is there."""
        if name in _ON_HOST:
            place = _ON_HOST[name]
            args = (*args[:place], args[place].cpu(), *args[place + 1 :])
        if func in _DIFFERENTIATE:  # by these tensors, not by copies of them
            return func(*args, **kwargs)
        leaves, structure = flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        here = [tensor.device == self._device for tensor in tensors]
        if all(here) or not any(here):
            return func(*args, **kwargs)
        stays = _wanted_on_host(name, args)
        moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.device.type == "cpu" and id(tensor) not in moved and tensor is not stays:
                moved[id(tensor)] = (tensor, self._lend(tensor, name in _SPARSE))
        versions = {key: copy._version for key, (_, copy) in moved.items()}
        args, kwargs = structure.unflatten(
            [moved[id(leaf)][1] if id(leaf) in moved else leaf for leaf in leaves]
        )
        # Some kernels change statistics without the version counters telling of it.
        watched = not in_transform() and not all(
            isinstance(origin, nn.Parameter) for origin, _ in moved.values()
        )
        with self._kernels if watched else nullcontext():
            out = func(*args, **kwargs)
        noticed, changed = self._kernels.take(), {}
        for key, (origin, copy) in moved.items():
            if copy._version != versions[key] or noticed.wrote(copy):
                own = origin.is_leaf and origin.requires_grad  # written behind autograd's back
                learns = copy.requires_grad and torch.is_grad_enabled() and not own
                with torch.set_grad_enabled(learns):
                    origin.copy_(copy)
                changed[id(copy)] = origin
        if not changed:
            return out
        made, structure = flatten(out)
        return structure.unflatten([changed.get(id(leaf), leaf) for leaf in made])

    def call_module(
        self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Handle a call of a module: nothing special."""
        return call(module, *args, **kwargs)

    def call_custom(self, function: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle ``apply`` of a custom ``autograd.Function``, which no mode sees."""
        if threading.get_ident() != self._thread:
            return apply(*args, **kwargs)
        if function is CheckpointFunction:  # see `_without_checkpoints`
            run, preserve_rng_state, *given = args
            with checkpointed(preserve_rng_state):
                return run(*given)
        if any(x.device == self._device for x in tensors_in((args, kwargs))):
            apply = _applied_to(_going_back(function, self._device), apply)
        return self.call(apply, function.__name__, args, kwargs)

    def call_script(self, script: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle a call of a TorchScript function, which no mode sees either."""
        if threading.get_ident() != self._thread:
            return call(script, *args, **kwargs)
        return self.call(functools.partial(call, script), "script", args, kwargs)

    def call_vmap(self, function: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle ``torch.vmap``: nothing special."""
        return call(function, *args, **kwargs)

    def keep(self, tensor: torch.Tensor) -> Any:
        """Return what to keep of a tensor that autograd saves."""
        if tensor.device != self._device or tensor.layout is not torch.strided:
            return tensor
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        known = None if wrapped else self._lent.get(tensor.untyped_storage()._cdata)
        plain = not (tensor.is_conj() or tensor.is_neg())
        if known is not None and plain and known[1].dtype is tensor.dtype:
            _, origin, version = known
            offset = int(tensor.storage_offset())
            return _Borrowed(origin, version, tensor.size(), tensor.stride(), offset)
        size = tensor.size()
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0:  # the same entries again and again
                tensor = tensor.narrow(dim, 0, min(1, size[dim]))
        return _OnHost(tensor.detach().to("cpu"), size)

    def fetch(self, kept: Any) -> torch.Tensor:
        """Return a saved tensor, on the device again.

        Raises:
            HarmonyError: if what it was a copy of has been changed since.
        """
        if isinstance(kept, _OnHost):
            return kept.entries.to(self._device).expand(kept.size)
        if not isinstance(kept, _Borrowed):
            found: torch.Tensor = kept
            return found
        if kept.origin._version != kept.version:
            raise HarmonyError(
                f"a parameter of shape {tuple(kept.origin.shape)} that the backward needs was "
                "changed in place after the forward: run the backward before the update"
            )
        copy = kept.origin.detach().to(self._device)
        return copy.as_strided(kept.size, kept.stride, kept.offset)

    def _lend(self, tensor: torch.Tensor, may_be_sparse: bool) -> torch.Tensor:
        lend: Any = _Dense.apply if may_be_sparse else torch.Tensor.to
        copy: torch.Tensor = lend(tensor, self._device)
        # Others may be changed before the backward; what a transform wraps has no storage.
        if isinstance(tensor, nn.Parameter) and not in_transform():
            storage = copy.untyped_storage()
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._lent[storage._cdata] = (reference, tensor, tensor._version)
        return copy


@contextmanager
def running_on(device: torch.device) -> Iterator[OnDevice]:
    """Run modules on a device, whose tensors stay on the host, until the block ends."""
    mode = OnDevice(device)
    with ExitStack() as stack:
        if autocast_dtype() is not None:
            stack.enter_context(torch.autocast(device.type, dtype=autocast_dtype()))
        stack.enter_context(saved_tensors_hooks(mode.keep, mode.fetch))
        stack.enter_context(transforms_allowed())
        stack.enter_context(recording(mode))
        stack.enter_context(_without_checkpoints())
        yield mode


def _going_back(function: Any, device: torch.device) -> Any:
    """Return a custom ``autograd.Function`` whose backward runs on the device, too.

    It may call modules whose parameters are on the host, as those of reversible networks do.
    """
    name = "backward" if function.vjp is torch.autograd.Function.vjp else "vjp"
    own = getattr(function, name)

    def backward(ctx: Any, *gradients: Any) -> Any:
        with running_on(device):
            return moved(own(ctx, *gradients), device)

    return type(function.__name__, (function,), {name: staticmethod(backward)})


_APPLY = torch.autograd.Function.__dict__["apply"]  # before anything takes its place


def _applied_to(function: Any, apply: Callable[..., Any]) -> Callable[..., Any]:
    """Return the `apply` of a custom ``autograd.Function`` for another one.

    It is a function of Python's where something has taken its place, and before torch 2.14.
    """
    python = getattr(apply, "__func__", None)
    bound = _APPLY.__get__(None, function) if python is None else MethodType(python, function)
    return cast("Callable[..., Any]", bound)


_as_it_is = threading.local()


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Let `torch.utils.checkpoint` run its functions once, in this thread, until the block ends.

    What is saved waits on the host anyway, and a thread of autograd's that ran them again would
    find the parameters there. The values are the same.
    """
    before = getattr(_as_it_is, "running", False)
    _as_it_is.running = True
    try:
        yield
    finally:
        _as_it_is.running = before


_GENERATOR = "_checkpoint_without_reentrant_generator"
_IS_NAMED = hasattr(checkpoint, f"{_GENERATOR}_impl")  # torch 2.14's, which is called by names
if _IS_NAMED:
    _GENERATOR += "_impl"
_checkpointed = getattr(checkpoint, _GENERATOR)


@functools.wraps(_checkpointed)
def _checkpointed_or_kept(run: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    as_it_is = getattr(_as_it_is, "running", False)
    preserve_rng_state = kwargs["preserve_rng_state"] if _IS_NAMED else args[0]
    with checkpointed(preserve_rng_state):
        yield from iter((None,)) if as_it_is else _checkpointed(run, *args, **kwargs)


setattr(checkpoint, _GENERATOR, _checkpointed_or_kept)


def moved(tree: Any, device: torch.device) -> Any:
    """Return a structure with its tensors on a device, as part of their graph."""
    leaves, structure = flatten(tree, is_leaf=is_packed)
    return structure.unflatten([leaf.to(device) if moves(leaf) else leaf for leaf in leaves])


class _Dense(torch.autograd.Function):
    """A copy on a device, whose gradient gets all its entries, as in the layers of a plan."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Copy it."""
        ctx.home = tensor.device
        copy: torch.Tensor = tensor.to(device)
        return copy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Bring its gradient back."""
        (gradient,) = gradients
        if gradient.layout is not torch.strided:
            zeros = torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
            gradient = zeros.add_(gradient)
        return gradient.to(ctx.home), None


def brought_home(tree: Any, device: torch.device, depth: int = 0) -> Any:
    """Return what a forward returns with its tensors on a device, as part of their graph.

    In objects that are no known container, the tensors are exchanged.

    Raises:
        CaptureError: for a function or a generator, whose tensors nobody can exchange.
    """
    leaves, structure = flatten(tree, is_leaf=is_packed)
    return structure.unflatten([_brought_home(leaf, device, depth) for leaf in leaves])


def _brought_home(leaf: Any, device: torch.device, depth: int) -> Any:
    if moves(leaf):
        return leaf.to(device)
    if isinstance(leaf, (set, frozenset)):
        return type(leaf)(brought_home(inner, device, depth) for inner in leaf)
    if isinstance(leaf, (FunctionType, MethodType, functools.partial, Iterator)) and not depth:
        raise CaptureError(
            f"the forward returns a {type(leaf).__name__}, whose tensors stay on the GPU: let it "
            "return the tensors"
        )
    held = getattr(leaf, "__dict__", None)
    if isinstance(held, dict) and not isinstance(leaf, nn.Module) and depth < _DEEPEST:
        for name, value in list(held.items()):
            held[name] = brought_home(value, device, depth + 1)
    return leaf


def _beside(owner: Any, value: Any) -> Any:
    """Return a value where the tensor is whose attribute it becomes."""
    both = isinstance(owner, torch.Tensor) and isinstance(value, torch.Tensor)
    return value.to(owner.device) if both else value


def _wanted_on_host(name: str, args: Any) -> Any:
    """The argument of a function that has to stay on the CPU, if any."""
    if name in _ON_HOST:
        return args[_ON_HOST[name]]
    packed = name in _RECURRENT and len(args) > 1 and isinstance(args[1], torch.Tensor)
    return args[1] if packed and args[1].dtype is torch.int64 else None
