"""Hooks on parameters are called with `train_step` as plain PyTorch calls them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import harmony

from .conftest import VirtualGPUs
from .models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch

Register = Callable[[nn.Module], Any]
OPTIONS = {"lr": 0.1, "momentum": 0.9}


def model_of(net: nn.Module, loss_fn: Any = square_loss, **more: Any) -> harmony.Harmony:
    settings: dict[str, Any] = {"mode": "pp", "devices": 2, **more}
    return harmony.Harmony(
        net, optimizer=torch.optim.SGD, optimizer_kwargs=OPTIONS, loss_fn=loss_fn, **settings
    )


class Plain:
    """Plain PyTorch on a copy, with the same hooks, in the same microbatches."""

    def __init__(self, net: nn.Module, register: Register, loss_fn: Any = square_loss) -> None:
        self.net = copy.deepcopy(net)
        self.handle = register(self.net)
        self._optimizer = torch.optim.SGD(self.net.parameters(), **OPTIONS)
        self._loss_fn = loss_fn
        self._steps = 0

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, size: int) -> None:
        self._optimizer.zero_grad()
        for index, low in enumerate(range(0, len(inputs), size)):
            harmony.seed_microbatch(self._steps, index)
            part = slice(low, low + size)
            loss = self._loss_fn(self.net(inputs[part]), targets[part])
            (loss * (len(inputs[part]) / len(inputs))).backward()
        self._steps += 1
        self._optimizer.step()


def agree(net: nn.Module, plain: nn.Module) -> None:
    for (name, param), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(param, expected), name
        assert (param.grad is None) is (expected.grad is None), name
        assert param.grad is None or torch.equal(param.grad, expected.grad), name


def masked(net: nn.Module) -> Any:
    mask = (torch.arange(576).view(24, 24) % 3 > 0).float()
    return net.layers[0].weight.register_hook(lambda g: g * mask)


def clamped(net: nn.Module) -> Any:
    """Not linear: the mean of the clamped ones is not the clamped mean."""
    return net.layers[-1].weight.register_hook(lambda g: g.clamp(-1e-2, 1e-2))


def changed_in_place(net: nn.Module) -> Any:
    def halve(gradient: torch.Tensor) -> None:
        gradient.mul_(0.5)

    return net.layers[2].bias.register_hook(halve)


def two_of_one(net: nn.Module) -> Any:
    weight = net.layers[3].weight
    weight.register_hook(lambda g: g + 0.25)
    return weight.register_hook(lambda g: g * 2)


def scaled_after(net: nn.Module) -> Any:
    def shrink(param: torch.Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(0.7)

    return net.layers[1].weight.register_post_accumulate_grad_hook(shrink)


def taken_away(net: nn.Module) -> Any:
    def forget(param: torch.Tensor) -> None:
        param.grad = None

    return net.layers[1].weight.register_post_accumulate_grad_hook(forget)


def stepped_in_backward(net: nn.Module) -> Any:
    """An optimizer in the backward: the usual way to save the memory of gradients."""
    own = {p: torch.optim.SGD([p], lr=0.05) for p in net.layers[-1].parameters()}

    def update(param: torch.Tensor) -> None:
        own[param].step()
        own[param].zero_grad()

    for param in own:
        handle = param.register_post_accumulate_grad_hook(update)
    return handle


HOOKS = [masked, clamped, changed_in_place, two_of_one, scaled_after, taken_away]


@pytest.mark.parametrize("register", [*HOOKS, stepped_in_backward])
def test_a_hook_sees_the_gradient_of_the_whole_batch(
    vgpus: VirtualGPUs, register: Register
) -> None:
    """Where one microbatch is the batch, as in plain PyTorch without accumulation."""
    torch.manual_seed(0)
    net = SkipMLP()
    plain = Plain(net, register)
    model = model_of(net, microbatch_size=8)
    register(net)
    for step in range(3):
        model.train_step(*vector_batch(step))
        plain.step(*vector_batch(step), 8)
        agree(net, plain.net)


@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("register", [*HOOKS, stepped_in_backward])
def test_a_hook_sees_each_microbatch_that_the_user_has_fixed(
    vgpus: VirtualGPUs, register: Register, mode: str
) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    plain = Plain(net, register)
    register(net)
    model = model_of(net, microbatch_size=3, mode=mode, device_memory="1MiB")
    for step in range(3):
        model.train_step(*vector_batch(step))
        plain.step(*vector_batch(step), 3)
        agree(net, plain.net)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_are_called_once_a_backward(vgpus: VirtualGPUs, kind: str) -> None:
    """The script parameter_hooks_called: they were not called at all."""
    for size, expected in ((4, 2), ("auto", 1)):
        net, calls = SkipMLP(), []
        getattr(net.layers[0].weight, kind)(lambda t, calls=calls: calls.append(t.device.type))
        model_of(net, microbatch_size=size, updates="host").train_step(*vector_batch(0))
        assert calls == ["cpu"] * expected


def test_a_hook_is_called_once_where_harmony_chooses_the_microbatches(vgpus: VirtualGPUs) -> None:
    """What is clamped is the whole batch's gradient, however it was summed."""
    torch.manual_seed(0)
    net = SkipMLP()
    plain = Plain(net, clamped)
    model = model_of(net, device_memory="24KiB")
    clamped(net)
    for step in range(2):
        model.train_step(*vector_batch(step))
        plain.step(*vector_batch(step), 8)
    for param, expected in zip(net.parameters(), plain.net.parameters(), strict=True):
        assert torch.allclose(param, expected, rtol=1e-5, atol=1e-6)


def test_hooks_of_tied_parameters_see_the_sum(vgpus: VirtualGPUs) -> None:
    def register(net: nn.Module) -> Any:
        return net.tokens.weight.register_hook(lambda g: g.sign() * 1e-3)

    torch.manual_seed(0)
    net = GPT(depth=2, tied=True)
    plain = Plain(net, register, token_loss)
    register(net)
    model = model_of(net, token_loss, microbatch_size=4)
    for step in range(2):
        model.train_step(*token_batch(step))
        plain.step(*token_batch(step), 4)
        agree(net, plain.net)


def test_hooks_that_come_and_go_between_steps_are_seen(vgpus: VirtualGPUs) -> None:
    """Also where packs were updated on their GPUs before."""
    torch.manual_seed(0)
    net = SkipMLP()
    plain = Plain(net, masked)
    plain.handle.remove()
    model = model_of(net, microbatch_size=8)
    for step in range(5):
        if step == 1:
            handles = [masked(net), masked(plain.net)]
        if step == 3:
            for handle in handles:
                handle.remove()
        model.train_step(*vector_batch(step))
        plain.step(*vector_batch(step), 8)
        for param, expected in zip(net.parameters(), plain.net.parameters(), strict=True):
            assert torch.equal(param, expected)


def test_hooks_of_frozen_parameters_are_not_called(vgpus: VirtualGPUs) -> None:
    net, calls = SkipMLP(), []
    weight = net.layers[0].weight
    weight.register_hook(lambda g: calls.append(1))
    weight.requires_grad_(False)
    model_of(net, microbatch_size=8).train_step(*vector_batch(0))
    assert calls == []


def test_clipping_comes_after_the_hooks(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    twin = copy.deepcopy(net)
    model = model_of(net, microbatch_size=8, max_grad_norm=0.01)
    for one in (net, twin):
        scaled_after(one)
    inputs, targets = vector_batch(0)
    model.train_step(inputs, targets)
    square_loss(twin(inputs), targets).backward()
    nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    torch.optim.SGD(twin.parameters(), **OPTIONS).step()
    agree(net, twin)


@pytest.mark.filterwarnings("ignore:the forward goes another way")
@pytest.mark.parametrize("size", [8, 4])
def test_hooks_of_live_models_are_called(vgpus: VirtualGPUs, size: int) -> None:
    class DynamicRunner(SkipMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.layers[0](x))
            if float(h.sum()) > 1e6:
                h = h * 2
            for layer in self.layers[1:]:
                h = layer(h)
            return h

    torch.manual_seed(0)
    net = DynamicRunner()
    plain = Plain(net, clamped)
    clamped(net)
    model = model_of(net, microbatch_size=size, devices=1)
    for step in range(2):
        model.train_step(*vector_batch(step))
        plain.step(*vector_batch(step), size)
        agree(net, plain.net)


def test_what_a_hook_raises_reaches_the_user_and_nothing_has_changed(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    before = copy.deepcopy(net)
    model = model_of(net, microbatch_size=8)

    def fail(gradient: torch.Tensor) -> None:
        raise ZeroDivisionError("the hook's own")

    handle = net.layers[2].weight.register_hook(fail)
    with pytest.raises(ZeroDivisionError, match="the hook's own"):
        model.train_step(*vector_batch(0))
    assert all(map(torch.equal, net.parameters(), before.parameters()))
    handle.remove()
    model.train_step(*vector_batch(0))
    assert model.num_steps == 1


@pytest.mark.parametrize("register", [masked, clamped, scaled_after, taken_away])
def test_both_forms_and_verify_agree(vgpus: VirtualGPUs, register: Register) -> None:
    """The script parameter_hooks: verify said that all was well."""
    torch.manual_seed(0)
    net = SkipMLP()
    register(net)
    plain = copy.deepcopy(net)
    register(plain)
    inputs, targets = vector_batch(0)
    square_loss(plain(inputs), targets).backward()
    model = harmony.Harmony(net, microbatch_size=8, mode="pp", devices=2)
    square_loss(model(inputs), targets).backward()
    for param, expected in zip(net.parameters(), plain.parameters(), strict=True):
        assert (param.grad is None) is (expected.grad is None)
        assert param.grad is None or torch.equal(param.grad, expected.grad)
    again = SkipMLP()
    register(again)
    assert model_of(again, microbatch_size=8).verify(inputs, targets).ok
