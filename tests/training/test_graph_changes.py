"""A forward that freezes parameters or cuts values off, and backwards that write somewhere."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony

from .conftest import VirtualGPUs
from .effects import both, model_of, train
from .test_changed_arguments import vectors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LOG: list[float] = []


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.kind, self.step = kind, 0
        self.seen: list[float] = []
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        if self.kind == "toggled":
            for param in self.first.parameters():
                param.requires_grad_(self.step > 2)
        elif self.kind == "set":
            self.first.weight.requires_grad = self.step % 2 == 0
        h = self.first(x)
        if self.kind == "detached":
            h.detach_()
        elif self.kind == "made to learn":
            h = torch.relu(x).requires_grad_()[:, :1] + h
        elif self.kind == "log":
            h = Logs.apply(h)
        elif self.kind == "module":
            h = OnModule.apply(h, self)
        elif self.kind == "helper":
            h = ByHelper.apply(h)
        elif self.kind == "average":
            h = Average.apply(h, self.mean)
        out: torch.Tensor = self.last(torch.relu(h))
        return out


class Logs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        LOG.append(float(grads[0].sum()))
        return grads[0] * 2


class OnModule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Net) -> torch.Tensor:
        ctx.module = module
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.module.seen.append(float(grads[0].sum()))
        return grads[0] * 2, None


def note(value: float) -> None:
    LOG.extend([value])


class ByHelper(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        note(float(grads[0].sum()))
        return grads[0] * 2


class Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        ctx.mean = mean
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.mean.lerp_(grads[0].mean().to(ctx.mean.device), 0.5)
        return grads[0] * 2, None


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("way", ["step", "loop"])
@pytest.mark.parametrize("kind", ["toggled", "set", "detached", "made to learn"])
def test_a_forward_that_changes_what_learns(
    vgpus: VirtualGPUs, kind: str, way: str, gpus: int
) -> None:
    vgpus(count=gpus)
    torch.manual_seed(0)
    both(Net(kind), vectors(4), F.cross_entropy, way)


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("way", ["step", "loop"])
@pytest.mark.parametrize("kind", ["log", "helper", "module"])
def test_a_backward_that_writes_is_called_once_a_step(
    vgpus: VirtualGPUs, kind: str, way: str, gpus: int
) -> None:
    vgpus(count=gpus)
    torch.manual_seed(0)
    LOG.clear()
    net, _ = both(Net(kind), vectors(3), F.cross_entropy, way)
    plain, ours = (LOG[:3], LOG[3:]) if kind != "module" else (net.seen, net.seen)
    assert len(ours) == 3
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_a_backward_that_moves_a_tensor_that_it_was_given_is_refused(vgpus: VirtualGPUs) -> None:
    net = Net("average")
    model = model_of(net, "loop", F.cross_entropy)
    with pytest.raises(harmony.HarmonyError, match=r"backward of Average at .* ctx\.mean"):
        train(model, net, vectors(1), F.cross_entropy, "loop")


LIBRARY = """
import torch

class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        total = torch.zeros_like(grad)
        total.add_(grad, alpha=2)
        return total
"""


@pytest.mark.parametrize(
    ("folder", "mode"),
    [("lib/python3/site-packages", "trace"), ("lib/dist-packages", "trace"), ("own", "eager")],
)
def test_what_a_library_writes_in_its_backward_is_its_own_wherever_it_is_installed(
    vgpus: VirtualGPUs, tmp_path: Path, folder: str, mode: str
) -> None:
    """In an environment, in the user's folder (pip install --user), or beside (--target)."""
    path = tmp_path / folder / "summed.py"
    path.parent.mkdir(parents=True)
    path.write_text(LIBRARY, encoding="utf-8")
    found = importlib.util.spec_from_file_location("summed", path)
    assert found is not None and found.loader is not None
    library = importlib.util.module_from_spec(found)
    found.loader.exec_module(library)

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.last(library.Summed.apply(self.first(x)))

    net = Fused()
    both(copy.deepcopy(net), vectors(2), F.cross_entropy, "loop")
    model = model_of(net, "loop", F.cross_entropy)
    train(model, net, vectors(1), F.cross_entropy, "loop")
    assert model.capture_mode == mode
