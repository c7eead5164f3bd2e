"""What a wrapped module shows of the module inside: its class, its names, its state, its modes.

A script that does not know of the wrapper sees the module: `isinstance`, ``forward``'s signature,
attributes that it reads, sets and deletes, children, and the way of a state dict into it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch._guards import TracingContext
from torch.nn.parameter import is_lazy

from harmony.capture.replay.shell import is_compiled
from harmony.core.units import listed
from harmony.core.warn import warn
from harmony.engine.bypass import Bypass, runs
from harmony.engine.engine import Engine
from harmony.engine.trainer_steps import keep_steps_in_trainers
from harmony.errors import ConfigError, HarmonyError
from harmony.runtime.interrupts import held_back
from harmony.runtime.unsaved import about_to_change
from harmony.weights.meta_init import make_room

Self = TypeVar("Self", bound="Wrapper")

_SHARED = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_modules",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)
"""What a module has registered; the wrapper has the same dictionaries, not copies of them."""


_stands_for: WeakKeyDictionary[Callable[..., Any], Callable[..., Any]] = WeakKeyDictionary()
"""A forward of a wrapper -> the one of the module."""


class ShownForward:
    """The wrapper's ``forward``, with the signature of the wrapped module's.

    Libraries read it to know which columns of a data set a model takes, and keep it to call it
    from a forward that they put in its place. While Harmony runs the module, what was kept is the
    module's forward of that time.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    @_disable_dynamo
    def __get__(self, wrapper: Wrapper | None, owner: type | None = None) -> Any:
        if wrapper is None:
            return self._run
        forward = wrapper._net.forward
        shown = wrapper.__dict__.get("_forward_shown")
        if shown is None or _stands_for[shown] != forward:
            shown = wrapper.__dict__["_forward_shown"] = _shown(self._run, wrapper._net, forward)
        return MethodType(shown, wrapper)


def _shown(run: Callable[..., Any], net: nn.Module, forward: Callable[..., Any]) -> Any:
    """Return a method of the wrapper that is seen as ``forward``, the module's."""

    def shown(called: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(called, Wrapper) and not runs(net):
            return run(called, *args, **kwargs)
        if isinstance(called, Wrapper) or not isinstance(forward, MethodType):
            return forward(*args, **kwargs)
        return forward.__func__(called, *args, **kwargs)  # the module, or a copy of it

    found: Any = _disable_dynamo(shown)
    _stands_for[found] = forward
    found.__doc__ = forward.__doc__
    del found.__wrapped__  # along it, libraries take off what they have put around a forward
    if isinstance(forward, MethodType):
        found.__wrapped__ = forward.__func__
    try:
        known = inspect.signature(forward)
    except (TypeError, ValueError):  # some callables have none
        return found
    itself = inspect.Parameter("_wrapper", inspect.Parameter.POSITIONAL_ONLY)
    found.__signature__ = known.replace(parameters=[itself, *known.parameters.values()])
    return found


class _Seen(dict[str, Any]):
    """A wrapper's ``__dict__``: whoever asks it by ``get`` also finds the module's attributes."""

    def __init__(self, own: Mapping[str, Any], net: nn.Module) -> None:
        super().__init__(own)
        self._net = net

    def get(self, name: str, default: Any = None) -> Any:
        """Return the wrapper's attribute, or else the module's."""
        return self[name] if name in self else self._net.__dict__.get(name, default)


def _operator(name: str) -> Callable[..., Any]:
    def run(wrapper: Wrapper, *args: Any) -> Any:
        return getattr(type(wrapper._net), name)(wrapper._net, *args)

    run.__name__ = name
    return run


def _with_operators(wrapper: type, net: type) -> type:
    """Return a wrapper's class with the operators that a module's class adds to `nn.Module`'s.

    ``model[0]``, ``len(model)`` and ``for layer in model`` ask the class, not the object.
    """
    found = {
        name: _operator(name)
        for name in dir(net)
        if name.startswith("__") and name.endswith("__") and not hasattr(wrapper, name)
        if isinstance(inspect.getattr_static(net, name), FunctionType) and name != "__del__"
    }
    names = {"__module__": wrapper.__module__, "__qualname__": wrapper.__qualname__}
    return type(wrapper.__name__, (wrapper,), {**found, **names}) if found else wrapper


class Wrapper(nn.Module):
    """A module in front of another, which is seen as if it were that other.

    ``type(wrapper)`` is the wrapper's class, ``wrapper.__class__`` the module's, so that it is an
    instance of both.
    """

    _net: nn.Module
    _engine: Engine
    _bypass: Bypass
    hf_device_map: Mapping[str, torch.device]

    def _show(self, net: nn.Module) -> None:
        """Be seen as ``net`` from now on."""
        own = {**self.__dict__, **{name: net.__dict__[name] for name in _SHARED}}
        del own["training"]  # the module's is the only one
        object.__setattr__(self, "__dict__", _Seen(own, net))
        # Not registered as a child: names of parameters are the module's own, without a prefix.
        self.__dict__["_net"] = net
        vars(object)["__class__"].__set__(self, _with_operators(type(self), type(net)))
        super().register_load_state_dict_post_hook(_restored)  # type: ignore[no-untyped-call]

    def register_load_state_dict_post_hook(self, hook: Any) -> Any:
        """Have a hook called when a state was loaded, as the wrapped module does."""
        return self._net.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]

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
        about_to_change(self._net.parameters())
        with held_back():
            result = self._net.load_state_dict(state_dict, strict=strict, assign=assign)
            self._engine.restored(getattr(result, "missing_keys", ()))
        return result

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Load what the wrapped module itself holds, for a module around this one."""
        if not local_metadata.get("assign_to_params_buffers", False):
            make_room(self._net, {n[len(prefix) :]: t for n, t in state_dict.items()})
        about_to_change(self._net.parameters())
        self.__dict__["_loaded_as"] = prefix
        self._net._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def train(self: Self, mode: bool = True) -> Self:
        """Set training or evaluation mode of the wrapped module."""
        self._net.train(mode)
        return self

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Freeze or unfreeze all parameters."""
        self._net.requires_grad_(requires_grad)
        return self

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The wrapped module's class, which libraries ask for to know what a model is."""
        net = self.__dict__.get("_net")
        # TorchDynamo takes what it traces from `__class__`, and would trace the module.
        if net is None or TracingContext.try_get() is not None:
            return type(self)
        return cast(type, net.__class__)

    def __getattr__(self, name: str) -> Any:
        net = self.__dict__.get("_net")
        if net is None or hasattr(type(self), name):
            raise AttributeError(name)
        if name == "hf_device_map":
            keep_steps_in_trainers()  # a Trainer asks for it before it makes its callbacks
            # Libraries of Hugging Face move no model that has one, nor replicate it over the GPUs.
            return {"": torch.device("cpu")}
        if name == "generate" and hasattr(net, name):
            return self._engine.generate
        return getattr(net, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the wrapped module, whose forward reads it.

        The wrapper's own are those of its class, and notes that a library makes of the object that
        it was given: private names that the module does not have.
        """
        if name == "forward":
            setattr(self._net, name, self._for_net(value))
        elif self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self._net, name, value)

    def __delattr__(self, name: str) -> None:
        if name != "forward" and self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self._net, name)

    def _for_net(self, forward: Any) -> Any:
        """Return the module's forward for one that a script has put in the wrapper's place."""
        if not isinstance(forward, MethodType) or forward.__self__ is not self:
            return forward
        return _stands_for.get(forward.__func__) or MethodType(forward.__func__, self._net)

    def _is_own(self, name: str) -> bool:
        if name in self.__dict__ or "_net" not in self.__dict__ or hasattr(type(self), name):
            return True
        return name.startswith("_") and not hasattr(self._net, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._net)})  # type: ignore[no-untyped-call]

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


def _restored(wrapper: Wrapper, incompatible: Any) -> None:
    """Note that a module around the wrapper has loaded a state."""
    prefix = wrapper.__dict__.pop("_loaded_as", "")
    missing = (name for name in incompatible.missing_keys if name.startswith(prefix))
    wrapper._engine.restored([name[len(prefix) :] for name in missing])
    for hook in wrapper._net._load_state_dict_post_hooks.values():
        hook(wrapper._net, incompatible)


def check_module(module: nn.Module) -> None:
    """Refuse to wrap what hides its layers, or has none yet.

    Raises:
        ConfigError: saying what to wrap instead.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"Harmony wraps an nn.Module, not {type(module).__name__}")
    if isinstance(module, Wrapper):
        raise ConfigError("the module is a Harmony model already: wrap it once")
    if type(module).__name__ == "OptimizedModule":
        raise ConfigError(
            "the module is compiled by torch.compile, which hides its layers: wrap the module "
            "that it was made of, Harmony(net) in the place of Harmony(torch.compile(net))"
        )
    compiled = [n for n, part in module.named_modules() if is_compiled(part)]
    if compiled:
        warn(
            f"{listed(compiled, 1)} compiled by torch.compile: Harmony runs layers as they were "
            "written, without compiling them. Results are those without torch.compile"
        )
    lazy = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if is_lazy(t)]
    if lazy:
        raise ConfigError(
            f"{lazy[0]} has no shape yet, as its module is lazy: run the module once, on a batch, "
            "before you wrap it (with torch.no_grad(): module(inputs))"
        )
