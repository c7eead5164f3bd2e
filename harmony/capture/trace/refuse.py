"""What cannot be captured, said by name, with the place and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from harmony.capture.graph.trace import Step
from harmony.capture.replay.shell import ModuleShell, closes_over_module, plain_tensors
from harmony.capture.trace.irregular import irregular_state
from harmony.capture.trace.isolation import user_frame, user_frame_of
from harmony.errors import CaptureError, HarmonyError

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "FSDPModule")
_HARMLESS = (torch.Tensor, nn.Module, type, bool, int, float, str, torch.dtype, torch.device)
_OUTPUTS: tuple[type, ...] = (torch.Tensor, bool, int, float, complex, str, bytes, type, Enum)
_OUTPUTS += (torch.dtype, torch.device, torch.Size)
NEED_A_GRAPH = frozenset({"register_hook", "retain_grad", "grad"})
"""Functions that plain PyTorch's forward can call because it records gradients."""
_REFUSED = {
    "register_hook": "register the hook inside a layer, or use a module hook",
    "register_post_accumulate_grad_hook": "register it on the parameter before training",
    "retain_grad": "keep the gradient inside a layer",
    "backward": "call backward outside of the forward",
    "grad": "call torch.autograd.grad inside a layer",
}


class DynamicOnlyError(CaptureError):
    """The trace of one forward does not stand for others: the model has to be run dynamically.

    Attributes:
        reason: why.
        where: file and line.
        eager: whether its Python has to run as it is, once: no recording of it will do.
        passing: whether that holds for what was found now only; a later call may find it as it
            was when a trace was recorded.
        remedy: what to do for it to be planned.
    """

    def __init__(
        self,
        reason: str,
        where: str,
        *,
        eager: bool = False,
        passing: bool = False,
        remedy: str = "let the forward return what it leaves, and take what changes as an input",
    ) -> None:
        super().__init__(f"{reason}, at {where}: the trace of one run does not stand for another")
        self.reason = reason
        self.where = where
        self.eager = eager
        self.passing = passing
        self.remedy = remedy

    def again(self) -> DynamicOnlyError:
        """Return it without its traceback, which would keep all that was captured alive."""
        kept = {"eager": self.eager, "passing": self.passing}
        return DynamicOnlyError(self.reason, self.where, remedy=self.remedy, **kept)


@contextmanager
def or_eager(net: nn.Module) -> Iterator[None]:
    """Let a module whose forward cannot be recorded run as it is, since plain PyTorch runs it.

    An error that is not ours may be the caller's own: then the module fails as it is too, and
    nothing is concluded for later calls.

    Raises:
        CaptureError: for modules that no way of running them takes.
        DynamicOnlyError: in the place of whatever recording raises.
    """
    check_module(net)
    try:
        yield
    except DynamicOnlyError:
        raise
    except Exception as error:
        ours = isinstance(error, CaptureError)
        other = isinstance(error, HarmonyError) and not ours
        if other or isinstance(error, torch.OutOfMemoryError) or _on_meta(net):
            raise
        text = " ".join(str(error).split())
        why = text if ours else f"{type(error).__name__}: {text}"
        raise DynamicOnlyError(
            f"the forward cannot be recorded ({why})",
            user_frame_of(error),
            eager=True,
            passing=not ours,
        ) from error


def _on_meta(net: nn.Module) -> bool:
    return any(param.device.type == "meta" for param in net.parameters())


class UnrecordableError(CaptureError):
    """Functional code does what a trace cannot hold, but a layer may: its Python runs again as it
    is.

    Attributes:
        inside: name of the module whose forward does it; None if it is none of the model's.
    """

    inside: str | None = None


def check_module(module: nn.Module) -> None:
    """Refuse wrappers, and parameters on several devices or not made yet.

    Raises:
        CaptureError: naming what is in the way.
    """
    if not isinstance(module, nn.Module):
        raise CaptureError(f"expected an nn.Module, got {type(module).__name__}")
    for name, inner in module.named_modules():
        kinds = {kind.__name__ for kind in type(inner).__mro__}
        if kinds.intersection(_WRAPPERS):
            where = f" at {name!r}" if name else ""
            raise CaptureError(
                f"the model is wrapped in {type(inner).__name__}{where}: pass the model inside "
                "it (its .module); Harmony does the parallel part"
            )
    _check_parameters(module)
    _check_attributes(module)
    irregular = irregular_state(module)
    if irregular is not None:
        raise DynamicOnlyError(irregular, type(module).__name__, eager=True)
    attribute = closes_over_module(module)
    if attribute is not None:
        raise DynamicOnlyError(
            f"{attribute} is a function that captured a module, and would go on using its "
            "weights: pass the module as an argument, or use functools.partial",
            type(module).__name__,
            eager=True,
        )


def check_function(name: str, func: Any, has_tensors: bool) -> None:
    """Refuse functions that functional code may not call.

    Raises:
        CaptureError: naming the function and the line.
    """
    check_transform(name)
    if has_tensors and name in _REFUSED and "__get__" not in str(func):
        kind = UnrecordableError if name in NEED_A_GRAPH else CaptureError
        raise kind(
            f"{name} outside of a layer at {user_frame()} cannot be replayed: {_REFUSED[name]}"
        )


def in_transform() -> bool:
    """Whether a function transform of ``torch.func`` is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def check_transform(name: str) -> None:
    """Refuse what a function transform calls: its tensors are not what they seem.

    Raises:
        UnrecordableError: naming the function and the line.
    """
    if in_transform():
        raise UnrecordableError(
            f"torch.func transform (vmap, grad, ...) around {name} at {user_frame()}: "
            "call it inside a module that is recorded as a layer"
        )


def check_outputs(leaves: Iterable[Any], name: str) -> None:
    """Let a module run as it is whose forward returns an object: a recording has but its own.

    Args:
        name: of the module.

    Raises:
        DynamicOnlyError: naming the object's class.
    """
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, _OUTPUTS):
            what = type(leaf).__name__
            raise DynamicOnlyError(f"the forward returns a {what}", name, eager=True)


def check_argument(leaf: Any, user: str) -> None:
    """Refuse arguments that hide tensors from the trace, such as KV caches.

    Raises:
        CaptureError: naming the argument's class and who gets it.
    """
    if leaf is None or isinstance(leaf, _HARMLESS):
        return
    names = [kind.__name__ for kind in type(leaf).__mro__]
    if any(name.endswith("Cache") for name in names):
        raise CaptureError(
            f"{user} gets a {names[0]} at {user_frame()}: a KV cache would be updated twice by "
            "the recompute. Call the model with use_cache=False"
        )
    check_generator(leaf, user)
    if isinstance(getattr(leaf, "__self__", None), nn.Module):
        hidden, remedy = True, "pass the module itself"
    else:
        hidden, remedy = hides_tensors(leaf), "pass the tensors as arguments"
    if hidden:
        raise UnrecordableError(
            f"{user} gets a {names[0]} at {user_frame()} that hides tensors from the recording: "
            f"{remedy}"
        )


def check_generator(leaf: Any, user: str) -> None:
    """Refuse to draw from a generator of the forward's own, before it has drawn.

    Raises:
        UnrecordableError: naming who draws, and where.
    """
    if isinstance(leaf, torch.Generator):
        raise UnrecordableError(
            f"{user} at {user_frame()} draws from a generator of the forward's own, which the "
            "recording would not make anew: draw inside a module that is recorded as a layer"
        )


def check_custom(name: str, args: tuple[Any, ...]) -> None:
    """Refuse a custom autograd function that calls back into the model.

    Raises:
        CaptureError: naming the function and the line.
    """
    if any(callable(arg) and not isinstance(arg, torch.Tensor) for arg in args):
        raise UnrecordableError(
            f"{name} at {user_frame()} gets a function: what that calls cannot be recorded. For "
            "torch.utils.checkpoint, pass use_reentrant=False"
        )


def check_in_layer(name: str, func: Any) -> None:
    """Refuse functions that not even a layer may call: the backward would run it once more.

    Raises:
        CaptureError: naming the line.
    """
    if name == "backward" and "__get__" not in str(func):
        raise CaptureError(
            f"backward inside the forward at {user_frame()} would add to gradients of parameters "
            "once more in the recompute: call torch.autograd.grad there"
        )


def check_buffers(steps: Iterable[Step], template: ModuleShell) -> None:
    """Refuse buffers that get their shape in the first forward, as those of observers do.

    Raises:
        CaptureError: naming the buffer and who writes it.
    """
    for step in steps:
        for name in step.changes:
            if template.placeholder(name).numel() == 0:
                raise CaptureError(
                    f"the buffer {name} is empty, and {step.name} at {step.where} gives it a "
                    "shape: run the module itself once, on a batch, before its first step here"
                )


def check_backward_hooks(root: nn.Module, leaves: Set[str]) -> None:
    """Refuse backward hooks of modules that are not replayed as a whole.

    Args:
        leaves: names of the modules that are.

    Raises:
        CaptureError: naming the module.
    """
    for name, module in root.named_modules():
        hooks = (*module._backward_hooks.values(), *module._backward_pre_hooks.values())
        parents = (name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1))
        if hooks and leaves.isdisjoint(parents):
            raise CaptureError(
                f"{name or type(root).__name__} has a backward hook, but a plan may part it, and "
                "then it would not run. Register it on a module inside that is one layer, or on "
                "the Harmony model for the whole"
            )


def check_unknown_tensor(tensor: torch.Tensor, user: str, fake: bool) -> None:
    """Refuse tensors of unknown origin that cannot be kept as constants.

    Raises:
        CaptureError: naming who uses it, and where.
    """
    if fake or not tensor.is_leaf:
        raise UnrecordableError(f"{user} at {user_frame()} uses a tensor of unknown origin")
    if tensor.requires_grad:
        raise CaptureError(
            f"{user} at {user_frame()} uses a tensor of shape {tuple(tensor.shape)} that requires "
            "a gradient and is no parameter of the model: make it one (register it on the module)"
        )


def hides_tensors(leaf: Any, depth: int = 0) -> bool:
    """Whether an object that is no known container holds tensors in its attributes."""
    attributes = getattr(leaf, "__dict__", None)
    if attributes is None or callable(leaf) or depth > 2:
        return False
    return any(_has_tensor(held, depth) for held in attributes.values())


def _has_tensor(held: Any, depth: int) -> bool:
    if isinstance(held, torch.Tensor):
        return True
    if isinstance(held, Mapping):
        return any(_has_tensor(inner, depth) for inner in held.values())
    if isinstance(held, (list, tuple)):
        return any(_has_tensor(inner, depth) for inner in held)
    return hides_tensors(held, depth + 1)


def _check_attributes(module: nn.Module) -> None:
    """Refuse tensors that learn but are no parameters: copies of the module would cut them off."""
    known = set(map(id, module.parameters()))
    for name, owner in module.named_modules():
        for attribute, tensor in plain_tensors(owner):
            if tensor.requires_grad and tensor.is_leaf and id(tensor) not in known:
                raise CaptureError(
                    f"{f'{name}.{attribute}'.lstrip('.')} is a tensor that requires a gradient "
                    "and is no parameter: make it an nn.Parameter"
                )


def _check_parameters(module: nn.Module) -> None:
    devices: dict[str, str] = {}
    for name, param in module.named_parameters():
        if is_lazy(param):
            raise CaptureError(f"{name} has no shape yet: run the model once before")
        if hasattr(param, "device_mesh"):
            raise CaptureError(f"{name} is a DTensor: pass the model before it is sharded")
        if param.device.type != "meta":  # that has no place yet
            devices.setdefault(str(param.device), name)
    if len(devices) > 1:
        listed = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise CaptureError(f"parameters on several devices ({listed}): move the model to one")
