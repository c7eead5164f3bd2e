"""Inputs of every form that plain PyTorch takes: the same numbers, or refused by name."""

from __future__ import annotations

import copy
import types
from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import harmony
from tests import devices

from .conftest import VirtualGPUs
from .side_by_side import assert_same_training

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no recorded forward stands for the next"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:.*quantize"),
]

NUM = 6
Pair = namedtuple("Pair", "a b")


class Bag:
    """Holds tensors as graph libraries' batches do: behind ``__getattr__``."""

    def __init__(self, **held: Any) -> None:
        object.__setattr__(self, "_store", held)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["_store"][name]


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.a, self.b = a, b


class Registered(Slotted):
    """A container whose parts were registered without names."""


pytree.register_pytree_node(
    Registered, lambda held: ([held.a, held.b], None), lambda parts, _: Registered(*parts)
)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 5), nn.Linear(5, 3)

    def forward(self, packed: Any) -> torch.Tensor:
        padded, _ = pad_packed_sequence(self.cell(packed)[0])
        return self.head(padded.sum(0))


class Head(nn.Module):
    """A linear layer on what a function makes of the inputs."""

    def __init__(self, of: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.lin, self.of = nn.Linear(4, 3), of

    def forward(self, *args: Any) -> torch.Tensor:
        return self.of(self.lin, *args)


class Adjacent(nn.Module):
    """A graph network that owns its sparse matrix."""

    def __init__(self, adjacency: torch.Tensor, as_buffer: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)
        if as_buffer:
            self.register_buffer("adjacency", adjacency)
        else:
            self.adjacency = adjacency

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.adjacency, self.lin(x))


def _graph(lin: nn.Module, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
    return torch.sparse.mm(adjacency, lin(x))


def _sum(lin: nn.Module, held: Any) -> torch.Tensor:
    return lin(held.a + held.b)


def _padded(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.nested.to_padded_tensor(lin(x), 0.0).sum(1)


def _draw() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]]:
    """Per form: a module, and what makes its inputs."""
    x, y = torch.randn(NUM, 4), torch.randn(NUM, 4)
    dense = (torch.rand(NUM, NUM) > 0.5).float()
    rows = [torch.randn(n, 4) for n in (5, 4, 4, 2, 2, 1)]
    nested = torch.nested.nested_tensor(rows)
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    eight_bit = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    first = lambda lin, held: lin(held["a"])  # noqa: E731
    return {
        "coo": (lambda: Head(_graph), lambda: (x, dense.to_sparse())),
        "csr": (lambda: Head(_graph), lambda: (x, dense.to_sparse_csr())),
        "coo on an attribute": (lambda: Adjacent(dense.to_sparse(), False), lambda: (x,)),
        "coo in a buffer": (lambda: Adjacent(dense.to_sparse(), True), lambda: (x,)),
        "nested": (lambda: Head(_padded), lambda: (nested,)),
        "jagged": (lambda: Head(_padded), lambda: (jagged,)),
        "quantized": (lambda: Head(lambda lin, q: lin(q.dequantize())), lambda: (eight_bit,)),
        "mkldnn": (lambda: Head(lambda lin, m: lin(m.to_dense())), lambda: (x.to_mkldnn(),)),
        "packed": (Recurrent, lambda: (pack_sequence(rows),)),
        "packed, not sorted": (
            Recurrent,
            lambda: (pack_sequence(rows[::-1], enforce_sorted=False),),
        ),
        "bag": (lambda: Head(_sum), lambda: (Bag(a=x, b=y),)),
        "slots": (lambda: Head(_sum), lambda: (Slotted(x, y),)),
        "registered": (lambda: Head(_sum), lambda: (Registered(x, y),)),
        "namedtuple": (lambda: Head(_sum), lambda: (Pair(x, y),)),
        "UserDict": (lambda: Head(first), lambda: (UserDict(a=x),)),
        "mapping": (lambda: Head(first), lambda: (types.MappingProxyType({"a": x}),)),
        "generator": (lambda: Head(lambda lin, g: lin(sum(g))), lambda: (iter((x, y)),)),
        "array": (lambda: Head(lambda lin, a: lin(torch.from_numpy(a))), lambda: (x.numpy(),)),
    }


_NOT_DENSE = devices.virtual_only("the stand-in has dense tensors only")
_SPARSE = ("coo", "csr", "coo on an attribute", "coo in a buffer")
_OTHERS = ("nested", "jagged", "quantized", "mkldnn")
FORMS = (
    *(pytest.param(form, marks=_NOT_DENSE) for form in (*_SPARSE, *_OTHERS)),
    *("packed", "packed, not sorted", "bag", "slots", "registered", "namedtuple"),
    *("UserDict", "mapping", "generator", "array"),
)


def _steps(net: nn.Module, model: nn.Module, inputs: Any, targets: torch.Tensor) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(*inputs()), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own_loop", [True, False], ids=["own loop", "step"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_form_of_inputs_trains_as_in_plain_pytorch(
    vgpus: VirtualGPUs, form: str, own_loop: bool, devices: int
) -> None:
    torch.manual_seed(0)
    make, inputs = _draw()[form]
    plain, targets = make(), torch.randint(0, 3, (NUM,))
    net = copy.deepcopy(plain)
    expected = _steps(plain, plain, inputs, targets)
    if own_loop:
        found = _steps(net, harmony.Harmony(net, devices=devices, mode="pp"), inputs, targets)
    else:
        model = harmony.Harmony(
            net,
            optimizer=torch.optim.SGD,
            optimizer_kwargs={"lr": 0.1, "fused": False},
            loss_fn=nn.functional.cross_entropy,
            devices=devices,
            mode="pp",
        )
        found = [model.train_step(inputs(), targets).item() for _ in range(3)]
    assert found == pytest.approx(expected, abs=1e-6)
    for one, two in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0.0, atol=1e-6)


def test_arrays_that_differ_only_where_their_text_does_not_are_told_apart(
    vgpus: VirtualGPUs,
) -> None:
    torch.manual_seed(0)
    net = Head(lambda lin, a: lin(torch.from_numpy(a)))
    one = torch.randn(2000, 4)
    two = one.clone()
    two[1000] += 1.0
    assert repr(one.numpy()) == repr(two.numpy())
    expected = [net(x.numpy()).detach() for x in (one, two)]
    model = harmony.Harmony(net, devices=1)
    for x, out in zip((one, two), expected, strict=True):
        torch.testing.assert_close(model(x.numpy()).detach(), out)


@pytest.mark.parametrize("form", [pytest.param("coo", marks=_NOT_DENSE), "packed", "bag"])
def test_microbatches_of_what_cannot_be_parted_are_refused(vgpus: VirtualGPUs, form: str) -> None:
    torch.manual_seed(0)
    make, inputs = _draw()[form]
    model = harmony.Harmony(
        make(),
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=nn.functional.cross_entropy,
        microbatch_size=2,
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(harmony.ConfigError, match="cannot be parted: leave microbatch_size out"):
        model.train_step(inputs(), torch.randint(0, 3, (NUM,)))
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_an_array_is_said_to_be_one_and_what_to_give(vgpus: VirtualGPUs) -> None:
    class OfArrays(nn.Linear):
        def forward(self, x: Any) -> torch.Tensor:
            return super().forward(torch.as_tensor(x))

    model = harmony.Harmony(
        OfArrays(4, 4),
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=nn.functional.mse_loss,
    )
    with pytest.warns(harmony.HarmonyWarning, match=r"is an array \(ndarray\).*give the forward"):
        model.train_step(np.ones((NUM, 4), dtype="float32"), torch.ones(NUM, 4))


def test_a_model_of_scalars_trains(vgpus: VirtualGPUs) -> None:
    net = Head(lambda lin, scale: lin(torch.ones(4, device=scale.device) * scale))
    plain = copy.deepcopy(net)
    plain(torch.tensor(2.0)).sum().backward()
    harmony.Harmony(net, devices=1)(torch.tensor(2.0)).sum().backward()
    for one, two in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(3), nn.LazyBatchNorm1d])
def test_a_lazy_module_is_refused_until_it_has_run(vgpus: VirtualGPUs, lazy: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), lazy())
    with pytest.raises(harmony.ConfigError, match="run the module once, on a batch"):
        harmony.Harmony(net)
    x = torch.randn(NUM, 4)
    with torch.no_grad():
        net(x)
    model = harmony.Harmony(net, devices=1)
    assert model(x).shape[0] == NUM


class Compared(nn.Module):
    """Goes by whether two inputs are one tensor, as attention and its users do."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, query: torch.Tensor, held: dict[str, torch.Tensor]) -> torch.Tensor:
        key = held["key"]
        return self.head(torch.tanh(self.lin(query)) + (key if query is key else 3.0 * key))


def test_a_tensor_that_is_given_twice_is_one_input(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net, plain = Compared(), Compared()
    plain.load_state_dict(net.state_dict())
    model = harmony.Harmony(net, devices=1, loss_fn=nn.functional.cross_entropy)
    x, y = torch.randn(NUM, 4, requires_grad=True), torch.randn(NUM, 4)
    for key in (y, x, y):
        found = []
        for module in (plain, model):
            x.grad = None
            module.zero_grad()
            out = module(x, {"key": key})
            out.square().sum().backward()
            assert x.grad is not None
            found.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
        assert all(map(torch.equal, *found))
    x = x.detach()
    assert model.verify((x, {"key": x}), torch.randint(0, 3, (NUM,))).ok


def test_a_step_tells_one_tensor_from_two(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(NUM, 4), torch.randn(NUM, 4)
    targets = torch.randint(0, 3, (NUM,))
    assert_same_training(Compared(), [((x, {"key": key}), targets) for key in (y, x, y)])
