"""What a checkpointed function changes twice in plain PyTorch is refused by name."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import harmony

from .conftest import VirtualGPUs
from .effects import both, model_of, train
from .test_changed_arguments import vectors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
COUNTED: list[int] = []


class Block(nn.Module):
    def __init__(self, kind: str, reentrant: bool, preserve: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        if kind == "spectral norm":
            self.linear = nn.utils.parametrizations.spectral_norm(self.linear)
        self.norm = nn.BatchNorm1d(8) if kind == "batch norm" else nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5 if kind == "random numbers" else 0.0)
        self.register_buffer("seen", torch.zeros(()))
        self.kind, self.calls = kind, 0
        self.checkpoint = partial(checkpoint, use_reentrant=reentrant, preserve_rng_state=preserve)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "attribute":
            self.calls += 1
        elif self.kind == "buffer":
            self.seen += 1
        elif self.kind == "list":
            COUNTED.append(1)
        out: torch.Tensor = self.drop(torch.tanh(self.norm(self.linear(x))))
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.checkpoint(self.inner, x)
        return out


class Net(nn.Module):
    def __init__(self, kind: str, reentrant: bool, parts: int, *, preserve: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(kind, reentrant, preserve) for _ in range(parts))
        self.outer = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.last(self.outer(x))
        return out


@pytest.mark.parametrize("way", ["step", "loop"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["batch norm", "spectral norm", "buffer", "attribute", "list"])
def test_a_checkpointed_function_that_changes_something_is_refused(
    vgpus: VirtualGPUs, kind: str, reentrant: bool, way: str
) -> None:
    vgpus(count=2)
    net = Net(kind, reentrant, 2)
    before = copy.deepcopy(net.state_dict())
    model = model_of(net, way, F.cross_entropy)
    with pytest.raises(harmony.HarmonyError, match=r"checkpoint at .*test_checkpointed_changes"):
        train(model, net, vectors(1), F.cross_entropy, way)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["step", "loop"])
@pytest.mark.parametrize("kind", ["nothing", "random numbers"])
def test_one_that_changes_nothing_computes_as_ever(
    vgpus: VirtualGPUs, kind: str, way: str
) -> None:
    """The BatchNorm beside it moves once."""
    torch.manual_seed(0)
    both(Net(kind, False, 2), vectors(), F.cross_entropy, way)


@pytest.mark.parametrize("way", ["step", "loop"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_random_numbers_that_would_be_drawn_anew_are_refused(
    vgpus: VirtualGPUs, reentrant: bool, way: str
) -> None:
    """Plain PyTorch's gradients are those of other numbers than its loss then."""
    net = Net("random numbers", reentrant, 2, preserve=False)
    with pytest.raises(harmony.HarmonyError, match="preserve_rng_state=True"):
        train(model_of(net, way, F.cross_entropy), net, vectors(1), F.cross_entropy, way)


@pytest.mark.parametrize("way", ["step", "loop"])
def test_without_random_numbers_their_state_need_not_be_kept(vgpus: VirtualGPUs, way: str) -> None:
    """Dropout with probability 0, as in many models that switch this off for speed."""
    torch.manual_seed(0)
    both(Net("nothing", False, 2, preserve=False), vectors(), F.cross_entropy, way)


def test_checkpoint_sequential_is_seen_as_well(vgpus: VirtualGPUs) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = checkpoint_sequential(self.parts, 2, x, use_reentrant=False)
            return out

    net = Sequence()
    with pytest.raises(harmony.HarmonyError, match="changes the buffer"):
        train(model_of(net, "loop", F.cross_entropy), net, vectors(1), F.cross_entropy, "loop")
