"""What Harmony computes is what plain PyTorch computes, bit for bit, for any plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch
from tests.training.plain import Run, gradients_of, params_of, train_plain

ADAMW = (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True})
SGD = (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9, "fused": True})


def train_harmony(net: torch.nn.Module, batches: list[Any], **options: Any) -> Run:
    """Train a copy of ``net`` by `train_step`, gradients to be seen after a step."""
    model = harmony.Harmony(copy.deepcopy(net), **{"updates": "host", **options})
    run = Run()
    for inputs, targets in batches:
        run.losses.append(model.train_step(inputs, targets))
        run.gradients.append(gradients_of(model.module))
    run.params = params_of(model.module)
    return run


def assert_same(found: Run, expected: Run) -> None:
    for step, (a, b) in enumerate(zip(found.losses, expected.losses, strict=True)):
        assert torch.equal(a, b), f"loss of step {step}: {a} instead of {b}"
    for step, (a, b) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        for name, gradient in b.items():
            if gradient is None:
                assert a[name] is None, f"step {step}: {name} has a gradient"
            else:
                assert a[name] is not None, f"step {step}: {name} has no gradient"
                assert torch.equal(a[name], gradient), f"step {step}: gradient of {name}"
    for name, param in expected.params.items():
        assert torch.equal(found.params[name], param), name


@pytest.mark.parametrize(("optimizer", "options"), [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_gpt_with_dropout(
    vgpus: VirtualGPUs, num_devices: int, mode: str, optimizer: Any, options: Any
) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    batches = [token_batch(step) for step in range(8)]
    common = {"loss_fn": token_loss}
    shares = num_devices if mode == "dp" else 1
    expected = train_plain(
        net, batches, optimizer=optimizer, options=options, microbatch=2, shares=shares, **common
    )
    found = train_harmony(
        net,
        batches,
        optimizer=optimizer,
        optimizer_kwargs=options,
        mode=mode,
        microbatch_size=2,
        devices=num_devices,
        device_memory="300KiB",
        **common,
    )
    assert_same(found, expected)


@pytest.mark.parametrize("num_devices", [1, 3])
@pytest.mark.parametrize("memory", ["24KiB", "48KiB", "1MiB"])
def test_skips_across_packs(vgpus: VirtualGPUs, num_devices: int, memory: str) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    batches = [vector_batch(step) for step in range(5)]
    common = {"loss_fn": square_loss}
    optimizer, options = SGD
    expected = train_plain(
        net, batches, optimizer=optimizer, options=options, microbatch=3, **common
    )
    found = train_harmony(
        net,
        batches,
        optimizer=optimizer,
        optimizer_kwargs=options,
        mode="pp",
        microbatch_size=3,
        devices=num_devices,
        device_memory=memory,
        **common,
    )
    assert_same(found, expected)
