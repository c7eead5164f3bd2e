"""What a user sees when something goes wrong: one clear error, nothing lost, nothing hanging."""

from __future__ import annotations

import _thread
import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.planner.policy import Policy
from harmony.planner.tasks import StepSpec
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch
from tests.training.plain import params_of
from tests.training.test_plans import packs, use_plan


class Switch:
    """Raises in a chosen call; all copies of a module share it, and count together."""

    def __init__(self) -> None:
        self.calls, self.fail_at = 0, -1

    def __deepcopy__(self, memo: Any) -> Switch:
        return self

    def __call__(self) -> None:
        if self.fail_at >= 0:
            self.calls += 1
            if self.calls == self.fail_at:
                raise ValueError("the user's own mistake")

    def set(self, calls: int, fail_at: int) -> None:
        self.calls, self.fail_at = calls, fail_at


class Fails(nn.Module):
    """Raises in a chosen call of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 24) / 5)
        self.switch = Switch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.switch()
        return torch.tanh(x @ self.weight)


def failing_model(**options: Any) -> tuple[harmony.Harmony, Fails]:
    torch.manual_seed(0)
    bad = Fails()
    net = nn.Sequential(nn.Linear(24, 24), bad, nn.Linear(24, 24), nn.Linear(24, 24))
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=square_loss,
        mode="pp",
        microbatch_size=2,
        devices=2,
        device_memory="24KiB",
        activations="recompute",
        updates="host",
        **options,
    )

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        """A pack a layer: the one that fails runs forward, and again in its backward."""
        last = packs([*range(1, num_layers)], num_layers)
        return StepSpec(minibatch, 2, 2, last[:-1], last, ((0, minibatch),))

    use_plan(model, vector_batch(0), spec_of, Policy(1, 1, 1))
    return model, bad


def test_error_in_a_forward_names_the_task_and_changes_nothing(vgpus: VirtualGPUs) -> None:
    model, bad = failing_model()
    model.train_step(*vector_batch(0))
    before = params_of(model.module)
    bad.switch.set(0, 2)
    with pytest.raises(harmony.ExecutionError, match="the user's own mistake") as caught:
        model.train_step(*vector_batch(1))
    assert "F[" in caught.value.task
    assert isinstance(caught.value.__cause__, ValueError)
    assert "all are of the step before" in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    bad.switch.set(0, -1)
    model.train_step(*vector_batch(1))  # and it goes on


def test_error_after_updates_says_so_and_wants_a_checkpoint(vgpus: VirtualGPUs) -> None:
    model, bad = failing_model()
    model.train_step(*vector_batch(0))
    checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bad.switch.set(0, 8)  # the last recompute: later packs are updated by then
    with pytest.raises(harmony.ExecutionError) as caught:
        model.train_step(*vector_batch(1))
    assert "B[" in caught.value.task
    if caught.value.torn:
        bad.switch.set(0, -1)
        with pytest.raises(harmony.HarmonyError, match="load a checkpoint"):
            model.train_step(*vector_batch(2))
        model.load_state_dict(checkpoint)
    bad.switch.set(0, -1)
    model.train_step(*vector_batch(1))


def test_first_step_is_all_or_nothing(vgpus: VirtualGPUs) -> None:
    model, bad = failing_model()
    before = params_of(model.module)
    bad.switch.set(-1000, 1)  # past capture and measuring
    x, y = vector_batch(0)
    model._engine.bindings.find("step", ((x,), {}, y))
    bad.switch.set(0, 8)
    with pytest.raises(harmony.ExecutionError) as caught:
        model.train_step(x, y)
    assert not caught.value.torn
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_layer_that_cannot_fit_is_refused_before_anything_runs(vgpus: VirtualGPUs) -> None:
    net = GPT(width=64, depth=2)
    before = params_of(net)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=token_loss,
        devices=2,
        device_memory="100KiB",
    )
    with pytest.raises(harmony.DoesNotFitError, match=r"blocks\.") as caught:
        model.train_step(*token_batch(0))
    assert "100 KiB" in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_interrupt_lets_the_step_end(vgpus: VirtualGPUs) -> None:
    """Ctrl-C during a step: it ends, all parameters are of the step after, then it surfaces."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "optimizer": torch.optim.SGD,
        "optimizer_kwargs": {"lr": 0.1},
        "loss_fn": square_loss,
        "mode": "pp",
        "devices": 2,
        "microbatch_size": 2,
        "device_memory": "32KiB",
    }
    net, other = SkipMLP(), SkipMLP()
    other.load_state_dict(net.state_dict())
    undisturbed = harmony.Harmony(other, **options)
    model = harmony.Harmony(net, **options)
    for step in range(2):
        undisturbed.train_step(*vector_batch(step))
    model.train_step(*vector_batch(0))
    vgpus_slow = threading.Event()
    (binding,) = model._engine.bindings
    update = binding.host.update

    def interrupting_update(pack: Any) -> None:
        if not vgpus_slow.is_set():
            vgpus_slow.set()
            _thread.interrupt_main()
        update(pack)

    binding.host.update = interrupting_update
    with pytest.raises(KeyboardInterrupt):
        model.train_step(*vector_batch(1))
        for _ in range(10**6):  # the interrupt may come as late as here
            pass
    expected = params_of(other)
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "zp"}, "choose one of auto, pp, dp"),
        ({"microbatch_size": 0}, "positive number"),
        ({"devices": 0}, "at least one device"),
        ({"devices": 99}, "99 devices asked for"),
        ({"device_memory": "much"}, "not a size"),
        ({"optimizer_kwargs": {"lr": 1.0}}, "without an optimizer"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"optimizer": torch.optim.SGD, "optimizer_kwargs": {"speed": 1}}, "speed"),
    ],
)
def test_bad_options(vgpus: VirtualGPUs, options: dict[str, Any], message: str) -> None:
    with pytest.raises(harmony.ConfigError, match=message):
        harmony.Harmony(SkipMLP(), **options)


def test_bad_batches(vgpus: VirtualGPUs) -> None:
    model = harmony.Harmony(SkipMLP(), devices=1)
    with pytest.raises(harmony.ConfigError, match="needs an optimizer"):
        model.train_step(*vector_batch(0))
    with pytest.raises(harmony.ConfigError, match="batch is empty"):
        model(torch.zeros(0, 24))
    with pytest.raises(harmony.ConfigError, match="dimension 0"):
        model(3)
    model = harmony.Harmony(
        SkipMLP(), devices=1, optimizer=torch.optim.SGD, loss_fn=square_loss
    )
    model.eval()
    with pytest.raises(harmony.ConfigError, match="eval mode"):
        model.train_step(*vector_batch(0))


def test_freezing_after_the_first_batch_is_refused(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    model = harmony.Harmony(
        net, devices=1, optimizer=torch.optim.SGD, loss_fn=square_loss, microbatch_size=4
    )
    model.train_step(*vector_batch(0))
    with pytest.raises(harmony.ConfigError, match="until the first batch"):
        model.requires_grad_(False)
    net.layers[0].requires_grad_(False)
    with pytest.raises(harmony.CaptureError, match="frozen"):
        model.train_step(*vector_batch(1))
    net.layers[0].requires_grad_(True)
    model.train_step(*vector_batch(1))


@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_a_wrong_id_is_one_error_whatever_the_kernels_raise_besides(
    vgpus: VirtualGPUs, mode: str
) -> None:
    """Kernels raise when they run, several of them before anybody looks, and no RuntimeError."""
    torch.manual_seed(0)
    model = harmony.Harmony(
        GPT(dropout=0.0),
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=token_loss,
        mode=mode,
        microbatch_size=1,
        devices=2,
    )
    tokens, targets = token_batch(0)
    wrong = torch.full_like(tokens, 10**6)
    before = params_of(model.module)
    for _ in range(3):
        with pytest.raises(harmony.ExecutionError, match="index out of range"):
            model.train_step(wrong, targets)
    after = params_of(model.module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    first = model.train_step(tokens, targets)
    # From now on updates begin before the backward is over: a failure may come too late.
    saved = copy.deepcopy(model.state_dict())
    for _ in range(3):
        with pytest.raises(harmony.ExecutionError, match="index out of range"):
            model.train_step(wrong, targets)
        model.load_state_dict(saved)
    assert model.train_step(tokens, targets) != first
