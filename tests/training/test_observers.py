"""Observers of a model hear of its plans and steps, and change nothing of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs


class Heard(harmony.Observer):
    def __init__(self) -> None:
        self.plans: list[str] = []
        self.steps: list[tuple[int, float | None, int]] = []

    def planned(self, record: harmony.ModelRecord) -> None:
        assert record.plan is not None
        self.plans.append(record.plan.mode)

    def stepped(self, record: harmony.ModelRecord, stats: harmony.StepStats) -> None:
        self.steps.append((stats.step, stats.loss, stats.num_samples))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


INPUTS = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(6) % 4


def test_steps_and_plans_are_heard_until_the_observer_is_removed(vgpus: VirtualGPUs) -> None:
    observer = Heard()
    losses = []
    for observed in (False, True):
        model = harmony.Harmony(
            net(), optimizer=torch.optim.SGD, loss_fn=nn.functional.cross_entropy, devices=1
        )
        if observed:
            model.add_observer(observer)
        losses.append([model.train_step(INPUTS, TARGETS).item() for _ in range(2)])
    model.remove_observer(observer)
    model.remove_observer(observer)
    model.train_step(INPUTS, TARGETS)
    assert losses[0] == losses[1]
    assert observer.plans == ["pp"]
    assert observer.steps == [(0, losses[0][0], 6), (1, losses[0][1], 6)]
    with pytest.raises(harmony.ConfigError, match=r"a harmony\.Observer, not int"):
        model.add_observer(7)  # type: ignore[arg-type]


def test_what_an_observer_raises_is_the_callers_and_the_step_is_whole(vgpus: VirtualGPUs) -> None:
    class Full(harmony.Observer):
        def stepped(self, record: harmony.ModelRecord, stats: harmony.StepStats) -> None:
            raise OSError("disk full")

    def trained(*, full: bool) -> list[torch.Tensor]:
        model = harmony.Harmony(
            net(), optimizer=torch.optim.SGD, loss_fn=nn.functional.cross_entropy, devices=1
        )
        observer = Full()
        if full:
            model.add_observer(observer)
            with pytest.raises(OSError, match="disk full"):
                model.train_step(INPUTS, TARGETS)
            model.remove_observer(observer)
        else:
            model.train_step(INPUTS, TARGETS)
        model.train_step(INPUTS, TARGETS)
        return [param.detach().clone() for param in model.parameters()]

    assert all(map(torch.equal, trained(full=True), trained(full=False)))


def test_a_loop_of_ones_own_is_heard_without_a_loss(vgpus: VirtualGPUs) -> None:
    observer = Heard()
    model = harmony.Harmony(net(), devices=1)
    model.add_observer(observer)
    for _ in range(2):
        model.zero_grad()
        nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
    assert observer.steps == [(0, None, 6), (1, None, 6)]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_the_optimizers_however_many_backwards_it_adds_up(
    vgpus: VirtualGPUs, to_none: bool, fused: bool
) -> None:
    observer = Heard()
    model = harmony.Harmony(net(), devices=1)
    model.add_observer(observer)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    for number in range(6):
        nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    assert [step for step, _, _ in observer.steps] == [0, 0, 0, 1, 1, 1]
    assert (model.record.num_steps, model.record.num_batches) == (2, 6)


def test_steps_of_an_optimizer_of_the_callers_own_are_told_by_the_parameters(
    vgpus: VirtualGPUs,
) -> None:
    observer = Heard()
    model = harmony.Harmony(net(), devices=1)
    model.add_observer(observer)
    for number in range(4):
        nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
        if number % 2:
            with torch.no_grad():
                for param in model.parameters():
                    param -= 0.1 * param.grad
                    param.grad.zero_()
    assert [step for step, _, _ in observer.steps] == [0, 0, 1, 1]
