"""Any optimizer leads to what its own step leads to in plain PyTorch: per pack, or all at once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.runtime.update.coupling import why_coupled

from . import optimizers as own
from .conftest import VirtualGPUs
from .models import SkipMLP, square_loss, vector_batch
from .plain import train_plain

STEPS = 4


def model_of(
    net: nn.Module, optimizer: Any, options: dict[str, Any] | None = None, **more: Any
) -> harmony.Harmony:
    """A model whose layers are in several packs."""
    settings = {"mode": "pp", "devices": 2, "device_memory": "40KiB", "microbatch_size": 4, **more}
    return harmony.Harmony(
        net,
        optimizer=optimizer,
        optimizer_kwargs=options,
        loss_fn=square_loss,
        **settings,
    )


def trained(
    optimizer: Callable[..., torch.optim.Optimizer],
    options: dict[str, Any] | None = None,
    net: nn.Module | None = None,
    **more: Any,
) -> tuple[harmony.Harmony, torch.optim.Optimizer]:
    """Train by Harmony and by plain PyTorch, and compare; return both optimizers."""
    torch.manual_seed(0)
    net = net or SkipMLP()
    made: list[torch.optim.Optimizer] = []

    def factory(params: Any, **given: Any) -> torch.optim.Optimizer:
        made.append(optimizer(params, **given))
        return made[-1]

    batches = [vector_batch(step) for step in range(STEPS)]
    expected = train_plain(
        net,
        batches,
        optimizer=factory,
        options=options or {},
        loss_fn=square_loss,
        microbatch=4,
    )
    model = model_of(net, optimizer, options, **more)
    losses = [model.train_step(*batch) for batch in batches]
    assert losses == expected.losses
    for name, param in model.named_parameters():
        assert torch.equal(param, expected.params[name]), name
    return model, made[-1]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        pairs = zip(one, other, strict=True)
        return len(one) == len(other) and all(same(a, b) for a, b in pairs)
    return bool(one == other)


@pytest.mark.parametrize("updates", ["auto", "host"])
@pytest.mark.parametrize("optimizer", own.COUPLED, ids=lambda kind: kind.__name__)
def test_optimizers_that_look_at_all_parameters_take_one_step(
    vgpus: VirtualGPUs, optimizer: Any, updates: str
) -> None:
    """Pack by pack, their norms, counters and means would be others: off by percents of a step."""
    model, plain = trained(optimizer, updates=updates)
    assert model.optimizer is not None
    assert same(model.optimizer.state_dict(), plain.state_dict())
    assert model.plan is not None and len(model.plan.spec.backward_packs) > 1
    assert "one step of all" in model.record.facts["optimizer"]
    for name in ("count", "turn", "slow"):
        assert same(getattr(model.optimizer, name, None), getattr(plain, name, None))


def test_a_large_model_with_a_norm_of_all_gradients_is_plain_pytorchs(vgpus: VirtualGPUs) -> None:
    """The script coupled_optimizer: parameters were off by 7 to 15 % of a step."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    plain = copy.deepcopy(net)
    model = model_of(net, own.NormSGD, device_memory="128KiB", updates="host")
    optimizer = own.NormSGD(plain.parameters())
    inputs, targets = vector_batch(0, width=64)
    model.train_step(inputs, targets)
    for part in (slice(0, 4), slice(4, 8)):
        (square_loss(plain(inputs[part]), targets[part]) * 0.5).backward()
    optimizer.step()
    assert all(map(torch.equal, net.parameters(), plain.parameters()))


def test_a_bad_step_is_left_out_as_a_whole(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    before = copy.deepcopy(net)
    model = model_of(net, own.SkipsBadSteps)
    inputs, targets = vector_batch(0)
    model.train_step(inputs, targets * float("inf"))
    assert all(map(torch.equal, net.parameters(), before.parameters()))


def test_noise_is_drawn_in_the_order_of_the_parameters(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    model, plain = model_of(net, own.Noisy), copy.deepcopy(net)
    optimizer = own.Noisy(plain.parameters())
    inputs, targets = vector_batch(0)
    torch.manual_seed(7)
    model.train_step(inputs, targets)
    after = torch.get_rng_state()
    for part in (slice(0, 4), slice(4, 8)):
        (square_loss(plain(inputs[part]), targets[part]) * 0.5).backward()
    torch.manual_seed(7)
    optimizer.step()
    assert all(map(torch.equal, net.parameters(), plain.parameters()))
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("place", ["pre", "post"])
def test_hooks_of_a_step_are_called_once_a_step(vgpus: VirtualGPUs, place: str) -> None:
    """Also where they come when packs have been updated alone, on their devices, before."""
    model, calls = model_of(SkipMLP(), torch.optim.SGD, {"lr": 0.1}), []
    assert model.optimizer is not None
    model.train_step(*vector_batch(0))
    register = getattr(model.optimizer, f"register_step_{place}_hook")
    handle = register(lambda optimizer, args, kwargs: calls.append(optimizer))
    model.train_step(*vector_batch(1))
    assert calls == [model.optimizer]
    handle.remove()
    model.train_step(*vector_batch(2))
    assert calls == [model.optimizer]


def test_a_hook_that_clips_all_gradients_sees_all(vgpus: VirtualGPUs) -> None:
    def clipping(params: Any, **options: Any) -> torch.optim.Optimizer:
        params = list(params)
        optimizer = torch.optim.AdamW(params, **options)
        optimizer.register_step_pre_hook(
            lambda *_: nn.utils.clip_grad_norm_(params, 0.01) and None
        )
        return optimizer

    trained(clipping, {"lr": 1e-2, "foreach": False})


def test_a_step_that_was_replaced_is_the_one_that_is_called(vgpus: VirtualGPUs) -> None:
    model, calls = model_of(SkipMLP(), torch.optim.SGD, {"lr": 0.1}), []
    assert model.optimizer is not None
    step = model.optimizer.step

    def replaced(closure: Any = None) -> None:
        calls.append(1)
        step()

    model.optimizer.step = replaced  # type: ignore[method-assign]
    model.train_step(*vector_batch(0))
    assert calls == [1]


def test_a_scheduler_counts_steps_that_are_one(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    plain = copy.deepcopy(net)
    model = model_of(net, own.NormSGD)
    optimizer = own.NormSGD(plain.parameters())
    assert model.optimizer is not None
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: step / 3)
        for one in (model.optimizer, optimizer)
    ]
    for step in range(4):
        inputs, targets = vector_batch(step)
        model.train_step(inputs, targets)
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (square_loss(plain(inputs[part]), targets[part]) * 0.5).backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert all(map(torch.equal, net.parameters(), plain.parameters()))


def test_the_trial_leaves_no_trace(vgpus: VirtualGPUs) -> None:
    """Neither on the optimizer, nor on what its code reaches, nor on random generators."""
    params = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    before, calls = torch.get_rng_state(), list(own.CALLS)
    values = [p.detach().clone() for p in params]
    for kind in (*own.COUPLED, own.Noisy, own.Lion):
        optimizer = kind(params)
        held = copy.deepcopy(optimizer.state_dict())
        assert (why_coupled(optimizer) is None) is (kind is own.Lion), kind
        assert same(optimizer.state_dict(), held)
    assert calls == own.CALLS
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, params, values)) and all(p.grad is None for p in params)


class Log:
    """Keeps what it is told, and how often."""

    def __init__(self) -> None:
        self.calls, self.lines = 0, list[int]()

    def tell(self, number: int) -> None:
        self.calls += 1
        self.lines.append(number)


@pytest.mark.parametrize("writes", ["average", "sum", "weight", "log"])
def test_what_a_step_writes_elsewhere_is_written_by_steps_alone(
    vgpus: VirtualGPUs, writes: str
) -> None:
    """Averages and weights that a step reaches by its closure were changed by its trials, too."""

    def train(by_harmony: bool) -> list[Any]:
        torch.manual_seed(0)
        net, log, total = SkipMLP(), Log(), torch.zeros(())
        average = [param.detach().clone() for param in net.parameters()]
        first = next(net.parameters())

        class Writing(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure: Any = None) -> None:
                super().step(closure)
                if writes == "average":
                    for mean, param in zip(average, net.parameters(), strict=True):
                        mean.lerp_(param, 0.1)
                elif writes == "sum":
                    total.add_(sum(p.grad.sum() for g in self.param_groups for p in g["params"]))
                elif writes == "weight":
                    first.mul_(0.9)
                else:
                    log.tell(len(log.lines))

        batches = [vector_batch(step) for step in range(STEPS)]
        if by_harmony:
            model = model_of(net, Writing, {"lr": 0.1}, microbatch_size=8)
            for batch in batches:
                model.train_step(*batch)
        else:
            optimizer = Writing(net.parameters(), lr=0.1)
            for inputs, targets in batches:
                optimizer.zero_grad()
                square_loss(net(inputs), targets).backward()
                optimizer.step()
        return [list(net.parameters()), average, total, log.calls, log.lines]

    assert same(train(True), train(False))


def test_what_looks_at_one_parameter_is_updated_behind_the_backward(vgpus: VirtualGPUs) -> None:
    model, plain = trained(own.Lion, updates="host")
    assert model.record.facts["optimizer"] == "Lion"
    assert model.optimizer is not None
    assert same(model.optimizer.state_dict(), plain.state_dict())
    assert model.last_timeline is not None
    assert len([s for s in model.last_timeline.spans if s.kind == "update"]) > 1


def test_an_optimizer_that_cannot_be_tried_takes_one_step(vgpus: VirtualGPUs) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            if any(p.numel() not in (24, 24 * 24) for g in self.param_groups for p in g["params"]):
                raise ValueError("not a parameter of this model")
            super().step()

    model, _ = trained(Odd, {"lr": 0.1})
    assert "fails where it is tried" in model.record.facts["optimizer"]


def test_an_optimizer_that_wants_a_gradient_of_each_gets_what_is_trained(
    vgpus: VirtualGPUs,
) -> None:
    class Strict(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad, alpha=0.1)

    net = SkipMLP()
    net.layers[2].requires_grad_(False)
    frozen = net.layers[2].weight.detach().clone()
    model = model_of(net, Strict)
    model.train_step(*vector_batch(0))
    assert model.record.facts["optimizer"] == "Strict"
    assert torch.equal(net.layers[2].weight, frozen)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, "own"])
def test_a_step_that_needs_a_closure_is_refused(vgpus: VirtualGPUs, kind: Any) -> None:
    class Closes(torch.optim.SGD):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            closure()

    with pytest.raises(harmony.ConfigError, match="several times in one step"):
        model_of(SkipMLP(), Closes if kind == "own" else kind)


def test_clipping_that_begins_later_moves_the_updates_to_the_host(vgpus: VirtualGPUs) -> None:
    options = {"device_memory": "1MiB", "updates": "auto"}
    model = model_of(SkipMLP(), torch.optim.SGD, {"lr": 0.1}, **options)
    model.train_step(*vector_batch(0))
    assert model.plan is not None and model.plan.policy.resident
    model._engine._optimizer.max_norm = 1.0  # type: ignore[union-attr]
    model.train_step(*vector_batch(1))
    assert not model.plan.policy.resident and model.last_grad_norm is not None


# Every optimizer of torch.optim, as its class is by default.


def _classes() -> list[Any]:
    found = (getattr(torch.optim, name) for name in dir(torch.optim))
    kinds = [k for k in found if inspect.isclass(k) and issubclass(k, torch.optim.Optimizer)]
    return [k for k in kinds if k.__name__ not in ("Optimizer", "LBFGS", "SparseAdam")]


class Matrices(nn.Module):
    """Layers without biases, for optimizers that want matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Muon": {"lr": 0.01}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", _classes(), ids=lambda kind: kind.__name__)
def test_every_optimizer_of_torch_is_what_its_class_is_by_default(
    vgpus: VirtualGPUs, kind: Any, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    net = Matrices().to(dtype)
    twin = copy.deepcopy(net)
    options = OPTIONS.get(kind.__name__, {})
    model = model_of(net, kind, options, updates="host")
    optimizer = kind(twin.parameters(), **options)
    for step in range(STEPS):
        inputs, targets = (x.to(dtype) for x in vector_batch(step))
        model.train_step(inputs, targets)
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (square_loss(twin(inputs[part]), targets[part]) * 0.5).backward()
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_parameters_in_bf16_move_as_in_plain_pytorch(vgpus: VirtualGPUs) -> None:
    """By the fused kernel of SGD they hardly moved (pytorch#191763)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).bfloat16()
    plain = copy.deepcopy(net)

    def loss_fn(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(out.float(), y)

    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.5},
        loss_fn=loss_fn,
        microbatch_size=16,
        devices=1,
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    x, y = torch.randn(16, 64).bfloat16(), torch.randint(0, 8, (16,))
    for _ in range(3):
        model.train_step(x, y)
        optimizer.zero_grad()
        loss_fn(plain(x), y).backward()
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), plain.parameters()))


def test_a_function_that_makes_its_optimizer_of_the_models_parameters_is_not_tried_on_them(
    vgpus: VirtualGPUs,
) -> None:
    net = SkipMLP()
    before = copy.deepcopy(net)

    def factory(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=0.1)

    model = model_of(net, factory)
    assert all(map(torch.equal, net.parameters(), before.parameters()))
    assert model.record.facts["optimizer"].startswith("AdamW (")
