"""The plan changes between two steps where they show that another is better; nothing else does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import harmony
from harmony.engine.replan import NUM_STEPS, WARM_UP
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import StepSpec

from .conftest import VirtualGPUs
from .models import GPT, token_batch, token_loss
from .plain import train_tokens
from .test_plans import packs, use_plan

STEPS = WARM_UP + NUM_STEPS + 3
ADAM = {"lr": 1e-2, "fused": True}


def model_of(net: torch.nn.Module, **options: Any) -> harmony.Harmony:
    return harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=ADAM,
        loss_fn=token_loss,
        mode="pp",
        microbatch_size=2,
        devices=2,
        **options,
    )


def poorly_planned(model: harmony.Harmony) -> Plan:
    """Let the model begin with a plan that moves everything that it could leave where it is."""

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        last = packs([*range(1, num_layers)], num_layers)
        return StepSpec(minibatch, 2, 2, last[:-1], last, ((0, minibatch),))

    use_plan(model, token_batch(0), spec_of, Policy(1, 1, 1, "host"))
    variant = model._engine.variants.active
    assert variant is not None
    return variant._plans[8].plan


@pytest.mark.parametrize("replan", [True, False])
def test_a_plan_that_turns_out_poor_is_replaced(vgpus: VirtualGPUs, replan: bool) -> None:
    vgpus(count=2, memory="1MiB", link="1MB/s")
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    model = model_of(copy.deepcopy(net), replan=replan)
    first = poorly_planned(model)
    losses = [model.train_step(*token_batch(step)) for step in range(STEPS)]
    expected = train_tokens(net, STEPS, torch.optim.AdamW, ADAM)
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())
    assert model.plan is not None
    assert (model.plan is first) is not replan
    assert ("plan changed" in model._engine.record.facts) is replan
    assert model.plan.spec.shares == first.spec.shares
    assert model.plan.spec.backward_size == first.spec.backward_size
