"""Any plan computes the same: random packs, microbatches, policies, devices."""

from __future__ import annotations

import copy
import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as Phase_
from hypothesis import strategies as st

import harmony
from harmony.engine.call_key import CallKind
from harmony.planner.check.verify import verify
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Op
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Pack, Phase, StepSpec
from harmony.planner.lower.passes import lower
from harmony.planner.predict.memory import host_nbytes
from tests import devices
from tests import race_check as racecheck
from tests.strategies import numbers_of_rounds
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch
from tests.training.plain import gradients_of, params_of, train_plain, train_tokens

SGD = {"lr": 0.1, "momentum": 0.9, "fused": True}
RANDOM = settings(
    max_examples=25,
    derandomize=True,
    phases=(Phase_.explicit, Phase_.generate),
    suppress_health_check=[
        *settings.default.suppress_health_check,
        HealthCheck.function_scoped_fixture,
    ],
)


def packs(cuts: list[int], num_layers: int) -> tuple[Pack, ...]:
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < num_layers}), num_layers]
    return tuple(Pack(a, b) for a, b in itertools.pairwise(bounds))


def use_plan(model: harmony.Harmony, batch: Any, spec_of: Any, policy: Policy) -> StepSpec:
    """Make ``model`` train ``batch`` by a plan of the test's own, verified."""
    engine = model._engine
    ready = engine.variants.ready(CallKind.TRAIN_STEP, ((batch[0],), {}, batch[1]))
    variant, planned = ready.variant, ready.planned
    minibatch = planned.plan.minibatch
    spec = spec_of(variant.graph.num_layers, minibatch)
    tasks = build_tasks(variant.graph, spec)
    schedule = lower(tasks, planned.measured.machine, policy)
    checked = verify(schedule, variant.graph, planned.measured.costs, Phase.TRAIN, tasks)
    plan = replace(
        planned.plan,
        spec=spec,
        policy=policy,
        schedules={Phase.TRAIN: schedule},
        peak_nbytes=checked.peak_nbytes,
        host_nbytes=host_nbytes(schedule, variant.graph),
    )
    variant.learn(replace(planned, plan=plan))
    return spec


def make(net: torch.nn.Module, loss_fn: Any, num_devices: int, size: int) -> harmony.Harmony:
    return harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs=SGD,
        loss_fn=loss_fn,
        microbatch_size=size,
        devices=num_devices,
    )


POLICIES = st.builds(
    Policy,
    weight_slots=st.integers(1, 3),
    gradient_slots=st.integers(1, 2),
    lookahead=st.integers(1, 3),
    boundary=st.sampled_from(["keep", "swap"]),
)
KEPT = ["recompute", "keep", "offload", "keep products", "offload products"]
CUTS = st.lists(st.integers(1, 7), max_size=5)


@RANDOM
@given(
    forward=CUTS,
    backward=CUTS,
    size=st.sampled_from([1, 2, 3, 8]),
    num_devices=st.integers(1, 4),
    replicated=st.booleans(),
    policy=POLICIES,
)
def test_gpt_bit_for_bit(
    forward: list[int],
    backward: list[int],
    size: int,
    num_devices: int,
    replicated: bool,
    policy: Policy,
) -> None:
    torch.set_num_threads(1)
    devices.provide(count=4, memory="64MiB")
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    shares = num_devices if replicated else 1

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        last = packs(backward, num_layers)
        first = tuple(p for p in packs([*forward, last[-1].first], num_layers))
        ends = tuple(p for p in first if p.last <= last[-1].first)
        each = minibatch // shares
        ranges = [(i * each, (i + 1) * each) for i in range(shares)]
        ranges[-1] = (ranges[-1][0], minibatch)
        return StepSpec(minibatch, size, size, ends, last, tuple(ranges))

    twin = copy.deepcopy(net)
    with racecheck.checked():
        model = make(twin, token_loss, num_devices, size)
        use_plan(model, token_batch(0), spec_of, policy)
        losses = [model.train_step(*token_batch(step)) for step in range(2)]
    expected = train_tokens(net, 2, torch.optim.SGD, SGD, microbatch=size, shares=shares)
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


@RANDOM
@given(
    cuts=CUTS,
    kept=st.lists(st.sampled_from(KEPT), min_size=8, max_size=8),
    size=st.sampled_from([1, 2, 3, 8]),
    num_devices=st.integers(1, 4),
    replicas=st.sampled_from([1, 1, 2, 4]),
    policy=POLICIES,
    hold=st.integers(0, 3),
    stays=st.lists(st.booleans(), min_size=8, max_size=8),
    saved_runs=st.integers(0, 4),
    selective=st.booleans(),
    part=st.integers(0, 3),
    products_runs=st.integers(0, 4),
    interleaved=st.booleans(),
)
def test_nothing_changes_with_what_a_forward_leaves_behind(
    cuts: list[int],
    kept: list[str],
    size: int,
    num_devices: int,
    replicas: int,
    policy: Policy,
    hold: int,
    stays: list[bool],
    saved_runs: int,
    selective: bool,
    part: int,
    products_runs: int,
    interleaved: bool,
) -> None:
    """Activations, or results of products, kept, offloaded or recomputed, weights held or
    resident, rings and rounds.
    """
    torch.set_num_threads(1)
    gc.collect()  # what an earlier example left would count in the peak
    devices.provide(count=4, memory="64MiB")
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    shares = replicas if num_devices % replicas == 0 else 1
    chosen: dict[str, tuple[Pack, ...]] = {}

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        last = packs(cuts, num_layers)
        for what in KEPT:
            chosen[what] = tuple(p for p, k in zip(last[:-1], kept, strict=False) if k == what)
        resident = tuple(p for p, stay in zip(last, stays, strict=False) if stay)
        chosen["resident"] = resident if shares == 1 else ()
        saved = (*chosen["keep"], *chosen["offload"])
        made = (*chosen["keep products"], *chosen["offload products"])
        made += saved if selective else ()
        ranges = [(minibatch * i // shares, minibatch * (i + 1) // shares) for i in range(shares)]
        microbatches = -(-(minibatch // shares) // size)
        several = numbers_of_rounds(microbatches) if shares == 1 and last[:-1] else [1]
        rounds = several[part % len(several)]
        each = -(-microbatches // rounds)
        all_runs = min(saved_runs, each) if saved else 0
        return StepSpec(
            minibatch,
            size,
            size,
            last[:-1],
            last,
            tuple(ranges),
            saved=saved,
            saved_runs=all_runs,
            rounds=rounds,
            products=tuple(p for p in made if graph.products_nbytes(p.first, p.last, 1)),
            products_runs=min(products_runs, each - all_runs),
            interleaved=interleaved and rounds > 1,
        )

    twin = copy.deepcopy(net)
    with racecheck.checked():
        model = make(twin, token_loss, num_devices, size)
        ready = model._engine.variants.ready(
            CallKind.TRAIN_STEP, ((token_batch(0)[0],), {}, token_batch(0)[1])
        )
        graph = ready.variant.graph
        spec_of(graph.num_layers, 8)
        policy = replace(
            policy,
            hold=hold,
            mirror=True,
            offload=(*chosen["offload"], *chosen["offload products"]),
            resident=chosen["resident"],
        )
        use_plan(model, token_batch(0), spec_of, policy)
        losses = [model.train_step(*token_batch(step)) for step in range(2)]
    assert model.plan is not None and model.last_timeline is not None
    for peak, bound in zip(model.last_timeline.peak_nbytes, model.plan.peak_nbytes, strict=True):
        assert peak <= bound
    expected = train_tokens(net, 2, torch.optim.SGD, SGD, microbatch=size, shares=shares)
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


@RANDOM
@given(
    forward=CUTS,
    backward=CUTS,
    sizes=st.sampled_from([(2, 1), (4, 2), (8, 1), (8, 2), (8, 4), (3, 1)]),
    num_devices=st.integers(1, 3),
    policy=POLICIES,
)
def test_different_microbatch_sizes(
    forward: list[int],
    backward: list[int],
    sizes: tuple[int, int],
    num_devices: int,
    policy: Policy,
) -> None:
    """Allowed without random numbers; a product over more rows may differ in its last bits."""
    torch.set_num_threads(1)
    devices.provide(count=4, memory="64MiB")
    torch.manual_seed(0)
    net = SkipMLP()
    twin = copy.deepcopy(net)

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        last = packs(backward, num_layers)
        first = packs([*forward, last[-1].first], num_layers)
        ends = tuple(p for p in first if p.last <= last[-1].first)
        return StepSpec(minibatch, *sizes, ends, last, ((0, minibatch),))

    with racecheck.checked():
        model = make(twin, square_loss, num_devices, sizes[1])
        use_plan(model, vector_batch(0), spec_of, policy)
        model.train_step(*vector_batch(0))
    found = gradients_of(model.module)
    expected = train_plain(
        net,
        [vector_batch(0)],
        optimizer=torch.optim.SGD,
        options=SGD,
        loss_fn=square_loss,
        microbatch=sizes[1],
    )
    for name, gradient in expected.gradients[0].items():
        worst = (found[name] - gradient).abs().max()
        assert worst <= 1e-6 * gradient.abs().max(), name


def test_different_sizes_are_refused_with_dropout() -> None:
    devices.provide(count=4, memory="64MiB")
    model = make(GPT(dropout=0.1), token_loss, 1, 2)

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        cut = (Pack(0, 4),)
        return StepSpec(minibatch, 4, 2, cut, (*cut, Pack(4, num_layers)), ((0, minibatch),))

    with pytest.raises(harmony.PlanError, match="random"):
        use_plan(model, token_batch(0), spec_of, Policy())


def test_tied_weights_across_packs() -> None:
    """Pack by pack the head's uses are added first; each gradient within 2e-7 of its largest."""
    devices.provide(count=4, memory="64MiB")
    torch.manual_seed(0)
    net = GPT(dropout=0.1, tied=True)
    expected = train_tokens(net, 3, torch.optim.SGD, SGD)
    for num_devices, mode in ((1, "pp"), (2, "pp"), (4, "pp"), (2, "dp")):
        model = harmony.Harmony(
            copy.deepcopy(net),
            optimizer=torch.optim.SGD,
            optimizer_kwargs=SGD,
            loss_fn=token_loss,
            mode=mode,
            microbatch_size=2,
            devices=num_devices,
            device_memory="300KiB",
        )
        with racecheck.checked():
            losses = [model.train_step(*token_batch(step)) for step in range(3)]
            assert torch.equal(losses[0], expected.losses[0])
            torch.testing.assert_close(
                torch.stack(losses), torch.stack(expected.losses), rtol=1e-5, atol=0
            )
        for name, param in params_of(model.module).items():
            torch.testing.assert_close(param, expected.params[name], rtol=1e-4, atol=1e-6)
        assert model.module.head.weight is model.module.tokens.weight


@pytest.mark.parametrize("saved_runs", [1, 2, 3])
def test_microbatches_add_up_where_a_pack_has_been_in_two_slots(saved_runs: int) -> None:
    """Some were kept in the slot of the forward, others are recomputed in that of the backward."""
    torch.set_num_threads(1)
    gc.collect()
    devices.provide(count=4, memory="64MiB")
    torch.manual_seed(0)
    net = GPT(dropout=0.1)

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        last = packs([1, 2, 4, 5], num_layers)
        whole = ((0, minibatch),)
        return StepSpec(
            minibatch, 2, 2, last[:-1], last, whole, saved=last[:-1], saved_runs=saved_runs
        )

    twin = copy.deepcopy(net)
    with racecheck.checked():
        model = make(twin, token_loss, 1, 2)
        use_plan(model, token_batch(0), spec_of, Policy(weight_slots=3))
        losses = [model.train_step(*token_batch(step)) for step in range(2)]
    assert model.plan is not None
    slots: dict[str, set[int | None]] = {}
    for step in model.plan.schedule.programs[0]:
        if step.op is Op.ALLOC and step.ref is not None and step.ref.is_parameter:
            slots.setdefault(str(step.ref), set()).add(step.slot)
    assert any(len(found) == 2 for found in slots.values()), "no pack was in two slots"
    expected = train_tokens(net, 2, torch.optim.SGD, SGD)
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


def test_what_does_not_fit_is_said_for_the_samples_that_there_are(vgpus: VirtualGPUs) -> None:
    net = torch.nn.Linear(64, 64)
    model = harmony.Harmony(net, devices=1, device_memory="4KiB", microbatch_size=100000)
    with pytest.raises(harmony.DoesNotFitError, match="at a microbatch of 3;"):
        model(torch.randn(3, 64))
