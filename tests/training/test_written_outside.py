"""What a forward and its hooks write outside is written once for each microbatch, as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import harmony

from .conftest import VirtualGPUs

SGD = {"lr": 0.1, "foreach": False}
LOG: dict[str, list[Any]] = {"calls": []}


class Meter:
    """Counts on an object that is no module."""

    def __init__(self) -> None:
        self.count = 0
        self.values: list[float] = []


class Part(nn.Module):
    """A layer that leaves something behind in its forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(8, 8), how
        self.meter, self.history, self.log = Meter(), [], {"loss": []}
        self.memory: torch.Tensor | None = None
        self.states: list[torch.Tensor] = []
        self.last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.linear(x))
        if self.how == "memory":
            h = h if self.memory is None else h + self.memory
            self.memory = h.detach()
        elif self.how == "moving memory":
            self.memory = h.detach() if self.memory is None else 0.5 * self.memory + h.detach()
            h = h * self.memory
        elif self.how == "list of states":
            self.states = [*self.states, h.detach().mean(0)][-2:]
            h = h + torch.stack(self.states).sum(0)
        elif self.how == "in place":
            if self.last is None:
                self.last = torch.zeros(8)
            self.last += h.detach().mean(0)
            h = h + self.last
        elif self.how == "random memory":
            h = h if self.memory is None else h + self.memory
            self.memory = torch.rand(8)
        elif self.how == "last activation":
            self.last = h
        elif self.how == "appends":
            self.history.append(h.detach())
        elif self.how == "meter":
            self.meter.count += 1
            self.meter.values.append(float(h.sum()))
        elif self.how == "nested log":
            self.log["loss"].append(len(x))
        elif self.how == "global":
            LOG["calls"].append(tuple(x.shape))
        return h


class Net(nn.Module):
    def __init__(self, how: str, inside: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(how if inside else "") for _ in range(3))
        self.outer, self.head = Part("" if inside else how), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return self.head(Part.forward(self.outer, x))


def state_of(net: nn.Module) -> list[Any]:
    found: list[Any] = []
    for part in net.modules():
        if isinstance(part, Part):
            found += [part.memory, part.last, *part.history, *part.states, part.meter.count]
            found += [list(part.meter.values), copy.deepcopy(part.log)]
    return found


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.device == two.device and torch.equal(one.detach(), two.detach())
    return bool(one == two)


def plain_run(net: nn.Module, steps: int, size: int) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    losses = []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        total = torch.zeros(())
        for index, low in enumerate(range(0, len(x), size)):
            harmony.seed_microbatch(step, index)
            loss = F.cross_entropy(net(x[low : low + size]), y[low : low + size])
            torch.autograd.backward(loss, torch.full_like(loss, size / len(x)))
            total = total + loss.detach() * (size / len(x))
        optimizer.step()
        losses.append(total)
    return losses


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(100 + step)
    return torch.randn(8, 8), torch.randint(0, 4, (8,))


def trained(net: nn.Module, size: int = 4) -> Any:
    return harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs=SGD,
        loss_fn=F.cross_entropy,
        microbatch_size=size,
        updates="host",
        devices=2,
        mode="pp",
        seed=0,
    )


WAYS = ["memory", "moving memory", "list of states", "in place", "random memory"]
WAYS += ["last activation", "appends", "meter", "nested log", "global"]


@pytest.mark.parametrize(
    ("how", "inside"), [*((how, True) for how in WAYS), ("memory", False), ("appends", False)]
)
def test_it_is_left_as_by_plain_pytorch(how: str, inside: bool, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Net(how, inside)
    plain = copy.deepcopy(net)
    LOG["calls"].clear()
    wanted = plain_run(plain, 3, 4)
    calls = list(LOG["calls"])
    LOG["calls"].clear()
    model = trained(net)
    for step in range(3):
        assert torch.equal(model.train_step(*batch(step)), wanted[step]), step
    assert LOG["calls"] == calls
    for found, expected in zip(state_of(net), state_of(plain), strict=True):
        assert same(found, expected)
    for (name, one), two in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert model.capture_mode in ("dynamic", "eager")


@pytest.mark.parametrize("how", ["memory", "last activation", "appends"])
def test_the_drop_in_form_leaves_it_too(how: str, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Net(how, inside=True)
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2, microbatch_size=8)
    for step in range(3):
        x, y = batch(step)
        for one, inner in ((model, net), (plain, plain)):
            one.zero_grad()
            loss = F.cross_entropy(one(x), y)
            if how == "last activation":  # the caller makes a part of the loss of it
                loss = loss + inner.parts[1].last.pow(2).mean()
            loss.backward()
        for (name, one), two in zip(net.named_parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None), name
            assert one.grad is None or torch.equal(one.grad, two.grad), name
    for found, expected in zip(state_of(net), state_of(plain), strict=True):
        assert same(found, expected)


class Table(nn.Module):
    """Keeps what depends on shapes alone: a cache, not a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or len(self.table) < x.shape[1]:
            self.table = torch.arange(x.shape[1], device=x.device, dtype=x.dtype).cos()
        return self.linear(x) * self.table


def test_a_table_is_no_memory(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Table(), Table(), nn.Linear(8, 4))
    plain = copy.deepcopy(net)
    wanted, model = plain_run(plain, 2, 4), trained(net)
    for step in range(2):
        assert torch.equal(model.train_step(*batch(step)), wanted[step])
    assert model.capture_mode == "trace"


def counting(net: nn.Module, seen: dict[str, list[Any]]) -> None:
    """Register hooks of every kind that write down what they get."""
    for name, module in net.named_children():
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(f"{name} in", []).append(given[0])
        )
        module.register_forward_hook(
            lambda _, given, out, name=name: seen.setdefault(f"{name} out", []).append(out)
        )
        module.register_full_backward_hook(
            lambda _, given, came, name=name: seen.setdefault(f"{name} back", []).append(came[0])
        )


@pytest.mark.parametrize("dropin", [False, True], ids=["step", "drop-in"])
def test_hooks_of_modules_are_called_on_real_values_only(dropin: bool, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    plain = copy.deepcopy(net)
    found: dict[str, list[Any]] = {}
    wanted: dict[str, list[Any]] = {}
    counting(net, found), counting(plain, wanted)
    size = 8 if dropin else 4
    model: Any = harmony.Harmony(net, devices=1) if dropin else trained(net)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    for step in range(2):
        x, y = batch(step)
        if dropin:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        else:
            model.train_step(x, y)
    plain_run(plain, 2, size)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert len(found[name]) == len(values), name
        assert all(map(same, (v.cpu() for v in found[name]), values)), name


def test_features_that_hooks_collect_are_there_for_the_forward(vgpus: VirtualGPUs) -> None:
    class Collects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.head, self.found = nn.Linear(16, 4), {}
            for index in (0, 2):
                self.body[index].register_forward_hook(self.keep(index))

        def keep(self, index: int) -> Callable[..., None]:
            def hook(module: nn.Module, given: Any, out: torch.Tensor) -> None:
                self.found[index] = out

            return hook

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.body(x)
            return self.head(torch.cat([self.found[0], self.found[2]], -1))

    torch.manual_seed(0)
    net = Collects()
    torch.manual_seed(0)
    plain = Collects()
    wanted, model = plain_run(plain, 2, 4), trained(net)
    for step in range(2):
        assert torch.equal(model.train_step(*batch(step)), wanted[step])
    for key, value in plain.found.items():
        assert same(net.found[key], value)


def test_hooks_that_only_compute_leave_the_model_recorded(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    net[0].register_forward_hook(lambda _, given, out: torch.tanh(out) * 2)
    plain = copy.deepcopy(net)
    wanted, model = plain_run(plain, 2, 4), trained(net)
    for step in range(2):
        assert torch.equal(model.train_step(*batch(step)), wanted[step])
    assert model.capture_mode == "trace"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropin", [True, False])
def test_checkpoints_in_a_model_that_runs_as_it_is(
    vgpus: VirtualGPUs, dropin: bool, reentrant: bool
) -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(8, 4), None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = checkpoint(lambda t: torch.tanh(self.inner(t)), x, use_reentrant=reentrant)
            self.last = out.detach()
            return out

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), Remembers())
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), Remembers())
    size = 8 if dropin else 4
    wanted = plain_run(plain, 2, size)
    model: Any = harmony.Harmony(net, devices=1) if dropin else trained(net)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    for step in range(2):
        x, y = batch(step)
        if dropin:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        else:
            loss = model.train_step(x, y)
        assert torch.equal(loss.detach(), wanted[step])
    assert all(map(torch.equal, net.parameters(), plain.parameters()))


@pytest.mark.parametrize("how", ["factory", "like", "in place"])
def test_a_generator_of_the_users_own_draws_what_it_draws_in_plain_pytorch(
    vgpus: VirtualGPUs, how: str
) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 4)
            self.generator = torch.Generator().manual_seed(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inner(x)
            if how == "factory":
                return h + torch.randn(h.shape, generator=self.generator, device=x.device)
            if how == "like":
                return h * torch.bernoulli(torch.full_like(h, 0.5), generator=self.generator)
            return h + torch.empty_like(h).uniform_(generator=self.generator)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), Noisy())
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), Noisy())
    wanted, model = plain_run(plain, 2, 4), trained(net)
    for step in range(2):
        assert torch.equal(model.train_step(*batch(step)), wanted[step])
    assert all(map(torch.equal, net.parameters(), plain.parameters()))
