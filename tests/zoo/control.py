"""Odd control flow and odd outputs: decisions by values and by random numbers, structures."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.data import WIDTH, normal, square_loss, vector_batch
from tests.zoo.entry import Entry


class Feed(nn.Module):
    """A pre-norm feed-forward block with dropout."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Chain(nn.Module):
    """A stem, blocks and a head, for the classes below."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Feed() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class BranchOnInput(Chain):
    """Which blocks run depends on the input of the model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        swapped = bool(x.mean() > 0)
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x = self.blocks[index ^ 1](x, 0.5) if swapped else block(x)
        return self.head(x)


class BranchOnValue(Chain):
    """Which block runs depends on what the blocks before it computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for index in range(0, len(self.blocks), 2):
            chosen = index if x.mean() > 0 else index + 1
            x = self.blocks[chosen](x)
        return self.head(x)


class Halting(Chain):
    """Goes on until the state is small enough: the number of calls depends on the values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        for _ in range(3):
            if float(x.detach().abs().mean()) < 0.75:
                break
            x = torch.tanh(self.blocks[0](x)) * 0.9
        return self.head(x)


class LayerDrop(Chain):
    """Skips blocks by a random number."""

    def __init__(self, draw: Callable[[], Any], depth: int = 5) -> None:
        super().__init__(depth)
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.training and self.draw() < 0.4:
                continue
            x = block(x)
        return self.head(x)


def draw_torch() -> torch.Tensor:
    return torch.rand([])


def draw_python() -> float:
    return random.random()


def draw_numpy() -> float:
    return float(np.random.uniform())


class Checkpointed(Chain):
    """Recomputes its blocks by itself, dropout included."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)  # type: ignore[no-untyped-call]
        return self.head(x)


class Autocast(Chain):
    """Blocks in bfloat16, head in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            x = self.stem(x)
            for index, block in enumerate(self.blocks):
                with torch.autocast(x.device.type, enabled=index != 2):
                    x = block(x if index != 2 else x.float())
        return self.head(x.float())


class Counting(Chain):
    """Python counters that the forward reads and writes; a warm-up scale follows from them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.history: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.history.append(self.calls)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, min(1.0, 0.25 * self.calls))
        return self.head(x)


@dataclass
class Encoded:
    hidden: torch.Tensor
    extra: dict[str, Any]


class Split(NamedTuple):
    main: torch.Tensor
    rest: tuple[torch.Tensor, ...]


class Structured(Chain):
    """Dictionaries, dataclasses and named tuples, with None and numbers among the tensors."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = self.stem(x)
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        encoded = Encoded(self.head(x), {"last": hidden[-1], "none": None, "count": len(hidden)})
        return {"encoded": encoded, "split": Split(hidden[0], tuple(hidden[1:3])), "scale": 0.1}


def structured_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    encoded, split = output["encoded"], output["split"]
    extra = sum(part.pow(2).mean() for part in (*split.rest, split.main))
    loss = square_loss(encoded.hidden, targets) + output["scale"] * extra
    return loss + encoded.extra["last"].mean() / encoded.extra["count"]


class Gated(nn.Module):
    """A block that leaves a balance loss on an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.feed, self.gate = Feed(), nn.Linear(WIDTH, 4)
        self.balance: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.balance = self.gate(x).softmax(-1).mean((0, 1)).pow(2).sum()
        return self.feed(x)


class LeftOnAttributes(Chain):
    """Losses left on attributes of the blocks are added up by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = super().forward(x)
        return y, sum(block.balance for block in self.blocks)  # type: ignore[misc,return-value]


def added_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    return square_loss(output[0], targets) + 0.1 * output[1]


class Optional(Chain):
    """Keyword arguments that are None, strings and numbers; a mask without a batch dimension."""

    def forward(
        self,
        x: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        mode: str = "plain",
        scale: float = 1.0,
        sizes: tuple[int, ...] = (),
    ) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks[: len(self.blocks) - len(sizes)]:
            x = block(x, scale if mode == "scaled" else 1.0)
        return self.head(x if mask is None else x * mask)


def optional_batch(num_samples: int, seed: int) -> Any:
    inputs, targets = vector_batch(num_samples, seed)
    mask = (normal(1, 7, WIDTH) > 0).float()
    return {"x": inputs, "mask": mask, "mode": "scaled", "scale": 0.5}, targets


FAMILY = "control flow and structures (our own code)"

ENTRIES = (
    Entry(
        "branch_on_input",
        FAMILY,
        "an `if` on the input",
        BranchOnInput,
        vector_batch,
        square_loss,
        num_samples=6,
    ),
    Entry(
        "branch_on_value",
        FAMILY,
        "an `if` on what a block computed",
        BranchOnValue,
        vector_batch,
        square_loss,
        num_samples=6,
    ),
    Entry(
        "halting",
        FAMILY,
        "a loop whose length depends on values",
        Halting,
        vector_batch,
        square_loss,
        num_samples=6,
    ),
    Entry(
        "layerdrop_torch",
        FAMILY,
        "blocks skipped by `torch.rand`",
        lambda: LayerDrop(draw_torch),
        vector_batch,
        square_loss,
    ),
    Entry(
        "layerdrop_python",
        FAMILY,
        "blocks skipped by `random.random`",
        lambda: LayerDrop(draw_python),
        vector_batch,
        square_loss,
    ),
    Entry(
        "layerdrop_numpy",
        FAMILY,
        "blocks skipped by `numpy.random`",
        lambda: LayerDrop(draw_numpy),
        vector_batch,
        square_loss,
    ),
    Entry(
        "checkpoint",
        FAMILY,
        "`torch.utils.checkpoint` inside the model",
        Checkpointed,
        vector_batch,
        square_loss,
    ),
    Entry(
        "autocast",
        FAMILY,
        "bfloat16 inside the model, nested",
        Autocast,
        vector_batch,
        square_loss,
    ),
    Entry(
        "counters",
        FAMILY,
        "Python counters that the forward reads and writes",
        Counting,
        vector_batch,
        square_loss,
    ),
    Entry(
        "structured",
        FAMILY,
        "dict, dataclass and named tuple outputs",
        Structured,
        vector_batch,
        structured_loss,
    ),
    Entry(
        "auxiliary_losses",
        FAMILY,
        "losses left on attributes",
        LeftOnAttributes,
        vector_batch,
        added_loss,
    ),
    Entry(
        "optional_inputs",
        FAMILY,
        "None, strings, numbers, a mask that is not batched",
        Optional,
        optional_batch,
        square_loss,
    ),
)
