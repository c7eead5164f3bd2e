"""Parameter groups with options of their own, LR schedulers, and clipping of all gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch
from tests.training.plain import params_of, train_plain

MODES = [("pp", 1), ("pp", 2), ("dp", 2)]
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.9)}


def groups_of(params: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices with weight decay, the others without it and with a learning rate of their own."""
    params = list(params)
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


def scheduled(params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """AdamW over the groups, whose learning rates fall after every step."""
    optimizer = torch.optim.AdamW(groups_of(params), **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


@pytest.mark.parametrize("as_function", [False, True], ids=["list", "function"])
@pytest.mark.parametrize(("mode", "num_devices"), MODES)
def test_groups_and_a_scheduler(
    vgpus: VirtualGPUs, mode: str, num_devices: int, as_function: bool
) -> None:
    torch.manual_seed(0)
    net = GPT(depth=3)
    batches = [token_batch(step) for step in range(5)]
    expected = train_plain(
        net,
        batches,
        optimizer=scheduled,
        options=OPTIONS,
        loss_fn=token_loss,
        microbatch=2,
        shares=num_devices if mode == "dp" else 1,
    )
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=OPTIONS,
        param_groups=(lambda module: groups_of(module.parameters()))
        if as_function
        else groups_of(net.parameters()),
        loss_fn=token_loss,
        mode=mode,
        microbatch_size=2,
        devices=num_devices,
        device_memory="300KiB",
    )
    assert model.optimizer is not None
    scheduler = torch.optim.lr_scheduler.ExponentialLR(model.optimizer, 0.7)
    for batch, loss in zip(batches, expected.losses, strict=True):
        assert torch.equal(model.train_step(*batch), loss)
        scheduler.step()
    assert len(model.plan.spec.backward_packs) > 1
    for name, param in params_of(net).items():
        assert torch.equal(param, expected.params[name]), name


def test_named_parameters_and_frozen_ones_that_are_left_out(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    net.layers[1].requires_grad_(False)
    twin = copy.deepcopy(net)
    before = params_of(net)
    trained = [pair for pair in net.named_parameters() if pair[1].requires_grad]
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        param_groups=[{"params": trained[:3], "lr": 0.1}, {"params": trained[3:], "lr": 0.2}],
        loss_fn=square_loss,
        microbatch_size=8,
        devices=1,
        device_memory="24KiB",
    )
    model.train_step(*vector_batch(0))
    inputs, targets = vector_batch(0)
    square_loss(twin(inputs), targets).backward()
    assert torch.equal(net.layers[1].weight, before["layers.1.weight"])
    for index, (name, param) in enumerate(trained):
        rate = 0.1 if index < 3 else 0.2
        gradient = twin.get_parameter(name).grad
        assert gradient is not None
        assert torch.equal(param, before[name].add(gradient, alpha=-rate)), name


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
@pytest.mark.parametrize(("mode", "num_devices"), MODES)
def test_clipping_the_norm_of_all_gradients(
    vgpus: VirtualGPUs, mode: str, num_devices: int, max_norm: float
) -> None:
    torch.manual_seed(0)
    net = GPT(depth=3)
    batches = [token_batch(step) for step in range(4)]
    norms = []

    def clipped(params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(params, **options)
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(nn.utils.clip_grad_norm_(params, max_norm))
        )
        return optimizer

    expected = train_plain(
        net,
        batches,
        optimizer=clipped,
        options=OPTIONS,
        loss_fn=token_loss,
        microbatch=2,
        shares=num_devices if mode == "dp" else 1,
    )
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=OPTIONS,
        max_grad_norm=max_norm,
        loss_fn=token_loss,
        mode=mode,
        microbatch_size=2,
        devices=num_devices,
        device_memory="300KiB",
    )
    assert model.last_grad_norm is None
    for step, batch in enumerate(batches):
        assert torch.equal(model.train_step(*batch), expected.losses[step]), step
        assert torch.equal(model.last_grad_norm, norms[step]), step
    for name, param in params_of(net).items():
        assert torch.equal(param, expected.params[name]), name


def test_a_failure_under_clipping_changes_nothing_even_late(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        max_grad_norm=1.0,
        loss_fn=square_loss,
        mode="pp",
        microbatch_size=2,
        devices=2,
        device_memory="24KiB",
    )
    model.train_step(*vector_batch(0))
    before = params_of(net)
    optimizer = model._engine._optimizer
    assert optimizer is not None
    optimizer.max_norm = "no number"  # type: ignore[assignment]
    with pytest.raises(harmony.ExecutionError, match="clipping of the gradients"):
        model.train_step(*vector_batch(1))
    assert all(torch.equal(param, before[name]) for name, param in params_of(net).items())
    optimizer.max_norm = 1.0
    model.train_step(*vector_batch(1))


def wrap(net: nn.Module, **options: Any) -> harmony.Harmony:
    return harmony.Harmony(net, optimizer=torch.optim.SGD, loss_fn=square_loss, **options)


def test_groups_that_do_not_hold_every_trainable_parameter_are_refused(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    first = list(net.layers[0].parameters())
    with pytest.raises(harmony.ConfigError, match=r"layers.1.weight, .* and 2 more. Add them"):
        wrap(net, param_groups=[{"params": first}])
    with pytest.raises(harmony.ConfigError, match=r"twice in one: layers.0.weight"):
        wrap(net, param_groups=[{"params": net.parameters()}, {"params": first[0]}])
    stranger = nn.Parameter(torch.zeros(3))
    with pytest.raises(harmony.ConfigError, match=r"shape \(3,\)', which is no parameter"):
        wrap(net, param_groups=[{"params": [*net.parameters(), stranger]}])
    with pytest.raises(harmony.ConfigError, match="a parameter group is a dict"):
        wrap(net, param_groups=[list(net.parameters())])


def test_options_without_an_optimizer_are_refused(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    with pytest.raises(harmony.ConfigError, match="param_groups without an optimizer"):
        harmony.Harmony(net, param_groups=[{"params": list(net.parameters())}])
    with pytest.raises(harmony.ConfigError, match="max_grad_norm without an optimizer"):
        harmony.Harmony(net, max_grad_norm=1.0)
    with pytest.raises(harmony.ConfigError, match=r"max_grad_norm=-1.0: a positive number"):
        wrap(net, max_grad_norm=-1.0)
