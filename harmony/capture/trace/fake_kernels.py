"""A faster dispatch path for kernels on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from harmony.capture.guards.observe import heard

_DEVICE = torch.ops.prim.device.default


@contextmanager
def refusals_unlogged() -> Iterator[None]:
    """Keep torch from logging what a fake kernel refuses, with a page of its stack.

    It raises it as well, and whoever records goes another way or lets it through.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_off, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_off


class FakeKernels:
    """Runs kernels from inside a dispatch mode; results are those of ``func(*args, **kwargs)``.

    With a fake tensor among the arguments that call would go to the class of fake tensors, from
    there to their mode, and that would compute the result anew if there is a real tensor among
    them, such as a rotary table. Here the mode is asked at once, and gets stand-ins for real
    tensors, so that it may look up a result that it has computed before.
    """

    def __init__(self) -> None:
        self._stand_ins: dict[Any, torch.Tensor] = {}

    def run(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a kernel."""
        if FakeTensor not in types:
            return heard(func, *args, **kwargs)
        if func is _DEVICE:
            return args[0].fake_device
        if func.namespace != "aten" or not _only_fake_and_plain(tuple(types)):
            return heard(func, *args, **kwargs)
        tensors = list(_tensors(args))
        fake = next((tensor for tensor in tensors if isinstance(tensor, FakeTensor)), None)
        if fake is None:  # it is among the keyword arguments
            return heard(func, *args, **kwargs)
        mode = fake.fake_mode
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors) and _makes_new(func):
            args = tuple(self._stand_in(arg, mode) for arg in args)
        return mode.dispatch(func, types, args, kwargs)

    def _stand_in(self, arg: Any, mode: FakeTensorMode) -> Any:
        """Return a fake tensor of the form of a real one; a scalar's value may be looked at."""
        if type(arg) in (list, tuple):
            return type(arg)(self._stand_in(inner, mode) for inner in arg)
        ordinary = type(arg) is torch.Tensor and arg.layout is torch.strided
        if not ordinary or arg.dim() == 0 or arg.is_complex() or arg.is_neg():
            return arg
        form = (mode, arg.shape, arg.stride(), arg.dtype, arg.device)
        if form not in self._stand_ins:
            shape, stride = arg.shape, arg.stride()
            with mode:
                made = torch.empty_strided(shape, stride, dtype=arg.dtype, device=arg.device)
            self._stand_ins[form] = made
        return self._stand_ins[form]


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif type(arg) in (list, tuple):
            yield from (inner for inner in arg if isinstance(inner, torch.Tensor))


@cache
def _only_fake_and_plain(types: tuple[type, ...]) -> bool:
    known = (torch.Tensor, nn.Parameter, FakeTensor)
    return all(kind in known for kind in types)


@cache
def _makes_new(func: Any) -> bool:
    """Whether a kernel changes no argument and returns no view of one."""
    schema = func._schema
    return all(spec.alias_info is None for spec in (*schema.arguments, *schema.returns))
