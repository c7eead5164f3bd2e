"""The watchdog: a step that stands still says where, and goes on or ends as it was told."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.core.options import Watch
from harmony.errors import ConfigError
from harmony.planner.ir.schedule import HOST, Schedule
from harmony.report import session
from harmony.runtime.exec.watchdog import LOOKS, Watchdog, Watching
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import square_loss, vector_batch

ROOT = Path(__file__).parents[2]
WIDTH = 64


@pytest.fixture
def hear() -> Iterator[Callable[[Callable[[str], None]], None]]:
    """What the watchdog says goes to a function of the test."""
    yield session.hear
    session.deactivate()


def make(**options: Any) -> harmony.Harmony:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    given: dict[str, Any] = {
        "optimizer": torch.optim.SGD,
        "optimizer_kwargs": {"lr": 0.01},
        "loss_fn": square_loss,
        "devices": 1,
        "device_memory": "100KiB",
        "microbatch_size": 8,
        "updates": "host",
    }
    return harmony.Harmony(net, **{**given, **options})


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = vector_batch(step, width=WIDTH)
    return x, y


def test_a_loss_that_hangs_is_named_and_what_it_computes_does_not_change(
    vgpus: VirtualGPUs, hear: Any
) -> None:
    said: list[str] = []
    freed = threading.Event()
    hangs = False

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if hangs:
            assert freed.wait(300)
        return square_loss(output, target)

    def heard(text: str) -> None:
        said.append(text)
        freed.set()

    hear(heard)
    model, plain = make(loss_fn=loss_fn, watchdog=1), make()
    for step in range(2):
        model.train_step(*batch(step)), plain.train_step(*batch(step))
    said.clear()
    freed.clear()
    hangs = True
    assert torch.equal(model.train_step(*batch(2)), plain.train_step(*batch(2)))
    (text,) = said
    lines = text.splitlines()
    assert lines[0].startswith("watchdog: nothing has moved in this step for ")
    assert lines[0].endswith("; it goes on waiting")
    at = next(line for line in lines if line.startswith("  gpu0 thread is at Run B["))
    assert f", in loss_fn ({__file__}:" in at
    assert "  program gpu0" in lines
    marked = [line for line in lines if line.startswith("    > compute Run B[")]
    assert len(marked) == 1
    around = lines.index(marked[0])
    assert lines[around - 1].startswith("      ")
    assert any(line.startswith("  host thread is at Wait e") for line in lines)
    hangs = False
    assert torch.equal(model.train_step(*batch(3)), plain.train_step(*batch(3)))
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)


class Stuck(torch.optim.SGD):
    """Waits in its step when it is told to."""

    wait: Callable[[], object] | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if Stuck.wait is not None:
            Stuck.wait()
        super().step(closure)


def test_an_update_that_hangs_is_named(vgpus: VirtualGPUs, hear: Any) -> None:
    said: list[str] = []
    freed = threading.Event()

    def heard(text: str) -> None:
        said.append(text)
        freed.set()

    hear(heard)
    model = make(optimizer=Stuck, watchdog="1s")
    model.train_step(*batch(0))
    said.clear()
    freed.clear()
    Stuck.wait = lambda: freed.wait(300)
    try:
        model.train_step(*batch(1))
    finally:
        Stuck.wait = None
    lines = said[0].splitlines()
    (at,) = (line for line in lines if line.startswith("  host thread is at "))
    assert "U[" in at
    assert f", in step ({__file__}:" in at or f", in <lambda> ({__file__}:" in at


def test_a_link_that_crawls_is_named(vgpus: VirtualGPUs, hear: Any) -> None:
    said: list[str] = []

    def heard(text: str) -> None:
        said.append(text)
        devices.provide(count=4, memory="64MiB", h2d="100GB/s")

    hear(heard)
    model, plain = make(watchdog=0.5), make()
    model.train_step(*batch(0)), plain.train_step(*batch(0))
    said.clear()
    devices.provide(
        count=4, memory="64MiB", h2d="5KB/s"
    )  # three seconds for the weights of a layer
    loss = model.train_step(*batch(1))
    devices.provide(count=4, memory="64MiB", h2d="100GB/s")
    assert torch.equal(loss, plain.train_step(*batch(1)))
    lines = said[0].splitlines()
    assert any(line.startswith("  gpu0 h2d stream is at SwapIn ") for line in lines)
    assert any(line.startswith("    > h2d     SwapIn ") for line in lines)


ENDS = """
import threading, torch, harmony
from tests.training.test_watchdog import batch, make, square_loss
harmony.virtual_gpus(count=1, memory="1MiB")
def loss_fn(output, target):
    if threading.current_thread().name.startswith("harmony-gpu"):
        print("hangs", flush=True)
        threading.Event().wait()
    return square_loss(output, target)
make(loss_fn=loss_fn).train_step(*batch(0))
print("never")
"""


@devices.virtual_only("its processes set them up")
def test_it_ends_the_process_if_it_is_told_to() -> None:
    known = {**os.environ, "PYTHONPATH": str(ROOT), "HARMONY_WATCHDOG": "2s,end"}
    done = subprocess.run(
        [sys.executable, "-c", ENDS], capture_output=True, text=True, env=known, check=False
    )
    assert done.returncode == 124, done.stderr
    assert done.stdout == "hangs\n"
    assert "harmony: watchdog: nothing has moved in this step" in done.stderr
    assert "the process ends (exit code 124)" in done.stderr
    assert "gpu0 thread is at Run B[" in done.stderr


@pytest.mark.parametrize(
    ("text", "watch"),
    [
        (None, None),
        ("off", None),
        (600, Watch(600.0)),
        (0.5, Watch(0.5)),
        ("600", Watch(600.0)),
        ("10m", Watch(600.0)),
        ("10 m, end", Watch(600.0, ends=True)),
    ],
)
def test_the_setting_is_a_time(text: Any, watch: Watch | None) -> None:
    assert Watch.of(text) == watch


@pytest.mark.parametrize("text", ["soon", 0, -1, "10m,abort", ",end", "nan"])
def test_a_setting_that_is_none_is_refused(
    text: Any, vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"watchdog=.*seconds .600. or a time"):
        make(watchdog=text)
    monkeypatch.setenv("HARMONY_WATCHDOG", str(text))
    with pytest.raises(ConfigError, match="the variable HARMONY_WATCHDOG: watchdog="):
        make()


def test_what_moves_is_not_reported_and_what_stands_is_once() -> None:
    schedule = Schedule.parse(
        "schedule minibatch=1\ndevice gpu0 memory=1 weight_slots=1x1 gradient_slots=1x1 "
        "stages=0x0\nprogram gpu0\n  h2d SwapIn W[0:1]\n  compute Record e0\nprogram host\n"
        "  update Wait e0\n"
    )
    program: Any = SimpleNamespace(name="gpu0", issuing=0, positions=dict)
    step: Any = SimpleNamespace(running={HOST: "Wait e0"}, spans=[], finished=[], threads={})
    now, said = [0.0], list[str]()
    watching = Watching(Watch(10.0), said.append)
    dog = Watchdog(watching, schedule, [program], step, lambda: now[0])

    def pass_time(seconds: float) -> None:
        for _ in range(int(seconds * LOOKS)):
            now[0] += 1 / LOOKS
            dog.look()

    for move in (
        lambda: setattr(program, "issuing", 1),
        lambda: setattr(program, "positions", lambda: {"h2d": (0, False)}),
        lambda: setattr(program, "positions", lambda: {"h2d": (0, True)}),
        lambda: step.spans.append(None),
        lambda: step.running.update({HOST: "Run"}),
        lambda: step.finished.append("gpu0"),
    ):
        pass_time(8)
        move()
    pass_time(8)
    assert said == []
    pass_time(40)
    (text,) = said
    assert "  gpu0 h2d stream is at SwapIn W[0:1]\n" in text
    assert "  gpu0 thread is done\n" in text
    assert "    > h2d     SwapIn W[0:1]\n    > compute Record e0\n" in text
    step.finished.append(HOST)
    pass_time(40)
    assert len(said) == 2
