"""Embeddings with ``sparse=True``: their gradients are dense here, with the same sums."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony

from .conftest import VirtualGPUs


class Words(nn.Module):
    """A mean of embeddings, made in one of three ways, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "bag":
            self.words: nn.Module = nn.EmbeddingBag(50, 16, sparse=True, mode="mean")
        else:
            padding = 3 if kind == "padding" else None
            self.words = nn.Embedding(50, 16, sparse=kind != "functional", padding_idx=padding)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.kind == "bag":
            return self.head(self.words(ids))
        if self.kind == "functional":
            return self.head(F.embedding(ids, self.words.weight, sparse=True).mean(1))
        return self.head(self.words(ids).mean(1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 50, (8, 6), generator=generator)
    return ids, torch.randint(0, 4, (8,), generator=generator)


@pytest.mark.parametrize("kind", ["module", "padding", "bag", "functional"])
@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adagrad, {"lr": 0.1})],
)
def test_sparse_embeddings_train_as_in_plain_pytorch(
    vgpus: VirtualGPUs, kind: str, size: int, optimizer: Any, options: dict[str, Any]
) -> None:
    """Up to the order of sums: plain PyTorch adds a row that comes twice to the weight twice."""
    torch.manual_seed(0)
    net = Words(kind)
    plain = copy.deepcopy(net)
    model = harmony.Harmony(
        net,
        optimizer=optimizer,
        optimizer_kwargs=options,
        loss_fn=F.cross_entropy,
        microbatch_size=size,
        mode="pp",
        devices=2,
    )
    twin = optimizer(plain.parameters(), **options)
    for step in range(3):
        ids, targets = batch(step)
        model.train_step(ids, targets)
        twin.zero_grad()
        for low in range(0, 8, size):
            part = slice(low, low + size)
            (F.cross_entropy(plain(ids[part]), targets[part]) * (size / 8)).backward()
        twin.step()
    for param, expected in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(param, expected, rtol=1e-5, atol=1e-5)


def test_the_drop_in_form_says_that_gradients_are_dense(vgpus: VirtualGPUs) -> None:
    net = Words("module")
    plain = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="words has sparse=True: its gradient is dense"):
        model = harmony.Harmony(net, microbatch_size=4, devices=1)
    ids, targets = batch(0)
    F.cross_entropy(model(ids), targets).backward()
    F.cross_entropy(plain(ids), targets).backward()
    assert torch.allclose(net.words.weight.grad, plain.words.weight.grad.to_dense(), atol=1e-7)


def test_an_optimizer_that_wants_sparse_gradients_is_refused_by_name(vgpus: VirtualGPUs) -> None:
    with pytest.raises(harmony.ConfigError, match="SparseAdam wants sparse gradients"):
        harmony.Harmony(Words("module"), optimizer=torch.optim.SparseAdam, devices=1)


def test_it_is_refused_by_name_in_a_loop_of_ones_own_too(vgpus: VirtualGPUs) -> None:
    """Before its step, which raised PyTorch's error; parameters of others it may take."""
    net, other = Words("module"), nn.Embedding(5, 2, sparse=True)
    with pytest.warns(UserWarning, match="sparse=True"):
        model = harmony.Harmony(net, microbatch_size=4, devices=1)
    optimizer = torch.optim.SparseAdam([net.words.weight])
    ids, targets = batch(0)
    F.cross_entropy(model(ids), targets).backward()
    with pytest.raises(harmony.ConfigError, match="SparseAdam wants sparse gradients"):
        optimizer.step()
    other(torch.tensor([1])).sum().backward()
    torch.optim.SparseAdam(other.parameters()).step()
