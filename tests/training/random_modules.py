"""Random modules for property tests: each is a chain of parts that do what real models do.

A recipe is a tuple of ``(part, number)``. `Net` reads it in its forward, as a configuration; the
number says which earlier value, layer or variant a part refers to, modulo how many there are. So
any recipe makes sense, and hypothesis may shorten it at will.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8

Recipe = tuple[tuple[str, int], ...]


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(x))))


class Average(nn.Module):
    """Adds a running mean, which it changes in place or replaces; it may be a cumulative one."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.linear, self.variant = nn.Linear(WIDTH, WIDTH), variant % 3
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.linear(x))
        now = x.detach().mean(0)
        if self.variant == 0:
            self.mean = self.mean * 0.9 + now * 0.1
        elif self.variant == 1:
            self.mean.mul_(0.9).add_(now, alpha=0.1)
        else:
            self.count += 1
            self.mean.add_((now - self.mean) / self.count)
        return x + self.mean


class Counts(nn.Module):
    """Scales by how often it was called, and by what Python draws."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x)) * (1.0 + random.random() / self.calls)


class Changes(nn.Module):
    """Changes its input in place before it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.7)
        return self.linear(x)


class Pair(nn.Module):
    """Returns two tensors, as a tuple or as a dictionary."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.linear, self.named = nn.Linear(WIDTH, 2 * WIDTH), bool(variant % 2)

    def forward(self, x: torch.Tensor) -> Any:
        value, gate = self.linear(x).chunk(2, -1)
        return {"value": value, "gate": gate} if self.named else (value, gate)


def _frozen() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH).requires_grad_(False)


MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda number: nn.Linear(WIDTH, WIDTH),
    "block": lambda number: Block(),
    "checkpoint": lambda number: Block(),
    "layer norm": lambda number: nn.LayerNorm(WIDTH),
    "batch norm": lambda number: nn.BatchNorm1d(WIDTH, momentum=(0.1, None)[number % 2]),
    "average": Average,
    "counts": lambda number: Counts(),
    "changes": lambda number: Changes(),
    "pair": Pair,
    "frozen": lambda number: _frozen(),
    "unused": lambda number: nn.Linear(WIDTH, WIDTH),
    "cat": lambda number: nn.Linear(2 * WIDTH, WIDTH),
}
"""Parts with parameters of their own; of the others the glue consists."""

CHANGING = {"batch norm", "average", "counts", "glue average"}
"""Parts that change buffers or attributes: not for data parallel plans."""

GLUE = (
    "save", "save view", "add", "gate", "same layer", "same weight", "tied layer", "scale",
    "dropout", "dropout in place", "noise", "relu in place", "scale in place", "add in place",
    "write rows", "halves", "turn", "detach", "no grad", "mask", "centre", "constant",
    "glue average", "places",
)  # fmt: skip


class Net(nn.Module):
    """What a recipe describes.

    Args:
        recipe: the parts in order.
        decides: whether the sign of the first input's sum decides how the forward ends.
    """

    level: torch.Tensor
    constant: torch.Tensor

    def __init__(self, recipe: Recipe, decides: bool = False) -> None:
        super().__init__()
        self.recipe, self.decides = recipe, decides
        self.parts = nn.ModuleList(
            MAKERS[name](number) if name in MAKERS else nn.Identity() for name, number in recipe
        )
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.places = nn.Embedding(WIDTH, 1)
        self.register_buffer("level", torch.ones(WIDTH))
        self.register_buffer("constant", torch.linspace(0.9, 1.1, WIDTH))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.other_head = nn.Linear(WIDTH, WIDTH) if decides else None
        linears = [m for m in self.parts if type(m) is nn.Linear and m.in_features == WIDTH]
        for part, (name, number) in enumerate(recipe):
            if name == "tied layer":
                self.parts[part] = nn.Linear(WIDTH, WIDTH)
                if linears:
                    self.parts[part].weight = linears[number % len(linears)].weight

    def tied_names(self) -> set[str]:
        """Names of the parameters that more than one step of the forward may use."""
        names = [name for name, _ in self.recipe]
        tied = {name for name in ("scale", "places.weight") if names.count(name.split(".")[0]) > 1}
        if {"same layer", "same weight", "tied layer"} & {*names}:
            weights = {f"parts.{part}" for part, name in enumerate(names) if name == "linear"}
            weights |= {f"parts.{part}" for part, name in enumerate(names) if name == "tied layer"}
            tied |= {f"{part}.{own}" for part in weights for own in ("weight", "bias")}
        return tied

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        first = bool(inputs.sum() > 0) if self.decides else True
        run = _Forward(self, inputs)
        for (name, number), part in zip(self.recipe, self.parts, strict=True):
            getattr(run, name.replace(" ", "_"))(part, number)
        head = self.head if first or self.other_head is None else self.other_head
        return head(run.x)


class _Forward:
    """One forward of a net: the value so far, and those that later parts may read."""

    def __init__(self, net: Net, inputs: torch.Tensor) -> None:
        self.net, self.x = net, inputs * 1.0
        self.mask_of_inputs = inputs > 1.0
        self.saved = [inputs]
        self.layers: list[nn.Linear] = []

    def _saved(self, number: int) -> torch.Tensor:
        return self.saved[number % len(self.saved)]

    # Parts with parameters

    def linear(self, part: nn.Module, number: int) -> None:
        assert isinstance(part, nn.Linear)
        self.layers.append(part)
        self.x = torch.tanh(part(self.x))

    def block(self, part: nn.Module, number: int) -> None:
        self.x = part(self.x)

    layer_norm = batch_norm = average = counts = changes = block

    def frozen(self, part: nn.Module, number: int) -> None:
        self.x = self.x + torch.tanh(part(self.x))

    def checkpoint(self, part: nn.Module, number: int) -> None:
        self.x = checkpoint(part, self.x, use_reentrant=False)

    def pair(self, part: nn.Module, number: int) -> None:
        made = part(self.x)
        value, gate = (made["value"], made["gate"]) if isinstance(made, dict) else made
        self.saved.append(gate)
        self.x = value if number % 3 == 0 else value * torch.sigmoid(gate)

    def unused(self, part: nn.Module, number: int) -> None:
        pass

    def cat(self, part: nn.Module, number: int) -> None:
        self.x = part(torch.cat([self.x, self._saved(number)], -1))

    def tied_layer(self, part: nn.Module, number: int) -> None:
        self.x = self.x + part(self.x)

    # The glue

    def save(self, part: nn.Module, number: int) -> None:
        self.saved.append(self.x)

    def save_view(self, part: nn.Module, number: int) -> None:
        self.saved.append(self.x.view(-1, 2, WIDTH // 2).view(-1, WIDTH))

    def add(self, part: nn.Module, number: int) -> None:
        self.x = self.x + self._saved(number)

    def gate(self, part: nn.Module, number: int) -> None:
        self.x = self.x * torch.sigmoid(self._saved(number))

    def same_layer(self, part: nn.Module, number: int) -> None:
        if self.layers:
            self.x = torch.tanh(self.layers[number % len(self.layers)](self.x))

    def same_weight(self, part: nn.Module, number: int) -> None:
        if self.layers:
            self.x = F.linear(self.x, self.layers[number % len(self.layers)].weight)

    def scale(self, part: nn.Module, number: int) -> None:
        self.x = self.x * self.net.scale

    def dropout(self, part: nn.Module, number: int) -> None:
        self.x = F.dropout(self.x, 0.1, self.net.training)

    def dropout_in_place(self, part: nn.Module, number: int) -> None:
        self.x = F.dropout(self.x, 0.1, self.net.training, inplace=True)

    def noise(self, part: nn.Module, number: int) -> None:
        self.x = self.x + 0.1 * torch.randn_like(self.x)

    def relu_in_place(self, part: nn.Module, number: int) -> None:
        self.x = F.relu(self.x, inplace=True)

    def scale_in_place(self, part: nn.Module, number: int) -> None:
        self.x.mul_(0.9)

    def add_in_place(self, part: nn.Module, number: int) -> None:
        self.x += self._saved(number)

    def write_rows(self, part: nn.Module, number: int) -> None:
        self.x[:, : 1 + number % 3] = 0.5

    def halves(self, part: nn.Module, number: int) -> None:
        one, two = self.x.chunk(2, -1)
        self.saved.append(torch.cat([one, one], -1))
        self.x = torch.cat([two, one * 2], -1)

    def turn(self, part: nn.Module, number: int) -> None:
        self.x = self.x.view(-1, 2, WIDTH // 2).transpose(1, 2).reshape(-1, WIDTH)

    def detach(self, part: nn.Module, number: int) -> None:
        self.x = self.x + torch.tanh(self._saved(number)).detach()

    def no_grad(self, part: nn.Module, number: int) -> None:
        with torch.no_grad():
            largest = self.x.abs().amax(-1, keepdim=True)
        self.x = self.x / (largest + 1.0)

    def mask(self, part: nn.Module, number: int) -> None:
        self.x = self.x.masked_fill(self.mask_of_inputs, 0.1)

    def centre(self, part: nn.Module, number: int) -> None:
        self.x = self.x - 0.5 * self.x.mean(0)

    def constant(self, part: nn.Module, number: int) -> None:
        self.x = self.x * self.net.constant

    def glue_average(self, part: nn.Module, number: int) -> None:
        now = self.x.detach().abs().mean(0)
        if number % 2:
            self.net.level = 0.5 * self.net.level + 0.5 * now
        else:
            self.net.level.lerp_(now, 0.5)
        self.x = self.x / (1.0 + self.net.level)

    def places(self, part: nn.Module, number: int) -> None:
        where = torch.arange(WIDTH, device=self.x.device)
        self.x = self.x + self.net.places(where).flatten()


def recipes(max_parts: int = 9) -> st.SearchStrategy[Recipe]:
    """Recipes of one part or more; as many parts with parameters as without."""
    with_params = st.sampled_from(["linear", "block", *MAKERS])
    part = st.tuples(st.one_of(with_params, st.sampled_from(GLUE)), st.integers(0, 5))
    return st.lists(part, min_size=1, max_size=max_parts).map(tuple)
