"""Costs without measuring: counted FLOPs and bytes, and the roofline of a GPU."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from harmony.capture import capture
from harmony.capture.cost.work import work_of
from harmony.errors import PlanError
from harmony.planner.predict.cost import CostTable
from harmony.profiling.analytic import (
    LayerWork,
    Work,
    WorkTable,
    analytic_costs,
    scaled_costs,
    sizes_up_to,
    step_flops,
    work_seconds,
)
from harmony.profiling.catalog import LAUNCH_S, MEMORY_SHARE, find_gpu
from tests.toys import chain, uniform_costs

A100 = find_gpu("A100")


class Block(nn.Module):
    """A GPT-2 block as the original Harmony ran it: attention written out, GELU by tanh."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop, self.heads = nn.Dropout(0.1), heads
        # Not on the meta device, whatever is around: a buffer has values.
        mask = torch.ones(context, context, device="cpu").tril().view(1, 1, context, context)
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        parts = self.qkv(self.norms[0](x)).split(width, 2)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(shape[-1])
        scores = scores * self.mask - 1e4 * (1 - self.mask)
        mixed = torch.matmul(self.drop(scores.softmax(-1)), v).transpose(1, 2)
        x = x + self.drop(self.out(mixed.reshape(batch, length, width)))
        h = self.up(self.norms[1](x))
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return x + self.drop(self.down(h))


def counted(net: nn.Module, batch: torch.Tensor, num_samples: int, layer: int = 0) -> LayerWork:
    counts = work_of(capture(net, (batch,)), num_samples)[layer]
    return LayerWork(Work(*counts.forward), Work(*counts.backward))


def test_products_are_counted_forward_and_backward() -> None:
    work = counted(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16)), torch.ones(8, 32), 4, 1)
    assert work.forward.flops == {"fp32": 2 * 4 * 64 * 16}
    assert work.backward.flops == {"fp32": 2 * 2 * 4 * 64 * 16}
    # Weights, bias, input and output, each once.
    assert work.forward.product_nbytes == 4 * (64 * 16 + 16 + 4 * 64 + 4 * 16)
    assert work.forward.other_nbytes == 0
    assert work.forward.num_kernels == 1


def test_the_backward_of_a_first_layer_has_no_gradient_of_its_input() -> None:
    work = counted(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16)), torch.ones(8, 32), 4, 0)
    assert work.backward.flops == {"fp32": 2 * 4 * 32 * 64}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = (x * self.scale).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(q, q, q).squeeze(1)


def test_fused_attention_is_counted() -> None:
    work = counted(nn.Sequential(Attention(), nn.Linear(8, 8)), torch.ones(4, 16, 8), 2)
    one = 2 * 2 * 16 * 16 * 8
    assert work.forward.flops == {"fp32": 2 * one}
    assert work.backward.flops["fp32"] >= 4 * one


def test_reduced_precision_is_told_apart() -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16)).bfloat16()
    work = counted(net, torch.ones(8, 32, dtype=torch.bfloat16), 4, 1)
    assert work.forward.flops == {"bf16": 2 * 4 * 64 * 16}


def test_of_a_table_only_the_rows_that_are_looked_up_are_read() -> None:
    net = nn.Sequential(nn.Embedding(100_000, 16), nn.Linear(16, 4))
    work = counted(net, torch.zeros(8, 3, dtype=torch.long), 8)
    assert work.forward.other_nbytes < 10_000


@pytest.mark.parametrize(
    ("width", "heads", "num_samples", "forward_s", "backward_s"),
    [
        # GPT2-XL: block 5 of the profile, forward, and backward less the forward that it holds.
        (1600, 25, 1, 0.014024592, 0.039603257 - 0.014024592),
        (1600, 25, 4, 0.051788417, 0.145673732 - 0.051788417),
        # GPT2-10B.
        (4096, 32, 1, 0.053625354, 0.11558399),
        (4096, 32, 4, 0.217232857, 0.484570279),
    ],
)
def test_the_roofline_meets_what_was_measured_on_a_gtx_1080_ti(
    width: int, heads: int, num_samples: int, forward_s: float, backward_s: float
) -> None:
    """Measured by the authors of Harmony (github.com/msr-fiddle/harmony, MIT licence, 5fd838f)."""
    with torch.device("meta"):
        net = nn.Sequential(Block(width, heads, 1024), Block(width, heads, 1024))
    work = counted(net, torch.empty(4, 1024, width), num_samples, 1)
    gpu = find_gpu("GTX 1080 Ti")
    assert work_seconds(work.forward, gpu) == pytest.approx(forward_s, rel=0.15)
    assert work_seconds(work.backward, gpu) == pytest.approx(backward_s, rel=0.15)


def test_the_roofline_is_the_longer_of_compute_and_memory() -> None:
    bandwidth = A100.memory_bytes_per_s * MEMORY_SHARE
    compute = Work({"bf16": 1e12}, 1e6, 0.0, 1)
    assert work_seconds(compute, A100) == pytest.approx(1e12 / (312e12 * 0.87))
    memory = Work({"bf16": 1e6}, 1e9, 0.0, 1)
    assert work_seconds(memory, A100) == pytest.approx(1e9 / bandwidth)
    others = Work({}, 0.0, 2e9, 1)
    assert work_seconds(memory + others, A100) == pytest.approx(3e9 / bandwidth)
    assert work_seconds(Work({}, 0.0, 10.0, 100), A100) == pytest.approx(100 * LAUNCH_S)


def test_fp32_products_are_faster_as_tf32_where_the_gpu_has_it() -> None:
    work = Work({"fp32": 1e12}, 1e6, 0.0, 1)
    assert work_seconds(work, A100, tf32=True) < work_seconds(work, A100) / 5
    old = find_gpu("GTX 1080 Ti")
    assert work_seconds(work, old, tf32=True) == work_seconds(work, old)
    assert work_seconds(Work({"fp64": 1e12}), A100) == 2 * work_seconds(work, A100)


def table(layers: int) -> WorkTable:
    one, four = Work({"fp32": 3e9}, 4e6, 5e6, 7), Work({"fp32": 12e9}, 13e6, 20e6, 7)
    rows = {1: LayerWork(one, one + one), 4: LayerWork(four, four + four)}
    return WorkTable((rows,) * layers)


LINES = ((2, 3.0), (4, 7.0), (8, 25.0))


def test_work_lies_on_the_line_through_what_was_counted() -> None:
    work = table(1)
    assert work.layer(0, 4) is work.by_layer[0][4]
    assert work.layer(0, 2).forward == Work({"fp32": 6e9}, 7e6, 10e6, 7)
    assert work.layer(0, 8).backward.flops == {"fp32": 48e9}
    # Beyond the counted sizes, too, on the line through the two that are nearest.
    rows = {size: LayerWork(Work({"fp32": flops}, 0, 0, 1), Work()) for size, flops in LINES}
    ends = WorkTable((rows,))
    found = {size: ends.layer(0, size).forward.flops["fp32"] for size in (1, 3, 6, 10)}
    assert found == {1: 1.0, 3: 5.0, 6: 16.0, 10: 34.0}
    single = WorkTable(({2: LayerWork(Work({"fp32": 2.0}, 4, 6, 8), Work())},))
    assert single.layer(0, 4).forward == Work({"fp32": 4.0}, 8, 12, 8)


def test_work_is_read_back_from_json() -> None:
    work = table(3)
    assert WorkTable.from_json(json.loads(json.dumps(work.to_json()))) == work


def test_model_flops_are_of_one_forward_and_one_backward() -> None:
    assert table(2).model_flops(1) == {"fp32": 2 * 9e9}
    assert step_flops(table(2), [1, 1, 4]) == {"fp32": 2 * 9e9 * 6}


def test_costs_keep_their_bytes_and_get_seconds() -> None:
    graph = chain(3)
    costs = analytic_costs(graph, table(3), uniform_costs(graph), A100, 100e9, 6)
    assert sorted(costs.by_layer[0]) == sizes_up_to(6) == [1, 2, 4, 6]
    known, bare = costs.layer(1, 4), uniform_costs(graph).layer(1, 4)
    assert known.forward_s == work_seconds(table(3).layer(1, 4).forward, A100)
    assert known.backward_s == work_seconds(table(3).layer(1, 4).backward, A100)
    assert (known.forward_nbytes, known.saved_nbytes) == (bare.forward_nbytes, bare.saved_nbytes)
    layer = graph.layers[1]
    moved = 3 * layer.gradient_nbytes + 2 * layer.state_nbytes
    assert known.update_s == pytest.approx(moved / 100e9)


def test_a_faster_gpu_never_takes_longer() -> None:
    graph = chain(3)
    order = ["GTX 1080 Ti", "RTX 3090", "RTX 4090", "RTX 5090"]
    seconds = [
        analytic_costs(graph, table(3), uniform_costs(graph), find_gpu(name), 1e11, 4)
        .layer(0, 4)
        .forward_s
        for name in order
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_measured_costs_are_scaled_by_the_rates_of_the_gpus() -> None:
    graph = chain(2)
    costs: Any = uniform_costs(graph)
    found = scaled_costs(costs, find_gpu("GTX 1080 Ti"), find_gpu("RTX 4090"))
    ratio = 11.3 / 82.6
    assert found.layer(0, 1).forward_s == pytest.approx(costs.layer(0, 1).forward_s * ratio)
    assert found.layer(0, 1).update_s == costs.layer(0, 1).update_s
    with pytest.raises(PlanError, match="no measured costs"):
        scaled_costs(CostTable(()), A100, A100)
