"""Results of products kept for the backward, the rest recomputed: the bits of plain PyTorch."""

from __future__ import annotations

import copy
import gc
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from harmony.capture import is_product
from harmony.engine.call_key import CallKind
from harmony.errors import RecomputeError
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Schedule
from harmony.planner.ir.tasks import StepSpec, TensorKind
from harmony.runtime.exec.kept_products import KeptProducts
from tests import devices
from tests import race_check as racecheck
from tests.training import mixed
from tests.training.models import GPT, square_loss, token_batch, token_loss
from tests.training.plain import Run, train_plain, train_tokens
from tests.training.test_plans import packs, use_plan

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


def train(
    net: nn.Module,
    batches: list[Any],
    *,
    cuts: list[int],
    num_devices: int = 1,
    offload: bool = True,
    mixed_runs: int = 0,
    rounds: int = 1,
    products_runs: int = 0,
    interleaved: bool = False,
    loss_fn: Any = token_loss,
    **options: Any,
) -> tuple[harmony.Harmony, list[torch.Tensor], Schedule]:
    """Train by a plan that keeps the results of all products that it can.

    Args:
        mixed_runs: of how many microbatches a round everything is saved instead.
        products_runs: of how many of the others results are kept; 0 for all.
    """
    torch.set_num_threads(1)
    gc.collect()
    devices.provide(count=2, memory="64MiB")
    model = harmony.Harmony(
        net, loss_fn=loss_fn, microbatch_size=2, devices=num_devices, **options
    )
    first = batches[0]
    ready = model._engine.variants.ready(CallKind.TRAIN_STEP, ((first[0],), {}, first[1]))
    graph = ready.variant.graph
    last = packs(cuts, graph.num_layers)
    keeps = tuple(p for p in last[:-1] if graph.products_nbytes(p.first, p.last, 1))

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        return StepSpec(
            minibatch,
            2,
            2,
            last[:-1],
            last,
            ((0, minibatch),),
            saved=keeps if mixed_runs else (),
            saved_runs=mixed_runs,
            rounds=rounds,
            products=keeps,
            products_runs=products_runs,
            interleaved=interleaved,
        )

    policy = Policy(mirror=num_devices > 1, offload=keeps if offload else ())
    with racecheck.checked():
        use_plan(model, first, spec_of, policy)
        losses = [model.train_step(*batch) for batch in batches]
    assert model.plan is not None and model.last_timeline is not None
    for peak, bound in zip(model.last_timeline.peak_nbytes, model.plan.peak_nbytes, strict=True):
        assert peak <= bound
    return model, losses, model.plan.schedule


def assert_same(model: harmony.Harmony, losses: list[torch.Tensor], expected: Run) -> None:
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("num_devices", "offload", "some_runs", "rounds", "clip", "part"),
    [
        (1, True, (1, 0), 4, 0.1, "0:2"),
        (1, False, (1, 2), 1, None, "4:6"),
        (2, True, (0, 3), 1, 0.1, "4:6"),
    ],
)
def test_gpt_with_dropout(
    num_devices: int,
    offload: bool,
    some_runs: tuple[int, int],
    rounds: int,
    clip: float | None,
    part: str,
) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    model, losses, schedule = train(
        copy.deepcopy(net),
        [token_batch(step) for step in range(2)],
        cuts=[2, 3, 5],
        num_devices=num_devices,
        offload=offload,
        mixed_runs=some_runs[0],
        rounds=rounds,
        products_runs=some_runs[1],
        interleaved=rounds > 1,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=ADAMW,
        max_grad_norm=clip,
    )
    text = str(schedule)
    assert (f"SwapIn P[2:3]@{part}" in text) is offload and f"P[2:3]@{part}" in text
    assert ("S[2:3]@2:4" in text) is (rounds > 1)
    assert_same(model, losses, train_tokens(net, 2, torch.optim.AdamW, ADAMW, max_norm=clip))


def test_gpt_in_bf16() -> None:
    torch.manual_seed(0)
    net, batches = GPT(dropout=0.1, depth=2), [token_batch(step) for step in range(2)]
    make = partial(torch.optim.AdamW, **ADAMW, fused=True)
    model, losses, _ = train(
        copy.deepcopy(net),
        batches,
        cuts=[2, 3],
        optimizer=make.func,
        optimizer_kwargs=make.keywords,
        precision="bf16",
        max_grad_norm=0.1,
    )
    expected = mixed.train_plain(
        copy.deepcopy(net), batches, make, token_loss, microbatch=2, clip=0.1
    )
    assert_same(model, losses, expected)


class Awkward(nn.Module):
    """What a product has made is changed in place; attention draws random numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x), inplace=True)
        y = self.first(x)
        z = y.view(-1, 8, 16)  # shares its memory
        y.mul_(0.5).add_(z.sigmoid())
        q = z.view(-1, 2, 4, 16)
        y = F.scaled_dot_product_attention(q, q, q, dropout_p=0.3 if self.training else 0.0)
        y = self.drop(F.relu(self.second(y.reshape(x.shape)), inplace=True))
        return self.last(y + x).flatten(1)


def test_products_changed_in_place_and_attention_that_drops() -> None:
    torch.manual_seed(0)
    net = Awkward()
    batches = [(torch.randn(8, 4, 16), torch.randn(8, 8)) for _ in range(2)]
    options = {"lr": 0.1, "foreach": False}
    model, losses, schedule = train(
        copy.deepcopy(net),
        batches,
        cuts=[3],
        loss_fn=square_loss,
        optimizer=torch.optim.SGD,
        optimizer_kwargs=options,
    )
    kept = {r for s in schedule.programs[0] for r in s.writes if r.kind is TensorKind.PRODUCTS}
    assert kept
    expected = train_plain(
        net,
        batches,
        optimizer=torch.optim.SGD,
        options=options,
        loss_fn=square_loss,
        microbatch=2,
    )
    assert_same(model, losses, expected)


def test_no_product_is_computed_again() -> None:
    """Results that are spoilt in between show in the recompute; others than those are refused."""
    kept = KeptProducts(torch.device("cpu"))
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with kept.keeping():
        made = torch.relu_(a @ b)
        torch.dropout(a, 0.5, train=True)
    assert kept.memory.sizes == [60]
    with kept.giving():
        assert torch.equal(torch.relu_(torch.zeros_like(a) @ b), made)
    other = r"aten\.bmm\.default in the place of aten\.mm"
    with pytest.raises(RecomputeError, match=other), kept.giving():
        torch.bmm(a[None], b[None])
    with pytest.raises(RecomputeError, match="0 products, not 1"), kept.giving():
        a + a
    with pytest.raises(RecomputeError, match="one more product"), kept.giving():
        (a @ b, a @ b)


def test_attention_that_draws_random_numbers_is_no_product_to_keep() -> None:
    q = torch.randn(1, 1, 2, 4)
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert is_product(flash, (q, q, q), {}) and is_product(flash, (q, q, q, 0.0, True), {})
    assert not is_product(flash, (q, q, q, 0.1), {})
    assert not is_product(flash, (q, q, q), {"dropout_p": 0.1})
    assert not is_product(torch.ops.aten.mm.out, (q[0, 0], q[0, 0].T), {"out": q})
