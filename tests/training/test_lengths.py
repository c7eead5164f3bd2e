"""Batches of ever new lengths: bounded memory, and the same training as by plain PyTorch."""

from __future__ import annotations

import copy
import cProfile
import gc
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

import harmony
from harmony.core.layergraph import LayerGraph
from harmony.engine import paths
from harmony.engine import variant as variant_module
from harmony.engine.other_lengths import ratio_between, stretched
from tests.toys import chain, uniform_costs

from .conftest import VirtualGPUs
from .models import GPT, token_batch, token_loss
from .plain import SGD, train_plain


def test_only_the_lengths_used_last_are_kept(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A length that was forgotten and comes back trains as before; nothing grows with others."""
    monkeypatch.setattr(paths, "MAX_SIGNATURES", 2)
    vgpus(count=1, memory="4MiB")
    torch.manual_seed(0)
    net = GPT(depth=1)
    model = harmony.Harmony(
        copy.deepcopy(net),
        optimizer=torch.optim.SGD,
        optimizer_kwargs=SGD,
        loss_fn=token_loss,
        microbatch_size=2,
    )
    lengths = (8, 9, 10, 8, 11, 10)
    batches = [token_batch(step, time=length) for step, length in enumerate(lengths)]
    losses, seen = [], []
    for batch in batches:
        losses.append(model.train_step(*batch))
        variants = model._engine.variants
        assert len(variants._paths) <= 2
        assert variants.active is not None
        seen.append(weakref.ref(variants.active))
    expected = train_plain(
        net, batches, optimizer=torch.optim.SGD, options=SGD, loss_fn=token_loss, microbatch=2
    )
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())
    del variants
    gc.collect()
    assert sum(variant() is not None for variant in seen) <= 2


def test_a_forward_whose_length_was_forgotten_still_has_its_backward(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "MAX_SIGNATURES", 1)
    vgpus(count=1, memory="4MiB")
    torch.manual_seed(0)
    net = GPT(depth=1, dropout=0.0)
    model, plain = harmony.Harmony(copy.deepcopy(net), microbatch_size=8), copy.deepcopy(net)
    first, second = token_batch(0, time=8), token_batch(1, time=9)
    waiting = token_loss(model(first[0]), first[1])
    token_loss(model(second[0]), second[1]).backward()
    waiting.backward()
    for x, y in (second, first):
        token_loss(plain(x), y).backward()
    for (name, param), twin in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(param.grad, twin.grad), name  # type: ignore[arg-type]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every capture whose layers are measured."""
    calls: list[int] = []
    measure_layers = variant_module.measure_layers

    def counted(*args: Any) -> Any:
        calls.append(1)
        return measure_layers(*args)

    monkeypatch.setattr(variant_module, "measure_layers", counted)
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_another_length_is_planned_by_what_is_known_of_one(
    vgpus: VirtualGPUs, measured: list[int], dropout: float
) -> None:
    """Nothing is measured again, microbatches are the same, and no device takes more than said."""
    vgpus(count=2, memory="512KiB")
    torch.manual_seed(0)
    net = GPT(depth=2, context=24, dropout=dropout)
    model = harmony.Harmony(
        copy.deepcopy(net),
        optimizer=torch.optim.SGD,
        optimizer_kwargs=SGD,
        loss_fn=token_loss,
        mode="pp",
        devices=2,
    )
    lengths = (16, 17, 12, 18, 20, 16)
    batches = [token_batch(step, time=length) for step, length in enumerate(lengths)]
    losses, sizes = [], set()
    for batch in batches:
        losses.append(model.train_step(*batch))
        assert model.plan is not None and model.last_timeline is not None
        sizes.add((model.plan.spec.shares, model.plan.spec.backward_size))
        peaks = zip(model.last_timeline.peak_nbytes, model.plan.peak_nbytes, strict=True)
        assert all(seen <= said for seen, said in peaks)
    assert len(measured) == 1 and len(sizes) == 1
    ((_, size),) = sizes
    assert model.plan is not None and model.plan.spec.forward_size == size
    expected = train_plain(
        net,
        batches,
        optimizer=torch.optim.SGD,
        options=SGD,
        loss_fn=token_loss,
        microbatch=size,
    )
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


def test_where_bounds_leave_no_room_the_bytes_are_counted(vgpus: VirtualGPUs) -> None:
    """Bounds must not refuse a length that fits: memory is what the first length just takes."""
    vgpus(count=1, memory="4MiB")
    net = GPT(depth=1, context=24, dropout=0.0)
    options: Any = {
        "optimizer": torch.optim.SGD,
        "loss_fn": token_loss,
        "microbatch_size": 8,
        "activations": "recompute",
        "updates": "host",
    }
    for nbytes in range(400 * 1024, 1 << 20, 16 * 1024):  # the least that the longer one needs
        try:
            model = harmony.Harmony(copy.deepcopy(net), device_memory=nbytes, **options)
            model.train_step(*token_batch(0, time=19))
            break
        except harmony.HarmonyError:
            continue
    model = harmony.Harmony(copy.deepcopy(net), device_memory=nbytes, **options)
    model.train_step(*token_batch(0, time=16))
    model.train_step(*token_batch(0, time=19))


def test_a_length_far_from_those_known_is_measured(
    vgpus: VirtualGPUs, measured: list[int]
) -> None:
    vgpus(count=1, memory="4MiB")
    net = GPT(depth=1, context=64)
    model = harmony.Harmony(net, optimizer=torch.optim.SGD, loss_fn=token_loss, microbatch_size=4)
    for length, count in ((16, 1), (18, 1), (40, 2), (44, 2), (20, 2), (8, 3)):
        model.train_step(*token_batch(0, time=length))
        assert len(measured) == count


def test_a_loop_of_ones_own_learns_from_other_lengths_too(
    vgpus: VirtualGPUs, measured: list[int]
) -> None:
    vgpus(count=1, memory="4MiB")
    torch.manual_seed(0)
    net = GPT(depth=1, context=24, dropout=0.0)
    model, plain = harmony.Harmony(copy.deepcopy(net), microbatch_size=8), copy.deepcopy(net)
    for length in (16, 17, 15):
        x, y = token_batch(length, time=length)
        token_loss(model(x), y).backward()
        token_loss(plain(x), y).backward()
    assert len(measured) == 1
    for (name, param), twin in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(param.grad, twin.grad), name  # type: ignore[arg-type]


def longer(graph: LayerGraph, factor: int) -> LayerGraph:
    """The same model with values of another length."""
    nbytes = (v.nbytes_per_sample * factor // 16 for v in graph.values)
    values = (replace(v, nbytes_per_sample=n) for v, n in zip(graph.values, nbytes, strict=True))
    layers = (replace(x, signature=f"block:{factor}") for x in graph.layers)
    return replace(graph, values=tuple(values), layers=tuple(layers))


def test_only_models_of_the_same_layers_are_kin() -> None:
    known = longer(chain(4), 16)
    assert ratio_between(longer(chain(4), 20), known) == 1.25
    assert ratio_between(longer(chain(4), 12), known) == 0.75
    assert ratio_between(longer(chain(4), 21), known) is None
    assert ratio_between(longer(chain(4), 8), known) is None
    others = [
        chain(5),
        chain(4, weight=128 * 1024),
        chain(4, frozen=(1,)),
        chain(4, skips=((0, 3),)),
        chain(4, random_layer=2),
        chain(4, tied=True),
    ]
    for other in others:
        assert ratio_between(longer(other, 17), known) is None
    layers = (replace(known.layers[0], signature="other:1"), *known.layers[1:])
    assert ratio_between(replace(known, layers=layers), known) is None


def test_bytes_of_another_length_are_bounded_from_above() -> None:
    costs = uniform_costs(chain(2))
    cost, more, less = costs.layer(0, 1), stretched(costs, 1.25).layer(0, 1), stretched(costs, 0.5)
    assert more.backward_nbytes == cost.backward_nbytes * 1.25**2
    assert more.forward_s == cost.forward_s * 1.25
    assert less.layer(0, 1).backward_nbytes == cost.backward_nbytes


def test_a_script_may_be_profiled(vgpus: VirtualGPUs) -> None:
    """Recording watches calls as well, and puts back what it found: cProfile's is no function."""
    profile = cProfile.Profile()
    profile.enable()
    try:
        model = harmony.Harmony(
            torch.nn.Linear(4, 4),
            optimizer=torch.optim.SGD,
            loss_fn=torch.nn.functional.mse_loss,
        )
        model.train_step(torch.ones(2, 4), torch.zeros(2, 4))
        assert sys.getprofile() is profile
    finally:
        profile.disable()
