"""Batches of ever new lengths: bounded memory, and the same training as by plain PyTorch."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

import harmony
from harmony import paths

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
        bindings = model._engine.bindings
        assert len(bindings._paths) <= 2
        assert bindings.active is not None
        seen.append(weakref.ref(bindings.active))
    expected = train_plain(
        net, batches, optimizer=torch.optim.SGD, options=SGD, loss_fn=token_loss, microbatch=2
    )
    assert losses == expected.losses
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())
    del bindings
    gc.collect()
    assert sum(binding() is not None for binding in seen) <= 2


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
