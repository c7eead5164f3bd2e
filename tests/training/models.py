"""Small models for the tests of the runtime: each shows one thing that real models do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A pre-norm transformer block with SDPA and dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(batch, time, width)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """A decoder with learned positions; tied embedding and head if asked for."""

    def __init__(
        self,
        vocab: int = 61,
        context: int = 16,
        width: int = 32,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.tokens(ids) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def token_batch(step: int, num_samples: int = 8, time: int = 16, vocab: int = 61):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, vocab, (num_samples, time + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class SkipMLP(nn.Module):
    """A chain with a long skip whose value two far layers read, and no random numbers."""

    def __init__(self, width: int = 24, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.tanh(self.layers[0](x))
        y = first
        for layer in self.layers[1:-2]:
            y = torch.tanh(layer(y))
        y = torch.tanh(self.layers[-2](y + first))
        return self.layers[-1](y * first)


def square_loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ((output - targets) ** 2).mean()


def vector_batch(step: int, num_samples: int = 8, width: int = 24):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(2000 + step)
    return (
        torch.randn(num_samples, width, generator=generator),
        torch.randn(num_samples, width, generator=generator),
    )
