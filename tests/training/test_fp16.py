"""``precision="fp16"``: a loop with PyTorch's `GradScaler`, bit for bit, for any plan."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.errors import ConfigError
from tests.training.conftest import VirtualGPUs
from tests.training.mixed import in_fp16, train_fsdp, train_plain
from tests.training.models import SkipMLP, square_loss, token_loss, vector_batch
from tests.training.plain import Run, params_of
from tests.training.test_precision import (
    SGD,
    AdamW,
    Deciding,
    Small,
    seeded,
    tokens,
    train_steps,
    wrapped,
)

FP16 = partial(train_plain, forward=in_fp16)
ByKernel = partial(torch.optim.AdamW, lr=1e-2)


def scaler(growth_interval: int = 2, scale: float = 2.0**17) -> torch.amp.GradScaler:
    """One whose first steps are skipped (fp16 ends at 65504), and which grows soon after."""
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)


def model_of(net: nn.Module, make: Any, **options: Any) -> harmony.Harmony:
    model = wrapped(net, make, precision="fp16", **options)
    assert model.grad_scaler is not None
    model.grad_scaler.load_state_dict(scaler().state_dict())
    return model


def assert_same(found: Run, expected: Run) -> None:
    """As elsewhere, but gradients of a step that is skipped are no numbers."""
    assert all(torch.equal(a, b) for a, b in zip(found.losses, expected.losses, strict=True))
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        for name, gradient in theirs.items():
            assert gradient is not None and ours[name] is not None
            equal = (gradient == ours[name]) | (gradient.isnan() & ours[name].isnan())
            assert bool(equal.all()), name
    for name, param in expected.params.items():
        assert torch.equal(found.params[name], param), name


@pytest.mark.parametrize("make", [ByKernel, SGD, AdamW], ids=["kernel", "sgd", "fused"])
@pytest.mark.parametrize(
    ("mode", "num_devices", "clip", "overlap"),
    [("pp", 1, None, False), ("pp", 2, 0.5, True), ("dp", 2, 0.5, False)],
)
def test_a_gpt_with_dropout(
    vgpus: VirtualGPUs, make: Any, mode: str, num_devices: int, clip: float | None, overlap: bool
) -> None:
    """Steps are skipped, others follow in which the scale grows, and shrinks again."""
    net, theirs = seeded(Small), scaler()
    shares = num_devices if mode == "dp" else 1
    expected = FP16(
        net,
        tokens(7),
        make,
        token_loss,
        microbatch=2,
        clip=clip,
        shares=shares,
        scaler=theirs,
    )
    model = model_of(
        net, make, mode=mode, devices=num_devices, max_grad_norm=clip, overlap_updates=overlap
    )
    found = train_steps(model, tokens(7))
    assert_same(found, expected)
    assert model.grad_scaler is not None
    assert model.grad_scaler.state_dict() == theirs.state_dict()
    skipped = [
        all(p is None or not p.isfinite().all() for p in g.values()) for g in found.gradients
    ]
    assert any(skipped) and not all(skipped)


@pytest.mark.parametrize("make", [ByKernel, SGD], ids=["kernel", "sgd"])
def test_models_are_trained_as_by_fsdp(vgpus: VirtualGPUs, make: Any) -> None:
    net = seeded(lambda: Small(dropout=0.0))
    theirs = scaler()
    expected = train_fsdp(
        net, tokens(4), make, token_loss, dtype=torch.float16, microbatch=2, scaler=theirs
    )
    model = model_of(net, make)
    assert_same(train_steps(model, tokens(4)), expected)
    assert model.grad_scaler is not None
    assert model.grad_scaler.get_scale() == theirs.get_scale()


def test_a_loop_of_ones_own_brings_its_scaler(vgpus: VirtualGPUs) -> None:
    net = seeded(lambda: Small(dropout=0.0))
    batches = tokens(5)
    expected = FP16(net, batches, ByKernel, token_loss, microbatch=8, scaler=scaler(), clip=0.5)
    model = harmony.Harmony(
        copy.deepcopy(net), devices=1, device_memory="600KiB", precision="fp16", microbatch_size=8
    )
    assert model.grad_scaler is None
    optimizer, own, run = ByKernel(model.parameters()), scaler(), Run()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = token_loss(model(inputs), targets)
        own.scale(loss).backward()
        own.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        own.step(optimizer)
        own.update()
        run.losses.append(loss.detach().float())
    run.params = params_of(model.module)
    expected.gradients.clear()
    assert_same(run, expected)


def test_a_step_of_all_at_once_is_skipped(vgpus: VirtualGPUs) -> None:
    calls: list[int] = []

    def hooked(params: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, **options)
        optimizer.register_step_pre_hook(lambda *_: calls.append(1) and None)
        return optimizer

    make, net = partial(hooked, lr=0.1, foreach=False), seeded(Small)
    expected = FP16(net, tokens(4), make, token_loss, microbatch=2, scaler=scaler())
    stepped = len(calls)
    assert_same(train_steps(model_of(net, make), tokens(4)), expected)
    assert 0 < stepped < 4 and len(calls) == 2 * stepped


def test_a_forward_that_is_known_only_as_it_runs(vgpus: VirtualGPUs) -> None:
    net = seeded(Deciding)
    batches = [vector_batch(step) for step in range(5)]
    expected = FP16(net, batches, SGD, square_loss, microbatch=4, scaler=scaler())
    with pytest.warns(harmony.HarmonyWarning, match="recorded on its way"):
        found = train_steps(model_of(net, SGD, loss_fn=square_loss, microbatch_size=4), batches)
    assert_same(found, expected)


def test_a_resumed_run_and_a_copy_go_on_with_the_scale(vgpus: VirtualGPUs, tmp_path: Path) -> None:
    net, theirs = seeded(Small), scaler()
    expected = FP16(net, tokens(7), ByKernel, token_loss, microbatch=2, scaler=theirs)
    model = model_of(net, ByKernel, seed=0)
    train_steps(model, tokens(7)[:3])
    model.save_checkpoint(tmp_path)
    resumed = wrapped(Small(), ByKernel, precision="fp16")
    resumed.load_checkpoint(tmp_path)
    for each in (resumed, copy.deepcopy(model)):
        found = train_steps(each, tokens(7)[3:])
        assert all(torch.equal(found.params[n], p) for n, p in expected.params.items())
        assert each.grad_scaler is not None
        assert each.grad_scaler.state_dict() == theirs.state_dict()


def test_what_cannot_go_with_a_scaled_loss_is_refused(vgpus: VirtualGPUs) -> None:
    with pytest.raises(ConfigError, match="detect_nonfinite=True with precision"):
        wrapped(Small(), precision="fp16", detect_nonfinite=True)
    with pytest.raises(ConfigError, match="the loss is scaled"):
        wrapped(Small(), precision="fp16").verify(*tokens(1)[0])


def test_a_scale_is_none_of_other_precisions(vgpus: VirtualGPUs) -> None:
    assert wrapped(SkipMLP()).grad_scaler is None
