"""Frozen and unfrozen between steps, as in plain PyTorch: gradients, updates, optimizer state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import harmony

from .changing import FORMS, Change, assert_same, same_with_changes
from .conftest import VirtualGPUs
from .models import SkipMLP, square_loss, vector_batch
from .side_by_side import assert_same_training

ADAMW: dict[str, Any] = {
    "optimizer": torch.optim.AdamW,
    "options": {"lr": 1e-2, "weight_decay": 0.1},
}


def freezing(*layers: int) -> Change:
    """Let these layers be frozen, and no others."""

    def change(net: nn.Module, _: object) -> None:
        for index, layer in enumerate(net.layers):
            layer.requires_grad_(index not in layers)

    return change


def only_biases(net: nn.Module, _: object) -> None:
    for name, param in net.named_parameters():
        param.requires_grad_("bias" in name)


def everything(net: nn.Module, _: object) -> None:
    net.requires_grad_(True)


SCHEDULES: dict[str, dict[int, Change]] = {
    "alternating": {n: freezing(*((0, 1, 2), (3, 4, 5))[n % 2]) for n in range(6)},
    "gradual": {n: freezing(*range(5 - 2 * n)) for n in range(3)},
    "and back": {1: freezing(0, 5), 2: only_biases, 4: everything},
}


@pytest.mark.parametrize(
    ("form", "updates"), [("dropin", "auto"), ("step", "auto"), ("step", "host")]
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_frozen_parameters_keep_values_and_state(
    vgpus: VirtualGPUs, form: str, schedule: str, updates: str
) -> None:
    torch.manual_seed(0)
    same_with_changes(SkipMLP(), SCHEDULES[schedule], form, steps=6, updates=updates, **ADAMW)


def test_the_norm_that_is_clipped_has_no_gradient_of_an_earlier_step(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    plain = copy.deepcopy(net)
    options = {"lr": 0.05, "momentum": 0.9, "foreach": False}
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs=options,
        loss_fn=square_loss,
        max_grad_norm=0.1,
        microbatch_size=8,
        devices=1,
    )
    theirs = torch.optim.SGD(plain.parameters(), **options)
    for step in range(4):
        for module in (net, plain):
            SCHEDULES["alternating"][step](module, theirs)
        x, y = vector_batch(step)
        theirs.zero_grad()
        square_loss(plain(x), y).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        theirs.step()
        model.train_step(x, y)
        assert model.last_grad_norm == norm
        assert_same(net, plain, f"after step {step}")


class GAN(nn.Module):
    """Generator and discriminator, of which each step trains one."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24))
        self.discriminator = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, noise: torch.Tensor, real: torch.Tensor | None = None) -> Any:
        made = self.generator(noise)
        if real is None:
            return self.discriminator(made)
        return self.discriminator(made.detach()), self.discriminator(real)


def test_a_gan_loop_switches_its_discriminator_on_and_off(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GAN()
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2, microbatch_size=8, mode="pp")
    states = []
    for module, inner in ((plain, plain), (model, net)):
        optimizers = [
            torch.optim.Adam(part.parameters(), lr=1e-2, foreach=False)
            for part in (inner.generator, inner.discriminator)
        ]
        losses = []
        for step in range(4):
            noise, real = vector_batch(step)
            inner.discriminator.requires_grad_(True)
            optimizers[1].zero_grad()
            fake, true = module(noise, real)
            loss = nn.functional.softplus(fake).mean() + nn.functional.softplus(-true).mean()
            loss.backward()
            optimizers[1].step()
            inner.discriminator.requires_grad_(False)
            optimizers[0].zero_grad()
            other = nn.functional.softplus(-module(noise)).mean()
            other.backward()
            optimizers[0].step()
            losses += [loss.detach(), other.detach()]
        states.append(losses)
    assert states[0] == states[1]
    assert_same(net, plain, "in the end")


class Adapter(nn.Module):
    """A frozen layer with a low-rank path beside it, on and off as PEFT's are."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(24, 24).requires_grad_(False)
        self.down, self.up = nn.Linear(24, 2, bias=False), nn.Linear(2, 24, bias=False)
        self.is_on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x)) if self.is_on else self.base(x)

    def switch(self, is_on: bool) -> None:
        self.is_on = is_on
        for layer in (self.down, self.up):
            layer.requires_grad_(is_on)


def test_adapters_are_off_for_the_reference_of_a_preference_loss(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(Adapter() for _ in range(3)))
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2, microbatch_size=8, mode="pp")
    losses: list[list[torch.Tensor]] = []
    for module, inner in ((plain, plain), (model, net)):
        trained = [p for p in inner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
        losses.append([])
        for step in range(4):
            x, y = vector_batch(step)
            for layer in inner:
                layer.switch(False)
            with torch.no_grad():
                reference = module(x)
            for layer in inner:
                layer.switch(True)
            optimizer.zero_grad()
            loss = -nn.functional.logsigmoid(square_loss(reference, y) - square_loss(module(x), y))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    assert losses[0] == losses[1]
    assert_same(net, plain, "in the end")
    base = sum(layer.base.weight.nbytes for layer in net)
    assert model._engine.factory.arenas[1].nbytes < base, "frozen weights have no gradient memory"


def test_alternating_sets_are_captured_once_each(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=square_loss,
        microbatch_size=8,
        devices=1,
    )
    for step in range(6):
        SCHEDULES["alternating"][step](net, model.optimizer)
        model.train_step(*vector_batch(step))
    assert len(list(model._engine.variants)) == 2
    assert len(model._engine.factory.arenas[1].buffers) == 2


def test_what_is_in_no_group_cannot_be_unfrozen(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    net.layers[0].requires_grad_(False)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        param_groups=[{"params": [p for p in net.parameters() if p.requires_grad]}],
        loss_fn=square_loss,
        microbatch_size=8,
        devices=1,
    )
    model.train_step(*vector_batch(0))
    model.requires_grad_(True)
    with pytest.raises(harmony.ConfigError, match=r"layers\.0\.weight, layers\.0\.bias, so they"):
        model.train_step(*vector_batch(1))
    model.optimizer.add_param_group({"params": list(net.layers[0].parameters()), "lr": 0.5})
    before = net.layers[0].weight.clone()
    model.train_step(*vector_batch(1))
    assert not torch.equal(before, net.layers[0].weight)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_with_nothing_to_train_is_refused(vgpus: VirtualGPUs, form: str) -> None:
    net = SkipMLP()
    settings = {"optimizer": torch.optim.SGD, "loss_fn": square_loss} if form == "step" else {}
    model = harmony.Harmony(net, microbatch_size=8, devices=1, **settings)
    x, y = vector_batch(0)
    if form == "step":
        model.train_step(x, y)
        model.requires_grad_(False)
        with pytest.raises(harmony.HarmonyError, match="frozen"):
            model.train_step(x, y)
    else:
        square_loss(model(x), y).backward()
        model.requires_grad_(False)
        with pytest.raises(RuntimeError, match="does not require grad"):
            square_loss(model(x), y).backward()


class Quantised(nn.Module):
    """Its frozen weight is of integers, as those of quantised models are."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(-8, 8, (8, 8), dtype=torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.linear(x, self.codes.float() * 0.1))


def test_the_optimizer_numbers_frozen_integers_too(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Quantised()
    plain = torch.optim.AdamW(copy.deepcopy(net).parameters())
    model = assert_same_training(
        net, [((torch.randn(4, 8),), torch.tensor([0, 1, 1, 0]))], options={"lr": 0.01}
    )
    assert model.optimizer is not None
    found = model.optimizer.state_dict()
    assert sorted(found["state"]) == [1, 2]
    assert found["param_groups"][0]["params"] == plain.state_dict()["param_groups"][0]["params"]
