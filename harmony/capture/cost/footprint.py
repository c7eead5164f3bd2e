"""Measures what a layer allocates in its forward and backward, beside what a plan knows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harmony.capture.cost.allocations import LiveBytes
from harmony.capture.cost.products import ProductBytes

Values = dict[int, torch.Tensor]
RunLayer = Callable[[Values], Values]


class Footprint(NamedTuple):
    """Bytes as ``harmony.planner.predict.cost.LayerCost`` defines them."""

    forward_nbytes: int
    saved_nbytes: int
    backward_nbytes: int
    products_nbytes: int = 0


def measure(
    run: RunLayer, inputs: Values, params: Mapping[str, torch.Tensor], seeds: frozenset[int]
) -> Footprint:
    """Run a layer forward without gradients, forward with them, and backward.

    Args:
        run: runs the layer on its inputs, returns its outputs.
        inputs: tensors by value; those that require a gradient are leaves.
        params: what the layer's parameters are bound to (`bindable`).
        seeds: outputs that the backward starts from.
    """
    known = [*inputs.values(), *params.values()]
    known += [param.grad for param in params.values() if param.grad is not None]
    with LiveBytes(known) as live, torch.no_grad():
        outputs = run(dict(inputs))
        forward = max(0, live.peak - _nbytes(outputs))
    del outputs
    with LiveBytes(known) as live:
        with torch.enable_grad(), ProductBytes() as products:
            outputs = run(dict(inputs))
        saved = max(0, live.now - live.nbytes(outputs.values()))
        roots = [t for v, t in outputs.items() if v in seeds and t.requires_grad]
        if not roots:
            return Footprint(forward, saved, 0, products.nbytes)
        gradients = [torch.empty_like(root) for root in roots]
        before = live.now
        live.reset_peak()
        torch.autograd.backward(roots, gradients)
        backward = max(0, live.peak + live.unseen - before)
        return Footprint(forward, saved, backward, products.nbytes)


def stand_in(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, requires_grad: bool
) -> torch.Tensor:
    """Return a tensor to stand for a value."""
    tensor = torch.zeros(shape, dtype=dtype, device=device)
    return tensor.requires_grad_(requires_grad)


def bindable(
    placeholder: torch.Tensor, device: torch.device, real: bool, master: torch.dtype | None
) -> torch.Tensor:
    """Return a tensor to bind for a parameter or buffer, whose gradients add up as in a step.

    Args:
        master: the type that gradients add up in, where that is another than the parameter's.
    """
    make: Any = torch.zeros if real else torch.empty
    if placeholder.device.type != "meta":
        if real:
            return placeholder.to(device)
        return torch.empty(placeholder.shape, dtype=placeholder.dtype, device=device)
    data = make(placeholder.shape, dtype=placeholder.dtype, device=device)
    param = nn.Parameter(data, requires_grad=placeholder.requires_grad)
    if param.requires_grad and master is None:
        param.grad = torch.empty_like(param)
    elif param.requires_grad:
        slot = torch.empty(param.shape, dtype=master, device=device)
        add: Any = param.register_post_accumulate_grad_hook
        add(_adding_to(slot))
    return param


def _adding_to(slot: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def hook(param: torch.Tensor) -> None:
        assert param.grad is not None, "it was made just now"
        slot.add_(param.grad)
        param.grad = None

    return hook


def pretending(real: bool) -> AbstractContextManager[Any]:
    """Compute with fake tensors, or with real ones where the layer looks at values."""
    return nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)


def _nbytes(values: Values) -> int:
    return sum(t.numel() * t.element_size() for t in values.values())
