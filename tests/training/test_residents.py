"""Weights that stay on a device: updated there, read on the host, changed by anybody."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.engine.call_key import CallKind
from harmony.engine.train_steps import TrainSteps
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Op
from harmony.planner.ir.tasks import Pack, Phase, StepSpec
from tests import devices

from .conftest import VirtualGPUs
from .models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch
from .plain import train_tokens
from .test_plans import packs, use_plan

ADAM = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
Make = Callable[..., harmony.Harmony]


def resident_model(
    net: nn.Module,
    resident: Callable[[tuple[Pack, ...]], tuple[Pack, ...]] = lambda all_packs: all_packs,
    optimizer: Any = torch.optim.AdamW,
    options: Any = ADAM,
    cuts: Sequence[int] = (2, 4, 6),
) -> harmony.Harmony:
    """A model on two GPUs in four packs, some or all of them resident."""
    model = harmony.Harmony(
        net,
        optimizer=optimizer,
        optimizer_kwargs=options,
        loss_fn=token_loss,
        microbatch_size=2,
        devices=2,
    )

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        last = packs([*cuts], num_layers)
        saved = last[1:2] if len(last) > 2 else ()
        return StepSpec(minibatch, 2, 2, last[:-1], last, ((0, minibatch),), saved=saved)

    call = ((token_batch(0)[0],), {}, token_batch(0)[1])
    variant = model._engine.variants.ready(CallKind.TRAIN_STEP, call).variant
    stay = resident(packs([*cuts], variant.graph.num_layers))
    use_plan(model, token_batch(0), spec_of, Policy(resident=stay, mirror=True))
    return model


def plain(net: nn.Module, steps: int, optimizer: Any = torch.optim.AdamW, options: Any = ADAM):  # type: ignore[no-untyped-def]
    return train_tokens(net, steps, optimizer, options)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, ADAM),
        (torch.optim.AdamW, {"lr": 1e-2, "foreach": False}),
        (torch.optim.SGD, {"lr": 0.1, "fused": True}),
        (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
        (torch.optim.NAdam, {"lr": 1e-3}),
    ],
)
@pytest.mark.parametrize("which", ["all", "every other"])
def test_updates_on_the_device_are_plain_pytorchs(
    vgpus: VirtualGPUs, optimizer: Any, options: Any, which: str
) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    chosen = slice(None, None, 1 if which == "all" else 2)
    model = resident_model(copy.deepcopy(net), lambda p: p[chosen], optimizer, options)
    losses = [model.train_step(*token_batch(step)) for step in range(3)]
    expected = plain(net, 3, optimizer, options)
    assert losses == expected.losses
    # Read on the host, without asking anybody: every step leaves the new weights there.
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


def test_tied_weights_stay_with_all_that_use_them(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1, tied=True)
    model = resident_model(copy.deepcopy(net), cuts=[])
    losses = [model.train_step(*token_batch(step)) for step in range(3)]
    expected = plain(net, 3)
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())
    engine = model._engine
    inputs, targets = token_batch(3)
    TrainSteps(engine).run_gradients(engine.ready(CallKind.TRAIN_STEP, (inputs,), {}, targets))
    assert all(param.grad is not None for param in model.parameters())


def test_what_is_resident_never_comes_in_again(vgpus: VirtualGPUs) -> None:
    model = resident_model(GPT())
    for step in range(2):
        model.train_step(*token_batch(step))
    assert model.plan is not None and model.last_timeline is not None
    moved = model.last_timeline.bytes_by()
    assert ("h2d", "weights") not in moved and ("d2h", "gradients") not in moved
    arena = model._engine.variants.active
    assert arena is not None
    assert moved["d2h", "weights"] == arena.graph.weight_nbytes()
    updates = [s for s in model.last_timeline.spans if s.kind == "update"]
    assert {span.lane for span in updates} == {"gpu0.compute", "gpu1.compute"}


def test_weights_that_somebody_changes_between_steps_are_seen(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.0)
    model = resident_model(copy.deepcopy(net))
    first = model.train_step(*token_batch(0))
    model.load_state_dict(net.state_dict())
    assert model.train_step(*token_batch(0)) == first
    with torch.no_grad():
        for param, value in zip(model.parameters(), net.parameters(), strict=True):
            param.copy_(value)
    assert model.train_step(*token_batch(0)) == first


def test_gradients_without_an_update_are_on_the_host(vgpus: VirtualGPUs) -> None:
    """As `verify` asks for them."""
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    model = resident_model(copy.deepcopy(net), lambda p: p[1:3])
    engine = model._engine
    inputs, targets = token_batch(0)
    TrainSteps(engine).run_gradients(engine.ready(CallKind.TRAIN_STEP, (inputs,), {}, targets))
    expected = plain(net, 1)
    for name, param in model.named_parameters():
        found, wanted = param.grad, expected.gradients[0][name]
        assert found is not None and wanted is not None and torch.equal(found, wanted), name
    pairs = zip(net.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_optimizer_state_is_saved_and_restored_wherever_it_is(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.0)
    model = resident_model(copy.deepcopy(net))
    losses = [model.train_step(*token_batch(step)) for step in range(4)]
    again = resident_model(copy.deepcopy(net))
    for step in range(2):
        again.train_step(*token_batch(step))
    weights, state = copy.deepcopy(again.state_dict()), again.optimizer.state_dict()
    fresh = resident_model(copy.deepcopy(net))
    fresh.load_state_dict(weights)
    fresh.optimizer.load_state_dict(copy.deepcopy(state))
    # From two steps later it is the same training: nothing of it was drawn at random.
    assert [fresh.train_step(*token_batch(step)) for step in (2, 3)] == losses[2:]


def test_inference_between_steps_uses_what_is_there(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.0)
    model = resident_model(copy.deepcopy(net))
    model.train_step(*token_batch(0))
    inputs, _ = token_batch(0)
    model.eval()
    with torch.no_grad():
        found = model(inputs)
    net.load_state_dict(model.state_dict())
    net.eval()
    with torch.no_grad():
        assert torch.equal(found, net(inputs))


def test_inference_schedules_know_what_is_resident(vgpus: VirtualGPUs) -> None:
    from harmony.planner.check.verify import verify
    from harmony.planner.ir.task_graph import build_tasks
    from harmony.planner.lower.passes import lower

    model = resident_model(GPT())
    variant = model._engine.variants.active
    assert variant is not None and variant.measured is not None
    whole = packs([2, 4, 6], variant.graph.num_layers)
    spec = StepSpec(8, 2, 2, whole, whole, ((0, 8),), Phase.INFER)
    tasks = build_tasks(variant.graph, spec)
    schedule = lower(tasks, variant.measured.machine, Policy(resident=whole, mirror=True))
    verify(schedule, variant.graph, variant.measured.costs, Phase.INFER, tasks)
    copied = [s.ref for p in schedule.programs for s in p if s.op is Op.SWAP_IN]
    assert not any(ref is not None and ref.is_parameter for ref in copied)


@pytest.mark.parametrize("first", [8, 5], ids=["on both first", "on one first"])
def test_plans_on_other_numbers_of_devices_take_turns(vgpus: VirtualGPUs, first: int) -> None:
    """What stays on a device that a step leaves out is of an earlier step afterwards."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    options = {"lr": 0.1, "momentum": 0.9, "fused": False}
    inputs, targets = torch.randn(8, 6), torch.randint(0, 3, (8,))
    model = harmony.Harmony(
        copy.deepcopy(plain),
        optimizer=torch.optim.SGD,
        optimizer_kwargs=options,
        loss_fn=nn.functional.cross_entropy,
        devices=2,
    )

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        last = packs([1] if minibatch == 8 else [], num_layers)
        return StepSpec(minibatch, minibatch, minibatch, last[:-1], last, ((0, minibatch),))

    for size in (8, 5):
        batch = inputs[:size], targets[:size]
        last = packs([1] if size == 8 else [], 2)
        use_plan(model, batch, spec_of, Policy(resident=last, mirror=True))
    own = torch.optim.SGD(plain.parameters(), **options)
    used = set()
    for size in (first, 13 - first) * 3:
        own.zero_grad()
        loss = nn.functional.cross_entropy(plain(inputs[:size]), targets[:size])
        loss.backward()
        own.step()
        assert model.train_step(inputs[:size], targets[:size]) == loss.item()
        assert model.plan is not None
        used.add(model.plan.schedules[Phase.TRAIN].num_devices)
    assert used == {1, 2}
    for expected, found in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_a_released_plan_leaves_nothing_on_the_devices(vgpus: VirtualGPUs) -> None:
    """Not even until Python looks for cycles: the next plan needs the memory at once."""
    model = resident_model(GPT())
    for step in range(2):
        model.train_step(*token_batch(step))
    gc.collect()
    gc.disable()
    try:
        active = model._engine.variants.active
        assert active is not None
        active.release()
        assert [torch.accelerator.memory_allocated(i) for i in range(2)] == [0, 0]
    finally:
        gc.enable()


def test_clipping_is_refused_with_updates_on_the_device(vgpus: VirtualGPUs) -> None:
    model = resident_model(GPT())
    optimizer = model._engine._optimizer
    assert optimizer is not None
    active = model._engine.variants.active
    optimizer.max_norm = 1.0
    found = model._engine.variants.ready(
        CallKind.TRAIN_STEP, ((token_batch(0)[0],), {}, token_batch(0)[1])
    )
    assert active is not None and active.measured is not None
    assert found.variant is not active  # it is planned again
    planned = active.plan(8, active.measured, ("auto", 2, "auto"))
    with pytest.raises(harmony.PlanError, match=r"max_grad_norm=1\.0: all gradients have to be"):
        active.prepared(planned, Phase.TRAIN)


def test_state_that_the_script_changes_on_a_gpu_is_waited_for(vgpus: VirtualGPUs) -> None:
    """What it has enqueued on its own stream is over before the step reads the state."""
    params = []
    for waits in (True, False):
        torch.manual_seed(0)
        model = harmony.Harmony(
            SkipMLP(),
            optimizer=torch.optim.AdamW,
            loss_fn=square_loss,
            devices=1,
            microbatch_size=8,
            updates="auto",
        )
        for step in range(3):
            model.train_step(*vector_batch(step))
            moments = [state["exp_avg"] for state in model.optimizer.state.values()]
            assert all(moment.device.type == devices.TYPE for moment in moments)
            busy = torch.ones(512, 512, device=moments[0].device)
            for _ in range(20):
                busy = busy @ busy * 1e-3
            for moment in moments:
                moment.mul_(0.5)
            if waits:
                torch.accelerator.synchronize()
        torch.accelerator.synchronize()  # the memory of the moments goes with the model
        params.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *params))
