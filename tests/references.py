"""What a test computes on the host beside Harmony, by a real GPU: references have its bits.

References are plain PyTorch on the host: a copy of the model, a loop, an optimizer. A real GPU's
kernels have other last bits than the host's. So where tests run on real GPUs each kernel for
numbers of floating point that a test's own code calls on the host runs on the first GPU: its
arguments go there as they lie in memory, its results come back. What Harmony itself, optimizers,
clipping and initialisation compute on the host stays there, as it does for both sides, and so do
random numbers that no forward draws, or draws one at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.library import _scoped_library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import harmony

_TORCH = Path(torch.__file__).parent
_HOSTS = (
    str(Path(harmony.__file__).parent) + "/",
    *(str(_TORCH / part) for part in ("optim/", "nn/utils/clip_grad.py", "nn/init.py")),
)
"""Code whose kernels stay on the host."""

_PASSES_ON = tuple(
    str(Path(harmony.__file__).parent / part)
    for part in ("runtime/update/first_access.py", "engine/bypass.py")
)
"""Code of Harmony's that calls what the test has called."""

_MODULES = str(_TORCH / "nn" / "modules" / "module.py")
_ORDINARY = (torch.Tensor, nn.Parameter, nn.Buffer)

_ABOUT_MEMORY = frozenset(
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "_to_copy", "clone", "copy_", "equal", "is_same_size", "set_"),
        *("_pin_memory", "is_pinned", "record_stream", "resize_", "resize_as_"),
        *("empty_like", "new_empty", "new_empty_strided"),
    )
)
"""Kernels that compute nothing."""

_COMPOSITES = (
    *("dropout", "feature_dropout", "alpha_dropout", "scaled_dot_product_attention"),
    *("batch_norm", "lstm.input", "lstm.data", "gru.input", "gru.data"),
    *("rnn_tanh.input", "rnn_tanh.data", "rnn_relu.input", "rnn_relu.data"),
)
"""What chooses its kernels by the device goes there whole."""

_WRITTEN = {"aten::batch_norm": (3, 4), "aten::native_batch_norm": (3, 4)}
"""Arguments that a kernel writes though its schema does not say so."""


@contextmanager
def computed_on(device: torch.device) -> Iterator[None]:
    """Let a GPU compute what the block computes on the host beside Harmony.

    The test is skipped if the host computes something of which a GPU has no kernel.
    """
    with ExitStack() as stack:
        library = stack.enter_context(_scoped_library("aten", "IMPL"))
        for name in _COMPOSITES:
            packet, _, overload = name.partition(".")
            func = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, partial(_whole, func, device), "AutogradCPU")
        stack.enter_context(_There(device))
        yield


class _There(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs a kernel that was called for the host on a GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _computes(func):
            return func(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        draws = torch.Tag.nondeterministic_seeded in func.tags
        if not tensors and draws:
            alone = [] in args  # one number is drawn for Python's own use
            if not alone and _is_the_tests(in_forward=True):
                return func(*args, **{**kwargs, "device": self.device}).cpu()
        if not _may_go(tensors, args, kwargs, draws) or not _is_the_tests(in_forward=draws):
            return func(*args, **kwargs)
        if not all(tensor.numel() for tensor in _written(func, args, kwargs)):
            return func(*args, **kwargs)  # of an observer, which gives it a size
        return self._computed(func, args, kwargs)

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "CUDA"):
            pytest.skip(f"the host computes {func.name()}, of which a GPU has no kernel")
        there: dict[int, torch.Tensor] = {}
        here: dict[int, torch.Tensor] = {}

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in there:
                there[id(tensor)] = _as_it_lies(tensor, self.device)
                here[id(there[id(tensor)])] = tensor
            return there[id(tensor)]

        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": self.device}
        with torch.no_grad():
            found = func(
                *tree_map_only(torch.Tensor, moved, args),
                **tree_map_only(torch.Tensor, moved, kwargs),
            )
            for tensor in _written(func, args, kwargs):
                # The host writes to it, as the test has it, and no copy of the GPU's.
                tensor.copy_(there[id(tensor)].cpu())
            return tree_map_only(torch.Tensor, partial(_back, here), found)


def _whole(func: Any, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """Run a composite on a GPU; its arguments' gradients come back to the host."""
    tensors = _tensors((args, kwargs))
    if not _may_go(tensors, args, kwargs, draws=False) or not _is_the_tests():
        return func.decompose(*args, **kwargs)
    here: dict[int, torch.Tensor] = {}

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        there = tensor.to(device)
        here[id(there)] = tensor
        return there

    args_there, kwargs_there = tree_map_only(torch.Tensor, moved, (args, kwargs))
    found = func(*args_there, **kwargs_there)
    for place in _WRITTEN.get(func.name(), ()):
        if args[place] is not None:
            args[place].data.copy_(args_there[place])
    return tree_map_only(torch.Tensor, partial(_back, here), found)


def _back(here: dict[int, torch.Tensor], there: torch.Tensor) -> torch.Tensor:
    """Return an argument itself where a kernel returns it, else what it made, on the host."""
    return here[id(there)] if id(there) in here else there.to("cpu")


@cache
def _computes(func: Any) -> bool:
    """Whether a kernel does more than to make, move or view memory."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in _returns(func))
    return func.namespace == "aten" and not views and func._schema.name not in _ABOUT_MEMORY


def _returns(func: Any) -> Any:
    return func._schema.returns


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _may_go(tensors: list[torch.Tensor], args: Any, kwargs: Any, draws: bool) -> bool:
    """Whether a kernel is the host's, of floating point, and draws from no generator given."""
    ordinary = all(
        type(t) in _ORDINARY and t.device.type == "cpu" and t.layout is torch.strided
        for t in tensors
    )
    if not tensors or not ordinary or "out" in kwargs:
        return False
    if not draws and not any(t.is_floating_point() or t.is_complex() for t in tensors):
        return False
    return not any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs)))


def _is_the_tests(in_forward: bool = False) -> bool:
    """Whether a test's own code runs; in a module's forward, if that is asked."""
    frame: Any = sys._getframe(2)
    found = not in_forward
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_HOSTS) and name not in _PASSES_ON:
            return False
        found = found or name == _MODULES
        frame = frame.f_back
    return found


def _as_it_lies(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device with the strides that it has, since kernels are chosen by them."""
    if tensor.is_conj() or tensor.is_neg() or not tensor.numel():
        return tensor.to(device)
    places = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in places)
    lying = tensor.detach().as_strided((extent,), (1,)).to(device)
    return lying.as_strided(tensor.shape, tensor.stride())


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a kernel writes among its arguments."""
    hidden = _WRITTEN.get(func._schema.name, ())
    for place, argument in enumerate(func._schema.arguments):
        says_so = argument.alias_info is not None and argument.alias_info.is_write
        if says_so or place in hidden:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from _tensors(given)
