"""Bytes that layers allocate agree with counting every storage after each kernel of a real run."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harmony.capture import Captured, capture
from harmony.capture.cost.allocations import LiveBytes
from harmony.capture.cost.costs import costs_nbytes

from .models import CASES, vectors
from .packs import captured_case


def rounded(nbytes: int) -> int:
    return -(-nbytes // 512) * 512


class Recount(TorchDispatchMode):
    """Counts all storages that are alive, from scratch, after every kernel."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.ignored = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages: list[weakref.ref[Any]] = []
        self.history: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.storages.append(weakref.ref(leaf.untyped_storage()))
        self.history.append(self.alive())
        return out

    def alive(self, tensors: list[torch.Tensor] | None = None) -> int:
        storages = [ref() for ref in self.storages]
        if tensors is not None:
            storages = [tensor.untyped_storage() for tensor in tensors]
        sizes = {s._cdata: s.nbytes() for s in storages if s is not None}
        return sum(rounded(n) for key, n in sizes.items() if key not in self.ignored)


def brute_force(captured: Captured, layer: int, num_samples: int) -> tuple[int, int, int]:
    """Run a layer for real and count."""
    described = captured.graph.layers[layer]
    shell = captured.make_shell(torch.device("cpu"))
    infos = {info.name: info for info in (*captured.params, *captured.buffers)}
    names = [info.name for info in captured.tensors_of(layer)]
    names += [captured.graph.shared[shared].name for shared in described.shared]
    known: list[torch.Tensor] = []
    for name in names:
        bound = shell.placeholder(name)
        if bound.device.type == "meta":
            info = infos[name]
            bound = nn.Parameter(torch.zeros(info.shape, dtype=info.dtype), info.requires_grad)
            if info.requires_grad:
                bound.grad = torch.zeros_like(bound)
                known.append(bound.grad)
        known.append(bound)
        shell.bind({name: bound})
    inputs = {}
    for value in described.inputs:
        shape, _, dtype = captured.value_form(value, num_samples)
        inputs[value] = torch.zeros(shape, dtype=dtype)
        inputs[value].requires_grad_(captured.graph.values[value].requires_grad)
    known += inputs.values()

    def run() -> list[torch.Tensor]:
        wanted = described.outputs
        found = captured.run(layer, layer + 1, shell, inputs, num_samples, wanted=wanted)
        return list(found.values())

    with Recount(known) as count, torch.no_grad():
        outputs = run()
    forward = max(0, max(count.history) - sum(t.numel() * t.element_size() for t in outputs))
    with Recount(known) as count:
        outputs = run()
        saved = count.alive() - count.alive(outputs)
        roots = [tensor for tensor in outputs if tensor.requires_grad]
        if not roots:
            return forward, saved, 0
        gradients = [torch.zeros_like(root) for root in roots]
        before = count.alive()
        count.history.clear()
        torch.autograd.backward(roots, gradients)
    return forward, saved, max(0, max(count.history) - before)


@pytest.mark.parametrize("name", CASES)
def test_costs_agree_with_a_brute_force_count(name: str) -> None:
    _, captured, _ = captured_case(name)
    costs = costs_nbytes(captured, 4)
    first = {}
    for layer in captured.graph.layers:
        first.setdefault(layer.signature, layer.index)
        assert costs[layer.index] == costs[first[layer.signature]]
    for layer in first.values():
        counted = brute_force(captured, layer, 4)
        if name == "in_place":  # room for what the backward of real views copies
            assert tuple(costs[layer][:2]) == counted[:2]
            assert counted[2] <= costs[layer].backward_nbytes <= 1.5 * counted[2]
        else:
            assert tuple(costs[layer][:3]) == counted, captured.graph.layers[layer]


def test_costs_of_a_linear_layer_by_hand() -> None:
    net = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 128))
    captured = capture(net, (torch.randn(8, 256).requires_grad_(),))
    weight, gradient = 256 * 512 * 4, 8 * 256 * 4
    bias = 512 * 4
    # Forward: only the output. Backward: the gradients of input, weight and bias at once, the
    # latter two before they are added to those in place.
    assert tuple(costs_nbytes(captured, 8)[0]) == (0, 0, weight + gradient + bias, 8 * bias)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.last = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.cells(x)[0][:, -1])


def test_what_recurrent_kernels_save_is_counted() -> None:
    """Fake tensors do not tell: the workspace of oneDNN's LSTM is empty there."""
    captured = capture(Recurrent(), (torch.randn(4, 6, 8),))
    _, saved, backward = brute_force(captured, 0, 4)
    found = costs_nbytes(captured, 4)[0]
    assert found.saved_nbytes == saved > 32 * 1024
    assert found.backward_nbytes == backward


def test_costs_grow_with_the_microbatch() -> None:
    net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128))
    captured = capture(net, (torch.randn(8, 256),))
    small, large = costs_nbytes(captured, 2)[0], costs_nbytes(captured, 8)[0]
    assert large.saved_nbytes == 4 * small.saved_nbytes == 8 * 512 * 4


@pytest.mark.parametrize("fake", [True, False])
def test_live_bytes_counts_storages_once(fake: bool) -> None:
    def measure() -> tuple[int, int, int, int]:
        x = torch.zeros(100, 4)
        with LiveBytes([x]) as live:
            y = x + 1
            _ = y.view(-1)[:3]
            one = live.now
            z = y * 2
            two = live.now
            del y, z
            return one, two, live.now, live.peak

    mode = FakeTensorMode() if fake else torch.no_grad()
    with mode:
        one, two, left, peak = measure()
    assert (one, two, left, peak) == (2048, 4096, 2048, 4096)


def test_measuring_needs_no_parameters() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(1 << 17, 1 << 17), nn.Linear(1 << 17, 8))
    captured = capture(net, (torch.zeros(2, 1 << 17),))
    assert captured.graph.weight_nbytes() > 1 << 36
    assert costs_nbytes(captured, 2)[0].backward_nbytes > 1 << 36


def test_the_peak_can_be_measured_anew() -> None:
    with LiveBytes() as live:
        big = vectors(64) * 1
        del big
        assert live.peak > live.now == 0
        live.reset_peak()
        assert live.peak == 0
