"""Kernels on fake tensors: the short way gives what the long way gives, and does not grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from harmony.capture import capture
from harmony.capture.trace.kernels import KernelWatch


def rotary(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    half = torch.cat((-x[..., 2:], x[..., :2]), dim=-1)
    return x * table.cos() + half * table.sin()


CASES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a real table": rotary,
    "a list with both": lambda x, table: torch.cat([x, table, x]),
    "a real result first": lambda x, table: table.expand(3, 6, 4) + x,
    "other types": lambda x, table: x * table.double() + table.to(torch.bfloat16),
    "a scalar": lambda x, table: torch.where(x > 0, x, table[0, 0]) * torch.tensor(2.0),
    "several results": lambda x, table: (x + table).max(dim=-1),
    "in place": lambda x, table: x.clone().mul_(table).view(4, 6),
    "a real tensor changed": lambda x, table: table.clone().add_(x),
    "a view": lambda x, table: x.t()[1:],
    "matrices": lambda x, table: F.linear(x, table),
    "embedding": lambda x, table: F.embedding(table.abs().long() % 6, x),
    "strides": lambda x, table: x.t() * table.t(),
    "device": lambda x, table: torch.zeros(3, device=x.device) + table[:, :3] * x[:, :3],
    "keywords": lambda x, table: torch.add(input=x, other=table, alpha=2),
    "attention": lambda x, table: F.scaled_dot_product_attention(x[None], x[None], table[None]),
}


def forms(results: Any) -> list[Any]:
    return [
        (type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.storage_offset())
        for t in tree_leaves(results)
        if isinstance(t, torch.Tensor)
    ]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grad", [True, False])
def test_results_have_the_form_that_pytorch_gives_them(name: str, grad: bool) -> None:
    table = torch.linspace(-1, 1, 24).view(6, 4)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = nn.Parameter(torch.empty(6, 4), requires_grad=grad)
    expected = CASES[name](x, table)
    with KernelWatch(fake=True):
        found = CASES[name](x, table)
        again = CASES[name](x, table)
    assert forms(found) == forms(again) == forms(expected)
    assert isinstance(tree_leaves(found)[0], FakeTensor) == isinstance(
        tree_leaves(expected)[0], FakeTensor
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(self.norm(x)) * table)


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.arange(8.0).cos()
        x = self.first(x)
        for block in self.blocks:
            x = block(x, table.unsqueeze(0))
        return x


def test_the_forms_of_repeated_blocks_are_computed_once() -> None:
    """What makes the capture of 80 blocks fast: the fake mode looks them up."""

    def computed(depth: int) -> int:
        FakeTensorMode.cache_clear()
        captured = capture(Stack(depth), (torch.randn(4, 8),))
        assert captured.graph.num_layers == depth + 1
        info = FakeTensorMode.cache_info()
        bypasses = sum(count for why, count in info.bypasses.items() if "non-fake" in why)
        return info.misses + bypasses

    few = computed(3)
    assert computed(12) == few
