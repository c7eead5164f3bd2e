"""Parts that the user has compiled by `torch.compile`: run as they were written, bit for bit."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs

IN, WIDTH = 8, 16


def squared(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().mean()


def gate(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


class Net(nn.Module):
    """Blocks that are compiled in one of torch's ways, or not."""

    def __init__(self, way: str | None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(IN, WIDTH), nn.Linear(WIDTH, IN)
        blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.25)) for _ in range(3)]
        if way == "module":
            blocks = [cast(nn.Sequential, torch.compile(block)) for block in blocks]
        if way == "in place":
            for block in blocks:
                block.compile()
        self.blocks = nn.ModuleList(blocks)
        self.gate = torch.compile(gate) if way == "function" else gate
        self.seen: list[int] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.seen is not None:  # no recording stands for that: the model runs as it is
            self.seen.append(len(x))
        for block in self.blocks:
            x = x + self.gate(block(x))
        return cast(torch.Tensor, self.last(x))


def trained(way: str | None, form: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net, loss_fn = Net(way), torch.compile(squared) if way == "function" else squared
    draw = torch.Generator().manual_seed(1)
    losses = []
    if form == "unplanned step":
        net.seen = []
    if form != "loop":
        model = harmony.Harmony(net, optimizer=torch.optim.AdamW, loss_fn=loss_fn, seed=0)
    else:
        model = harmony.Harmony(net, seed=0)
        optimizer, loss_fn = torch.optim.AdamW(model.parameters()), squared
    for _ in range(3):
        x, y = torch.randn(2, 8, IN, generator=draw).unbind()
        if form != "loop":
            losses.append(model.train_step(x, y))
        else:
            optimizer.zero_grad()
            losses.append(loss_fn(model(x), y))
            losses[-1].backward()
            optimizer.step()
    assert (model.capture_mode == "trace") == (form != "unplanned step")
    found = [*losses, *model.parameters()]
    model.close()
    return [tensor.detach().clone() for tensor in found]


@pytest.mark.parametrize("form", ["step", "loop", "unplanned step"])
@pytest.mark.parametrize("way", ["module", "in place", "function"])
def test_what_is_compiled_trains_as_it_was_written(
    vgpus: VirtualGPUs, way: str, form: str
) -> None:
    vgpus(count=2, memory="1MiB")
    expected = trained(None, form)
    if way == "function":
        found = trained(way, form)
    else:
        with pytest.warns(harmony.HarmonyWarning, match=r"blocks\.0 and 2 more.*torch\.compile"):
            found = trained(way, form)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_a_module_that_is_wrapped_again_was_not_compiled(
    vgpus: VirtualGPUs, recwarn: pytest.WarningsRecorder
) -> None:
    """Harmony itself looks at calls where a compiled module has its code."""
    net = Net(None)
    x = torch.ones(8, IN)
    for _ in range(2):
        harmony.Harmony(net)(x).sum().backward()
    assert not [w for w in recwarn if "compile" in str(w.message)]
