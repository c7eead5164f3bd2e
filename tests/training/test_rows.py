"""Outputs of own loops whose rows are not one for each sample, in order.

Compared with plain PyTorch on the whole batch: bit for bit as one microbatch, within the rounding
of sums where microbatches were asked for.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.plain import gradients_of

# Whole batch and microbatches add the same terms in another order.
TOLERANCE = 1e-6

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, 11, (4, 6), generator=GENERATOR)
ONE, TWO = torch.randn(4, 8, generator=GENERATOR), torch.randn(4, 8, generator=GENERATOR)


class Tokens(nn.Module):
    """Token after token of one sample after the other, or sample after sample of one token."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.words, self.inner, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.inner(self.words(x)))
        return self.head(h.transpose(0, 1) if self.time_first else h).reshape(-1, 11)


class Both(nn.Module):
    """Two views of each sample: all of the first kind, then all of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(torch.cat([x, y]))))


class Crops(Both):
    """Two views, of three rows each: rows of one sample are neighbours within a view."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        views = [v[:, None] * torch.tensor([1.0, 2.0, 3.0])[:, None] for v in (x, y)]
        return self.b(torch.relu(self.a(torch.cat([v.flatten(0, 1) for v in views]))))


class TimeFirst(nn.Module):
    """The word language model of PyTorch's examples: samples in dimension 1, outputs flat."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.head = nn.Embedding(11, 8), nn.LSTM(8, 8, 2), nn.Linear(8, 11)

    def forward(self, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        out, state = self.rnn(self.words(x), state)
        return F.log_softmax(self.head(out).view(-1, 11), 1), state


SAMPLE_FIRST: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "tokens": (lambda: Tokens(False), (TOKENS,), {}),
    "time": (lambda: Tokens(True), (TOKENS,), {}),
    "both": (Both, (ONE, TWO), {}),
    "crops": (Crops, (ONE, TWO), {}),
    "rnn": (
        TimeFirst,
        (TOKENS.T.contiguous(), (torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))),
        {"args[0]": 1, "args[1][0]": 1, "args[1][1]": 1},
    ),
}


def outputs_of(model: Any, batch: tuple[Any, ...]) -> list[torch.Tensor]:
    out = model(*batch)
    if isinstance(out, tuple):
        first, (hidden, cell) = out
        return [first, hidden, cell]
    return [out]


def loss_of(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Another weight for each entry, so that no two rows may be exchanged."""
    weights = [torch.linspace(-1, 1, out.numel()).sin().view(out.shape) for out in outputs]
    return sum(((o * w).sum() for o, w in zip(outputs, weights, strict=True)), torch.zeros(()))


OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "two": {"microbatch_size": 2},
    "three": {"microbatch_size": 3},
    "dp": {"mode": "dp"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name", list(SAMPLE_FIRST))
def test_outputs_and_their_gradients_are_put_where_they_belong(
    vgpus: VirtualGPUs, name: str, options: dict[str, Any]
) -> None:
    make, batch, batch_dims = SAMPLE_FIRST[name]
    torch.manual_seed(0)
    net = make()
    twin = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2, batch_dims=batch_dims, **{"mode": "pp", **options})
    with torch.no_grad():
        evaluated = outputs_of(model, batch)
    found, wanted = outputs_of(model, batch), outputs_of(twin, batch)
    for one, two, three in zip(found, wanted, evaluated, strict=True):
        torch.testing.assert_close(one, two, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(three, two, rtol=TOLERANCE, atol=TOLERANCE)
    loss_of(found).backward()
    loss_of(wanted).backward()
    expected = gradients_of(twin)
    for parameter, gradient in gradients_of(net).items():
        other = expected[parameter]
        assert gradient is not None and other is not None
        assert (gradient - other).abs().max() <= TOLERANCE * other.abs().max(), parameter
    assert model.plan is not None
    if options.get("mode") == "dp":
        assert len(model.plan.spec.shares) == 2
    elif options:
        assert model.plan.spec.backward_size == options["microbatch_size"]


def test_time_in_dimension_0_is_taken_for_samples_and_mixes_them(vgpus: VirtualGPUs) -> None:
    """Without batch_dims= the steps of time count as samples: one microbatch, and right."""
    make, batch, _ = SAMPLE_FIRST["rnn"]
    torch.manual_seed(0)
    net = make()
    twin = copy.deepcopy(net)
    found, wanted = outputs_of(harmony.Harmony(net, devices=2), batch), outputs_of(twin, batch)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
    loss_of(found).backward()
    loss_of(wanted).backward()
    expected = gradients_of(twin)
    for parameter, gradient in gradients_of(net).items():
        other = expected[parameter]
        assert gradient is not None and other is not None
        assert torch.equal(gradient, other), parameter


class PooledTokens(Tokens):
    """Returns the mean over the batch beside the rows: an output that is not made of parts."""

    def forward(self, x: torch.Tensor) -> Any:
        out = super().forward(x)
        return out.mean(0)


def test_an_output_that_has_no_samples_is_that_of_the_whole_batch(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = PooledTokens(False)
    twin = copy.deepcopy(net)
    out = harmony.Harmony(net, devices=2)(TOKENS)
    assert torch.equal(out, twin(TOKENS))
    loss_of([out]).backward()
    loss_of([twin(TOKENS)]).backward()
    for name, gradient in gradients_of(net).items():
        wanted = gradients_of(twin)[name]
        assert gradient is not None and wanted is not None and torch.equal(gradient, wanted)
