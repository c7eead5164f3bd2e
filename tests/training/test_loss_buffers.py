"""Loss functions that are modules with buffers of their own, as DINO's with its centre."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from .conftest import VirtualGPUs
from .effects import model_of, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Follows(nn.Module):
    """Follows the mean of the targets by a buffer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(4))
        self.how = how
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.how == "of a layer":
            out = self.norm(out)
        loss = ((out - (target - self.center.to(target.device))) ** 2).mean()
        mean = target.detach().mean(0).to(self.center.device)
        with torch.no_grad():
            if self.how == "assigned":
                self.center = self.center * 0.9 + mean * 0.1
            elif self.how == "by outputs":
                self.center = self.center * 0.9 + out.detach().mean(0).to(self.center.device) * 0.1
            else:
                self.center.mul_(0.9).add_(mean, alpha=0.1)
        return loss


class Outer(nn.Module):
    """A loss function that holds another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = Follows(how)

    def forward(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(out, target)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["assigned", "by outputs", "in place", "of a layer"])
def test_buffers_of_a_loss_follow_as_in_plain_pytorch(vgpus: VirtualGPUs, how: str) -> None:
    vgpus(count=2)
    torch.manual_seed(0)
    net, loss = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), Outer(how)
    twin, own = copy.deepcopy(net), copy.deepcopy(loss)
    data = [(torch.randn(8, 8), torch.randn(8, 4)) for _ in range(3)]
    expected = train(twin, twin, data, own, "plain")
    found = train(model_of(net, "step", loss), net, data, loss, "step")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.state_dict(), own.state_dict(), rtol=1e-5, atol=1e-6)
