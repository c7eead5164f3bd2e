"""Own loops whose loss uses some of the outputs only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.report.metrics import metrics_of
from tests.training.conftest import VirtualGPUs
from tests.training.models import SkipMLP, square_loss, vector_batch
from tests.training.test_dropin_graph import both, same_gradients, wrapped


class TwoHeads(nn.Module):
    """A trunk, two heads, and what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = SkipMLP(depth=4)
        self.right = nn.Linear(24, 24)
        self.left = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.trunk(x)
        parts = {"mask": x > 0, "none": None}
        return {"hidden": y, "right": self.right(y), "left": self.left(y), "parts": parts}


@pytest.mark.parametrize("used", [("left",), ("right",), ("hidden",), ("left", "hidden")])
def test_a_loss_of_some_of_the_outputs(vgpus: VirtualGPUs, used: tuple[str, ...]) -> None:
    """Parameters that it does not depend on have no gradient, not one of zeros."""
    torch.manual_seed(0)
    net = TwoHeads()
    model = wrapped(net, device_memory="24KiB")
    x, y = vector_batch(0)

    def run(module: nn.Module) -> list[torch.Tensor]:
        out = module(x)
        assert torch.equal(out["parts"]["mask"], x > 0) and out["parts"]["none"] is None
        loss = sum(square_loss(out[name], y) for name in used)
        loss.backward()
        return [loss.detach()]

    both(net, model, run)
    both(net, model, run)
    assert len(model.plan.spec.backward_packs) >= 2


def test_all_outputs_after_a_part_of_them(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = TwoHeads()
    model = wrapped(net, device_memory="24KiB")
    x, y = vector_batch(0)
    for names in (("left",), ("left", "right", "hidden"), ("right",), ("right", "hidden")):
        for module in (net, model):
            module.zero_grad()
            out = module(x)
            sum(square_loss(out[name], y) for name in names).backward()
        same_gradients(model, net)


def test_a_parameter_that_the_backward_does_not_need_may_change(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    model = wrapped(TwoHeads(), device_memory="20KiB")
    x, y = vector_batch(0)
    out = model(x)
    out["left"].sum().backward(retain_graph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    model.trunk.zero_grad()
    optimizer.step()  # of the left head only
    square_loss(out["right"], y).backward(retain_graph=True)
    out = model(x)
    with torch.no_grad():
        model.left.weight.add_(1.0)
    square_loss(out["right"], y).backward(retain_graph=True)
    with pytest.raises(harmony.HarmonyError, match=r"parameter left\."):
        square_loss(out["left"], y).backward()


def test_what_a_gpu_waited_for_is_that_of_the_backward_that_ran(vgpus: VirtualGPUs) -> None:
    """The report's shares make up the step, though outputs were left out of it."""
    model = wrapped(TwoHeads(), device_memory="24KiB")
    x, y = vector_batch(0)
    square_loss(model(x)["hidden"], y).backward()
    metrics = metrics_of(model.record)
    whole = metrics.gpus[0].busy_s + sum(metrics.gpus[0].stalls_s.values())
    assert whole == pytest.approx(metrics.timeline_s, rel=1e-3)
