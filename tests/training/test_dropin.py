"""The user's own loop, loss and optimizer around the wrapped module."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, vector_batch
from tests.training.plain import gradients_of, params_of


def split_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_forward(net: nn.Module, x: torch.Tensor, microbatch: int, step: int) -> torch.Tensor:
    outputs = []
    for index, part in enumerate(x.split(microbatch)):
        torch.manual_seed(harmony.microbatch_seed(step, index))
        outputs.append(net(part))
    return torch.cat(outputs)


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_loop_with_clipping_and_scheduler(vgpus: VirtualGPUs, num_devices: int, mode: str) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    twin = copy.deepcopy(net)
    model = harmony.Harmony(
        twin, mode=mode, microbatch_size=2, devices=num_devices, device_memory="300KiB"
    )

    def train(module: nn.Module, forward: Any) -> tuple[list[torch.Tensor], list[Any]]:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        losses, gradients = [], []
        for step in range(5):
            x, y = token_batch(step)
            optimizer.zero_grad()
            loss = split_loss(forward(x, step), y)
            loss.backward()
            gradients.append(gradients_of(module))
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
        return losses, gradients

    expected = train(net, lambda x, step: plain_forward(net, x, 2, step))
    found = train(model, lambda x, step: model(x))
    # One plain backward runs the microbatches last to first, Harmony first to last: the sums of
    # a gradient over microbatches differ in their order, so in the last bits, and AdamW's first
    # steps turn a last bit of a tiny gradient into a visible one of the parameter.
    assert torch.equal(found[0][0], expected[0][0])
    torch.testing.assert_close(torch.stack(found[0]), torch.stack(expected[0]), rtol=1e-4, atol=0)
    for name, gradient in expected[1][0].items():
        worst = (found[1][0][name] - gradient).abs().max()
        assert worst <= 5e-7 * gradient.abs().max(), name


def test_one_microbatch_is_bit_identical(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    model = harmony.Harmony(
        copy.deepcopy(net), microbatch_size=8, devices=2, device_memory="2MiB", mode="pp"
    )
    losses = []
    for module, forward in ((net, lambda x, s: plain_forward(net, x, 8, s)), (model, None)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        found = []
        for step in range(5):
            x, y = token_batch(step)
            optimizer.zero_grad()
            loss = split_loss(model(x) if forward is None else forward(x, step), y)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    expected = params_of(net)
    for name, param in model.named_parameters():
        assert torch.equal(param, expected[name]), name


def test_names_and_state_are_the_modules_own(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    expected = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1)
    params = list(model.parameters())
    model(vector_batch(0)[0])
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in expected.named_parameters()]
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    other = SkipMLP().state_dict()
    model.load_state_dict(other)
    x = vector_batch(0)[0]
    expected.load_state_dict(other)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))


def test_eval_in_the_middle_of_training(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    twin = copy.deepcopy(net)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=split_loss,
        microbatch_size=4,
        devices=2,
        device_memory="600KiB",
    )
    for step in range(2):
        model.train_step(*token_batch(step))
    model.eval()
    assert not net.training
    x, _ = token_batch(9)
    with torch.no_grad():
        out = model(x)
    twin.load_state_dict(model.state_dict())
    twin.eval()
    with torch.no_grad():
        assert torch.equal(out, torch.cat([twin(part) for part in x.split(4)]))
    model.train()
    assert net.training
    model.train_step(*token_batch(2))


def test_moving_to_a_device_is_a_notice(vgpus: VirtualGPUs) -> None:
    model = harmony.Harmony(SkipMLP(), devices=1)
    with pytest.warns(UserWarning, match="stay on the host"):
        model.to(devices.device())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.to("cpu")
    assert next(model.parameters()).device.type == "cpu"


def test_what_is_no_copy_of_its_own_is_refused(vgpus: VirtualGPUs) -> None:
    model = harmony.Harmony(SkipMLP(), devices=1)
    with pytest.raises(harmony.HarmonyError, match="deepcopy"):
        copy.copy(model)
    with pytest.raises(harmony.HarmonyError, match="cannot be pickled"):
        import pickle

        pickle.dumps(model)


def test_the_callers_stream_and_device_stay_as_they_were(vgpus: VirtualGPUs) -> None:
    torch.accelerator.set_device_index(1)
    mine = torch.Stream(device=devices.device(1))
    before = torch.accelerator.current_stream(devices.device(1))
    with mine:
        model = harmony.Harmony(SkipMLP(), devices=2, microbatch_size=4)
        x, y = vector_batch(0)
        square_loss(model(x), y).backward()
        assert torch.accelerator.current_device_index() == 1
        assert torch.accelerator.current_stream(devices.device(1)) == mine
    assert torch.accelerator.current_stream(devices.device(1)) == before
    torch.accelerator.set_device_index(0)
