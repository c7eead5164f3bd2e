"""State and sharing: buffers that change, tied and frozen weights, in-place operations, skips."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.control import Chain, Feed
from tests.zoo.data import TIME, VOCAB, WIDTH, square_loss, token_batch, token_loss, vector_batch
from tests.zoo.entry import TIED, Entry


class MovingAverage(nn.Module):
    """Buffers that change in the forward and enter the output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(torch.tanh(self.linear(x)))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(y.mean((0, 1)), alpha=0.1)
            self.count += 1
            self.scratch = y.amax((0, 1))
        return x + y - self.mean / self.count


class EMA(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MovingAverage() for _ in range(4))


class Codebook(nn.Module):
    """A codebook that follows the data by moving averages (VQ-VAE; van den Oord et al., 2017)."""

    def __init__(self, size: int = 8, width: int = WIDTH) -> None:
        super().__init__()
        codes = torch.randn(size, width)
        self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", codes.clone())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        nearest = torch.cdist(flat, self.codes).argmin(1)
        if self.training:
            with torch.no_grad():
                hits = F.one_hot(nearest, len(self.codes)).to(flat.dtype)
                self.counts.mul_(0.9).add_(hits.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(hits.t() @ flat, alpha=0.1)
                self.codes.copy_(self.sums / self.counts.clamp(min=1e-3)[:, None])
        chosen = self.codes[nearest].view_as(x)
        return x + (chosen - x).detach(), F.mse_loss(x, chosen)


class VectorQuantised(nn.Module):
    """Encoder, codebook, decoder; straight-through gradients, commitment loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), Feed(), Feed())
        self.codebook = Codebook()
        self.decoder = nn.Sequential(Feed(), Feed(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, commitment = self.codebook(self.encoder(x))
        decoded = self.decoder(codes)
        return {"loss": square_loss(decoded, x) + 0.25 * commitment, "decoded": decoded}


def own_batch(num_samples: int, seed: int) -> Any:
    return vector_batch(num_samples, seed)[0], None


class TiedFar(nn.Module):
    """The embedding is read by the first layer, by one in the middle, and by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.blocks = nn.ModuleList(Feed() for _ in range(4))
        self.blocks[3].up.weight = self.blocks[0].up.weight
        self.probe = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.probe.weight = self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks[:2]:
            x = block(x)
        x = x + self.probe(x).softmax(-1) @ self.embed.weight
        for block in self.blocks[2:]:
            x = block(x)
        return self.head(x)


class Shared(nn.Module):
    """One block called three times, others between the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Feed()
        self.between = nn.ModuleList(Feed() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.between:
            x = block(self.shared(x))
        return self.head(x)


class Adapter(nn.Module):
    """A frozen linear layer with a trainable one of low rank beside it (LoRA; Hu et al., 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(self.drop(x)))


class LoRA(nn.Module):
    """A frozen embedding and two frozen blocks, then frozen blocks with trainable adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Feed() for _ in range(5))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.requires_grad_(False)
        for block in self.blocks[2:]:
            block.up = Adapter(block.up)
        self.head.bias.requires_grad_(True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Unused(Chain):
    """Parameters that no forward reads, or whose result no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(3, 3)
        self.ignored = nn.Linear(WIDTH, WIDTH)
        self.alone = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = super().forward(x)
        return y, self.ignored(y.detach())


class Changing(nn.Module):
    """Changes its input in place, and a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH // 2, WIDTH // 2), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(1.5)
        x[:, 1:].add_(0.25)
        y = self.drop(self.linear(x))
        y += 1.0
        return y


class InPlace(nn.Module):
    """In-place operations on boundary values, through views and by index."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ModuleList(Changing() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        a, b = h[..., : WIDTH // 2].clone(), h[..., WIDTH // 2 :]
        for index, part in enumerate(self.parts):
            a = part(a)
            if index == 1:
                b = b * 2
                b[..., 0] = a[..., 0]
        return self.last(torch.cat([torch.tanh(a), b], -1))


class Straight(torch.autograd.Function):
    """Rounds; hands half of the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step: float) -> torch.Tensor:
        return torch.round(x / step) * step

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * 0.5, None


class Quantised(Feed):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return Straight.apply(super().forward(x, scale), 0.125)  # type: ignore[no-any-return,no-untyped-call]


class CustomFunction(Chain):
    """A custom `autograd.Function` in the blocks and between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Quantised() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = Straight.apply(self.stem(x), 0.25)  # type: ignore[no-untyped-call]
        for block in self.blocks:
            x = Straight.apply(block(x), 0.0625)  # type: ignore[no-untyped-call]
        return self.head(x)


class Skips(nn.Module):
    """Every block reads what all earlier blocks made, weighted by parameters of its own."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Feed() for _ in range(depth))
        self.weights = nn.ParameterList(torch.randn(index + 1) for index in range(depth))
        self.places = nn.Parameter(torch.randn(TIME, WIDTH) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [self.stem(x) + self.places]
        for block, weights in zip(self.blocks, self.weights, strict=True):
            mixed = sum(w * y for w, y in zip(weights.softmax(0), made, strict=True))
            made.append(block(mixed))
        return self.head(made[-1] * torch.sigmoid(made[1]) + made[0] + x)


class Table(Chain):
    """Hands views of a buffer and of a parameter from the first layer to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 2 * TIME * WIDTH).view(-1, WIDTH))
        self.gains = nn.Parameter(torch.randn(3, WIDTH) * 0.1)
        self.start = Slices()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places, gain = self.start(self.table, self.gains, x.shape[1])
        x = self.stem(x + places)
        for block in self.blocks:
            x = block(x) + places
        return self.head(x * gain + places)


class Slices(nn.Module):
    """Returns views of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, table: torch.Tensor, gains: torch.Tensor, time: int) -> Any:
        return table[:time], gains[1] * self.scale


def first_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    return square_loss(output[0], targets)


FAMILY = "state and sharing (our own code)"

ENTRIES = (
    Entry(
        "ema_buffers",
        FAMILY,
        "buffers changed in the forward and used in the output",
        EMA,
        vector_batch,
        square_loss,
        num_samples=6,
    ),
    Entry(
        "vq_codebook",
        FAMILY,
        "a codebook that follows the data",
        VectorQuantised,
        own_batch,
        num_samples=6,
    ),
    Entry(
        "tied_far",
        FAMILY,
        "one weight read in three places, another in two",
        TiedFar,
        token_batch,
        token_loss,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry(
        "shared_block",
        FAMILY,
        "one block called three times",
        Shared,
        vector_batch,
        square_loss,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry("lora", FAMILY, "frozen weights with trainable adapters", LoRA, token_batch, token_loss),
    Entry("unused", FAMILY, "parameters that nothing uses", Unused, vector_batch, first_loss),
    Entry(
        "in_place",
        FAMILY,
        "in-place operations on boundary values and views",
        InPlace,
        vector_batch,
        square_loss,
    ),
    Entry(
        "custom_function",
        FAMILY,
        "a custom `autograd.Function`",
        CustomFunction,
        vector_batch,
        square_loss,
    ),
    Entry(
        "views_of_state",
        FAMILY,
        "a view of a buffer that far layers read",
        Table,
        vector_batch,
        square_loss,
    ),
    Entry(
        "dense_skips",
        FAMILY,
        "every block reads all earlier ones",
        Skips,
        vector_batch,
        square_loss,
        num_samples=5,
    ),
)
