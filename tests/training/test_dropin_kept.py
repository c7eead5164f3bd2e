"""Loops of the user's own whose activations wait for the backward: the bits of plain PyTorch."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Instruction, Op
from harmony.planner.ir.tasks import Phase
from harmony.runtime.exec.stage import Stage
from tests import devices
from tests.training import mixed
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, token_batch, token_loss
from tests.training.plain import gradients_of, params_of
from tests.training.test_dropin_plans import use_plan

CUTS = [2, 3, 5]


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the backwards that recompute, and those that find what their forward has kept."""
    count = {"recomputed": 0, "found": 0}

    def counting(name: str, run: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return run(*args, **kwargs)

        return counted

    monkeypatch.setattr(Stage, "backward", counting("recomputed", Stage.backward))
    monkeypatch.setattr(Stage, "backward_saved", counting("found", Stage.backward_saved))
    return count


def keeping(
    net: nn.Module, kept: str = "all", num_devices: int = 1, size: int = 8, **options: Any
) -> harmony.Harmony:
    """Wrap a copy, to run batches of tokens by a plan that keeps activations."""
    model = harmony.Harmony(
        copy.deepcopy(net), devices=num_devices, microbatch_size=size, mode="pp", **options
    )
    use_plan(model, (token_batch(0)[0],), CUTS, size, 1, Policy(), kept)
    return model


def held(model: harmony.Harmony) -> int:
    """Bytes that wait on the first device for a backward."""
    return int(model._engine.variants.active.executor.left.nbytes()[0])


def plain_step(net: nn.Module, forward: Any, step: int, size: int) -> torch.Tensor:
    """One forward and backward of plain PyTorch, microbatch by microbatch as Harmony runs them."""
    x, y = token_batch(step)
    outs = []
    for index, part in enumerate(x.split(size)):
        torch.manual_seed(harmony.microbatch_seed(step, index))
        outs.append(forward(net, part))
    leaf = torch.cat([out.detach() for out in outs]).requires_grad_()
    loss = token_loss(leaf, y)
    loss.backward()
    for out, gradient in zip(outs, leaf.grad.split(size), strict=True):
        out.backward(gradient)
    return loss.detach()


@pytest.mark.parametrize(
    ("kept", "num_devices", "size", "precision"),
    [
        ("all", 1, 2, "fp32"),
        ("out", 2, 2, "fp32"),
        ("some", 1, 2, "bf16"),
        ("all", 2, 8, "bf16"),
        ("products", 2, 2, "fp32"),
    ],
)
def test_a_gpt_with_dropout(
    vgpus: VirtualGPUs,
    backwards: dict[str, int],
    kept: str,
    num_devices: int,
    size: int,
    precision: str,
) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1 if precision == "fp32" else 0.0)
    model = keeping(net, kept, num_devices, size, precision=precision)
    backwards.update(found=0, recomputed=0)  # measuring layers runs them, too
    forward = mixed.in_bf16 if precision == "bf16" else lambda module, x: module(x)
    make = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    optimizers = [make(module.parameters()) for module in (net, model)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected_loss = plain_step(net, forward, step, size)
        x, y = token_batch(step)
        loss = token_loss(model(x), y)
        loss.backward()
        assert torch.equal(loss.detach(), expected_loss)
        expected, found = gradients_of(net), gradients_of(model.module)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, params_of(net)[n]) for n, p in model.module.named_parameters())
    assert backwards["found"] > 0 or kept == "products"
    assert backwards["recomputed"] == 0 or kept in ("some", "products")


def both(net: nn.Module, model: nn.Module, run: Any, backwards: dict[str, int]) -> tuple[int, int]:
    """Run the same on both, one microbatch: the same bits.

    Returns:
        How many packs found what their forward has kept, and how many were recomputed.
    """
    module = copy.deepcopy(net)
    expected = run(module)
    backwards.update(found=0, recomputed=0)
    found = run(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    other = gradients_of(model.module)
    for name, gradient in gradients_of(module).items():
        assert torch.equal(other[name], gradient), name
    return backwards["found"], backwards["recomputed"]


def test_what_the_last_forward_has_kept_gives_way_to_all_else(
    vgpus: VirtualGPUs, backwards: dict[str, int]
) -> None:
    """A backward that does not find it recomputes, and has the same bits."""
    torch.manual_seed(0)
    net = GPT(dropout=0.0)
    model = keeping(net)
    packs = len(CUTS) + 1
    (x, y), (other, _) = token_batch(0), token_batch(1)

    def again(module: nn.Module) -> list[torch.Tensor]:
        loss = token_loss(module(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        return [loss.detach()]

    def two_forwards(module: nn.Module) -> list[torch.Tensor]:
        first, second = module(x), module(other)
        (token_loss(first, y) + token_loss(second, y)).backward()
        return [first.detach(), second.detach()]

    def inference_between(module: nn.Module) -> list[torch.Tensor]:
        out = module(x)
        with torch.no_grad():
            seen = module(other)
        token_loss(out, y).backward()
        return [out.detach(), seen]

    for run, found in ((again, packs), (two_forwards, packs), (inference_between, 0)):
        model.zero_grad()
        recomputed = packs if run is inference_between else found
        assert both(net, model, run, backwards) == (found, recomputed)
    assert held(model) == 0


def test_a_graph_that_is_dropped_gives_the_memory_back(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    model = keeping(GPT(dropout=0.0))
    x, y = token_batch(0)
    token_loss(model(x), y).backward()
    device = devices.device()
    before = torch.accelerator.memory_allocated(device)
    for _ in range(3):
        loss = token_loss(model(x), y)
        assert held(model) > 0
        assert torch.accelerator.memory_allocated(device) >= before + held(model)
        del loss
        assert held(model) == 0
        assert torch.accelerator.memory_allocated(device) == before
    with torch.no_grad():
        model(x)
    assert held(model) == 0


def test_a_parameter_that_changes_before_the_backward_is_an_error(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.0)
    model = keeping(net)
    x, y = token_batch(0)
    loss = token_loss(model(x), y)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    with pytest.raises(harmony.HarmonyError, match=r"head\.weight"):
        loss.backward()
    assert held(model) == 0


def test_another_model_on_the_same_gpu_gets_the_room(
    vgpus: VirtualGPUs, backwards: dict[str, int]
) -> None:
    """As generator and discriminator take turns: neither is refused for what the other kept."""
    torch.manual_seed(0)
    nets = [GPT(dropout=0.0) for _ in range(2)]
    models = [keeping(net) for net in nets]
    x, y = token_batch(0)

    def run(pair: list[nn.Module]) -> list[torch.Tensor]:
        losses = [token_loss(module(x), y) for module in pair]
        sum(losses).backward()
        return [loss.detach() for loss in losses]

    expected = run(nets)
    backwards.update(found=0, recomputed=0)
    assert all(torch.equal(a, b) for a, b in zip(run(models), expected, strict=True))
    for net, model in zip(nets, models, strict=True):
        found = gradients_of(model.module)
        assert all(torch.equal(found[name], g) for name, g in gradients_of(net).items())
    packs = len(CUTS) + 1
    assert backwards == {"found": packs, "recomputed": packs}


def test_a_loss_of_some_of_the_outputs_finds_it_too(
    vgpus: VirtualGPUs, backwards: dict[str, int]
) -> None:
    """As of a model that returns loss and logits: a gradient comes for the loss alone."""

    class WithLoss(GPT):
        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = super().forward(ids)
            return token_loss(logits, ids), logits

    torch.manual_seed(0)
    net = WithLoss(dropout=0.0)
    model = keeping(net)
    x, _ = token_batch(0)

    def run(module: nn.Module) -> list[torch.Tensor]:
        loss, _ = module(x)
        loss.backward()
        return [loss.detach()]

    found, recomputed = both(net, model, run, backwards)
    assert found == len(CUTS) + 1
    assert recomputed == 0


def test_a_plan_of_the_callers_whose_forward_leaves_nothing_is_refused(
    vgpus: VirtualGPUs,
) -> None:
    net, x = GPT(dropout=0.0), token_batch(0)[0]
    model = keeping(net)
    model(x)
    forward = model.plan.schedules[Phase.FORWARD]
    (device,), (program,) = forward.devices, forward.programs
    drops = [Instruction("compute", Op.DROP, ref=ref) for ref in device.left]
    bare = replace(forward, devices=(replace(device, left=()),), programs=((*program, *drops),))
    wrong = replace(model.plan, schedules={**model.plan.schedules, Phase.FORWARD: bare})
    other = harmony.Harmony(net, devices=1, microbatch_size=8, mode="pp", plan=wrong)
    with pytest.raises(harmony.PlanError, match="never reaches the host"):
        other(x)


@pytest.mark.parametrize("memory", ["4MiB", "700KiB"])
def test_the_planner_keeps_what_there_is_room_for(vgpus: VirtualGPUs, memory: str) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.0)
    model = harmony.Harmony(copy.deepcopy(net), devices=1, microbatch_size=2, device_memory=memory)
    losses = []
    for step in range(2):
        x, y = token_batch(step)
        net.zero_grad()
        model.zero_grad()
        expected = plain_step(net, lambda module, part: module(part), step, 2)
        loss = token_loss(model(x), y)
        loss.backward()
        assert torch.equal(loss.detach(), expected)
        found = gradients_of(model.module)
        assert all(torch.equal(found[name], g) for name, g in gradients_of(net).items())
        losses.append(loss.detach())
    plan = model.plan
    assert plan.spec.saved and any(
        "kept" in d.chosen or "offloaded" in d.chosen for d in plan.decisions
    )
    assert max(plan.peak_nbytes) <= plan.machine.devices[0].memory_nbytes
    assert model.last_timeline.peak_nbytes[0] <= plan.peak_nbytes[0]


@pytest.mark.parametrize("memory", ["105KiB", "111KiB"])
def test_what_waits_is_counted_whole_where_memory_is_short(
    vgpus: VirtualGPUs, memory: str
) -> None:
    """With it lie tensors that autograd's graph begins at; "others have taken" those, it said."""
    vgpus(count=2, memory=memory)
    torch.manual_seed(0)
    widths = [16, 200, 40, 180, 30, 160, 8]
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    net = nn.Sequential(*(each for layer in layers for each in (layer, nn.Tanh())))
    twin = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2, microbatch_size=1, mode="pp")
    for step in range(3):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        for each in (model, twin):
            each.zero_grad()
            each(x).square().mean().backward()
        for name, gradient in gradients_of(net).items():
            torch.testing.assert_close(gradient, gradients_of(twin)[name], rtol=1e-5, atol=1e-8)
