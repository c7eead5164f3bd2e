"""Checkpoints that are written while training goes on: the files of one that is waited for."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.checkpoint import writing
from harmony.runtime.unsaved import Unsaved
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, square_loss, token_batch, token_loss, vector_batch

PATIENCE_S = 60


class Gate:
    """Holds the thread that writes until somebody waits for it, or the test opens it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.copied_nbytes: list[int] = []
        self.waits = 0
        write, copied, wait = writing._write_all, Unsaved._copy, Unsaved._wait

        def written(*args: Any) -> None:
            if threading.current_thread().name == "harmony-save" and self.is_closed:
                assert self.open.wait(PATIENCE_S)
            write(*args)

        def copying(unsaved: Unsaved, unit: Any) -> None:
            self.copied_nbytes.append(unit.nbytes)
            copied(unsaved, unit)

        def waiting(unsaved: Unsaved, unit: Any, check: Any) -> None:
            if unit.is_unread:
                self.waits += 1
                self.open.set()
            wait(unsaved, unit, check)

        self.is_closed = False
        monkeypatch.setattr(writing, "_write_all", written)
        monkeypatch.setattr(Unsaved, "_copy", copying)
        monkeypatch.setattr(Unsaved, "_wait", waiting)
        begin = Unsaved.begin
        monkeypatch.setattr(Unsaved, "begin", lambda unsaved: (self.close(), begin(unsaved)))
        end = writing.Writer.json

        def beside(writer: writing.Writer, name: str, data: object) -> None:
            end(writer, name, data)
            self.is_closed = name == "state.json"  # from here on there are parameters alone

        monkeypatch.setattr(writing.Writer, "json", beside)

    def close(self) -> None:
        self.open.clear()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


def trained(net: nn.Module, **options: Any) -> harmony.Harmony:
    settings: dict[str, Any] = {
        "optimizer": torch.optim.AdamW,
        "optimizer_kwargs": {"lr": 1e-2},
        "loss_fn": token_loss,
        "microbatch_size": 4,
        "mode": "pp",
        "devices": 2,
        "device_memory": "440KiB",
        "seed": 5,
    }
    return harmony.Harmony(net, **{**settings, **options})


def small(**options: Any) -> harmony.Harmony:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    return harmony.Harmony(
        net, optimizer=torch.optim.AdamW, loss_fn=square_loss, devices=1, seed=1, **options
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = vector_batch(step, width=8)
    return x, y


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16"},
        {"max_grad_norm": 0.5},
        {"device_memory": "8MiB", "devices": 1},  # all stays on the GPU, and is updated there
        {"optimizer": torch.optim.Adafactor},
    ],
    ids=["packs", "bf16", "clipped", "resident", "one step of all"],
)
def test_the_files_are_those_of_a_save_that_is_waited_for(
    options: dict[str, Any], vgpus: VirtualGPUs, tmp_path: Path, gate: Gate
) -> None:
    """Nothing is read before somebody is about to change it."""
    model = trained(GPT(dropout=0.1), **options)
    for step in range(4):
        model.train_step(*token_batch(step))
        if step in (1, 2):
            model.save_checkpoint(tmp_path / "waited for", extra=step)
            model.save_checkpoint(tmp_path / "meanwhile", extra=step, async_save=True)
    gate.open.set()
    model.finish_saving()
    assert files(tmp_path / "waited for") == files(tmp_path / "meanwhile")
    assert len(gate.copied_nbytes) + gate.waits > 0


def test_copies_take_at_most_two_packs(vgpus: VirtualGPUs, tmp_path: Path, gate: Gate) -> None:
    model = trained(GPT())
    model.train_step(*token_batch(0))
    model.save_checkpoint(tmp_path, async_save=True)
    model.train_step(*token_batch(1))
    gate.open.set()
    saving = model.saving
    model.finish_saving()
    assert saving is not None
    sizes = {n: 3 * p.nbytes + 4 for n, p in model.module.named_parameters()}
    two_packs = model._engine.two_packs_nbytes(sizes)
    assert 0 < saving.copied_nbytes <= two_packs < sum(sizes.values())
    assert gate.waits


def test_a_loop_of_ones_own_waits_where_its_optimizer_steps(
    vgpus: VirtualGPUs, tmp_path: Path, gate: Gate
) -> None:
    """And ``param.data`` is given out only once the old values are safe."""
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    model = harmony.Harmony(net, devices=1, seed=1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)

    def step(number: int) -> None:
        optimizer.zero_grad()
        square_loss(model(batch(number)[0]), batch(number)[1]).backward()
        optimizer.step()

    step(0)
    model.save_checkpoint(tmp_path / "whole", optimizer=optimizer)
    for number, change in enumerate([lambda: step(1), lambda: net[0].weight.data.mul_(2)]):
        root = tmp_path / str(number)
        model.load_checkpoint(tmp_path / "whole", optimizer=optimizer)
        model.save_checkpoint(root, optimizer=optimizer, async_save=True)
        change()
        gate.open.set()
        model.finish_saving()
        assert files(root) == files(tmp_path / "whole")


def test_a_state_that_is_loaded_meanwhile_is_not_the_one_that_is_saved(
    vgpus: VirtualGPUs, tmp_path: Path, gate: Gate
) -> None:
    model = small()
    model.train_step(*batch(0))
    model.save_checkpoint(tmp_path / "whole")
    model.save_checkpoint(tmp_path / "meanwhile", async_save=True)
    model.load_state_dict({n: torch.zeros_like(t) for n, t in model.state_dict().items()})
    model.finish_saving()
    assert files(tmp_path / "whole") == files(tmp_path / "meanwhile")


def test_what_is_changed_in_place_meanwhile_is_not_saved_half(
    vgpus: VirtualGPUs, tmp_path: Path, gate: Gate
) -> None:
    model = small()
    model.train_step(*batch(0))
    model.save_checkpoint(tmp_path)
    model.train_step(*batch(1))
    model.save_checkpoint(tmp_path, async_save=True)
    with torch.no_grad():
        model.module[0].weight.mul_(2)
    gate.open.set()
    with pytest.raises(harmony.NotSavedError, match=r"0.weight .* changed in place while it was"):
        model.finish_saving()
    assert model.load_checkpoint(tmp_path).step == 1


def test_memory_that_somebody_holds_is_written_first(vgpus: VirtualGPUs, tmp_path: Path) -> None:
    model = small()
    model.train_step(*batch(0))
    alias = model.module[2].bias.detach().numpy()
    with pytest.warns(harmony.HarmonyWarning, match=r"holds the memory of 2\.bias"):
        model.save_checkpoint(tmp_path, async_save=True)
    assert model.saving is None
    assert model.load_checkpoint(tmp_path).step == 1
    del alias


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_is_said_and_leaves_what_was_there(
    number: int, vgpus: VirtualGPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    model.train_step(*batch(0))
    model.save_checkpoint(tmp_path)
    before, expected = files(tmp_path), [p.clone() for p in model.parameters()]
    write = writing._write_all
    for after in range(0, 30, 3):
        left = [after]

        def written(*args: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(number, os.strerror(number))
            write(*args)

        monkeypatch.setattr(writing, "_write_all", written)
        model.save_checkpoint(tmp_path, async_save=True, extra=after)
        saving = model.saving
        assert saving is not None
        saving.wait()
        if left[0] >= 0:
            break
        with pytest.warns(harmony.HarmonyWarning, match=os.strerror(number)):
            model.train_step(*batch(0))
        with pytest.raises(harmony.NotSavedError, match=os.strerror(number)):
            model.finish_saving()
        model.finish_saving()  # it is said once
        assert files(tmp_path) == before
        monkeypatch.setattr(writing, "_write_all", write)
        assert model.load_checkpoint(tmp_path).step == 1
    assert after > 9
    assert all(map(torch.equal, expected, model.parameters()))


def test_what_is_interrupted_before_all_is_safe_is_no_checkpoint(
    vgpus: VirtualGPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not if the script may change, from then on, what nobody would hear of."""
    model = small()
    model.train_step(*batch(0))
    write, interrupted = writing._write_all, threading.Event()

    def written(*args: Any) -> None:
        if not interrupted.is_set():
            signal.raise_signal(signal.SIGINT)
            assert interrupted.wait(PATIENCE_S)
        write(*args)

    monkeypatch.setattr(writing, "_write_all", written)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.save_checkpoint(tmp_path, async_save=True)
    finally:
        signal.signal(signal.SIGINT, before)
        interrupted.set()
    with pytest.raises(harmony.NotSavedError, match="of step 1 was interrupted"):
        model.finish_saving()
    assert not list(tmp_path.iterdir())
    model.train_step(*batch(1))
    model.save_checkpoint(tmp_path, async_save=True)
    model.finish_saving()
    assert model.load_checkpoint(tmp_path).step == 2


def test_state_on_gpus_for_which_the_host_has_no_room_is_not_copied(
    vgpus: VirtualGPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the system ends the process; a run goes on without this checkpoint."""
    model = small(updates="auto")
    with harmony.Run(model, tmp_path, every=1) as run:
        model.train_step(*batch(0))
        with monkeypatch.context() as scarce:
            scarce.setattr("harmony.checkpoint.optimizers.available_host_nbytes", lambda: 1000)
            with pytest.warns(harmony.HarmonyWarning, match=r"lie on GPUs, .* 1000 B free"):
                run.step()
        assert not list(tmp_path.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("form", ["step", "loop"])
def test_a_run_that_saves_meanwhile_is_the_run_that_does_not(
    form: str, vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    from tests.training.test_runs import train

    expected, losses = train(form, tmp_path / "waits")

    def stop(text: str) -> None:
        if text == "step 6":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        train(form, tmp_path / "goes on", stop, async_save=True)
    names = sorted(path.name for path in (tmp_path / "goes on").iterdir())
    assert names == ["step-00000006", "step-00000007"]
    state, kept = train(form, tmp_path / "goes on", async_save=True)
    assert kept == losses
    assert all(map(torch.equal, state, expected))
    assert files(tmp_path / "waits") == files(tmp_path / "goes on")


def test_a_run_tries_again_after_a_checkpoint_that_failed_meanwhile(
    vgpus: VirtualGPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that fails last is written again at the end, or the end is an error."""
    write, full = writing._write_all, [True]

    def written(*args: Any) -> None:
        if full:
            raise OSError(errno.ENOSPC, "the disk is full")
        write(*args)

    monkeypatch.setattr(writing, "_write_all", written)
    model = small()
    with (
        pytest.warns(harmony.HarmonyWarning, match=r"of step 1 .*full"),
        pytest.raises(harmony.NotSavedError, match=r"of step 1 .*full"),
        harmony.Run(model, tmp_path, every=1, async_save=True) as run,
    ):
        model.train_step(*batch(0))
        run.step()
    with (
        pytest.warns(harmony.HarmonyWarning, match=r"of step 2 .*full"),
        harmony.Run(model, tmp_path, every=1, async_save=True) as run,
    ):
        model.train_step(*batch(1))
        run.step()
        assert model.saving is not None
        model.saving.wait()
        full.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
