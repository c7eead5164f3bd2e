"""Watches the construction of a model for its `InitLog`: two modes and a hook of ``nn.Module``.

The dispatch mode sees every operator. The function mode sees what operators do not show: the
functions of ``torch.nn.init``, some of which do nothing on the meta device and some of which look
at what they drew, so each is noted as a whole; ``.data = ...``; and NumPy's access.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn import init
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from harmony.errors import ConfigError
from harmony.weights.init_log import (
    SEEDED,
    InitLog,
    current_log,
    is_plain,
    suspended,
    take_apart,
    takes_only_form,
    taking,
)

MARK = "_harmony_meta_init"
"""Attribute of a parameter whose memory was taken."""

_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_AS_NUMPY = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist)
_FIXED = ("constant_", "ones_", "zeros_", "eye_", "dirac_")
_READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "_unique2")


@contextmanager
def recording(log: InitLog) -> Iterator[None]:
    """Note the construction of modules on this thread; their parameters go to meta."""
    hooks = (
        register_module_parameter_registration_hook(_on_parameter),
        register_module_buffer_registration_hook(_on_buffer),
    )
    try:
        with watching(log):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watching(log: InitLog) -> Iterator[None]:
    """Note what is done to tensors on this thread."""
    with taking(log), _Operators(log), _Functions(log):
        yield


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator."""

    def __init__(self, log: InitLog) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        log = self._log
        if log.suspended or func.is_view:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            _check_read(log, func, args)
            if takes_only_form(func) and args[0].is_meta:
                kwargs = {"device": torch.device("cpu"), **kwargs}  # it has a value, be it zeros
            call = take_apart(log, func, args, kwargs, SEEDED in func.tags)
            out = _run(log, func, args, kwargs)
            if not call.tensors and isinstance(out, torch.Tensor) and _makes(func):
                # What it left open came from the defaults of this moment.
                kwargs = {**kwargs, "dtype": out.dtype}
                call = take_apart(log, func, args, kwargs, call.random)
            log.note(call, out)
        return out


class _Functions(TorchFunctionMode):
    """Notes what operators do not show."""

    def __init__(self, log: InitLog) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        log = self._log
        if log.suspended:
            return func(*args, **kwargs)
        if getattr(func, "__module__", None) == init.__name__:
            return _initialise(log, func, kwargs if not args else _named(func, args, kwargs))
        if func == _IS_META:
            frame = sys._getframe(1)
            if frame.f_code.co_filename == init.__file__:
                _initialise(log, *_call_of(frame))
                return True  # that it is done: the function returns at once
        if func == _SET_DATA:
            return _set_data(log, args[0], args[1])
        if func in _AS_NUMPY:
            _release(log, args[0])
        return func(*args, **kwargs)


def _initialise(log: InitLog, func: Any, kwargs: dict[str, Any]) -> Any:
    """Note a call of a function of ``torch.nn.init``; run it if its tensor is real."""
    with suspended(log):
        tensors = [leaf for leaf in tree_flatten(kwargs)[0] if isinstance(leaf, torch.Tensor)]
        call = take_apart(log, func, (), kwargs, func.__name__ not in _FIXED)
        if not any(tensor.is_meta for tensor in tensors):
            func(**kwargs)
        log.note(call, None)
    return tensors[0] if tensors else None


def _named(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    return dict(bound.arguments)


def _call_of(frame: FrameType) -> tuple[Any, dict[str, Any]]:
    """The function that a frame runs, and the arguments that it was called with."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return getattr(init, code.co_name), {name: frame.f_locals[name] for name in names}


def _run(log: InitLog, func: Any, args: Any, kwargs: Any) -> Any:
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        leaves = tree_flatten((args, kwargs))[0]
        if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves):
            raise ConfigError(_no_value(str(func), error)) from error
        raise


def _check_read(log: InitLog, func: Any, args: Any) -> None:
    """Python looks at a content: it must be there, and count from now on."""
    name = func.overloadpacket.__name__
    if name not in _READS:
        return
    for tensor in tree_flatten(args)[0]:
        if isinstance(tensor, torch.Tensor):
            if tensor.is_meta:
                raise ConfigError(_no_value(name, None))
            number = log.number_of(tensor)
            if number is not None and log.storages[number].drawn:
                log.forget_drawn()


def _release(log: InitLog, tensor: torch.Tensor) -> None:
    """NumPy may read or write the content without anybody seeing it."""
    with suspended(log):
        number = log.number_of(tensor)
        if number is not None and log.storages[number].drawn:
            log.forget_drawn()
        if not tensor.is_meta:
            log.forget(tensor)


def _makes(func: Any) -> bool:
    return any(argument.name == "dtype" for argument in func._schema.arguments)


def _set_data(log: InitLog, tensor: torch.Tensor, value: torch.Tensor) -> None:
    """``tensor.data = value`` where one of them is a parameter without memory."""
    with suspended(log):
        if tensor.is_meta and not value.is_meta:
            value = log.shadow(value)
        tensor.data = value


def _on_parameter(module: nn.Module, name: str, param: Any) -> None:
    """Take the memory of a parameter that a module registers; it stays the same object."""
    log = current_log()
    if log is None or log.suspended or param is None:
        return
    if is_lazy(param):
        raise ConfigError(
            f"{type(module).__name__}.{name} gets its shape when the model first runs, so it "
            "cannot be built without memory: give the layer its sizes, or build it outside of "
            "harmony.meta_init()"
        )
    if not is_plain(param):
        raise ConfigError(
            f"{type(module).__name__}.{name} is a {type(param).__name__} ({param.layout}), not an "
            "ordinary parameter (is the model quantised?): build it outside of harmony.meta_init()"
        )
    if param.device.type != "cpu":
        return
    with suspended(log):
        replace(param, nn.Parameter(log.shadow(param), requires_grad=param.requires_grad))
        param.__dict__[MARK] = True


def _on_buffer(module: nn.Module, name: str, buffer: Any) -> None:
    log = current_log()
    if log is None or log.suspended or not isinstance(buffer, torch.Tensor):
        return
    with suspended(log):
        if buffer.is_meta:
            raise ConfigError(
                f"buffer {type(module).__name__}.{name} is computed from parameters, which have "
                "no values inside harmony.meta_init(): build this model outside of it"
            )


def _no_value(what: str, error: Exception | None) -> str:
    because = "" if error is None else f" ({type(error).__name__}: {error})"
    return (
        f"the model's construction looks at the values of a parameter ({what}){because}, which "
        "has none inside harmony.meta_init(): build this model outside of it"
    )


def replace(tensor: torch.Tensor, fresh: torch.Tensor) -> None:
    """Give a tensor the memory of another, which may be on another device; it stays the object.

    Raises:
        RuntimeError: if weak references or a graph hold on to it.
    """
    fresh.__dict__.update(tensor.__dict__)
    if tensor._backward_hooks:
        fresh._backward_hooks = tensor._backward_hooks
    if tensor._post_accumulate_grad_hooks:
        fresh._post_accumulate_grad_hooks = tensor._post_accumulate_grad_hooks
    if not weakref.getweakrefs(tensor):
        torch.utils.swap_tensors(tensor, fresh)  # type: ignore[no-untyped-call]
        return
    # RNNs keep weak references to their parameters, which `swap_tensors` refuses; the object they
    # refer to stays, so they may.
    if tensor._use_count() > 1:  # type: ignore[attr-defined]
        raise RuntimeError(f"{tensor._use_count()} references")  # type: ignore[attr-defined]
    tensor.__dict__, fresh.__dict__ = fresh.__dict__, tensor.__dict__
    torch._C._swap_tensor_impl(tensor, fresh)
