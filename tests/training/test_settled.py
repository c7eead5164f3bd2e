"""What runs for a call is found once; as long as nothing changes, no later step looks for it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.engine.variant import Variant

from .conftest import VirtualGPUs
from .models import GPT, token_batch, token_loss
from .plain import train_tokens

out: Any = None  # what a script's loop calls its output is a global there


class Named(nn.Module):
    """Has an attribute of the name that the loop gives its output, and reads a real global."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x) * SCALE


SCALE = 1.0
ADAM = {"lr": 1e-2, "fused": True}


def test_steady_steps_try_no_path_and_a_new_plan_is_looked_at(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    vgpus(count=1, memory="1MiB")
    torch.manual_seed(0)
    net = GPT()
    model = harmony.Harmony(
        copy.deepcopy(net),
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=ADAM,
        loss_fn=token_loss,
        microbatch_size=2,
        replan=False,
    )
    tried: list[int] = []
    misfit = Variant.misfit

    def counted(self: Variant, *args: Any) -> Any:
        tried.append(len(losses))
        return misfit(self, *args)

    monkeypatch.setattr(Variant, "misfit", counted)
    losses: list[torch.Tensor] = []
    for step in range(5):
        if step == 3:
            variant = model._engine.variants.active
            assert variant is not None
            variant.learn(replace(variant._plans[8]))
        losses.append(model.train_step(*token_batch(step)))
    assert tried == [0, 3], "the first step, and the first one of another plan"
    expected = train_tokens(net, 5, torch.optim.AdamW, ADAM)
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


def test_an_attribute_is_no_global_of_the_same_name(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    vgpus(count=1, memory="1MiB")
    net = Named()
    model = harmony.Harmony(net)
    x = torch.randn(2, 4)
    for scale in (1.0, 1.0, 1.0, 3.0):
        monkeypatch.setitem(globals(), "SCALE", scale)
        monkeypatch.setitem(globals(), "out", model(x))
        out.sum().backward()
        assert torch.equal(out.detach(), copy.deepcopy(net)(x).detach())
    assert len(list(model._engine.variants)) == 2, "one for each scale"
