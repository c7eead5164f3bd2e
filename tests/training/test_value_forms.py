"""What the device makes has the form that was recorded, or nothing is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import harmony
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import StepSpec
from tests.toys import halves
from tests.training.conftest import VirtualGPUs
from tests.training.test_plans import packs, use_plan


@torch.library.custom_op("harmony_tests::widened", mutates_args=())
def widened(x: torch.Tensor, form: str) -> torch.Tensor:
    """Gives another form than its fake kernel says."""
    if form == "dtype":
        return x.double()
    return torch.cat([x, x], 1) if form == "shape" else x.clone()


@widened.register_fake
def _(x: torch.Tensor, form: str) -> torch.Tensor:
    return torch.empty_like(x)


widened.register_autograd(lambda ctx, grad: (grad.float()[:, :16], None))


class Widened(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return widened(self.linear(x.float()[:, :16]), self.form)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.float()[:, :16] - target).square().mean()


def make(form: str) -> harmony.Harmony:
    torch.manual_seed(0)
    net = nn.Sequential(*(Widened(form) for _ in range(4)))
    return harmony.Harmony(
        net, optimizer=torch.optim.SGD, loss_fn=loss_of, devices=2, microbatch_size=2, mode="pp"
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 16), torch.randn(4, 16)


def every_layer_alone(num_layers: int, minibatch: int) -> StepSpec:
    """Cut after each layer: where nothing is cut, what is made goes on as in plain PyTorch."""
    every = packs(list(range(1, num_layers)), num_layers)
    return StepSpec(minibatch, 2, 2, every[:-1], every, halves(minibatch, 1))


@pytest.mark.parametrize("form", ["dtype", "shape"])
def test_a_value_of_another_form_than_recorded_is_refused_by_name(
    vgpus: VirtualGPUs, form: str
) -> None:
    model = make(form)
    before = [p.detach().clone() for p in model.parameters()]
    use_plan(model, batch(), every_layer_alone, Policy())
    with pytest.raises(harmony.HarmonyError, match="but was recorded as"):
        model.train_step(*batch())
    assert all(map(torch.equal, before, model.parameters()))


def test_a_value_of_the_recorded_form_trains(vgpus: VirtualGPUs) -> None:
    model = make("none")
    use_plan(model, batch(), every_layer_alone, Policy())
    assert float(model.train_step(*batch())) > 0
