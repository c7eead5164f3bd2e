"""What runs for a call is found once; as long as nothing changes, no later step looks for it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import harmony
from harmony.engine.variant import Variant

from .conftest import VirtualGPUs
from .models import GPT, token_batch, token_loss
from .plain import train_tokens

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
