"""State: resume, schedulers, unused and frozen parameters, what the host memory holds."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch
from tests.training.plain import gradients_of, params_of, train_plain

ADAMW: dict[str, Any] = {
    "optimizer": torch.optim.AdamW,
    "optimizer_kwargs": {"lr": 1e-2, "fused": True},
}


def small(net: nn.Module, **options: Any) -> harmony.Harmony:
    settings = {"loss_fn": square_loss, "devices": 2, "microbatch_size": 4, **ADAMW, **options}
    return harmony.Harmony(net, **settings)


def test_resume_goes_on_bit_for_bit(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    fresh = copy.deepcopy(net)
    options = {"loss_fn": token_loss, "device_memory": "400KiB"}
    model = small(net, **options)
    losses = [model.train_step(*token_batch(step)) for step in range(3)]
    saved = io.BytesIO()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": model.optimizer.state_dict(),
        "num_steps": model.num_steps,
    }
    torch.save(checkpoint, saved)
    losses = [model.train_step(*token_batch(step)) for step in range(3, 6)]
    resumed = small(fresh, **options)
    saved.seek(0)
    checkpoint = torch.load(saved)
    resumed.load_state_dict(checkpoint["model"])
    resumed.optimizer.load_state_dict(checkpoint["optimizer"])
    resumed.num_steps = checkpoint["num_steps"]
    again = [resumed.train_step(*token_batch(step)) for step in range(3, 6)]
    assert losses == again
    expected = params_of(model.module)
    assert all(torch.equal(p, expected[n]) for n, p in resumed.named_parameters())


def test_lr_scheduler_on_the_full_optimizer(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    twin = copy.deepcopy(net)
    model = small(net)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, fused=True)
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (model.optimizer, optimizer)
    ]
    for step in range(4):
        x, y = vector_batch(step)
        model.train_step(x, y)
        optimizer.zero_grad()
        for low in (0, 4):
            (square_loss(twin(x[low : low + 4]), y[low : low + 4]) * 0.5).backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


class Partial(nn.Module):
    """Has a frozen layer, a layer that is never used, and a parameter used in some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 24)
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.unused = nn.Linear(24, 24)
        self.b = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.frozen(torch.tanh(self.a(x)))))


def test_unused_and_frozen_parameters(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Partial()
    batches = [vector_batch(step) for step in range(3)]
    expected = train_plain(
        net,
        batches,
        optimizer=torch.optim.AdamW,
        options={"lr": 1e-2, "fused": True, "weight_decay": 0.5},
        loss_fn=square_loss,
        microbatch=4,
    )
    frozen = net.frozen.weight.clone()
    options = {"lr": 1e-2, "fused": True, "weight_decay": 0.5}
    model = small(net, optimizer_kwargs=options, mode="pp")
    for batch in batches:
        model.train_step(*batch)
    found = gradients_of(model.module)
    assert found["unused.weight"] is None
    assert found["frozen.weight"] is None
    assert torch.equal(model.frozen.weight, frozen)
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())
    assert model.frozen.weight not in model.optimizer.state


def test_arena_is_exact_and_replaces_the_old_memory(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    before = {p.data_ptr() for p in net.parameters()}
    model = small(net)
    model.train_step(*vector_batch(0))
    weights = model._engine.factory.arenas[0]
    assert not before & {p.data_ptr() for p in net.parameters()}
    nbytes = sum(-(-p.nbytes // 64) * 64 for p in net.parameters())
    (buffer,) = weights.buffers
    assert buffer.tensor.numel() == weights.nbytes == nbytes
    assert buffer.pinned
    assert all(p.is_pinned() for p in net.parameters())
    low = buffer.tensor.data_ptr()
    assert all(low <= p.data_ptr() < low + nbytes for p in net.parameters())


def test_a_smaller_last_batch(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    batches = [token_batch(0), token_batch(1, num_samples=5), token_batch(2)]
    expected = train_plain(
        net,
        batches,
        optimizer=torch.optim.SGD,
        options={"lr": 0.1, "fused": True},
        loss_fn=token_loss,
        microbatch=2,
    )
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=token_loss,
        microbatch_size=2,
        devices=2,
        mode="pp",
        device_memory="400KiB",
    )
    losses = [model.train_step(*batch) for batch in batches]
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "optimizer",
    ["Adam", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax", "Rprop", "ASGD"],
)
def test_any_torch_optimizer(vgpus: VirtualGPUs, optimizer: str) -> None:
    torch.manual_seed(0)
    net = SkipMLP(depth=4)
    factory = getattr(torch.optim, optimizer)
    batches = [vector_batch(step) for step in range(4)]
    expected = train_plain(
        net, batches, optimizer=factory, options={}, loss_fn=square_loss, microbatch=4
    )
    model = small(net, optimizer=factory, optimizer_kwargs={}, mode="pp", device_memory="32KiB")
    losses = [model.train_step(*batch) for batch in batches]
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


def test_an_input_with_as_many_rows_as_samples_is_named_once(vgpus: VirtualGPUs) -> None:
    class Mixes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return self.linear(x).matmul(table)

    net, table = Mixes(), torch.randn(8, 8)
    plain = copy.deepcopy(net)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=square_loss,
        devices=1,
        microbatch_size=2,
        batch_dims={"args[1]": None},
    )
    x, y = vector_batch(0, width=8)
    loss = model.train_step((x, table), y)
    assert torch.allclose(loss, square_loss(plain(x, table), y), rtol=1e-6, atol=0)
