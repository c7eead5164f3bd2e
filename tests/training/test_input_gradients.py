"""Gradients of inputs: of prompts, of a generator in front, of whatever the user's graph holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.planner.ir.tasks import TaskKind
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import SkipMLP, square_loss, vector_batch
from tests.training.plain import gradients_of


class ReadsItsInputTwice(nn.Module):
    """The first and two far layers read the input."""

    def __init__(self, width: int = 24, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = x
        for index, layer in enumerate(self.layers):
            y = torch.tanh(layer(y))
            if index in (2, 4):
                y = y + x if scale is None else y * scale + x
        return y


def wrapped(net: nn.Module, **options: Any) -> harmony.Harmony:
    defaults = {"devices": 2, "microbatch_size": 2, "device_memory": "24KiB", "mode": "pp"}
    return harmony.Harmony(copy.deepcopy(net), **{**defaults, **options})


def parts(model: harmony.Harmony) -> list[tuple[int, int]]:
    """The microbatches of the last call: kernels may differ in their last bits with the size."""
    spec = model.plan.spec
    kind = TaskKind.BACKWARD
    return [s for replica in range(len(spec.shares)) for s in spec.microbatches(replica, kind)]


def same_gradients(found: nn.Module, expected: nn.Module) -> None:
    other = gradients_of(found)
    for name, gradient in gradients_of(expected).items():
        assert (gradient is None) == (other[name] is None), name
        assert gradient is None or torch.equal(other[name], gradient), name


@pytest.mark.parametrize("num_devices", [1, 3])
@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("kind", [SkipMLP, ReadsItsInputTwice])
def test_an_input_gets_its_gradient_bit_for_bit(
    vgpus: VirtualGPUs, kind: type[nn.Module], mode: str, num_devices: int
) -> None:
    torch.manual_seed(0)
    net = kind()
    model = wrapped(net, mode=mode, devices=num_devices)
    for step in range(3):
        x, y = vector_batch(step)
        x.requires_grad_()
        square_loss(model(x), y).backward()
        assert len(model.plan.spec.backward_packs) >= 2
        twin = x.detach().clone().requires_grad_()
        square_loss(torch.cat([net(twin[a:b]) for a, b in parts(model)]), y).backward()
        assert torch.equal(x.grad, twin.grad)


def test_one_microbatch_gives_all_gradients_bit_for_bit(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = ReadsItsInputTwice()
    model = wrapped(net, microbatch_size=8, device_memory="32KiB")
    x, y = vector_batch(0)
    for module, leaf in ((net, x.clone().requires_grad_()), (model, x.requires_grad_())):
        square_loss(module(leaf), y).backward()
        module.leaf = leaf if module is net else None
    assert torch.equal(x.grad, net.leaf.grad)
    same_gradients(model.module, net)


def test_a_network_in_front_is_trained_through_the_model(vgpus: VirtualGPUs) -> None:
    """A generator before a wrapped discriminator, and a head behind it."""
    torch.manual_seed(0)
    front, net, head = nn.Linear(24, 24), ReadsItsInputTwice(), nn.Linear(24, 24)
    model = wrapped(net, microbatch_size=8, device_memory="32KiB")
    x, y = vector_batch(0)
    results = []
    for module in (net, model):
        ends = copy.deepcopy(nn.ModuleList([front, head]))
        square_loss(ends[1](module(torch.tanh(ends[0](x)))), y).backward()
        results.append(ends)
    same_gradients(results[1], results[0])
    same_gradients(model.module, net)


def test_two_wrapped_models_in_one_graph(vgpus: VirtualGPUs) -> None:
    """One feeds the other, and both feed the loss."""
    torch.manual_seed(0)
    nets = SkipMLP(), SkipMLP()
    models = [wrapped(net, microbatch_size=8, device_memory="32KiB") for net in nets]
    x, y = vector_batch(0)
    for a, b in (nets, models):
        hidden = a(x)
        (square_loss(b(hidden), y) + square_loss(hidden, y)).backward()
    for model, net in zip(models, nets, strict=True):
        same_gradients(model.module, net)


def test_a_frozen_model_passes_gradients_to_its_input(vgpus: VirtualGPUs) -> None:
    """Adversarial examples, prompt tuning."""
    torch.manual_seed(0)
    net = ReadsItsInputTwice().requires_grad_(False)
    model = wrapped(net)
    x, y = vector_batch(0)
    assert not model(x).requires_grad
    x.requires_grad_()
    square_loss(model(x), y).backward()
    twin = x.detach().clone().requires_grad_()
    square_loss(torch.cat([net(twin[a:b]) for a, b in parts(model)]), y).backward()
    assert torch.equal(x.grad, twin.grad)
    assert all(p.grad is None for p in model.parameters())


def test_an_input_without_samples_gets_the_sum_over_the_microbatches(vgpus: VirtualGPUs) -> None:
    """A soft prompt, or a scale, that all microbatches share; added in their order."""
    torch.manual_seed(0)
    net = ReadsItsInputTwice()
    for mode in ("pp", "dp"):
        model = wrapped(net, mode=mode)
        x, y = vector_batch(0)
        scale = torch.randn(24, generator=torch.Generator().manual_seed(1), requires_grad=True)
        square_loss(model(x, scale), y).backward()
        twin = scale.detach().clone().requires_grad_()
        for a, b in parts(model):
            (square_loss(net(x[a:b], twin), y[a:b]) * ((b - a) / len(x))).backward()
        assert torch.equal(scale.grad, twin.grad)


def test_a_last_batch_of_another_size_and_one_without_gradient(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net)
    for num_samples, wants in ((8, True), (5, True), (8, False), (8, True)):
        x, y = vector_batch(num_samples, num_samples)
        x.requires_grad_(wants)
        model.zero_grad()
        square_loss(model(x), y).backward()
        twin = x.detach().clone().requires_grad_()
        square_loss(torch.cat([net(twin[a:b]) for a, b in parts(model)]), y).backward()
        assert (x.grad is None) is not wants
        assert not wants or torch.equal(x.grad, twin.grad)
        assert all(p.grad is not None for p in model.parameters())


def test_the_gradient_alone_leaves_the_parameters_be(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net, microbatch_size=8, device_memory="32KiB")
    x, y = vector_batch(0)
    x.requires_grad_()
    (found,) = torch.autograd.grad(square_loss(model(x), y), x)
    (expected,) = torch.autograd.grad(square_loss(net(x), y), x)
    assert torch.equal(found, expected)
    assert all(p.grad is None for p in model.parameters())


def test_an_input_on_a_device_gets_its_gradient_there(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net, microbatch_size=8, device_memory="32KiB")
    x, y = vector_batch(0)
    there = x.to(devices.device(1)).requires_grad_()
    out = model(there)
    assert out.device == there.device
    square_loss(out, y.to(there.device)).backward()
    twin = x.requires_grad_()
    square_loss(net(twin), y).backward()
    assert there.grad.device == there.device
    assert torch.equal(there.grad.cpu(), twin.grad)


class HandsThrough(nn.Module):
    """Returns an input as it is, a view of it, nothing, and what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SkipMLP()

    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> dict[str, Any]:
        return {"x": x, "view": x.view(-1, 2, 12), "none": None, "y": self.inner(x), "u": unused}


def test_outputs_that_are_inputs(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = HandsThrough()
    model = wrapped(net, microbatch_size=8, device_memory="32KiB")
    x, y = vector_batch(0)
    for grad in (True, False):
        results = []
        for module in (net, model):
            leaf, other = x.clone().requires_grad_(), y.clone()
            with torch.set_grad_enabled(grad):
                out = module(leaf, other)
            assert torch.equal(out["x"], leaf) and torch.equal(out["u"], other)
            assert torch.equal(out["view"], leaf.view(-1, 2, 12)) and out["none"] is None
            if grad:
                assert out["x"].requires_grad and not out["u"].requires_grad
                (square_loss(out["y"], y) + (out["x"] ** 2).sum() + out["view"].sum()).backward()
                results.append(leaf.grad)
        assert not grad or torch.equal(*results)


def test_a_whole_step_refuses_an_input_that_requires_a_gradient(vgpus: VirtualGPUs) -> None:
    options = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    model = wrapped(SkipMLP(), loss_fn=square_loss, **options)
    x, y = vector_batch(0)
    with pytest.raises(harmony.ConfigError, match="requires a gradient"):
        model.train_step(x.requires_grad_(), y)
    model.train_step(x.detach(), y)
