"""Values written into parameters between steps count, whatever way they were written.

PyTorch's version counters do not see what goes through ``param.data``.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import harmony

from .conftest import VirtualGPUs
from .models import GPT, token_batch, token_loss
from .test_residents import resident_model

Write = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]
"""Writes values into parameters."""


def copied(params: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.data.copy_(value)


def assigned(params: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.data = value.clone()


def by_numpy(params: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.data.numpy()[...] = value.numpy()


def by_rows(params: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        for row, new in zip(param.data.unbind(0), value.unbind(0), strict=True):
            row.copy_(new)


def by_vector(params: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    flat = nn.utils.parameters_to_vector(values)
    nn.utils.vector_to_parameters(flat, params)


WRITES = (copied, assigned, by_numpy, by_rows, by_vector)


def streaming_model(net: nn.Module) -> harmony.Harmony:
    return harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-2},
        loss_fn=token_loss,
        microbatch_size=2,
        updates="host",
        devices=2,
    )


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("make", [resident_model, streaming_model])
def test_what_is_written_counts(
    vgpus: VirtualGPUs, make: Callable[[nn.Module], harmony.Harmony], write: Write
) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.0)
    values = [param.detach().clone() for param in net.parameters()]
    model = make(net)
    first = model.train_step(*token_batch(0))
    for _ in range(2):
        assert model.train_step(*token_batch(0)) != first
        write(list(model.parameters()), values)
        assert model.train_step(*token_batch(0)) == first
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in net.named_parameters()]


def test_an_alias_that_is_kept_may_be_written_to_at_any_time(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.0)
    values = [param.detach().clone() for param in net.parameters()]
    model = resident_model(net)
    first = model.train_step(*token_batch(0))
    aliases = [param.data[:] for param in model.parameters()]  # views: the tensors are gone
    for _ in range(3):
        assert model.train_step(*token_batch(0)) != first
    for alias, value in zip(aliases, values, strict=True):
        alias.copy_(value)
    assert model.train_step(*token_batch(0)) == first


class Scaled(nn.Module):
    """A linear layer with a buffer that nobody changes in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


@pytest.mark.parametrize("updates", ["auto", "host"])
def test_buffers_written_through_data_count(vgpus: VirtualGPUs, updates: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(Scaled() for _ in range(4)))
    net = copy.deepcopy(plain)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=nn.functional.mse_loss,
        microbatch_size=8,
        updates=updates,
        devices=1,
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    for step in range(4):
        loss = nn.functional.mse_loss(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert float(model.train_step(x, y)) == loss.item(), step
        for either in (plain, net):
            either[1].scale.data.fill_(0.5 + step)
    if updates == "auto":
        devices = model.plan.schedule.devices
        assert any(device.resident for device in devices), "the test is about resident weights"


def test_data_of_another_shape_is_refused(vgpus: VirtualGPUs) -> None:
    model = streaming_model(GPT(dropout=0.0))
    model.train_step(*token_batch(0))
    param = next(model.parameters())
    kept = param.data
    param.data = torch.zeros(3)
    with pytest.raises(harmony.HarmonyError, match=r"was given data of shape \(3,\)"):
        model.train_step(*token_batch(0))
    param.data = kept
    model.train_step(*token_batch(0))


def test_parameters_are_pytorchs_when_nothing_is_resident_any_more(vgpus: VirtualGPUs) -> None:
    model = resident_model(GPT(dropout=0.0))
    model.train_step(*token_batch(0))
    assert "data" in nn.Parameter.__dict__
    del model
    gc.collect()
    assert torch.equal(nn.Parameter(torch.ones(2)).data, torch.ones(2))
    assert "data" not in nn.Parameter.__dict__
