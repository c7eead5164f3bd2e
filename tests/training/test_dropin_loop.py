"""Training loops of the user's own: gradients added up, held, hooked, clipped and scaled."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import harmony
from harmony.planner.ir.schedule import Schedule
from harmony.planner.ir.tasks import Phase
from harmony.runtime.exec.executor import Executor, PreparedSchedule
from harmony.runtime.step.step import HostValues
from tests.training.conftest import VirtualGPUs
from tests.training.models import SkipMLP, square_loss, vector_batch
from tests.training.plain import gradients_of, params_of
from tests.training.test_dropin_graph import both, same_gradients, wrapped

Loop = Callable[[nn.Module], list[torch.Tensor]]


def same_training(net: nn.Module, loop: Loop, **options: Any) -> harmony.Harmony:
    """Losses and parameters of a loop around the module and around Harmony are the same bits."""
    model = wrapped(net, **options)
    net = copy.deepcopy(net)
    both(net, model, loop)
    expected = params_of(net)
    for name, param in model.named_parameters():
        assert torch.equal(param, expected[name]), name
    return model


# Gradients that add up


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_add_up_over_backwards_bit_for_bit(vgpus: VirtualGPUs, to_none: bool) -> None:
    torch.manual_seed(0)

    def loop(module: nn.Module) -> list[torch.Tensor]:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
        losses = []
        for step in range(6):
            x, y = vector_batch(step)
            loss = square_loss(module(x), y) / 3
            loss.backward()
            losses.append(loss.detach())
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)
        square_loss(module(x), y).backward()
        return losses

    same_training(SkipMLP(), loop)


def test_gradients_of_several_microbatches_add_up(vgpus: VirtualGPUs) -> None:
    """Each backward adds its own sum once, as plain PyTorch's does."""
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net, microbatch_size=2)
    singles = []
    for step in range(3):
        x, y = vector_batch(step)
        square_loss(model(x), y).backward()
        singles.append(gradients_of(model.module))
        model.zero_grad()
    for step in range(3):
        x, y = vector_batch(step)
        square_loss(model(x), y).backward()
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, singles[0][name] + singles[1][name] + singles[2][name])


def test_gradients_that_the_user_keeps_stay_as_they_are(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net)

    def run(module: nn.Module) -> list[torch.Tensor]:
        kept = []
        for step in range(3):
            x, y = vector_batch(step)
            square_loss(module(x), y).backward()
            kept.append([p.grad for p in module.parameters()])
            module.zero_grad()
            kept.append(list(torch.autograd.grad(module(x).sum(), list(module.parameters()))))
        return [gradient for each in kept for gradient in each]

    both(net, model, run)


def test_a_view_of_a_gradient_that_is_overwritten_is_a_warning(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    model = wrapped(SkipMLP())
    x, y = vector_batch(0)
    square_loss(model(x), y).backward()
    copies = torch.cat([p.grad.view(-1) for p in model.parameters()])
    first = copies.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        square_loss(model(x), y).backward()
        square_loss(model(x), y).backward()
    assert torch.equal(copies, first)
    model.zero_grad()
    square_loss(model(x), y).backward()
    view = model.layers[2].weight.grad.view(-1)
    with pytest.warns(UserWarning, match=r"view of the gradient of layers\.2\.weight"):
        square_loss(model(y), y).backward()
    assert not torch.equal(view, first[: view.numel()])


def test_gradients_outlive_their_model(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net)
    x, y = vector_batch(0)
    for module in (net, model):
        square_loss(module(x), y).backward()
    gradient = model.layers[0].weight.grad
    del model, module
    gc.collect()
    assert torch.equal(gradient, net.layers[0].weight.grad)


def test_gradients_are_not_copied_where_nobody_keeps_them(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    model = wrapped(SkipMLP())
    for step in range(3):
        x, y = vector_batch(step)
        model.zero_grad()
        square_loss(model(x), y).backward()
        arena = model._engine.factory.arenas[1]
        for name, param in model.named_parameters():
            assert param.grad.data_ptr() == arena.views[name].data_ptr(), name


def test_autograd_grad_returns_what_backward_would_leave(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net)
    x, y = vector_batch(0)
    found = torch.autograd.grad(square_loss(model(x), y), list(model.parameters()))
    expected = torch.autograd.grad(square_loss(net(x), y), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(p.grad is None for p in model.parameters())
    some = [model.layers[1].weight, model.layers[4].bias]
    square_loss(model(x), y).backward(inputs=some)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "layers.1.weight",
        "layers.4.bias",
    }


# Hooks on parameters, clipping, scaling, schedules, groups


def test_hooks_of_parameters_are_called(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    seen: dict[int, list[torch.Tensor]] = {}

    def loop(module: nn.Module) -> list[torch.Tensor]:
        mine = seen[id(module)] = []
        params = dict(module.named_parameters())
        params["layers.1.weight"].register_hook(lambda gradient: gradient * 2)
        params["layers.2.weight"].register_hook(mine.append)

        def step_at_once(param: torch.Tensor) -> None:
            with torch.no_grad():
                param.sub_(param.grad, alpha=0.1)
            param.grad = None

        for name in ("layers.0.weight", "layers.5.bias"):
            params[name].register_post_accumulate_grad_hook(step_at_once)
        losses = []
        for step in range(3):
            x, y = vector_batch(step)
            loss = square_loss(module(x), y)
            loss.backward()
            losses.append(loss.detach())
        return losses

    net = SkipMLP()
    same_training(net, loop)
    first, second = seen.values()
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_clipping_schedules_and_groups(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)

    def loop(module: nn.Module) -> list[torch.Tensor]:
        weights = [p for p in module.parameters() if p.dim() > 1]
        biases = [p for p in module.parameters() if p.dim() == 1]
        groups = [{"params": weights, "lr": 1e-2}, {"params": biases, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 3e-3], total_steps=6)
        losses = []
        for step in range(5):
            x, y = vector_batch(step)
            optimizer.zero_grad()
            loss = square_loss(module(x), y)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
            torch.nn.utils.clip_grad_value_(module.parameters(), 0.01)
            optimizer.step()
            scheduler.step()
            losses += [loss.detach(), norm]
        return losses

    same_training(SkipMLP(), loop)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler_around_the_step(vgpus: VirtualGPUs, dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def loop(module: nn.Module) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        losses = []
        for step in range(5):
            x, y = vector_batch(step)
            if step == 2:
                x = x * 1e30  # overflows: the step is left out and the scale halved
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                out = module(x)
                loss = square_loss(out.float(), y)
            assert out.dtype == dtype
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses += [torch.nan_to_num(loss.detach()), torch.tensor(scaler.get_scale())]
        return losses

    same_training(SkipMLP(), loop)


def test_with_and_without_autocast_by_turns(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)

    def loop(module: nn.Module) -> list[torch.Tensor]:
        losses = []
        for step in range(4):
            x, y = vector_batch(step)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step % 2 == 1):
                loss = square_loss(module(x).float(), y)
            loss.backward()
            losses.append(loss.detach())
        return losses

    same_training(SkipMLP(), loop)


class Deep(nn.Module):
    """Several times as large as the GPU; what it notes makes its decisions ones of data."""

    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64 + i, 256), nn.GELU(), nn.Linear(256, 65 + i))
            for i in range(6)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            if self.dynamic and x.detach().float().mean() > 1e6:
                x = x * 2
        return x


@pytest.mark.parametrize("dynamic", [False, True])
def test_autocast_of_the_caller_keeps_no_weights_on_the_gpu(
    vgpus: VirtualGPUs, dynamic: bool
) -> None:
    """Its cache of casts holds on to weights until it ends, behind the caller's forward."""
    vgpus(count=1, memory="600KiB")
    torch.manual_seed(0)
    net = Deep(dynamic)
    twin, x = copy.deepcopy(net), torch.randn(8, 64)
    for each in (harmony.Harmony(net, devices=1), twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = each(x).float().square().mean()
        loss.backward()
    for param, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad, rtol=3e-2, atol=1e-6)


def test_generator_and_discriminator_by_turns(vgpus: VirtualGPUs) -> None:
    """Both wrapped; the discriminator is called twice, and in the generator's graph."""
    torch.manual_seed(0)
    nets = nn.ModuleList([SkipMLP(), SkipMLP()])
    models = [wrapped(net) for net in nets]
    results = []
    for generator, judge in (nets, models):
        mine = torch.optim.Adam(generator.parameters(), lr=1e-3)
        yours = torch.optim.Adam(judge.parameters(), lr=1e-3)
        losses = []
        for step in range(3):
            noise, real = vector_batch(step)
            fake = generator(noise)
            yours.zero_grad()
            loss = (judge(fake.detach()) - judge(real)).mean()
            loss.backward()
            yours.step()
            mine.zero_grad()
            lie = -judge(fake).mean()
            lie.backward()
            mine.step()
            losses += [loss.detach(), lie.detach()]
        results.append(losses)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for model, net in zip(models, nets, strict=True):
        expected = params_of(net)
        assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())


# What the model returns, and the modes around it


class Pair(NamedTuple):
    main: torch.Tensor
    extra: dict[str, Any]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = SkipMLP(), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Pair:
        y = self.body(x)
        rows = y.sum(1)
        return Pair(self.tail(y) * scale, {"list": [y, rows], "count": 3, "index": rows.argmax()})


def test_nested_outputs_of_several_kinds(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)

    def loop(module: nn.Module) -> list[torch.Tensor]:
        x, y = vector_batch(0)
        out = module(x, scale=0.5)
        assert isinstance(out, Pair) and out.extra["count"] == 3
        assert not out.extra["index"].requires_grad
        hidden, rows = out.extra["list"]
        loss = square_loss(out.main, y) + hidden.abs().mean() + rows.sum()
        loss.backward()
        return [loss.detach(), out.main.detach(), rows.detach()]

    same_training(Structured(), loop)


def test_inference_mode_before_and_between_training(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)

    def loop(module: nn.Module) -> list[torch.Tensor]:
        found = []
        for step in range(3):
            x, y = vector_batch(step)
            with torch.inference_mode():
                out = module(x)
                found.append(out.clone())
            found.append(out.clone())
            loss = square_loss(module(x), y)
            with torch.inference_mode():
                found.append(module(y).clone())
            loss.backward()
            torch.optim.SGD(module.parameters(), lr=0.1).step()
            module.zero_grad()
        return found

    same_training(SkipMLP(), loop)


class Modal(nn.Module):
    """Does something else in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(24, 24) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.a(x))
        y = self.drop(torch.tanh(self.b(y)))
        return self.c(y) * (1.0 if self.training else 2.0)


def test_modes_of_the_model_and_of_parts_of_it(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Modal()
    model = wrapped(net, device_memory="16KiB")
    x, y = vector_batch(0)
    losses: list[list[torch.Tensor]] = []
    for module in (net, model):
        found = []
        for step, mode in enumerate(("train", "eval", "drop in eval", "train")):
            module.train(mode != "eval")
            module.drop.train(mode == "train")
            harmony.seed_microbatch(step, 0)
            loss = square_loss(module(x), y)
            loss.backward()
            found.append(loss.detach())
        losses.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    same_gradients(model, net)


def test_anomaly_mode_names_no_anomaly(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)

    def loop(module: nn.Module) -> list[torch.Tensor]:
        x, y = vector_batch(0)
        with torch.autograd.detect_anomaly():
            loss = square_loss(module(x), y)
            loss.backward()
            bad = torch.sqrt(module(x) * 0 - 1)
            with pytest.raises(RuntimeError, match="returned nan"):
                bad.sum().backward()
        return [loss.detach()]

    with pytest.warns(UserWarning, match="Anomaly Detection"):
        same_training(SkipMLP(), loop)


# What a step of a loop makes anew


def test_forward_and_backward_take_turns_in_the_same_slots(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots of other sizes would be given back, and all be prepared again, twice a step."""
    prepared, prepare = [], Executor.prepare

    def counting(executor: Executor, schedule: Schedule, values: HostValues) -> PreparedSchedule:
        prepared.append(schedule)
        return prepare(executor, schedule, values)

    monkeypatch.setattr(Executor, "prepare", counting)
    model = wrapped(SkipMLP(), device_memory="24KiB")
    for step in range(4):
        x, y = vector_batch(step)
        square_loss(model(x), y).backward()
    assert [id(schedule) for schedule in prepared] == [
        id(model.plan.schedules[phase]) for phase in (Phase.FORWARD, Phase.BACKWARD)
    ]
