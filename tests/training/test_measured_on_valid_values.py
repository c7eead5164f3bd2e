"""Layers that run on valid values only are measured on those, or not at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn

from harmony.capture import capture
from harmony.errors import CaptureError

from .conftest import VirtualGPUs
from .side_by_side import assert_same_training

pytestmark = pytest.mark.filterwarnings("ignore")


def batches() -> list[Any]:
    return [((torch.randn(4, 8),), torch.randint(0, 4, (4,))) for _ in range(3)]


def quantised(backend: str) -> nn.Module:
    net = nn.Sequential(
        quantization.QuantStub(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
        quantization.DeQuantStub(),
    ).train()
    net.qconfig = quantization.get_default_qat_qconfig(backend)
    return quantization.prepare_qat(net)


def test_observers_learn_their_ranges(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    assert_same_training(quantised("qnnpack"), batches())


def test_observers_by_channel_learn_once_they_have_a_shape(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = quantised("fbgemm")
    with pytest.raises(CaptureError, match=r"min_val is empty, .* run the module itself once"):
        capture(copy.deepcopy(net), (torch.randn(4, 8),))
    net(torch.randn(4, 8))
    assert_same_training(net, batches())


class Checks(nn.Module):
    """Looks at the values that it gets, and refuses what no real batch has."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(8, 8), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "assert":
            assert (x.abs().sum(-1) > 0).all(), "a row of zeros"
        elif self.how == "raise" and not bool((x.std(-1) > 0).all()):
            raise ValueError("a row that does not vary")
        elif self.how == "index":
            return self.linear(x[:, x[0].nonzero()[0]].expand_as(x))
        elif self.how == "divide":
            x = x * (1 / float(x.norm()))
        return self.linear(x) + 1.0


@pytest.mark.parametrize("how", ["assert", "raise", "index", "divide"])
def test_a_layer_that_checks_what_it_gets_trains(how: str, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(Checks(how), nn.Tanh()) for _ in range(3)]
    net = nn.Sequential(nn.Linear(8, 8), *blocks, nn.Linear(8, 4))
    assert_same_training(net, batches())
