"""The same script computes the same bits in every run, whatever was measured in it."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.core.machine import Machine
from harmony.engine import variant
from harmony.planner.predict.cost import CostTable
from harmony.profiling import measured
from harmony.runtime.step.randomness import drawn_seed
from tests import devices

from .conftest import VirtualGPUs
from .models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch

RUNS = 3

measure_layers, measure_machine = variant.measure_layers, measured.measure_machine


@contextmanager
def other_times(seed: int) -> Iterator[None]:
    """Let everything that is measured take another time, from a tenth to ten times."""
    draw = random.Random(seed)

    def factor() -> float:
        return float(10 ** draw.uniform(-1, 1))

    def layers(*args: Any) -> tuple[CostTable, float]:
        costs, share = measure_layers(*args)
        rows = []
        for row in costs.by_layer:
            forward, backward, update = factor(), factor(), factor()
            rows.append(
                {
                    size: replace(
                        cost,
                        forward_s=cost.forward_s * forward * factor(),
                        backward_s=cost.backward_s * backward * factor(),
                        update_s=cost.update_s * update,
                    )
                    for size, cost in row.items()
                }
            )
        return CostTable(tuple(rows)), share

    def machine(*args: Any) -> Machine:
        found = measure_machine(*args)
        devices = tuple(
            replace(
                device,
                h2d_bytes_per_s=device.h2d_bytes_per_s * factor(),
                d2h_bytes_per_s=device.d2h_bytes_per_s * factor(),
                p2p_bytes_per_s=device.p2p_bytes_per_s * factor(),
            )
            for device in found.devices
        )
        return replace(found, devices=devices, cpu_share=found.cpu_share * factor())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variant, "measure_layers", layers)
        patch.setattr(measured, "measure_machine", machine)
        yield


def chain() -> nn.Module:
    """The chain of the case that showed it: dp in one run, pp in the next."""
    return nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(24, 24), nn.Tanh())])


def albert() -> nn.Module:
    """Layers that all share one parameter: which uses are added first follows the packs."""
    net = SkipMLP(depth=5)
    for layer in net.layers[1:]:
        layer.weight = net.layers[0].weight  # type: ignore[union-attr]
    return net


@pytest.mark.parametrize(
    ("make", "batch", "loss_fn", "options"),
    [
        (chain, vector_batch, nn.functional.mse_loss, {"microbatch_size": 2, "devices": 2}),
        (chain, vector_batch, square_loss, {"devices": 4}),
        (albert, vector_batch, square_loss, {"devices": 2}),
        (GPT, token_batch, token_loss, {"devices": 3}),
        (lambda: GPT(dropout=0.0, tied=True), token_batch, token_loss, {"devices": 1}),
    ],
    ids=["case", "any microbatch", "shared by all layers", "random numbers", "tied"],
)
def test_bits_do_not_follow_what_was_measured(
    vgpus: VirtualGPUs,
    make: Callable[[], nn.Module],
    batch: Callable[[int], Any],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    options: dict[str, Any],
) -> None:
    """Microbatches, replicas and what is added up first are chosen by counts, not by seconds."""
    vgpus(count=4, memory="256KiB", link="50MB/s")
    torch.manual_seed(0)
    net = make()
    found = []
    for run in range(RUNS):
        with other_times(run):
            model = harmony.Harmony(
                copy.deepcopy(net),
                optimizer=torch.optim.AdamW,
                loss_fn=loss_fn,
                **options,
            )
            losses = [model.train_step(*batch(step)) for step in range(3)]
        assert model.plan is not None
        found.append((model.plan, losses, [p.detach().clone() for p in model.parameters()]))
        del model
        gc.collect()
    first, losses, params = found[0]
    for plan, others, values in found[1:]:
        assert plan.spec.shares == first.spec.shares
        assert plan.spec.backward_size == first.spec.backward_size
        assert plan.spec.forward_size == first.spec.forward_size
        assert others == losses
        assert all(torch.equal(a, b) for a, b in zip(values, params, strict=True))


def test_a_loop_of_ones_own_computes_the_same_bits_too(vgpus: VirtualGPUs) -> None:
    vgpus(count=2, memory="256KiB", link="50MB/s")
    torch.manual_seed(0)
    net = GPT()
    found = []
    for run in range(RUNS):
        with other_times(run):
            model = harmony.Harmony(copy.deepcopy(net), devices=2)
            x, y = token_batch(0)
            token_loss(model(x), y).backward()
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        del model
        gc.collect()
    for gradients in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0], strict=True))


def test_what_was_measured_chooses_the_rest(vgpus: VirtualGPUs) -> None:
    """Were packs and what is kept chosen by counts as well, all plans would be the same."""
    vgpus(count=2, memory="256KiB", link="50MB/s")
    torch.manual_seed(0)
    net, specs = GPT(dropout=0.0), set()
    for run in range(RUNS):
        with other_times(run):
            model = harmony.Harmony(
                copy.deepcopy(net), optimizer=torch.optim.SGD, loss_fn=token_loss, devices=2
            )
            model.train_step(*token_batch(0))
        assert model.plan is not None
        specs.add((model.plan.spec, model.plan.policy))
        del model
        gc.collect()
    assert len(specs) > 1


def test_memory_that_others_have_taken_is_not_counted_on(vgpus: VirtualGPUs) -> None:
    """The choice counts on all of a device; where less is free it is made again, and trains."""
    vgpus(count=1, memory="1MiB")
    taken = torch.empty(700 * 1024, dtype=torch.uint8, device=devices.device())
    torch.manual_seed(0)
    net = GPT(depth=2)
    model = harmony.Harmony(
        copy.deepcopy(net), optimizer=torch.optim.SGD, loss_fn=token_loss, devices=1
    )
    model.train_step(*token_batch(0))
    assert model.plan is not None
    assert max(model.plan.peak_nbytes) <= 2**20 - taken.nbytes


def test_the_seed_follows_from_torchs_and_leaves_it_alone(vgpus: VirtualGPUs) -> None:
    """`torch.manual_seed` means what people think; a model that draws takes no number away."""
    seeds, after = [], []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("harmony.module.drawn_seed", drawn_seed)
            seeds.append(harmony.Harmony(nn.Linear(2, 2)).seed)
        after.append(torch.get_rng_state())
    assert seeds[0] == seeds[2] != seeds[1]
    torch.manual_seed(1)
    nn.Linear(2, 2)
    assert torch.equal(torch.get_rng_state(), after[0])
    assert harmony.Harmony(nn.Linear(2, 2), seed=7).seed == 7


def test_dropout_follows_the_seed_that_was_drawn(vgpus: VirtualGPUs) -> None:
    """A run is repeated by `torch.manual_seed`, and by giving its seed to another model."""
    torch.manual_seed(0)
    net, losses = GPT(dropout=0.3), []
    drawn: int | None = None
    for seed in (5, 5, 6, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("harmony.module.drawn_seed", drawn_seed)
            torch.manual_seed(seed)
            model = harmony.Harmony(
                copy.deepcopy(net),
                optimizer=torch.optim.SGD,
                loss_fn=token_loss,
                seed=None if seed else drawn,
            )
        if seed == 5:
            drawn = model.seed
        losses.append(float(model.train_step(*token_batch(0))))
        del model
        gc.collect()
    assert losses[0] == losses[1] == losses[3] != losses[2]
