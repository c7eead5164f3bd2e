"""What the forward and the loss read from outside of the model is read in every step."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import itertools
import os
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony

from .conftest import VirtualGPUs

SCALE = 1.0
TABLE = {"kl": 0.0}
COUNTER = itertools.count(1)


@dataclass
class Settings:
    scale: float = 1.0
    inner: dict[str, Any] = field(default_factory=dict)


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Block(nn.Module):
    """A layer whose scale comes from somewhere."""

    shared = 1.0

    def __init__(self, scale: Callable[[Block], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.own = 1.0
        self.mask = torch.ones(8)
        self.settings, self.slotted = Settings(), Slotted()
        self.deep = types.SimpleNamespace(a=types.SimpleNamespace(b=Settings(inner={"c": [1.0]})))
        self.by_default: Any = collections.defaultdict(lambda: 1.0)
        self.array = np.ones(8, dtype=np.float32)
        self.scale = scale

    @property
    def computed(self) -> float:
        return SCALE * 2

    def helped(self, x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
        return x * by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) * self.scale(self)


class Net(nn.Module):
    def __init__(self, scale: Callable[[Block], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(scale) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.blocks[0].scale(self.blocks[0]))


def everywhere(change: Callable[[Block, float], object]) -> Callable[[Net, float], None]:
    def apply(net: Net, value: float) -> None:
        for block in net.blocks:
            change(block, value)

    return apply


def set_global(_: Net, value: float) -> None:
    global SCALE
    SCALE = value


def set_class(_: Net, value: float) -> None:
    Block.shared = value


def set_environment(_: Net, value: float) -> None:
    os.environ["HARMONY_TEST_SCALE"] = str(value)


def set_default(_: Net, value: float) -> None:
    Block.helped.__defaults__ = (value,)


def replace_forward(net: Net, value: float) -> None:
    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * value

    for block in net.blocks:
        block.forward = types.MethodType(forward, block)  # type: ignore[method-assign]


def in_place(block: Block, value: float) -> None:
    block.mask.fill_(value)


def unseen(block: Block, value: float) -> None:
    block.mask.numpy()[3] = value


TRACED = ("trace", "real-run trace")
MADE_ANEW = ("forward", "tensor replaced")
"""Another object in every step, which is another value even if it is equal."""


def closure() -> tuple[Callable[[Block], Any], Callable[[Net, float], None]]:
    held = 1.0

    def put(_: Net, value: float) -> None:
        nonlocal held
        held = value

    return lambda _: held, put


def read_environment(_: Block) -> float:
    return float(os.environ.get("HARMONY_TEST_SCALE", "1.0"))


def looked_up(name: str) -> Any:
    return globals()[name]


READ: dict[str, tuple[Callable[[Block], Any], Callable[[Net, float], None]]] = {
    "own attribute": (lambda b: b.own, everywhere(lambda b, v: setattr(b, "own", v))),
    "global": (lambda _: SCALE, set_global),
    "global by a text": (lambda _: looked_up("SCALE"), set_global),
    "property": (lambda b: b.computed, set_global),
    "class attribute": (lambda b: b.shared, set_class),
    "environment": (read_environment, set_environment),
    "closure": closure(),
    "dataclass": (
        lambda b: b.settings.scale,
        everywhere(lambda b, v: setattr(b.settings, "scale", v)),
    ),
    "slots": (
        lambda b: b.slotted.scale,
        everywhere(lambda b, v: setattr(b.slotted, "scale", v)),
    ),
    "deep": (
        lambda b: b.deep.a.b.inner["c"][0],
        everywhere(lambda b, v: b.deep.a.b.inner["c"].__setitem__(0, v)),
    ),
    "default dict": (
        lambda b: b.by_default["x"],
        everywhere(lambda b, v: b.by_default.__setitem__("x", v)),
    ),
    "by name": (lambda b: getattr(b, "o" + "wn"), everywhere(lambda b, v: setattr(b, "own", v))),
    "tensor replaced": (
        lambda b: b.mask.to(b.linear.weight.device),
        everywhere(lambda b, v: setattr(b, "mask", torch.full((8,), v))),
    ),
    "tensor in place": (lambda b: b.mask.to(b.linear.weight.device), everywhere(in_place)),
    "tensor behind its back": (
        lambda b: b.mask.to(b.linear.weight.device),
        everywhere(unseen),
    ),
    "array": (
        lambda b: float(b.array.sum()),
        everywhere(lambda b, v: b.array.__setitem__(2, v)),
    ),
    "defaults": (lambda b: float(b.helped(torch.ones(()))), set_default),
    "forward": (lambda _: 1.0, replace_forward),
}


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    yield
    set_global(None, 1.0)  # type: ignore[arg-type]
    set_class(None, 1.0)  # type: ignore[arg-type]
    set_default(None, 1.0)  # type: ignore[arg-type]
    os.environ.pop("HARMONY_TEST_SCALE", None)
    TABLE.update(kl=0.0)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(step)
    return torch.randn(8, 8), torch.randint(0, 4, (8,))


def trained(net: nn.Module, loss: Any, **options: Any) -> Any:
    return harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=loss,
        microbatch_size=8,
        updates="host",
        devices=2,
        mode="pp",
        **options,
    )


def wrapped(net: nn.Module) -> Any:
    return harmony.Harmony(net, microbatch_size=8, devices=2, mode="pp")


def gradients(net: nn.Module) -> dict[str, Any]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def check_step(model: Any, net: nn.Module, loss: Any, step: int, dropin: bool) -> None:
    """One step of Harmony's beside one of plain PyTorch from the same parameters."""
    plain, (x, y) = copy.deepcopy(net), batch(step)
    plain.zero_grad()
    wanted = loss(plain(x), y)
    wanted.backward()
    if dropin:
        net.zero_grad()
        found = loss(model(x), y)
        found.backward()
    else:
        found = model.train_step(x, y)
    assert torch.equal(found.detach(), wanted.detach()), (step, float(found), float(wanted))
    expected = gradients(plain)
    for name, gradient in gradients(net).items():
        assert (gradient is None) == (expected[name] is None), name
        assert gradient is None or torch.equal(gradient, expected[name]), (step, name)


DROPIN = ("global", "environment", "deep", "tensor in place", "forward")


@pytest.mark.parametrize(
    ("name", "dropin"), [*((name, False) for name in READ), *((name, True) for name in DROPIN)]
)
def test_what_the_forward_reads_is_as_it_is_now(
    name: str, dropin: bool, vgpus: VirtualGPUs
) -> None:
    read, change = READ[name]
    torch.manual_seed(0)
    net = Net(read)
    change(net, 1.0)
    model = wrapped(net) if dropin else trained(net, F.cross_entropy)
    # A value that returns is known again; one that goes on changing is not recorded for ever.
    values = (1.0, 1.0, 0.5, 1.0, 2.0) if name == "closure" else (1.0, 0.5, 1.0)
    for step, value in enumerate(values):
        if name != "forward" or value != 1.0:
            change(net, value)
        check_step(model, net, F.cross_entropy, step, dropin)
        assert model.capture_mode in TRACED or step == 4 or name in MADE_ANEW, step


class Criterion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_of_squares, self.calls = 0.0, 0
        self.classes = torch.ones(4)

    def forward(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        entropy = F.cross_entropy(output, targets, weight=self.classes)
        return entropy + self.weight_of_squares * output.pow(2).mean()


def with_table(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, targets) + TABLE["kl"] * output.pow(2).mean()


def weighted(output: torch.Tensor, targets: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return F.cross_entropy(output, targets) * factor


def annealed(criterion: Any, step: int) -> None:
    criterion.weight_of_squares = 0.1 * step
    criterion.classes[step % 4] = 0.5


LOSSES: dict[str, tuple[Callable[[], Any], Callable[[Any, int], object]]] = {
    "table": (lambda: with_table, lambda _, step: TABLE.update(kl=float(step))),
    "criterion": (Criterion, annealed),
    "partial": (
        lambda: functools.partial(weighted, factor=1.0),
        lambda loss, step: loss.keywords.update(factor=1.0 + step),
    ),
    "torch's own": (
        nn.CrossEntropyLoss,
        lambda loss, step: setattr(loss, "label_smoothing", 0.1 * step),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_run_in_every_step(name: str, vgpus: VirtualGPUs) -> None:
    make, change = LOSSES[name]
    loss = make()
    torch.manual_seed(0)
    net = Net(lambda _: 1.0)
    model = trained(net, loss)
    for step in range(5):
        change(loss, step)
        check_step(model, net, loss, step, dropin=False)
    assert model.capture_mode == "trace", "what the loss reads costs no new recording"
    assert len(list(model._engine.variants)) == 1


def test_the_loss_may_keep_books(vgpus: VirtualGPUs) -> None:
    """It is called once for each microbatch, on its values; recording leaves no trace."""
    seen: list[float] = []
    last: dict[str, Any] = {}

    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        value = F.cross_entropy(output, targets)
        seen.append(value.item())
        last["entropy"] = value.detach()
        return value

    torch.manual_seed(0)
    net = Net(lambda _: 1.0)
    plain = copy.deepcopy(net)
    model = trained(net, loss)
    for step in range(3):
        x, y = batch(step)
        model.train_step(x, y)
    found, seen[:] = list(seen), []
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        loss(plain(x), y).backward()
        optimizer.step()
    assert found == seen
    assert isinstance(last["entropy"], torch.Tensor)


@pytest.mark.parametrize("dropin", [False, True], ids=["step", "drop-in"])
def test_what_cannot_be_looked_at_runs_as_it_is(dropin: bool, vgpus: VirtualGPUs) -> None:
    counts = {"plain": itertools.count(1), "harmony": itertools.count(1)}
    which = ["plain"]

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x) / next(counts[which[0]]))

    torch.manual_seed(0)
    net = Counted()
    model = wrapped(net) if dropin else trained(net, F.cross_entropy)
    for step in range(3):
        plain, (x, y) = copy.deepcopy(net), batch(step)
        which[0] = "plain"
        wanted = F.cross_entropy(plain(x), y)
        which[0] = "harmony"
        found = F.cross_entropy(model(x), y) if dropin else model.train_step(x, y)
        assert torch.equal(found, wanted), step
    assert model.capture_mode == "eager"


COLLECTIONS = 0


def test_collections_of_garbage_are_no_part_of_a_forward(vgpus: VirtualGPUs) -> None:
    """A callback of the collector (Hypothesis has one) may run in any line of any forward."""

    def count(phase: str, info: Any) -> None:
        global COLLECTIONS
        COLLECTIONS += 1

    thresholds = gc.get_threshold()
    gc.callbacks.append(count)
    gc.set_threshold(50, 2, 2)
    try:
        model = harmony.Harmony(
            nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)),
            optimizer=torch.optim.SGD,
            optimizer_kwargs={"lr": 0.1},
            loss_fn=nn.functional.mse_loss,
            devices=1,
        )
        x = torch.randn(8, 24)
        for _ in range(2):
            model.train_step(x, x)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(count)
    assert COLLECTIONS and model.capture_mode == "trace"
