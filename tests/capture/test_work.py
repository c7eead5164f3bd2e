"""What is counted of a layer: bytes, as a step moves them."""

from __future__ import annotations

import torch
from torch import nn

from harmony.capture import capture
from harmony.capture.cost.work import work_of


def test_gradients_in_bf16_count_as_they_add_up_in_fp32() -> None:
    """Of each element 2 bytes are read, and 4 are read and written; of fp32's 4, 4 and 4."""
    net, x = nn.Linear(32, 16, bias=False), torch.randn(4, 32)
    counted = {}
    for dtype, given in ((None, x), (torch.bfloat16, x.bfloat16())):
        captured = capture(net, (given,), param_dtype=dtype)
        counted[dtype] = sum(layer.backward.other_nbytes for layer in work_of(captured, 4))
    elements = 32 * 16
    assert counted[torch.bfloat16] == 10 * elements
    assert counted[None] == 12 * elements
