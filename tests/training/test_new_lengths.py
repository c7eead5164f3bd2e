"""What a new length spares of a model that is known, and models that do something else for it.

A batch of another length is recorded once, and is parted as batches of a known length are only
where values show that it may be. Each model here takes another path, or mixes samples, for some
lengths only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from harmony.capture import capture
from harmony.capture.cost.costs import costs_nbytes
from harmony.capture.graph import trace_set
from harmony.engine import paths
from tests import devices

from .conftest import VirtualGPUs
from .models import GPT, token_batch, token_loss
from .plain import SGD

Forward = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Tokens(nn.Module):
    """Embeds, does something with the hidden values in between, and predicts."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor], width: int = 64) -> None:
        super().__init__()
        self.between = between
        self.tokens = nn.Embedding(61, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.head = nn.Linear(width, 61)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for index, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x))
            if index == 2:
                x = self.between(x)
        return self.head(x)


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens that there is an output of."""
    return F.cross_entropy(logits.flatten(0, 1), targets[:, : logits.shape[1]].flatten())


class Plain:
    """The reference: accumulates gradients over microbatches of the size that Harmony took."""

    def __init__(self, net: nn.Module, loss_fn: Any) -> None:
        self.net, self.loss_fn, self.num_steps = copy.deepcopy(net), loss_fn, 0
        self.optimizer = torch.optim.SGD(self.net.parameters(), **SGD)

    def step(self, x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for index, low in enumerate(range(0, len(x), size)):
            torch.manual_seed(harmony.microbatch_seed(self.num_steps, index, 0))
            part = slice(low, low + size)
            loss = self.loss_fn(self.net(x[part]), y[part])
            weight = len(x[part]) / len(x)
            (loss * weight).backward()
            total = total + loss.detach() * weight
        self.optimizer.step()
        self.num_steps += 1
        return total


def sizes_taken(
    net: nn.Module,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    loss_fn: Any = loss_of,
    **options: Any,
) -> list[int]:
    """Train Harmony and plain PyTorch, compare bit for bit; return the microbatch sizes."""
    plain, sizes = Plain(net, loss_fn), []
    model = harmony.Harmony(
        copy.deepcopy(net),
        optimizer=torch.optim.SGD,
        optimizer_kwargs=SGD,
        loss_fn=loss_fn,
        seed=0,
        **options,
    )
    for x, y in batches:
        loss = model.train_step(x, y)
        planned = model.last_timeline is not None and model.plan is not None
        sizes.append(model.plan.spec.backward_size if planned and model.plan else len(x))
        assert torch.equal(loss, plain.step(x, y, sizes[-1])), (x.shape, sizes)
    for (name, param), twin in zip(model.named_parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(param, twin), name
    return sizes


def batches_of(*lengths: int, num_samples: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [token_batch(i, num_samples, length) for i, length in enumerate(lengths)]


PARTED: dict[str, Any] = {"mode": "pp", "devices": 2}
"""With little memory, batches of a model that may be parted are."""


def doubled_from_18(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[1] >= 18 else x


def padded_to_windows(x: torch.Tensor) -> torch.Tensor:
    batch, time, width = x.shape
    if time % 4:
        x = F.pad(x, (0, 0, 0, 4 - time % 4))
    windows = x.view(batch, -1, 4, width)
    return (windows - windows.mean(2, keepdim=True)).flatten(1, 2)[:, :time]


def last_16(x: torch.Tensor) -> torch.Tensor:
    return x[:, -16:]


def by_a_ramp(x: torch.Tensor) -> torch.Tensor:
    steps = torch.linspace(0, 1, x.shape[1], device=x.device)
    return x * steps[:, None] / x.shape[1] ** 0.5


def with_learnt_rows_apart(x: torch.Tensor) -> torch.Tensor:
    odd = x[:, 1::2].softmax(1)
    return torch.cat([x[:, ::2], odd], 1)


@pytest.mark.parametrize(
    "between",
    [doubled_from_18, padded_to_windows, last_16, by_a_ramp, with_learnt_rows_apart],
)
def test_paths_that_depend_on_the_length_are_those_of_plain_pytorch(
    vgpus: VirtualGPUs, between: Any
) -> None:
    vgpus(count=2, memory="128KiB")
    sizes = sizes_taken(Tokens(between), batches_of(16, 17, 18, 15, 16), **PARTED)
    assert max(sizes) < 8


def normed_in_chunks(x: torch.Tensor) -> torch.Tensor:
    """Chunks of 16 tokens, of whichever sample: at a length of 16 each is a sample."""
    chunks = x.reshape(-1, 16, x.shape[2])
    chunks = chunks - chunks.mean(1, keepdim=True)
    return chunks.reshape(x.shape)


def rolled_if_many(x: torch.Tensor) -> torch.Tensor:
    """Samples see their neighbours from 130 tokens on: 8 samples of 17, not 4 of them."""
    return x + x.roll(1, 0) if x.shape[0] * x.shape[1] > 130 else x


def centred_from_18(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0) if x.shape[1] >= 18 else x


@devices.virtual_only("the limit is in bytes that the CPU's kernels take")
@pytest.mark.parametrize(
    ("between", "lengths", "whole"),
    [
        (normed_in_chunks, (16, 18, 16, 14), (18, 14)),
        (rolled_if_many, (16, 17, 15, 18), (17, 18)),
        (centred_from_18, (16, 17, 18, 19), (18, 19)),
    ],
)
def test_samples_that_mix_at_some_lengths_are_not_parted_there(
    vgpus: VirtualGPUs, between: Any, lengths: tuple[int, ...], whole: tuple[int, ...]
) -> None:
    vgpus(count=2, memory="640KiB")
    sizes = sizes_taken(Tokens(between), batches_of(*lengths), **PARTED)
    assert [size == 8 for size in sizes] == [length in whole for length in lengths]


def test_mixing_at_the_first_length_only_is_no_wrong_result(vgpus: VirtualGPUs) -> None:
    vgpus(count=2, memory="640KiB")
    sizes_taken(Tokens(normed_in_chunks), batches_of(18, 16, 18, 16), **PARTED)


@devices.virtual_only("the limit is in bytes that the CPU's kernels take")
def test_a_loss_that_mixes_samples_at_some_lengths_is_not_parted_there(
    vgpus: VirtualGPUs,
) -> None:
    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = loss_of(logits, targets)
        return found + logits.mean(0).square().mean() if logits.shape[1] >= 18 else found

    vgpus(count=2, memory="640KiB")
    sizes = sizes_taken(Tokens(torch.tanh), batches_of(16, 17, 18, 19), loss, **PARTED)
    assert [size == 8 for size in sizes] == [False, False, True, True]


def test_a_length_that_is_the_number_of_samples_is_told_apart_from_it(vgpus: VirtualGPUs) -> None:
    vgpus(count=2, memory="128KiB")
    sizes_taken(Tokens(by_a_ramp), batches_of(9, 8, 10, 7), **PARTED)


def test_numbers_of_samples_may_change_with_the_length(vgpus: VirtualGPUs) -> None:
    vgpus(count=2, memory="128KiB")
    shapes = ((8, 16), (6, 17), (8, 18), (1, 17), (3, 16), (2, 15))
    batches = [token_batch(i, num, length) for i, (num, length) in enumerate(shapes)]
    sizes_taken(Tokens(padded_to_windows), batches, **PARTED)


def test_decisions_by_values_stay_checked_at_a_new_length(vgpus: VirtualGPUs) -> None:
    class Decides(Tokens):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out = super().forward(ids)
            return out * 3 if bool((ids[:, 0] == 7).any()) else out

    vgpus(count=1, memory="4MiB")
    batches = batches_of(16, 17, 17, 18, 18, 16)
    for index in (1, 3, 5):
        batches[index][0][0, 0] = 7
    for index in (0, 2, 4):
        batches[index][0][:, 0] = 5
    sizes_taken(Decides(torch.tanh), batches)


def test_what_the_forward_reads_outside_is_read_at_each_new_length(vgpus: VirtualGPUs) -> None:
    scale = {"now": 1.0}

    class Scaled(Tokens):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * scale["now"]

    vgpus(count=1, memory="4MiB")
    net = Scaled(torch.tanh)
    plain = Plain(net, loss_of)
    model = harmony.Harmony(
        copy.deepcopy(net), optimizer=torch.optim.SGD, optimizer_kwargs=SGD, loss_fn=loss_of
    )
    for now, (x, y) in zip((1.0, 2.0, 3.0, 2.0), batches_of(16, 17, 17, 18), strict=True):
        scale["now"] = now
        assert torch.equal(model.train_step(x, y), plain.step(x, y, 8))


@pytest.mark.parametrize("between", [padded_to_windows, normed_in_chunks, rolled_if_many])
def test_a_loop_of_ones_own_gets_the_same_at_new_lengths(vgpus: VirtualGPUs, between: Any) -> None:
    vgpus(count=1, memory="4MiB")
    net = Tokens(between)
    model, plain = harmony.Harmony(copy.deepcopy(net)), copy.deepcopy(net)
    for x, y in batches_of(16, 18, 16, 14):
        logits, expected = model(x), plain(x)
        assert torch.equal(logits, expected)
        loss_of(logits, y).backward()
        loss_of(expected, y).backward()
    for (name, param), twin in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(param.grad, twin.grad), name  # type: ignore[arg-type]


def test_rows_by_time_of_a_new_length_are_those_of_plain_pytorch(vgpus: VirtualGPUs) -> None:
    """Their number of groups is the length, of which nothing was tried yet."""

    class ByTime(Tokens):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(ids)
            return out.transpose(0, 1).flatten(0, 1)

    vgpus(count=1, memory="4MiB")
    net = ByTime(torch.tanh)
    model, plain = harmony.Harmony(copy.deepcopy(net)), copy.deepcopy(net)
    for x, _ in batches_of(16, 17, 15):
        rows, expected = model(x), plain(x)
        assert torch.equal(rows, expected)
        rows.square().mean().backward()
        expected.square().mean().backward()
    for (name, param), twin in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(param.grad, twin.grad), name  # type: ignore[arg-type]


def test_a_new_length_is_recorded_once(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[int] = []
    trace_other = trace_set.trace_other

    def counted(*args: Any) -> Any:
        traced.append(args[1])
        return trace_other(*args)

    monkeypatch.setattr(trace_set, "trace_other", counted)
    vgpus(count=1, memory="4MiB")
    net = GPT(depth=2, context=24)
    model = harmony.Harmony(net, optimizer=torch.optim.SGD, loss_fn=token_loss)
    model.train_step(*token_batch(0, time=16))
    for length in (17, 15, 18):
        traced.clear()
        model.train_step(*token_batch(0, time=length))
        assert traced == [8]


def test_many_lengths_take_bounded_memory_and_are_the_same_training(vgpus: VirtualGPUs) -> None:
    """Forty lengths: signatures kept, device bytes, threads and host tensors stay bounded."""
    vgpus(count=1, memory="4MiB")
    torch.manual_seed(0)
    net = GPT(depth=1, context=64, dropout=0.0)
    plain = Plain(net, token_loss)
    model = harmony.Harmony(
        copy.deepcopy(net), optimizer=torch.optim.SGD, optimizer_kwargs=SGD, loss_fn=token_loss
    )
    for step, length in enumerate(range(12, 52)):
        x, y = token_batch(step, 4, length)
        loss = model.train_step(x, y)
        assert model.plan is not None
        assert torch.equal(loss, plain.step(x, y, model.plan.spec.backward_size))
    assert len(model._engine.variants._paths) <= paths.MAX_SIGNATURES
    for param, twin in zip(model.parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(param, twin)


def test_a_capture_like_a_known_one_has_the_same_graph() -> None:
    """Of another length, recorded once, as if it had been recorded on its own."""
    net = GPT(depth=2, context=24, dropout=0.0)
    (x, y), (longer, targets) = token_batch(0, time=16), token_batch(0, time=19)
    known = capture(net, (x,), loss=token_loss, targets=y)
    like = capture(net, (longer,), loss=token_loss, targets=targets, known=known)
    alone = capture(net, (longer,), loss=token_loss, targets=targets)
    assert like.graph == alone.graph
    for size in (1, 2, 4, 8):
        assert like.traces.of(size).outline() == alone.traces.of(size).outline()
        assert costs_nbytes(like, size) == costs_nbytes(alone, size)
