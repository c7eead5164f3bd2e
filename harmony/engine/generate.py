"""``generate`` of Hugging Face models whose parameters stay on the host."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harmony.capture import StreamedModule
from harmony.engine.precision import Precision
from harmony.weights.meta_init import check_values


def generate(
    net: nn.Module,
    device: torch.device,
    precision: Precision,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run ``net.generate(*args, **kwargs)`` with its forwards on ``device``.

    The parameters are streamed through the device once a token, because decoding is sequential;
    a cache of keys and values stays there.
    """
    check_values(net)
    streamed = StreamedModule(net, device, precision.dtype)

    @functools.wraps(net.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = precision.cast((args, kwargs))
        return streamed(*args, **kwargs)

    net.__dict__["forward"] = forward  # `generate` calls the module, whoever calls `generate`
    try:
        return net.generate(*args, **kwargs)  # type: ignore[operator]
    finally:
        del net.__dict__["forward"]
