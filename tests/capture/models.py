"""Models for the tests of capture: each shows one thing that real models do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, TIME, WIDTH = 61, 12, 32


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, depth: int = 4, tied: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(32, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GlueHead(GPT):
    """The tied weight is used directly by the root; the loss is computed inside."""

    def forward(self, ids: torch.Tensor, *, labels: torch.Tensor) -> Any:
        batch, time = ids.shape
        x = self.tokens(ids) + self.positions(torch.arange(time))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight).view(batch * time, VOCAB)
        return {"loss": F.cross_entropy(logits, labels.view(batch * time)), "logits": logits}


class LongSkip(nn.Module):
    """A value that several far layers read."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.tanh(self.layers[0](x))
        y = first
        for layer in self.layers[1:-2]:
            y = torch.tanh(layer(y)) + first * 0.5
        y = torch.tanh(self.layers[-2](torch.cat([y, first], 0)[: x.shape[0]] + first))
        return self.layers[-1](y * first)


class TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.layers[3].weight = self.layers[1].weight
        self.layers[4].bias = self.layers[0].bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


class Frozen(GPT):
    """Some parameters do not train, one is never used."""

    def __init__(self) -> None:
        super().__init__(tied=False)
        self.tokens.requires_grad_(False)
        self.blocks[1].requires_grad_(False)
        self.blocks[2].qkv.weight.requires_grad_(False)
        self.unused = nn.Linear(3, 3)


@dataclass
class Pair:
    hidden: torch.Tensor
    extra: dict[str, Any]


class Nested(nn.Module):
    """Dataclasses and dicts pass between modules and come out."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": nn.LayerNorm(WIDTH)})
            self.drop = nn.Dropout(0.2)

        def forward(self, pair: Pair, *, scale: float) -> Pair:
            hidden = self.drop(self.inner["b"](torch.tanh(self.inner["a"](pair.hidden))))
            return Pair(hidden * scale, {"last": pair.hidden.mean(1), "count": 3, "none": None})

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self.Part() for _ in range(4))

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        pair = Pair(x, {})
        for part in self.parts:
            pair = part(pair, scale=scale)
        return {"out": pair, "pooled": (pair.hidden.sum(1), [pair.extra["last"]]), "n": 4}


class InPlace(nn.Module):
    """In-place operations on what a layer got, on views, and on the input."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH // 2, WIDTH // 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(1.5)
            view = x[:, 1:]
            view.add_(0.25)
            h = self.linear(x)
            h += 1.0
            return h

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ModuleList(self.Part() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()  # the caller's would be changed
        x.add_(1.0)
        h = self.first(x)
        a, b = h[..., : WIDTH // 2].clone(), h[..., WIDTH // 2 :]
        for index, part in enumerate(self.parts):
            a = part(a)
            if index == 1:
                b = b * 2
                view = b[..., 0]
                view.add_(a[..., 0])
        return self.last(torch.cat([torch.tanh(a), b], -1))


class LeavesBehind(nn.Module):
    """A layer leaves an auxiliary loss on an attribute, another in a list of its parent."""

    class Part(nn.Module):
        def __init__(self, sink: list[torch.Tensor]) -> None:
            super().__init__()
            self.linear, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
            self.aux: torch.Tensor | None = None
            self.sink = sink

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.aux = self.gate(x).softmax(-1).mean((1, 2))
            return torch.tanh(self.linear(x))

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self.Part([]) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for part in self.parts:
            x = part(x)
        return x, sum(part.aux for part in self.parts)  # type: ignore[return-value]


class Escapes(nn.Module):
    """A tensor made inside a block reaches the root through a shared list."""

    class Part(nn.Module):
        def __init__(self, sink: list[torch.Tensor]) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
            self.sink = sink

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.up(x))
            self.sink.append(h.mean((1, 2)))
            return self.down(h)

    def __init__(self) -> None:
        super().__init__()
        self.sink: list[torch.Tensor] = []
        self.parts = nn.ModuleList(self.Part(self.sink) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.sink.clear()
        for part in self.parts:
            x = part(x)
        return x, torch.stack(self.sink, 1)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step: float) -> torch.Tensor:
        return torch.round(x / step) * step

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * 0.5, None


class CustomFunction(nn.Module):
    """A custom autograd function, no_grad and autocast in the glue; a buffer two layers use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.table = torch.linspace(0, 1, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = Straight.apply(self.layers[0](x), 0.25) * self.scale
        with torch.no_grad():
            norm = self.layers[1](x).abs().amax(-1, keepdim=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.layers[2](x)
        y = y.float() / (norm + 1.0) * self.gain + self.table
        top, where = torch.topk(self.layers[3](y), 4, dim=-1)
        return torch.gather(y, -1, where) * top * self.scale[:4]


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 5))


def gpt2() -> nn.Module:
    transformers = _transformers()
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=WIDTH, n_layer=3, n_head=4, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool = False) -> nn.Module:
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def _transformers() -> Any:
    import pytest

    return pytest.importorskip("transformers")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(num_samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (num_samples, TIME), generator=generator(seed))


def vectors(num_samples: int, seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(num_samples, *(shape or (TIME, WIDTH)), generator=generator(seed))


def token_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def square_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    if isinstance(output, dict):
        pooled = output["pooled"][0].pow(2).mean() + output["pooled"][1][0].mean()
        return ((output["out"].hidden - targets) ** 2).mean() + pooled
    if isinstance(output, tuple):
        return output[0].pow(2).mean() + 0.1 * output[1].pow(2).sum()
    return output.pow(2).mean() if targets is None else ((output - targets) ** 2).mean()


def own_loss(output: Any, targets: Any) -> torch.Tensor:
    return output["loss"]


@dataclass
class Case:
    """A model, its batch, its loss; whether it has tied weights."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[tuple[Any, ...], dict[str, Any], Any]]
    loss: Callable[[Any, Any], torch.Tensor]
    tied: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"output_loss": True} if self.loss is own_loss else {"loss": self.loss}


def tokens(n: int) -> Any:
    return (ids(n),), {}, ids(n, 1)


def labelled(n: int) -> Any:
    return (ids(n),), {"labels": ids(n, 1)}, None


def masked(n: int) -> Any:
    mask = torch.ones(n, TIME, dtype=torch.long)
    mask[:, TIME - 3 :] = 0
    kwargs = {"input_ids": ids(n), "attention_mask": mask, "labels": ids(n, 1)}
    return (), kwargs, None


def regression(n: int) -> Any:
    return (vectors(n),), {}, vectors(n, 1)


def unsupervised(n: int) -> Any:
    return (vectors(n),), {}, None


CASES = {
    "gpt": Case(GPT, tokens, token_loss, tied=True),
    "gpt_untied": Case(lambda: GPT(tied=False), tokens, token_loss),
    "glue_head": Case(GlueHead, labelled, own_loss, tied=True),
    "mlp": Case(mlp, lambda n: ((vectors(n),), {}, vectors(n, 1, TIME, 5)), square_loss),
    "long_skip": Case(LongSkip, lambda n: ((vectors(n, 0, WIDTH),), {}, None), square_loss),
    "tied_linears": Case(TiedLinears, regression, square_loss, tied=True),
    "frozen": Case(Frozen, tokens, token_loss),
    "nested": Case(Nested, lambda n: ((vectors(n),), {"scale": 0.9}, vectors(n, 1)), square_loss),
    "in_place": Case(InPlace, regression, square_loss),
    "leaves_behind": Case(LeavesBehind, unsupervised, square_loss),
    "escapes": Case(Escapes, unsupervised, square_loss),
    "custom_function": Case(CustomFunction, unsupervised, square_loss),
    "gpt2": Case(gpt2, tokens, token_loss, tied=True),
    "gpt2_labels": Case(gpt2, masked, own_loss, tied=True),
    "llama": Case(llama, tokens, token_loss),
    "llama_labels": Case(llama, masked, own_loss),
    "llama_tied": Case(lambda: llama(tied=True), labelled, own_loss, tied=True),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].build().train()
