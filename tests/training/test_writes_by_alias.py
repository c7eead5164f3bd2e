"""Forwards that write parameters and buffers by another name: ``.data``, views, detached ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .conftest import VirtualGPUs
from .effects import both, model_of
from .test_changed_arguments import vectors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WAYS = ("replaced", "copied", "row", "flat", "chunks", "kept view")


class Average(nn.Module):
    """Follows the mean of a layer, by the parameter or buffer ``mean``, before it is used."""

    def __init__(self, how: str, parameter: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.how = how
        if parameter:
            self.mean = nn.Parameter(torch.ones(2, 8), requires_grad=False)
        else:
            self.register_buffer("mean", torch.ones(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        view = self.mean[0]
        with torch.no_grad():
            self._follow(h.detach().mean(0), view)
        return self.last(torch.tanh(self.second(h * view + self.mean[1])))  # type: ignore[no-any-return]

    def _follow(self, new: torch.Tensor, view: torch.Tensor) -> None:
        if self.how == "replaced":
            self.mean.data = self.mean.data * 0.9 + new * 0.1
        elif self.how == "copied":
            self.mean.data.copy_(self.mean * 0.9 + new * 0.1)
        elif self.how == "row":
            self.mean[0].mul_(0.9).add_(new, alpha=0.1)
        elif self.how == "flat":
            self.mean.view(-1)[:8] = new
        elif self.how == "chunks":
            for part in self.mean.chunk(2):
                part += new
        else:
            view.lerp_(new, 0.1)


@pytest.mark.parametrize("way", ["step", "loop"])
@pytest.mark.parametrize("how", WAYS)
def test_buffers_keep_what_is_written(vgpus: VirtualGPUs, how: str, way: str) -> None:
    vgpus(count=2)
    torch.manual_seed(0)
    options = {"activations": "recompute", "mode": "pp"} if way == "step" else {}
    both(Average(how, parameter=False), vectors(3), F.cross_entropy, way, **options)


@pytest.mark.parametrize("how", WAYS)
def test_parameters_keep_what_is_written(vgpus: VirtualGPUs, how: str) -> None:
    vgpus(count=1)
    torch.manual_seed(0)
    both(Average(how, parameter=True), vectors(3), F.cross_entropy, "step")


class Constrained(nn.Linear):
    """A linear layer whose rows have a limited norm."""

    def __init__(self, how: str) -> None:
        super().__init__(8, 8)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "renorm":
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.4)
        else:
            self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("how", ["renorm", "clamp"])
def test_layers_may_limit_their_weights(vgpus: VirtualGPUs, how: str) -> None:
    vgpus(count=2)
    torch.manual_seed(0)
    net = nn.Sequential(Constrained(how), nn.Tanh(), Constrained(how), nn.Linear(8, 4))
    both(net, vectors(3), F.cross_entropy, "step")


def test_views_of_buffers_that_change_leave_the_model_recorded(vgpus: VirtualGPUs) -> None:
    vgpus(count=2)
    torch.manual_seed(0)
    model = model_of(Average("kept view", parameter=False), "step", F.cross_entropy)
    for x, y in vectors(2):
        model.train_step((x,), y)
    assert model.capture_mode == "trace"


@pytest.mark.parametrize("way", ["step", "loop"])
def test_embeddings_may_limit_their_rows(vgpus: VirtualGPUs, way: str) -> None:
    vgpus(count=1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 8, max_norm=0.5), nn.Flatten(), nn.Linear(24, 4))
    data = [(torch.randint(0, 10, (8, 3)), torch.randint(0, 4, (8,))) for _ in range(3)]
    both(net, data, F.cross_entropy, way)
