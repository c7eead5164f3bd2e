"""Training by Harmony and by plain PyTorch on the same GPU, microbatch by microbatch."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

import harmony
from gpu_check.models import TINY, Llama, Shape, batches, loss_fn, make_model
from gpu_check.steps import Note

STEPS, MICROBATCH = 4, 2
CLOSE = 1e-3
"""What a parameter's change may be off by, of its own largest change: products of other shapes
are not made here, but the sum of a gradient over the microbatches may be taken elsewhere."""


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        gpus: how many; 0: all.
        loop: a loop of one's own, in place of `train_step`.
        autocast: bfloat16 where autocast says so.
        dropout: its probability.
        share: of the training state that a GPU may use.
    """

    name: str
    gpus: int = 1
    loop: bool = False
    autocast: bool = False
    dropout: float = 0.0
    share: float = 0.4


CASES = (
    Case("fp32"),
    Case("fp32, all that it wants", share=4.0),
    Case("dropout", dropout=0.2),
    Case("bfloat16 autocast", autocast=True),
    Case("a loop of one's own", loop=True),
    Case("all GPUs", gpus=0),
    Case("all GPUs, dropout, autocast", gpus=0, dropout=0.2, autocast=True),
)


def compare(note: Note, small: bool) -> bool:
    """Note for each case how many values differ, and by how much; False if one is not close."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    shape = TINY if small else replace(TINY, width=512, depth=8, heads=8, hidden=1408, context=256)
    good = True
    for case in CASES:
        good &= _compare(case, replace(shape, dropout=case.dropout), note)
    return good


def _compare(case: Case, shape: Shape, note: Note) -> bool:
    net = make_model(shape)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    count = case.gpus or torch.cuda.device_count()
    losses, expected = plain(net, case, shape)
    found = _losses_of_loop if case.loop else _losses_of_steps
    limit = int(case.share * 16 * shape.num_params) + (64 << 20 if shape.width > 64 else 4 << 20)
    options = {
        "microbatch_size": MICROBATCH,
        "mode": "pp",
        "devices": count,
        "device_memory": limit,
    }
    mine, packs = found(net, case, shape, options)
    differing = total = 0
    worst = 0.0
    for name, value in net.state_dict().items():
        theirs = expected[name]
        differing += int((value != theirs).sum())
        total += value.numel()
        change = float((theirs - before[name]).abs().max())
        if change:
            worst = max(worst, float((value - theirs).abs().max()) / change)
    off = max(abs(a - b) / abs(b) for a, b in zip(mine, losses, strict=True))
    close = worst <= CLOSE or (case.autocast and worst <= 0.1)
    note(
        what=case.name,
        gpus=count,
        packs=packs,
        bits="equal" if not differing else f"{differing} of {total} values differ",
        worst_of_a_change=worst,
        loss_off=off,
        close=close,
    )
    return close


def _context(case: Case) -> contextlib.AbstractContextManager[Any]:
    if case.autocast:
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def plain(net: Llama, case: Case, shape: Shape) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a copy on the first GPU; returns the losses, and the state at the end on the host."""
    twin = copy.deepcopy(net).to("cuda:0")
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    losses = []
    for step, (x, y) in enumerate(batches(shape, STEPS)):
        optimizer.zero_grad()
        total = torch.zeros((), device="cuda:0")
        share = MICROBATCH / len(x)
        for index in range(len(x) // MICROBATCH):
            rows = slice(index * MICROBATCH, (index + 1) * MICROBATCH)
            harmony.seed_microbatch(step, index)
            with _context(case):
                loss = loss_fn(twin(x[rows].to("cuda:0")), y[rows].to("cuda:0"))
            (loss * share).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * share
        for param in twin.parameters():  # the update itself is compared on the same device
            assert param.grad is not None
        _step_on_host(twin, optimizer)
        losses.append(float(total))
    return losses, {name: value.cpu() for name, value in twin.state_dict().items()}


def _step_on_host(twin: Llama, optimizer: torch.optim.AdamW) -> None:
    """Take the optimizer's step on the host, where Harmony's runs in this comparison."""
    params = list(twin.parameters())
    for param in params:
        gradient = param.grad
        assert gradient is not None
        param.data, param.grad = param.data.cpu(), None
        param.grad = gradient.cpu()
    optimizer.step()
    for param in params:
        param.grad = None
        param.data = param.data.to("cuda:0")


def _losses_of_steps(
    net: Llama, case: Case, shape: Shape, options: dict[str, Any]
) -> tuple[list[float], int]:
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-3, "fused": False},
        loss_fn=loss_fn,
        updates="host",
        seed=0,
        **options,
    )
    losses = []
    for x, y in batches(shape, STEPS):
        with _context(case):
            losses.append(float(model.train_step(x, y)))
    packs = _num_packs(model)
    model.close()
    return losses, packs


def _losses_of_loop(
    net: Llama, case: Case, shape: Shape, options: dict[str, Any]
) -> tuple[list[float], int]:
    model = harmony.Harmony(net, seed=0, **options)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for x, y in batches(shape, STEPS):
        optimizer.zero_grad()
        with _context(case):
            loss = loss_fn(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    packs = _num_packs(model)
    model.close()
    return losses, packs


def _num_packs(model: harmony.Harmony) -> int:
    return len(model.plan.spec.backward_packs) if model.plan is not None else 0
