"""Settings of PyTorch, and functions put in the place of its own, that change what is computed.

A recording stands only while they are as they were: they are part of the key of a call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from harmony.errors import ConfigError

_NAMES = (
    *("_get_deterministic_algorithms", "_get_mkldnn_enabled"),
    *("_get_deterministic_algorithms_warn_only", "_get_mkldnn_deterministic", "_get_qengine"),
    *("_get_nnpack_enabled", "_get_cudnn_enabled", "_get_cudnn_benchmark"),
    *("_get_cudnn_deterministic", "_get_flash_sdp_enabled", "_get_mem_efficient_sdp_enabled"),
    *("_get_math_sdp_enabled", "_get_cudnn_sdp_enabled", "_get_linalg_preferred_backend"),
    "_get_cublas_allow_fp16_reduced_precision_reduction",
    "_get_cublas_allow_bf16_reduced_precision_reduction",
)
"""Not every torch has all of them."""

_PRECISIONS = (
    *(("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")),
    *(("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")),
)


def _getters() -> Iterable[Callable[[], Any]]:
    yield torch.get_default_dtype
    for name in _NAMES:
        getter = getattr(torch._C, name, None)
        if getter is not None:
            yield getter
    of_kind = getattr(torch._C, "_get_fp32_precision_getter", None)
    if of_kind is None:
        yield torch.get_float32_matmul_precision
    else:
        yield from (partial(of_kind, *kind) for kind in _PRECISIONS)


_GETTERS = tuple(_getters())
_MOST_PATCHES = 64
_FUNCTIONAL = dict(vars(F))


class _Functions:
    """The functions of torch's namespaces, and which of them the program has replaced."""

    def __init__(self) -> None:
        self._of = [(vars(module), _functions(module)) for module in (torch, F)]
        self._known: list[list[Any]] = [[]]
        self._last = 0

    def number(self) -> int:
        """Of what there is now: the same for the same functions.

        Raises:
            ConfigError: if one that a recording would run twice is another.
        """
        now = self._now()
        if now != self._known[self._last]:
            _check_replaced()
            found = (i for i, known in enumerate(self._known) if known == now)
            self._last = next(found, -1)
            if self._last < 0:
                del self._known[_MOST_PATCHES:]
                self._last = len(self._known)
                self._known.append(now)
        return self._last

    def _now(self) -> list[Any]:
        now = list(vars(torch.Tensor).values())
        for held, take in self._of:
            now += take(held)
        return now


def _check_replaced() -> None:
    """Refuse other functions in the place of those that hand themselves to a mode by their name.

    These are the methods of tensors and what `torch.nn.functional` has in Python. A recording,
    which is such a mode, would see the new one inside of itself, and run it twice.
    """
    own = torch._C.TensorBase
    methods = ((n, f) for n, f in vars(torch.Tensor).items() if hasattr(own, n))
    functions = (
        (n, vars(F).get(n)) for n, f in _FUNCTIONAL.items() if isinstance(f, FunctionType)
    )
    for place, pairs in (("torch.Tensor", methods), ("torch.nn.functional", functions)):
        for name, held in pairs:
            module = getattr(held, "__module__", None) or "torch"
            if isinstance(held, FunctionType) and module.split(".")[0] != "torch":
                code = held.__code__
                raise ConfigError(
                    f"{place}.{name} was replaced at {code.co_filename}:{code.co_firstlineno}, "
                    "which a recording would run twice. Call the new function by a name of its own"
                )


def _functions(module: ModuleType) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    names = [n for n, f in vars(module).items() if callable(f) and not isinstance(f, type)]
    return operator.itemgetter(*names)


_FUNCTIONS = _Functions()


def torch_settings() -> Hashable:
    """Return what decides how PyTorch computes, beside a call's own arguments.

    Raises:
        ConfigError: inside of `parametrize.cached`, or where functions were replaced.
    """
    if parametrize._cache_enabled:
        raise ConfigError(
            "torch.nn.utils.parametrize.cached() is on: it would keep the parameters of one pack "
            "and microbatch for the next. Call the Harmony model outside of it"
        )
    modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    devices = tuple(str(mode.device) for mode in modes if isinstance(mode, DeviceContext))
    return tuple([getter() for getter in _GETTERS]), _FUNCTIONS.number(), devices


def mode_of_users() -> str | None:
    """Name a mode of the program's own that sees every function, if one is on."""
    modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    own = (mode for mode in modes if not isinstance(mode, DeviceContext))
    return next((type(mode).__name__ for mode in own), None)
