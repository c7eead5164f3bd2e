"""The reasons for a plan say what its numbers say."""

from __future__ import annotations

import re

import torch
from torch import nn

import harmony

from .conftest import VirtualGPUs
from .models import GPT, token_batch, token_loss


def test_how_much_longer_another_choice_takes_is_that_of_its_seconds(vgpus: VirtualGPUs) -> None:
    vgpus(count=2, memory="2MiB")
    torch.manual_seed(0)
    net: nn.Module = GPT(dropout=0.0)
    model = harmony.Harmony(net, optimizer=torch.optim.SGD, loss_fn=token_loss, devices=2)
    model.train_step(*token_batch(0))
    plan = model.plan
    assert plan is not None
    compared = []
    for decision in plan.decisions:
        said = re.search(r"(\d+)% longer", decision.why)
        seconds = next((s for _, s in decision.alternatives if isinstance(s, float)), None)
        if said is not None:
            assert seconds is not None
            assert abs(100 * (seconds / plan.step_s - 1) - int(said[1])) < 1, decision
            compared.append(decision.name)
    assert {"replicas", "microbatch size"}.intersection(compared), plan.decisions
