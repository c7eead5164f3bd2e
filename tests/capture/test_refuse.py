"""What cannot be captured is refused by name, with the line and the remedy."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from harmony.capture import capture
from harmony.errors import CaptureError

from .models import VOCAB, ids

LINE = r"test_refuse\.py:\d+"


class Two(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between, self.scale = between, 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self, self.first(x)))


def with_hook(net: Any, h: torch.Tensor) -> torch.Tensor:
    h.register_hook(lambda gradient: gradient * 2)
    return h


def with_vmap(net: Any, h: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(lambda row: row * net.scale)(h)


def with_reentrant_checkpoint(net: Any, h: torch.Tensor) -> torch.Tensor:
    return torch.utils.checkpoint.checkpoint(net.last, h, use_reentrant=True)


def with_inner_gradient(net: Any, h: torch.Tensor) -> torch.Tensor:
    return h + torch.autograd.grad(h.sum(), net.first.weight, create_graph=True)[0].sum()


def with_changed_constant(net: Any, h: torch.Tensor) -> torch.Tensor:
    return h * torch.FloatTensor([1.0] * 8).add_(1.0)


def with_python_random(net: Any, h: torch.Tensor) -> torch.Tensor:
    return h * random.random()


def with_random_decision(net: Any, h: torch.Tensor) -> torch.Tensor:
    return h if torch.rand(()) < 0.5 else h * 2


def with_foreign_parameter(net: Any, h: torch.Tensor) -> torch.Tensor:
    return h * FOREIGN


FOREIGN = torch.ones(8, requires_grad=True)


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (with_changed_constant, rf"add_ at .*{LINE} changes a tensor in place that is no buffer"),
        (with_python_random, "random numbers .*outside of a layer"),
        (with_random_decision, rf"__bool__ decides by a random number, at .*{LINE}"),
        (with_foreign_parameter, rf"{LINE} uses a tensor of shape \(8,\).*no parameter of"),
    ],
)
def test_what_the_glue_may_not_do(between: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Two(between), (torch.randn(4, 8),))


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (with_hook, rf"register_hook outside of a layer at .*{LINE}"),
        (with_vmap, rf"torch.vmap at .*{LINE} maps a function that reaches tensors"),
        (with_reentrant_checkpoint, rf"{LINE}.*use_reentrant=False"),
        (with_inner_gradient, rf"grad outside of a layer at .*{LINE}"),
    ],
)
def test_what_only_a_layer_may_do_makes_its_module_one(between: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=rf"the model \(Two\) is one layer.*{message}"):
        assert capture(Two(between), (torch.randn(4, 8),)).graph.num_layers == 1


def test_wrappers_and_scattered_parameters() -> None:
    with pytest.raises(CaptureError, match=r"DataParallel.*\.module"):
        capture(nn.DataParallel(nn.Linear(8, 8)), (torch.randn(4, 8),))
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    assert capture(net, (torch.randn(4, 8),)).graph.num_layers == 2  # meta is no place
    with pytest.raises(CaptureError, match=r"0\.weight has no shape yet"):
        capture(nn.Sequential(nn.LazyLinear(8)), (torch.randn(4, 8),))
    with pytest.raises(CaptureError, match=r"expected an nn\.Module, got builtin"):
        capture(torch.relu, (torch.randn(4, 8),))  # type: ignore[arg-type]


def test_a_function_that_captured_a_module() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    net.helper = lambda x: net[0](x)  # type: ignore[assignment]
    with pytest.raises(CaptureError, match=r"helper is a function that captured a module"):
        capture(net, (torch.randn(4, 8),))


def test_a_module_that_cannot_be_copied() -> None:
    import threading

    net = nn.Sequential(nn.Linear(8, 8))
    net.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(CaptureError, match=r"Sequential cannot be copied .*Keep locks"):
        capture(net, (torch.randn(4, 8),))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        eye = torch.eye(8).to_sparse()
        return torch.sparse.mm(eye, self.last(self.first(x)).t()).t()


def test_sparse_tensors_between_layers() -> None:
    with pytest.raises(CaptureError, match=r"to_sparse makes a sparse .* crosses layers"):
        capture(Sparse(), (torch.randn(4, 8),))


def gpt2(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, **options
    )
    return transformers.GPT2LMHeadModel(config).train()


def test_a_cache_is_switched_off_or_refused() -> None:
    net = gpt2()
    with pytest.warns(UserWarning, match="captured with use_cache=False"):
        assert capture(net, (), {"input_ids": ids(4)}).graph.num_layers == 6
    assert net.config.use_cache
    with (
        warnings.catch_warnings(),
        pytest.raises(CaptureError, match=r"gets a DynamicCache.*use_cache=False"),
    ):
        warnings.simplefilter("ignore")
        capture(net, (), {"input_ids": ids(4), "use_cache": True})
