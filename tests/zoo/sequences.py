"""Recurrent networks, PyTorch's own transformer, a recommender, experts of our own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.zoo.data import (
    TIME,
    VOCAB,
    WIDTH,
    classes,
    ids,
    normal,
    padding,
    square_loss,
    token_batch,
    token_loss,
    vector_batch,
)
from tests.zoo.entry import TIED, Entry


class PackedLSTM(nn.Module):
    """Packed sequences; the state of one LSTM starts the next."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(3))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(width, VOCAB)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x, state = self.embed(tokens), None
        for layer in self.layers:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            packed, state = layer(packed, state)
            x, _ = pad_packed_sequence(packed, batch_first=True, total_length=tokens.shape[1])
            x = self.drop(x)
        return self.head(x)


def packed_batch(num_samples: int, seed: int) -> Any:
    lengths = TIME - classes(num_samples, seed, 5)
    return (ids(num_samples, seed), lengths), ids(num_samples, seed + 1)


class BidirectionalGRU(nn.Module):
    """A bidirectional GRU with dropout between its layers, then a plain RNN."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.gru = nn.GRU(
            width, width, num_layers=2, bidirectional=True, dropout=0.2, batch_first=True
        )
        self.rnn = nn.RNN(2 * width, width, batch_first=True, nonlinearity="relu")
        self.cell, self.head = nn.GRUCell(width, width), nn.Linear(width, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, last = self.gru(self.embed(tokens))
        x, _ = self.rnn(x)
        state = last[0] + last[-1]
        for step in x[:, :3].unbind(1):
            state = self.cell(step, state)
        return self.head(x + state[:, None])


class Translator(nn.Module):
    """`nn.Transformer` with causal and padding masks, and tied output weights."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.places = nn.Parameter(torch.randn(TIME, width) * 0.1)
        self.core = nn.Transformer(width, 4, 2, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, source: torch.Tensor, target: torch.Tensor, pad: torch.Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], device=target.device
        )
        x = self.core(
            self.embed(source) + self.places,
            self.embed(target) + self.places[: target.shape[1]],
            tgt_mask=mask,
            src_key_padding_mask=pad,
            memory_key_padding_mask=pad,
            tgt_is_causal=True,
        )
        return {"logits": self.head(x)}


def translation_batch(num_samples: int, seed: int) -> Any:
    inputs = {
        "source": ids(num_samples, seed),
        "target": ids(num_samples, seed + 1, time=8),
        "pad": padding(num_samples) == 0,
    }
    return inputs, ids(num_samples, seed + 2, time=8)


class Recommender(nn.Module):
    """Large embedding tables, bags of indices, pairwise products (DLRM; Naumov et al., 2019)."""

    def __init__(self, width: int = 8, rows: tuple[int, ...] = (5000, 3000, 2000)) -> None:
        super().__init__()
        modes = ("sum", "mean", "max")
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(num, width, mode=mode) for num, mode in zip(rows, modes, strict=True)
        )
        self.bottom = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU())
        pairs = (len(rows) + 1) * len(rows) // 2
        self.top = nn.Sequential(
            nn.Linear(width + pairs, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1)
        )

    def forward(self, dense: torch.Tensor, *bags: torch.Tensor) -> torch.Tensor:
        x = self.bottom(dense)
        features = [x, *(table(bag) for table, bag in zip(self.tables, bags, strict=True))]
        stacked = torch.stack(features, 1)
        products = stacked @ stacked.transpose(1, 2)
        rows, columns = torch.tril_indices(len(features), len(features), -1)
        flat = products[:, rows, columns]
        return self.top(torch.cat([x, flat], 1)).squeeze(1)


def click_batch(num_samples: int, seed: int) -> Any:
    bags = tuple(
        ids(num_samples, seed + i, 4, vocab=num) for i, num in enumerate((5000, 3000, 2000))
    )
    return (normal(num_samples, seed, 6), *bags), classes(num_samples, seed, 2).float()


class Experts(nn.Module):
    """Top-2 routing that sends each token to its experts with `index_add`."""

    def __init__(self, width: int, count: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = x.flatten(0, 1)
        chances = self.gate(flat).softmax(-1)
        weights, chosen = chances.topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            tokens, rank = torch.where(chosen == index)
            if tokens.numel():
                scaled = expert(flat[tokens]) * weights[tokens, rank, None]
                out = out.index_add(0, tokens, scaled)
        used = F.one_hot(chosen[:, 0], len(self.experts)).float().mean(0)
        return out.view_as(x), (used * chances.mean(0)).sum()


class ExpertBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(width), Experts(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, balance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, loss = self.experts(self.norm(x))
        return x + self.drop(y), balance + loss


class MixtureOfExperts(nn.Module):
    """Experts chosen token by token; the balance loss is carried along the blocks."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(ExpertBlock(width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, balance = self.stem(x), x.new_zeros(())
        for block in self.blocks:
            x, balance = block(x, balance)
        return self.head(x), balance


def balanced_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    return square_loss(output[0], targets) + 0.01 * output[1]


FAMILY = "sequences, recommender, experts (our own code)"

ENTRIES = (
    Entry(
        "nn_transformer",
        FAMILY,
        "causal and padding masks, keyword inputs",
        Translator,
        translation_batch,
        token_loss,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry(
        "lstm_packed",
        FAMILY,
        "packed sequences, a state handed from layer to layer",
        PackedLSTM,
        packed_batch,
        token_loss,
    ),
    Entry(
        "gru_bidirectional",
        FAMILY,
        "two directions, dropout inside, a cell called three times",
        BidirectionalGRU,
        token_batch,
        token_loss,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry(
        "recommender",
        FAMILY,
        "large embedding tables, bags, pairwise products",
        Recommender,
        click_batch,
        F.binary_cross_entropy_with_logits,
        num_samples=6,
    ),
    Entry(
        "experts",
        FAMILY,
        "tokens sent to experts by content, balance loss",
        MixtureOfExperts,
        vector_batch,
        balanced_loss,
    ),
)
