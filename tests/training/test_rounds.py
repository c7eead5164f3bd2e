"""A step in rounds: groups of microbatches, each forward and backward before the next."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch

import harmony
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Op, Schedule
from harmony.planner.ir.tasks import Pack, StepSpec, TensorKind
from tests import devices
from tests import race_check as racecheck
from tests.training.models import GPT, token_batch, token_loss
from tests.training.plain import train_tokens
from tests.training.test_plans import SGD, make, packs, use_plan

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


def in_rounds(
    rounds: int, *, late: bool = False, saved_runs: int = 0, interleaved: bool = False
) -> StepSpec:
    """Microbatches of 2 samples of 8; all packs keep their activations but the last."""

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        last = packs([1, 2, 4], num_layers)
        return StepSpec(
            minibatch,
            2,
            2,
            last[:-1],
            last,
            ((0, minibatch),),
            saved=last[:-1],
            saved_runs=saved_runs,
            late=last if late else (),
            rounds=rounds,
            interleaved=interleaved,
        )

    return spec_of


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize(("rounds", "interleaved"), [(2, False), (4, True)])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("overlap", [False, True])
def test_three_steps_bit_for_bit(
    rounds: int, interleaved: bool, num_devices: int, clip: float | None, overlap: bool
) -> None:
    torch.set_num_threads(1)
    gc.collect()
    devices.provide(count=2, memory="64MiB")
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    model = harmony.Harmony(
        copy.deepcopy(net),
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=ADAMW,
        loss_fn=token_loss,
        max_grad_norm=clip,
        microbatch_size=2,
        devices=num_devices,
        overlap_updates=overlap,
    )
    with racecheck.checked():
        policy = Policy(mirror=True)
        spec_of = in_rounds(rounds, late=overlap, interleaved=interleaved)
        use_plan(model, token_batch(0), spec_of, policy)
        losses = [model.train_step(*token_batch(step)) for step in range(3)]
        model.synchronize()
    expected = train_tokens(net, 3, torch.optim.AdamW, ADAMW, max_norm=clip)
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


def offloading(rounds: int, saved_runs: int = 0, *, interleaved: bool = False) -> Schedule:
    """The schedule of a step whose activations wait on the host; it has been trained by."""
    devices.provide(count=1, memory="64MiB")
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    model = make(copy.deepcopy(net), token_loss, 1, 2)
    cut = tuple(Pack(*pair) for pair in ((0, 1), (1, 2), (2, 4)))
    policy = Policy(boundary="swap", offload=cut)
    with racecheck.checked():
        spec_of = in_rounds(rounds, saved_runs=saved_runs, interleaved=interleaved)
        use_plan(model, token_batch(0), spec_of, policy)
        losses = [model.train_step(*token_batch(step)) for step in range(2)]
    expected = train_tokens(net, 2, torch.optim.SGD, SGD)
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())
    assert model.plan is not None
    return model.plan.schedule


@pytest.mark.parametrize(("saved_runs", "interleaved"), [(0, True), (1, False)])
def test_rounds_use_the_same_memory_on_the_host(saved_runs: int, interleaved: bool) -> None:
    """Interleaved, too: what a FORWARD leaves lies where a BACKWARD has just read."""
    whole = offloading(1, 2 * saved_runs)
    parted = offloading(2, saved_runs, interleaved=interleaved)
    sizes = []
    for schedule in (whole, parted):
        out = [s for s in schedule.programs[0] if s.op is Op.SWAP_OUT]
        own = [s for s in out if s.ref.kind is TensorKind.SAVED and s.over is None]
        assert all(s.over is None for s in out if s.ref.is_gradient_part)
        sizes.append(len(own))
    # Of interleaved rounds that are only two, and packs of other bytes, some lie by themselves.
    assert 0 < sizes[1] <= sizes[0] * (2 / 3 if interleaved else 1 / 2)


def test_gradients_come_back_in_every_round_but_the_first() -> None:
    schedule = offloading(4)
    back = [s.ref for s in schedule.programs[0] if s.op is Op.SWAP_IN and s.ref.is_gradient_part]
    out = [s.ref for s in schedule.programs[0] if s.op is Op.SWAP_OUT and s.ref.is_gradient_part]
    assert len(out) == 4 * len(set(out)) > 0
    assert sorted(map(str, back)) == sorted(map(str, 3 * list(set(out))))


@pytest.mark.parametrize("rounds", [2, 4])
def test_tied_weights_have_the_bits_of_one_round(rounds: int) -> None:
    """Their uses in several packs are partial sums, each of which goes on from round to round."""
    found = []
    for number in (1, rounds):
        devices.provide(count=1, memory="64MiB")
        torch.manual_seed(0)
        model = make(GPT(dropout=0.1, tied=True), token_loss, 1, 2)
        with racecheck.checked():
            use_plan(model, token_batch(0), in_rounds(number), Policy())
            losses = [model.train_step(*token_batch(step)) for step in range(2)]
        assert model.plan is not None
        back = [s.ref for s in model.plan.schedule.programs[0] if s.op is Op.SWAP_IN]
        assert any(ref.is_gradient_part and ref.part for ref in back) is (number > 1)
        found.append((losses, [p.detach().clone() for p in model.parameters()]))
    (losses, params), (others, again) = found
    assert losses == others
    assert all(map(torch.equal, params, again))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"rounds": 3}, "4 microbatches do not make 3 rounds"),
        ({"rounds": 0}, "do not make 0 rounds"),
        ({"rounds": 2, "shares": ((0, 4), (4, 8))}, "one replica"),
        ({"rounds": 2, "forward_size": 4}, "equal FORWARD and BACKWARD"),
    ],
)
def test_what_cannot_be_parted_is_refused(spec: dict[str, object], words: str) -> None:
    devices.provide(count=2, memory="64MiB")
    model = make(GPT(dropout=0.0), token_loss, 2, 2)
    with pytest.raises(harmony.PlanError, match=words):
        use_plan(
            model,
            token_batch(0),
            lambda n, m: replace(in_rounds(1)(n, m), saved=(), **spec),
            Policy(),
        )
