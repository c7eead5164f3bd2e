"""detect_nonfinite=True: what is not finite is named before anything is updated."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.models import square_loss

HERE = Path(__file__).name


class Net(nn.Module):
    """Masks with minus infinity, as attention does; a logarithm and a root in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        x = x.masked_fill(x > 0.5, -math.inf).softmax(-1)
        x = self.layers[1](x) + low.log()
        return self.layers[2](x) + (self.layers[3](x) * high).square().sqrt()


def inputs(low: float, high: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=generator)
    lows, highs = torch.ones(4, 8), torch.ones(4, 8)
    lows[2, 3], highs[1] = low, high
    return x, lows, highs


def state(model: harmony.Harmony) -> list[torch.Tensor]:
    held = [model.optimizer.state[p] for p in model.parameters()]  # the order in it is a plan's
    values = [v for state in held for v in state.values()]
    return [t.cpu().clone() for t in (*model.parameters(), *values, torch.get_rng_state())]


@pytest.mark.parametrize("activations", ["auto", "recompute"])
@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (-1.0, 1.0, r"made first by log \(.*{here}:\d\d\), in layer \d \(.*\), in the forward of"),
        (1.0, 0.0, r"made first by the backward of sqrt \(.*{here}:\d\d\), in layer \d"),
    ],
    ids=["forward", "backward"],
)
def test_the_operation_that_made_it_first_is_named(
    low: float, high: float, text: str, activations: str, vgpus: VirtualGPUs
) -> None:
    torch.manual_seed(0)
    model = harmony.Harmony(
        Net(),
        optimizer=torch.optim.AdamW,
        loss_fn=square_loss,
        devices=1,
        microbatch_size=2,
        activations=activations,
        detect_nonfinite=True,
    )
    target = torch.zeros(4, 8)
    model.train_step(inputs(1.0, 1.0), target)
    before = state(model)
    with pytest.raises(harmony.NonFiniteError, match=text.format(here=HERE)) as caught:
        model.train_step(inputs(low, high), target)
    samples = "2:4" if low < 0 else "0:2"
    assert f"of samples {samples}" in str(caught.value)
    assert "Nothing was updated" in str(caught.value)
    assert all(map(torch.equal, before, state(model)))
    assert model.num_steps == 1
    model.train_step(inputs(1.0, 1.0), target)


def test_a_step_in_which_all_is_finite_computes_the_same(vgpus: VirtualGPUs) -> None:
    results = []
    for options in ({}, {"detect_nonfinite": True}):
        torch.manual_seed(0)
        model = harmony.Harmony(
            Net(), optimizer=torch.optim.AdamW, loss_fn=square_loss, devices=1, **options
        )
        losses = [model.train_step(inputs(1.0, 1.0), torch.zeros(4, 8)) for _ in range(2)]
        results.append([*losses, *state(model)])
    assert all(map(torch.equal, *results))


def test_a_parameter_that_is_not_finite_is_named(vgpus: VirtualGPUs) -> None:
    model = harmony.Harmony(
        Net(), optimizer=torch.optim.SGD, loss_fn=square_loss, devices=1, detect_nonfinite=True
    )
    with torch.no_grad():
        model.module.layers[1].bias[0] = math.nan
    with pytest.raises(harmony.NonFiniteError, match=r"layers\.1\.bias itself is not finite"):
        model.train_step(inputs(1.0, 1.0), torch.zeros(4, 8))


class Wanders(nn.Module):
    """Decides by what it computes, or changes its input."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by == "eager":
            x.mul_(1.0)
        x = self.norm(self.first(x))
        if self.by == "dynamic" and x.mean() > 0:
            x = x + 1
        return self.last(x)


@pytest.mark.parametrize("by", ["dynamic", "eager", "hooked"])
def test_a_step_that_is_not_planned_as_a_whole_is_refused_as_well(
    by: str, vgpus: VirtualGPUs
) -> None:
    """And leaves the buffers that its microbatches have changed as they were."""
    model = harmony.Harmony(
        Wanders(by),
        optimizer=torch.optim.AdamW,
        loss_fn=square_loss,
        devices=1,
        microbatch_size=4,
        detect_nonfinite=True,
    )
    if by == "hooked":
        model.module.last.weight.register_hook(lambda gradient: gradient * 0.5)
    x = torch.randn(8, 8)
    bad = x.clone()
    bad[5] = math.nan
    model.train_step(x.clone(), x)
    before = [*state(model), *(b.clone() for b in model.buffers())]
    with pytest.raises(harmony.NonFiniteError, match=r"is nan\. Nothing was updated"):
        model.train_step(x.clone(), bad)
    assert all(map(torch.equal, before, [*state(model), *model.buffers()]))
    model.train_step(x.clone(), x)
    assert by == "hooked" or model.capture_mode == by


def own_loop(**options: object) -> tuple[harmony.Harmony, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = harmony.Harmony(Net(), devices=2, microbatch_size=2, mode="pp", seed=3, **options)
    return model, torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize(
    ("low", "high", "loss", "text"),
    [
        (
            -1.0,
            1.0,
            "mean",
            r"output is not finite: made first by log \(.*{here}:\d\d\), in layer",
        ),
        (1.0, 0.0, "mean", r"gradient of .* is not finite: made first by the backward of sqrt"),
        (1.0, 1.0, "root", r"the outputs are, so it is made outside of the model"),
    ],
    ids=["forward", "backward", "outside"],
)
def test_a_backward_of_ones_own_loop_names_it_and_adds_no_gradient(
    low: float, high: float, loss: str, text: str, vgpus: VirtualGPUs
) -> None:
    model, optimizer = own_loop(detect_nonfinite=True)
    model(*inputs(1.0, 1.0)).square().mean().backward()
    before = [p.grad.clone() for p in model.parameters()]
    out = model(*inputs(low, high))
    made = out.square().mean() if loss == "mean" else (out - out.detach()).abs().sqrt().mean()
    with pytest.raises(harmony.NonFiniteError, match=text.format(here=HERE)):
        made.backward()
    assert all(map(torch.equal, before, (p.grad for p in model.parameters())))
    optimizer.step()
    model(*inputs(1.0, 1.0)).square().mean().backward()


def test_a_loop_of_ones_own_in_which_all_is_finite_computes_the_same(vgpus: VirtualGPUs) -> None:
    results = []
    for looks in (False, True):
        model, optimizer = own_loop(detect_nonfinite=looks)
        for _ in range(3):
            x, low, high = inputs(1.0, 1.0)
            x.requires_grad_()
            optimizer.zero_grad()
            square_loss(model(x, low, high), torch.zeros(4, 8)).backward()
            optimizer.step()
        results.append([*(p.detach().clone() for p in model.parameters()), x.grad])
    assert all(map(torch.equal, *results))


def test_a_loop_that_nothing_looks_at_is_said(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    model = harmony.Harmony(Wanders("eager"), devices=1, detect_nonfinite=True)
    with pytest.warns(harmony.HarmonyWarning, match="detect_nonfinite does not look at this"):
        model(torch.randn(8, 8)).sum().backward()
    assert model.capture_mode == "eager"


def test_an_input_that_is_not_finite_is_named_in_a_dynamic_loop_too(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    model = harmony.Harmony(Wanders("dynamic"), devices=1, detect_nonfinite=True)
    for step in range(4):  # it goes both ways, which no recording stands for
        model(torch.randn(8, 8) + step).sum().backward()
    bad = torch.randn(8, 8)
    bad[5] = math.nan
    with pytest.raises(harmony.NonFiniteError, match=r"the input args\[0\] is not finite itself"):
        model(bad).sum().backward()
    assert model.capture_mode == "dynamic"
