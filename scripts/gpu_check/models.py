"""Llama in plain PyTorch, so that no package beside torch is needed, and its FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its batches.

    Attributes:
        batch, context: samples of a step, and tokens of a sample.
    """

    name: str
    width: int
    depth: int
    heads: int
    hidden: int
    vocab: int = 32000
    batch: int = 8
    context: int = 2048
    dropout: float = 0.0

    @property
    def num_params(self) -> int:
        """Parameters, the embedding and the head being two."""
        block = 4 * self.width**2 + 3 * self.width * self.hidden + 2 * self.width
        return self.depth * block + 2 * self.vocab * self.width + self.width

    @property
    def num_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.context

    def step_flops(self) -> float:
        """FLOPs of a step without recompute: 6 a parameter and token, and the attention's."""
        dense = 6.0 * (self.num_params - self.vocab * self.width) * self.num_tokens
        attention = 6.0 * self.depth * self.num_tokens * self.context * self.width
        return dense + attention


TINY = Shape("tiny", 64, 4, 4, 128, vocab=128, batch=8, context=32)
SHAPES = {
    "1B": Shape("1B", 2048, 16, 32, 8192),
    "7B": Shape("7B", 4096, 32, 32, 11008),
    "14B": Shape("14B", 5120, 48, 40, 13824),
}


class RMSNorm(nn.Module):
    """Scales each token to a root mean square of 1, in plain operators."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a tensor to the same shape."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (wide * scale).to(x.dtype) * self.weight


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads, self.dropout = shape.width, shape.heads, shape.dropout
        self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, shape.hidden, bias=False)
        self.up = nn.Linear(width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Map (samples, tokens, width) to the same shape."""
        samples, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(samples, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(samples, tokens, width))
        inner = self.mlp_norm(x)
        grown = F.silu(self.gate(inner)) * self.up(inner)
        return x + F.dropout(self.down(grown), self.dropout, self.training)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


class Llama(nn.Module):
    """Tokens of shape (samples, tokens) to logits of shape (samples, tokens, vocabulary)."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        half = shape.width // shape.heads // 2
        rates = 10000.0 ** (-torch.arange(half, device="cpu") / half)
        angles = torch.outer(torch.arange(shape.context, device="cpu"), rates)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]].to(x.dtype), self.sin[: tokens.shape[1]].to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def make_model(shape: Shape) -> Llama:
    """A model with random weights, made quickly: large ones repeat a few million numbers."""
    with torch.device("meta"):
        net = Llama(shape)
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1 << 22, generator=generator) * 0.02
    with torch.no_grad():
        for name, param in net.named_parameters():
            flat = param.view(-1)
            if "norm" in name:
                flat.fill_(1.0)
                continue
            for start in range(0, len(flat), len(drawn)):
                part = flat[start : start + len(drawn)]
                part.copy_(drawn[: len(part)])
    fresh = Llama(Shape("", shape.width, 0, shape.heads, 1, vocab=1, context=shape.context))
    net.cos.copy_(fresh.cos)
    net.sin.copy_(fresh.sin)
    return net


def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def batches(shape: Shape, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens that a model can learn: each follows from the one before."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        first = torch.randint(0, shape.vocab, (shape.batch, 1), generator=generator)
        tokens = (first + 7 * torch.arange(shape.context + 1)) % shape.vocab
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
