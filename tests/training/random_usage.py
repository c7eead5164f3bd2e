"""Random ways to use a model: what people do between and around training steps, in any order.

A usage is a tuple of ``(operation, number)``: `Usage` does each to a Harmony model and to a plain
twin that accumulates the same microbatches, and compares them after every step. The number says
which layer, value or size an operation takes, modulo how many there are, so that any usage makes
sense and hypothesis may shorten it at will.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import harmony

WIDTH = 8
LENGTHS = (3, 5, 4)
SIZES = (8, 4, 6)
OUTSIDE = {"weight": 0.0, "temperature": 1.0}
"""What the loss reads from outside."""

Steps = tuple[tuple[str, int], ...]


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


class Net(nn.Module):
    """Reads buffers, attributes and a plain tensor that its user changes, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))
        self.register_buffer("seen", torch.zeros(()))
        self.gain = 1.0
        self.table = torch.zeros(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        h = self.embed(x) * self.scale + self.table.to(x.device)
        for block in self.blocks:
            h = block(h) * self.gain
        out: torch.Tensor = self.head(h)
        return out


def loss_fn(out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A mean whose terms are weighted from outside."""
    missed = ((out / OUTSIDE["temperature"] - targets) ** 2).mean()
    return missed + OUTSIDE["weight"] * out.pow(2).mean()


class SGD(torch.optim.SGD):
    """Interrupts the program in the middle of a step, if asked for."""

    armed = False

    def step(self, closure: Any = None) -> Any:
        """Step; the signal comes before the first parameter changes."""
        if SGD.armed:
            SGD.armed = False
            signal.raise_signal(signal.SIGINT)
        return super().step(closure)


OPTIONS = {"lr": 0.05, "momentum": 0.9, "foreach": False}


@dataclass(frozen=True)
class Way:
    """How a model is made.

    Attributes:
        form: ``"step"`` or ``"dropin"``.
        size: samples of a microbatch.
        updates: as `harmony.Harmony` takes it.
    """

    form: str = "step"
    size: int = 4
    num_devices: int = 1
    updates: str = "host"


class Plain:
    """The reference: accumulates the microbatches' gradients, then steps."""

    def __init__(self, net: Net, size: int) -> None:
        self.net = net
        self.size = size
        self.num_steps = 0
        self.optimizer = SGD(net.parameters(), **OPTIONS)  # type: ignore[arg-type]

    def _parts(self, inputs: torch.Tensor) -> Iterator[tuple[int, int, int]]:
        for index, low in enumerate(range(0, len(inputs), self.size)):
            yield index, low, min(low + self.size, len(inputs))

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One step as `train_step` stands for it."""
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for index, low, high in self._parts(inputs):
            harmony.seed_microbatch(self.num_steps, index)
            loss = loss_fn(self.net(inputs[low:high].clone()), targets[low:high].clone())
            weight = (high - low) / len(inputs)
            (loss * weight).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach() * weight
        self.optimizer.step()
        self.num_steps += 1
        return total

    def loop(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One step of a loop of one's own: the loss is of the whole batch."""
        self.optimizer.zero_grad()
        outs = []
        for index, low, high in self._parts(inputs):
            harmony.seed_microbatch(self.num_steps, index)
            outs.append(self.net(inputs[low:high].clone()))
        joined = torch.cat([out.detach() for out in outs]).requires_grad_()
        loss = loss_fn(joined, targets)
        (gradient,) = torch.autograd.grad(loss, joined)
        for (_, low, high), out in zip(self._parts(inputs), outs, strict=True):
            out.backward(gradient[low:high])
        self.optimizer.step()
        self.num_steps += 1
        return loss.detach()

    def infer(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs in eval mode."""
        self.net.eval()
        with torch.no_grad():
            outs = [self.net(inputs[low:high].clone()) for _, low, high in self._parts(inputs)]
        self.net.train()
        return torch.cat(outs)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds."""
        return {
            "net": copy.deepcopy(self.net.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "num_steps": self.num_steps,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.num_steps = state["num_steps"]


class Usage:
    """A model and its plain twin, to which the same is done."""

    def __init__(self, way: Way) -> None:
        OUTSIDE.update(weight=0.0, temperature=1.0)
        SGD.armed = False
        torch.manual_seed(0)
        net = Net()
        self.way = way
        self.plain = Plain(copy.deepcopy(net), way.size)
        self.net = net
        step: dict[str, Any] = {"optimizer": SGD, "optimizer_kwargs": OPTIONS, "loss_fn": loss_fn}
        self.model = harmony.Harmony(
            net,
            microbatch_size=way.size,
            mode="pp",
            devices=way.num_devices,
            updates=way.updates,
            seed=0,
            **(step if way.form == "step" else {}),
        )
        own = self.model.optimizer
        self.optimizer = SGD(net.parameters(), **OPTIONS) if own is None else own  # type: ignore
        self.saved: tuple[dict[str, Any], dict[str, Any]] | None = None
        self.hooks: list[tuple[Any, Any]] = []
        self.length, self.num_samples, self.batches = LENGTHS[0], SIZES[0], 0

    def run(self, steps: Steps) -> None:
        """Do it all, and compare after each operation."""
        for operation, number in steps:
            getattr(self, operation)(number)
            self._compare(operation)
        self.step(0)
        self._compare("a last step")

    # Steps

    def step(self, _: int) -> None:
        """Train on a batch."""
        inputs, targets = self._batch()
        if self.way.form == "dropin":
            self.loop(0)
            return
        wanted = self.plain.step(inputs, targets)
        loss = self.model.train_step(inputs.clone(), targets.clone())
        assert same_bits(loss, wanted), f"loss {loss} instead of {wanted}"

    def loop(self, _: int) -> None:
        """Train on a batch in a loop of one's own, with the same optimizer."""
        inputs, targets = self._batch()
        wanted = self.plain.loop(inputs, targets)
        self.optimizer.zero_grad()
        loss = loss_fn(self.model(inputs.clone()), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        assert same_bits(loss.detach(), wanted), f"loss {loss} instead of {wanted}"

    def infer(self, _: int) -> None:
        """Look at outputs in eval mode."""
        inputs, _targets = self._batch()
        wanted = self.plain.infer(inputs)
        self.model.eval()
        with torch.no_grad():
            found = self.model(inputs.clone())
        self.model.train()
        assert same_bits(found, wanted), f"outputs differ by {(found - wanted).abs().max()}"

    def interrupt(self, _: int) -> None:
        """Press Ctrl-C in the middle of a step: it is of one step then, or says that it is not."""
        if self.way.form == "dropin":
            return
        inputs, targets = self._batch()
        before = self.plain.state()
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            SGD.armed = True
            self.model.train_step(inputs.clone(), targets.clone())
        except KeyboardInterrupt:
            pass
        finally:
            SGD.armed = False
            signal.signal(signal.SIGINT, handler)
        if not self._is_at(self.plain):
            self.plain.step(inputs, targets)
        if not self._is_at(self.plain):
            self._recover(before)

    def _recover(self, state: dict[str, Any]) -> None:
        """A torn model refuses to go on until a state is loaded."""
        try:
            self.model.train_step(*self._batch())
        except harmony.HarmonyError:
            self.plain.load(state)
            self._load(state)
        else:
            raise AssertionError("the state is of no step, and the next one went on")

    # What is changed between steps

    def freeze(self, number: int) -> None:
        """Freeze a layer, but never the last one that is trained."""
        layers = ("embed", "blocks.0", "blocks.1", "head")
        self._both(lambda net: _train(net, layers[number % 4], False))

    def unfreeze(self, _: int) -> None:
        """Train everything again."""
        self._both(lambda net: _train(net, "", True))

    def save(self, _: int) -> None:
        """Keep a checkpoint."""
        ours = {
            "net": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "num_steps": self.model.num_steps,
        }
        self.saved = ours, self.plain.state()

    def load(self, _: int) -> None:
        """Go back to the last checkpoint."""
        if self.saved is not None:
            self._load(self.saved[0])
            self.plain.load(self.saved[1])

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(copy.deepcopy(state["net"]))
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.model.num_steps = state["num_steps"]

    def hook(self, number: int) -> None:
        """Let a hook halve a gradient."""
        name = ("head.weight", "blocks.1.up.weight", "embed.bias")[number % 3]
        if all(net.get_parameter(name).requires_grad for net in (self.net, self.plain.net)):
            self._hook(lambda net: net.get_parameter(name).register_hook(_halved))

    def module_hook(self, number: int) -> None:
        """Let a hook scale what a block returns."""
        self._hook(lambda net: net.blocks[number % 3].register_forward_hook(_scaled))

    def unhook(self, _: int) -> None:
        """Remove the last hook."""
        for handle in self.hooks.pop() if self.hooks else ():
            handle.remove()

    def write(self, number: int) -> None:
        """Change a parameter by hand."""

        def change(net: Net) -> None:
            weight = net.blocks[number % 3].get_parameter("down.weight")
            with torch.no_grad():
                weight.mul_(0.9) if number % 2 else weight.data.add_(0.01)

        self._both(change)

    def buffer_in_place(self, number: int) -> None:
        """Change a buffer in place."""
        self._both(lambda net: net.scale.mul_(1.0 + 0.1 * (number % 3)))

    def buffer_assigned(self, number: int) -> None:
        """Give a buffer another tensor."""
        self._both(lambda net: setattr(net, "scale", torch.full((WIDTH,), 0.5 + number % 3)))

    def table_in_place(self, number: int) -> None:
        """Change a plain tensor on an attribute in place."""
        self._both(lambda net: net.table.add_(0.1 * (number % 3)))

    def table_assigned(self, number: int) -> None:
        """Give an attribute another tensor."""
        self._both(lambda net: setattr(net, "table", torch.full((WIDTH,), 0.1 * (number % 3))))

    def attribute(self, number: int) -> None:
        """Change a number that the forward reads."""
        self._both(lambda net: setattr(net, "gain", 1.0 + 0.1 * (number % 3)))

    def outside(self, number: int) -> None:
        """Change what the loss reads from outside."""
        OUTSIDE.update(weight=0.2 * (number % 3), temperature=1.0 + number % 2)

    def rate(self, number: int) -> None:
        """Change the learning rate."""
        for optimizer in (self.optimizer, self.plain.optimizer):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (1 + number % 3)

    def other_length(self, number: int) -> None:
        """Go on with another length."""
        self.length = LENGTHS[number % len(LENGTHS)]

    def other_size(self, number: int) -> None:
        """Go on with another number of samples."""
        self.num_samples = SIZES[number % len(SIZES)]

    # Machinery

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches += 1
        generator = torch.Generator().manual_seed(self.batches)
        shape = (self.num_samples, self.length, WIDTH)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    def _both(self, change: Callable[[Net], object]) -> None:
        change(self.net)
        change(self.plain.net)

    def _hook(self, register: Callable[[Net], Any]) -> None:
        self.hooks.append((register(self.net), register(self.plain.net)))

    def _is_at(self, plain: Plain) -> bool:
        pairs = zip(self.net.state_dict().items(), plain.net.state_dict().values(), strict=True)
        same = all(same_bits(one, two) for (_, one), two in pairs)
        return same and self.model.num_steps == plain.num_steps

    def _compare(self, when: str) -> None:
        wanted = self.plain.net.state_dict()
        for name, tensor in self.net.state_dict().items():
            assert same_bits(tensor, wanted[name]), f"after {when}: {name}"
        assert self.model.num_steps == self.plain.num_steps, f"after {when}"
        theirs = self.plain.optimizer.state_dict()["state"]
        for index, held in self.optimizer.state_dict()["state"].items():
            for key, value in held.items():
                if isinstance(value, torch.Tensor):
                    assert same_bits(value.cpu(), theirs[index][key]), f"after {when}: {key}"


def _train(net: Net, layer: str, trained: bool) -> None:
    for param in net.get_submodule(layer).parameters():
        param.requires_grad_(trained)


def _halved(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * 0.5


def _scaled(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return out * 1.25


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors hold the same values."""
    return one.shape == two.shape and bool(torch.equal(one, two))


OPERATIONS = (
    "step",
    "loop",
    "infer",
    "interrupt",
    "freeze",
    "unfreeze",
    "save",
    "load",
    "hook",
    "module_hook",
    "unhook",
    "write",
    "buffer_in_place",
    "buffer_assigned",
    "table_in_place",
    "table_assigned",
    "attribute",
    "outside",
    "rate",
    "other_length",
    "other_size",
)

LATER: frozenset[str] = frozenset()
"""Operations that are known to fail; only `scripts/random_usage.py --all` tries them."""

WAYS = st.builds(
    Way,
    form=st.sampled_from(["step", "dropin"]),
    size=st.sampled_from([4, 2, 8]),
    num_devices=st.sampled_from([1, 2]),
    updates=st.sampled_from(["host", "auto"]),
)


KNOWN = tuple(name for name in OPERATIONS if name not in LATER)
"""Operations that the tests do."""


def usages(operations: tuple[str, ...] = KNOWN) -> st.SearchStrategy[Steps]:
    """Any usage: up to six operations, with a step after most of them."""
    one = st.tuples(st.sampled_from(operations), st.integers(0, 5))
    two = st.tuples(one, st.just(("step", 0)))
    return st.lists(st.one_of(st.tuples(one), two, two), min_size=1, max_size=6).map(
        lambda groups: tuple(step for group in groups for step in group)
    )
