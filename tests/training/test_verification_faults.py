"""What Harmony.verify must notice: faults put into Harmony's step, each of a kind that happened.

A fault is put around the whole step (`TrainSteps.train_step`, `OwnLoop.backward`), so that nothing
depends on how Harmony works inside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from harmony.engine.engine import Engine
from harmony.engine.own_loop import OwnLoop
from harmony.engine.train_steps import TrainSteps
from harmony.verification.verification import Verification
from tests.training.conftest import VirtualGPUs
from tests.training.test_verification import everything, same

Fault = Callable[[Engine, Callable[[], Any]], Any]
"""Runs a step in a wrong way: the engine, and what runs it."""


class Net(nn.Module):
    """Layers with running statistics, which may decide by values that are computed."""

    def __init__(self, dynamic: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)
        self.dynamic = dynamic
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dynamic:
            self.calls += 1
        h = torch.relu(self.norm(self.first(x)))
        if self.dynamic and h.sum() > 0:
            h = h * 2
        return self.last(torch.tanh(self.second(h)))


WEIGHT = {"kl": 0.0}


def annealed(out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, targets) + WEIGHT["kl"] * out.pow(2).mean()


def batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(size, 8, generator=generator)
    return inputs, torch.randint(0, 4, (size,), generator=generator)


def make(dynamic: bool = False, **options: Any) -> harmony.Harmony:
    torch.manual_seed(0)
    options.setdefault("microbatch_size", 8)
    return harmony.Harmony(
        Net(dynamic),
        optimizer=torch.optim.Adam,
        optimizer_kwargs={"lr": 1e-2},
        loss_fn=annealed,
        devices=1,
        **options,
    )


def moved_too_far(engine: Engine, run: Callable[[], Any]) -> Any:
    """7 % more of a step, as an optimizer does whose norm is that of a part."""
    weight = engine.net.get_parameter("second.weight")
    before = weight.detach().clone()
    result = run()
    with torch.no_grad():
        weight.add_(0.07 * (weight - before))
    return result


def other_state(engine: Engine, run: Callable[[], Any]) -> Any:
    """An optimizer's state that is not what the step leaves."""
    result = run()
    optimizer = engine.optimizer
    assert optimizer is not None
    held = optimizer.state[engine.net.get_parameter("last.weight")]
    held["exp_avg_sq"] = held["exp_avg_sq"] * 1.01
    return result


def not_updated(engine: Engine, run: Callable[[], Any]) -> Any:
    """A parameter that the optimizer leaves as it is."""
    bias = engine.net.get_parameter("first.bias")
    before = bias.detach().clone()
    result = run()
    with torch.no_grad():
        bias.copy_(before)
    return result


def hooks_forgotten(engine: Engine, run: Callable[[], Any]) -> Any:
    """Hooks on parameters that are not called."""
    hooks = engine.net.get_parameter("second.weight")._backward_hooks
    assert hooks is not None
    kept = dict(hooks)
    hooks.clear()
    try:
        return run()
    finally:
        hooks.update(kept)


def weight_frozen(engine: Engine, run: Callable[[], Any]) -> Any:
    """A weight in the loss that stays what it was in the first step."""
    now = WEIGHT["kl"]
    WEIGHT["kl"] = 0.0
    try:
        return run()
    finally:
        WEIGHT["kl"] = now


def buffer_kept(engine: Engine, run: Callable[[], Any]) -> Any:
    """A buffer that does not get what the forward has made of it."""
    mean = engine.net.get_buffer("norm.running_mean")
    before = mean.clone()
    result = run()
    mean.copy_(before)
    return result


def extra_buffer(engine: Engine, run: Callable[[], Any]) -> Any:
    """A buffer that no forward has changed in plain PyTorch."""
    result = run()
    engine.net.get_buffer("norm.running_var").mul_(1.001)
    return result


def attributes_changed(engine: Engine, run: Callable[[], Any]) -> Any:
    """A counter and a mode that the forward does not leave so."""
    result = run()
    engine.net.calls += 1  # type: ignore[operator]
    engine.net.get_submodule("norm").eval()
    return result


STEP_FAULTS = [
    attributes_changed,
    moved_too_far,
    other_state,
    not_updated,
    hooks_forgotten,
    weight_frozen,
    buffer_kept,
    extra_buffer,
]


def with_fault(monkeypatch: pytest.MonkeyPatch, calls: type, method: str, fault: Fault) -> None:
    right = getattr(calls, method)

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        return fault(self._engine, lambda: right(self, *args, **options))

    monkeypatch.setattr(calls, method, wrong)


def prepared(dynamic: bool) -> harmony.Harmony:
    """A model that has trained a step, with a hook and a weight of the loss that has changed."""
    model = make(dynamic)
    WEIGHT["kl"] = 0.0
    model.module.get_parameter("second.weight").register_hook(lambda gradient: gradient * 0.5)
    return model


@pytest.mark.filterwarnings("ignore:.*so no recorded forward")
@pytest.mark.parametrize("dynamic", [False, True], ids=["planned", "dynamic"])
@pytest.mark.parametrize("fault", STEP_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_step_is_found(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, fault: Fault, dynamic: bool
) -> None:
    model = prepared(dynamic)
    if fault is weight_frozen:
        WEIGHT["kl"] = 0.3
    with_fault(monkeypatch, TrainSteps, "train_step", fault)
    before = everything(model)
    found = model.verify(*batch())
    WEIGHT["kl"] = 0.0
    assert not found.ok, found.summary()
    assert "DIFFERENT" in found.summary()
    assert same(before, everything(model))


@pytest.mark.filterwarnings("ignore:.*so no recorded forward")
@pytest.mark.parametrize("dynamic", [False, True], ids=["planned", "dynamic"])
def test_without_a_fault_the_step_is_right_and_nothing_is_left(
    vgpus: VirtualGPUs, dynamic: bool
) -> None:
    model = make(dynamic)
    assert model.verify(*batch()).ok
    model.train_step(*batch())
    before, calls = everything(model), model.module.calls
    found = model.verify(*batch())
    assert found.ok, found.summary()
    assert same(before, everything(model))
    assert model.module.calls == calls


def test_what_the_loss_and_the_forward_keep_is_put_back(vgpus: VirtualGPUs) -> None:
    """In a closure and a global: else the second run begins with what the first has left."""
    seen = {"count": 0}
    WEIGHT["kl"] = 0.5

    def moving(out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen["count"] += 1
        WEIGHT["kl"] *= 0.5
        return annealed(out, targets) * seen["count"]

    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    options: Any = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}, "devices": 1}
    model = harmony.Harmony(net, loss_fn=moving, **options)
    found = model.verify(*batch())
    assert found.ok, found.summary()
    assert seen["count"] == 0 and WEIGHT["kl"] == 0.5
    WEIGHT["kl"] = 0.0


def scaled(engine: Engine, run: Callable[[], Any]) -> Any:
    """Gradients that are 1 % too large."""
    return [None if g is None else g * 1.01 for g in run()]


def test_a_fault_in_the_backward_of_the_drop_in_form_is_found(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = harmony.Harmony(Net(), loss_fn=F.cross_entropy, microbatch_size=8, devices=1)
    inputs, targets = batch()
    assert model.verify(inputs.requires_grad_(), targets).identical
    with_fault(monkeypatch, OwnLoop, "backward", scaled)
    found = model.verify(inputs, targets)
    assert not found.ok
    assert {"first.weight", "input 0"} <= {d.name for d in found.gradients if not d.ok}


@pytest.mark.parametrize("size", [None, 4], ids=["whole batch", "fixed microbatches"])
def test_a_wrong_weight_of_a_microbatch_is_found(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        loss_fn=F.cross_entropy,
        mode="pp" if size else "dp",
        microbatch_size=size or "auto",
        devices=1 if size else 2,
    )
    inputs, targets = batch()
    targets[:3] = -100  # the microbatches count unequal numbers of labels
    found = model.verify(inputs, targets)
    assert found.ok and found.num_microbatches == 2, found.summary()
    ready = Engine.ready

    def weighted(*values: float) -> Callable[..., Any]:
        def wrong(*args: Any) -> Any:
            step = ready(*args)
            keys = sorted(step.weights)
            return replace(step, weights=dict(zip(keys, values * len(keys), strict=False)))

        return wrong

    monkeypatch.setattr(Engine, "ready", weighted(0.5, 0.5))
    assert model.verify(inputs, targets).ok is (size == 4)  # 4 + 4 samples: as plain PyTorch
    monkeypatch.setattr(Engine, "ready", weighted(0.3, 0.7))
    assert not model.verify(inputs, targets).ok


class NormSGD(torch.optim.Optimizer):
    """Uses the norm of all gradients."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.norms: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        self.norms.append(float(norm))
        for param in params:
            param.sub_(param.grad / norm * 0.1)


def pairs(out: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    half = len(out) // 2
    return -F.logsigmoid((out[:half] - out[half:]).sum(-1)).mean()


def is_right(model: harmony.Harmony, loss_fn: Any, *batch: torch.Tensor) -> bool:
    """Whether a step leaves the loss and the parameters that plain PyTorch's leaves."""
    net = copy.deepcopy(model.module)
    for (name, param), own in zip(net.named_parameters(), model.parameters(), strict=True):
        param.grad = None
        for hook in (own._backward_hooks or {}).values():
            net.get_parameter(name).register_hook(hook)
    options = model._engine.options
    assert options.optimizer is not None
    optimizer = options.optimizer(net.parameters(), **options.optimizer_kwargs)
    expected = loss_fn(net(batch[0]), batch[1])
    expected.backward()
    expected = expected.detach()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    loss = model.train_step(*batch)
    if abs(float(loss) - float(expected)) > 1e-4 * abs(float(expected)):
        return False
    return all(
        float((p - q).abs().max()) <= 1e-2 * float((q - b).abs().max())
        for p, q, b in zip(model.parameters(), net.parameters(), before, strict=True)
    )


def _pairs() -> tuple[harmony.Harmony, Any]:
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    options: Any = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    return harmony.Harmony(net, loss_fn=pairs, devices=2, **options), pairs


def _coupled() -> tuple[harmony.Harmony, Any]:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 4))
    options: Any = {"microbatch_size": 8, "device_memory": "16KiB", "updates": "host"}
    model = harmony.Harmony(
        net, optimizer=NormSGD, loss_fn=F.cross_entropy, devices=1, mode="pp", **options
    )
    return model, F.cross_entropy


def _hooked() -> tuple[harmony.Harmony, Any]:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    net[0].weight.register_hook(lambda gradient: gradient * 0.5)
    options: Any = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    return harmony.Harmony(net, loss_fn=F.cross_entropy, devices=1, **options), F.cross_entropy


def _half() -> tuple[harmony.Harmony, Any]:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()
    options: Any = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.5}}

    def loss_fn(out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out.float(), targets)

    return harmony.Harmony(net, loss_fn=loss_fn, microbatch_size=16, devices=1, **options), loss_fn


@pytest.mark.parametrize("make_model", [_pairs, _coupled, _hooked, _half])
def test_verify_says_of_a_step_what_the_step_is(
    vgpus: VirtualGPUs, make_model: Callable[[], tuple[harmony.Harmony, Any]]
) -> None:
    # pairs_loss, coupled_optimizer, parameter_hooks, fused_by_default: each was wrong, and
    # verify said that it was identical.
    torch.manual_seed(0)
    model, loss_fn = make_model()
    inputs, targets = batch(16)
    inputs = inputs.to(next(model.parameters()).dtype)
    before = everything(model)
    said = model.verify(inputs, targets)
    assert same(before, everything(model))
    assert said.ok is is_right(model, loss_fn, inputs, targets), said.summary()


def test_a_weight_of_the_loss_that_changes_is_seen(vgpus: VirtualGPUs) -> None:
    # outside_values: frozen at its first value.
    WEIGHT["kl"] = 0.0
    model = make()
    model.train_step(*batch())
    WEIGHT["kl"] = 0.4
    said: Verification = model.verify(*batch())
    right = is_right(make(), annealed, *batch())
    WEIGHT["kl"] = 0.0
    assert right
    assert said.plain_loss is not None and said.loss is not None
    assert said.ok is (abs(said.loss - said.plain_loss) < 1e-5)


def test_a_step_that_fails_leaves_nothing(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    model.train_step(*batch())
    before = everything(model)

    def fails(engine: Engine, run: Callable[[], Any]) -> Any:
        run()
        raise ZeroDivisionError("on purpose")

    with_fault(monkeypatch, TrainSteps, "train_step", fails)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        model.verify(*batch())
    assert same(before, everything(model))


class Doubles(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x.mul_(2))
        return out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize("fault", [True, False])
def test_inputs_are_compared_after_the_step(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, fault: bool, steps: bool
) -> None:
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    model = harmony.Harmony(
        Doubles(), loss_fn=nn.functional.cross_entropy, **(options if steps else {})
    )
    if fault:
        monkeypatch.setattr(
            "harmony.capture.state.caller_arguments.Lent.give_back", lambda lent: None
        )
    x = torch.ones(8, 8)
    found = model.verify(x, torch.arange(8) % 4)
    assert found.ok is not fault
    assert x.eq(1).all()
