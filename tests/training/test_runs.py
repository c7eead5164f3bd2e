"""harmony.Run: a run that was interrupted and resumed is the run that was not, to the last bit."""

from __future__ import annotations

import copy
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset

import harmony
from harmony.checkpoint import writing
from harmony.core.options import Every, Options
from harmony.errors import ConfigError, HarmonyError
from harmony.report import session
from harmony.runtime.interrupts import Ending
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import square_loss

ROOT = Path(__file__).parents[2]
EPOCHS, BATCHES = 3, 4

SCRIPT = """
import sys
from tests.training.test_runs import checksum, make, say, train
import harmony
harmony.virtual_gpus(count=2, memory="8MiB")
form, folder = sys.argv[1], (sys.argv[2:] or [None])[0]
state, losses = train(form, folder, say)
say("end " + checksum(state))
"""


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples with noise from torch's generator, drawn in the process that trains."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.sin(torch.arange(8.0) * (index + 1))
        return x + 0.1 * torch.randn(8), x


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8)
    )


def state_of(model: harmony.Harmony, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    values = [v for param in model.parameters() for v in optimizer.state[param].values()]
    return [
        *(v.cpu().clone() for v in (*model.module.state_dict().values(), *values)),
        torch.rand(2),
    ]


def checksum(state: list[torch.Tensor]) -> str:
    return " ".join(tensor.double().sum().item().hex() for tensor in state)


def train(
    form: str, folder: Any = None, heard: Any = lambda text: None, **options: Any
) -> tuple[list[torch.Tensor], list[float]]:
    """Train three epochs, in the step form or in a loop of one's own."""
    net, losses = make(), []
    own = form == "loop"
    optimizer: Any = None
    if own:
        model = harmony.Harmony(net, devices=1, seed=1)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    else:
        model = harmony.Harmony(
            net,
            optimizer=torch.optim.AdamW,
            optimizer_kwargs={"lr": 1e-2},
            loss_fn=square_loss,
            max_grad_norm=0.5,
            seed=1,
            devices=2,
            mode="pp",
        )
        optimizer = model.optimizer
    scheduler = StepLR(optimizer, 1, 0.5)
    generator = torch.Generator()
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, generator=generator)
    objects = {"scheduler": scheduler, **({"optimizer": optimizer} if own else {})}
    torch.manual_seed(7)
    with harmony.Run(model, folder, **{"every": 2, "keep": 2, **options}, **objects) as run:
        heard(f"start {run.resume()}")
        for epoch in run.epochs(EPOCHS):
            generator.manual_seed(epoch)
            for x, y in run.batches(loader):
                heard(f"step {run.num_steps}")
                if own:
                    loss = square_loss(model(x), y)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                else:
                    loss = model.train_step(x, y)
                losses.append(loss.item())
                run.extra["losses"] = [*run.extra.get("losses", []), loss.item()]
                run.step()
            scheduler.step()
        assert run.num_steps == EPOCHS * BATCHES
        return state_of(model, optimizer), run.extra["losses"]


def command(form: str, folder: Path, *, outside: bool) -> list[str]:
    script = folder.parent / "train.py"
    script.write_text(SCRIPT)
    if not outside:
        return [sys.executable, str(script), form, str(folder)]
    words = ["--checkpoint-dir", str(folder), "--checkpoint-every", "2", "--keep", "2"]
    run = [sys.executable, "-m", "harmony", str(script), *words, "--resume", "auto"]
    return [*run, "--virtual", "--gpus", "2", "--gpu-memory", "8MiB", "--", form]


def run_until(words: list[str], moment: str | None, number: int) -> tuple[int, str, str]:
    """Run a process; send it a signal once it has said something. Exit code and what it said."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    around = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=around, **streams, preexec_fn=_hear) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line == f"{moment}\n":
                process.send_signal(number)
        assert process.stderr is not None
        errors = process.stderr.read()
    return process.returncode, said, errors


def _hear() -> None:
    """Ignore no signal: who has started the tests (a shell, nohup) may have done so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def end_of(said: str) -> str:
    """What a process says of its state at the end; behind it harmony-run reports."""
    (line,) = re.findall(r"^end .+$", said, re.MULTILINE)
    return str(line)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How runs end that nobody interrupts."""
    ends = {}
    for form in ("step", "loop"):
        folder = tmp_path_factory.mktemp(form) / "runs"
        code, said, errors = run_until(command(form, folder, outside=False), None, 0)
        assert code == 0, errors
        ends[form] = end_of(said)
    return ends


@devices.virtual_only("its processes set them up")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "name", "outside"),
    [
        ("step", "SIGTERM", True),
        ("step", "SIGINT", False),
        ("step", "SIGKILL", False),
        ("loop", "SIGHUP", False),
        ("loop", "SIGINT", True),
        ("loop", "SIGKILL", True),
    ],
)
def test_a_process_that_is_stopped_and_started_again_ends_as_one_that_was_not(
    form: str, name: str, outside: bool, whole: dict[str, str], tmp_path: Path
) -> None:
    words = command(form, tmp_path / "runs", outside=outside)
    number = signal.Signals[name]
    code, said, errors = run_until(words, "step 6", number)
    assert "step 6\n" in said
    assert "end " not in said
    assert "Traceback" not in errors
    if name == "SIGKILL":
        assert code == -number
    else:
        assert code == 128 + number
        step = len(re.findall(r"^step \d+$", said, re.MULTILINE))
        assert f"{name}: the run ends after {step} steps, saved in " in errors
        assert (tmp_path / "runs" / f"step-{step:08}" / "manifest.json").exists()
    code, said, errors = run_until(words, None, 0)
    assert code == 0, errors
    begun = int(said.split()[1])
    assert begun >= 6
    assert f"harmony: resumed at step {begun} from " in errors
    assert end_of(said) == whole[form]
    assert len(list((tmp_path / "runs").iterdir())) == 2


# In one process


@pytest.fixture
def calm() -> Iterator[None]:
    """Handlers of signals are as they were, whatever a test leaves behind."""
    before = {number: signal.getsignal(number) for number in Ending.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("form", ["step", "loop"])
@pytest.mark.parametrize("at", [0, 3, 6, 11])
def test_wherever_it_is_interrupted_it_goes_on(
    form: str, at: int, vgpus: VirtualGPUs, tmp_path: Path, calm: None
) -> None:
    """In the first step and the last, and at the end of an epoch."""
    expected, losses = train(form)

    def stop(text: str) -> None:
        if text == f"step {at}":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        train(form, tmp_path, stop, every=100)
    assert ended.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{at + 1:08}"]
    state, again = train(form, tmp_path)
    assert again == losses
    assert all(map(torch.equal, state, expected))
    # It is over, and going on from there trains nothing more.
    said: list[str] = []
    state, again = train(form, tmp_path, said.append)
    assert said == [f"start {EPOCHS * BATCHES}"]
    assert again == losses
    assert signal.getsignal(signal.SIGTERM) is not None
    assert not isinstance(signal.getsignal(signal.SIGTERM), Ending)


def test_a_damaged_checkpoint_is_passed_over_aloud(
    vgpus: VirtualGPUs, tmp_path: Path, calm: None
) -> None:
    expected, losses = train("step", tmp_path, every=5)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000010", "step-00000012"]
    (tmp_path / names[-1] / "state.json").write_bytes(b"{}")
    said: list[str] = []
    with pytest.warns(UserWarning, match=r"passed over a damaged checkpoint: .*00012.state.json"):
        state, again = train("step", tmp_path, said.append)
    assert said[0] == "start 10"
    assert again == losses
    assert all(map(torch.equal, state, expected))


def small(**options: Any) -> harmony.Harmony:
    given: dict[str, Any] = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    return harmony.Harmony(make(), loss_fn=square_loss, devices=1, seed=1, **{**given, **options})


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 8, generator=generator)
    return x, x.flip(0)


def test_what_resume_does_is_what_was_asked_for(
    vgpus: VirtualGPUs, tmp_path: Path, calm: None
) -> None:
    root, model = tmp_path / "a", small()
    run = harmony.Run(model, root, every=1)
    assert run.resume() == 0
    for step in range(3):
        model.train_step(*batch(step))
        run.step()
    run.close()
    assert harmony.Run(small(), root).resume() == 3
    assert harmony.Run(small(), None, resume=root).resume() == 3
    assert harmony.Run(small(), root, resume=root).resume() == 3
    assert harmony.Run(small(), tmp_path / "b", resume=root / "step-00000002").resume() == 2
    assert harmony.Run(small(), tmp_path / "b", resume=None).resume() == 0
    for options, match in (
        ({"resume": None}, r"holds checkpoints already, step-00000003 .* resume='auto'"),
        ({"resume": root / "step-00000002"}, r"step-00000003, which does not lead to .*00002"),
        ({"resume": tmp_path / "none"}, "there are no checkpoints in"),
    ):
        with pytest.raises(ConfigError, match=match):
            harmony.Run(small(), root, **options).resume()
    other = tmp_path / "other"
    small_model = small()
    small_model.train_step(*batch(0))
    small_model.save_checkpoint(other)
    with pytest.raises(ConfigError, match="does not lead to"):
        harmony.Run(small(), other, resume=root).resume()
    assert harmony.Run(small(), other).resume() == 1, "one that no run has written"
    late = small()
    late.train_step(*batch(0))
    with pytest.raises(ConfigError, match=r"has not called run\.resume"):
        harmony.Run(late, root).step()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "neither a number of steps"),
        ({"every": "soon"}, "'soon' is neither a number of steps .100. nor a time"),
        ({"every": "-3m"}, "neither"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], match: str, vgpus: VirtualGPUs, calm: None
) -> None:
    with pytest.raises(ConfigError, match=match):
        harmony.Run(small(), "nowhere", **options)


def test_periods_are_steps_or_time(vgpus: VirtualGPUs, tmp_path: Path, calm: None) -> None:
    assert Every.of("15m") == Every(seconds=900.0)
    assert Every.of("7") == Every.of(7) == Every(steps=7)
    assert Every.of(None) == Every(seconds=1800.0)
    model = small()
    with harmony.Run(model, tmp_path, every="2h") as run:
        model.train_step(*batch(0))
        run.step()
        assert not list(tmp_path.iterdir())
        run._saved_s -= 7300
        model.train_step(*batch(1))
        run.step()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
        model.train_step(*batch(2))
        run.step()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000002", "step-00000003"], "what is left is saved at the end"


def test_data_whose_position_nothing_knows_is_refused(
    vgpus: VirtualGPUs, tmp_path: Path, calm: None
) -> None:
    model = small()
    run = harmony.Run(model, tmp_path)
    with pytest.raises(ConfigError, match=r"not in run\.batches"):
        for epoch in run.epochs(2):
            model.train_step(*batch(epoch))
            run.step()
    run = harmony.Run(model, tmp_path, every=1)
    with pytest.raises(ConfigError, match="for a second time in one epoch"):
        for _ in range(2):
            for x, y in run.batches([batch(0), batch(1)]):
                model.train_step(x, y)
                run.step()
    again = harmony.Run(small(), tmp_path)
    again.resume()
    with pytest.raises(ConfigError, match=r"2 batches into epoch 0, and the loader has 1"):
        list(again.batches([batch(0)]))
    run.close()


class Positioned:
    """A loader that knows where it is, as torchdata's StatefulDataLoader."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while self.at < 3:
            self.at += 1
            yield batch(self.at)
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("through", [False, True])
def test_a_loader_that_knows_its_position_is_not_wound_forward(
    through: bool, vgpus: VirtualGPUs, tmp_path: Path, calm: None
) -> None:
    seen: list[int] = []

    def work(stop: int) -> None:
        model, data = small(), Positioned()
        run = harmony.Run(model, tmp_path, every=1, data=data)
        run.resume()
        for _ in run.epochs(2):
            for x, y in run.batches(data) if through else data:
                model.train_step(x, y)
                seen.append(data.at)
                run.step()
                if run.num_steps == stop:
                    return run.close()
        return run.close()

    for stop in (2, 3, 5, 6):
        work(stop)
    assert seen == [1, 2, 3, 1, 2, 3]


def test_without_a_folder_a_run_does_nothing(vgpus: VirtualGPUs, calm: None) -> None:
    model, before = small(), signal.getsignal(signal.SIGTERM)
    with harmony.Run(model) as run:
        assert run.resume() == 0
        assert run.save() is None
        model.train_step(*batch(0))
        run.step()
        assert signal.getsignal(signal.SIGTERM) is before


# Signals


def test_when_to_save_without_a_folder_is_warned_of(vgpus: VirtualGPUs) -> None:
    with pytest.warns(harmony.HarmonyWarning, match="no folder, so nothing is saved"):
        harmony.Run(small(), every=2)


def test_a_second_signal_does_what_it_did_before(
    vgpus: VirtualGPUs, tmp_path: Path, calm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harmony.runtime.interrupts.SAME_S", 0.0)
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = harmony.Run(small(), tmp_path)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, "nohup"
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    another = harmony.Run(small(), tmp_path)
    another.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run.close()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM] * 2


def test_ctrl_c_twice_in_a_step_stops_it_and_what_was_whole_is_saved(
    vgpus: VirtualGPUs, tmp_path: Path, calm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harmony.runtime.interrupts.SAME_S", 0.0)
    model = small()
    with (
        pytest.raises(KeyboardInterrupt),
        harmony.Run(model, tmp_path, save_on_error=True) as run,
    ):
        model.train_step(*batch(0))
        run.step()
        variants = model._engine.variants
        ready = variants.ready

        def twice(*args: Any, **kwargs: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return ready(*args, **kwargs)

        monkeypatch.setattr(variants, "ready", twice)
        model.train_step(*batch(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# Errors


class Counter:
    """Something of the script's that has a state, and changes at the top of the loop."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make()
        self.broken = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.broken:
            raise ValueError("the forward has failed")
        return self.inner(x)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("where", ["data", "step", "after"])
def test_an_error_saves_the_step_before_it_if_that_is_whole(
    own: bool,
    where: str,
    vgpus: VirtualGPUs,
    tmp_path: Path,
    calm: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What the loop had drawn and counted for the step that failed is not in the checkpoint."""

    def work(net: Breaks, folder: Any, fails: bool) -> tuple[list[torch.Tensor], int]:
        counter, optimizer = Counter(), torch.optim.AdamW(net.parameters(), lr=0.01)
        objects: dict[str, Any] = {"counter": counter}
        if own:
            model = harmony.Harmony(net, devices=1, seed=1)
            objects["optimizer"] = optimizer
        else:
            options = {"optimizer": torch.optim.AdamW, "optimizer_kwargs": {"lr": 0.01}}
            model = harmony.Harmony(net, loss_fn=square_loss, devices=1, seed=1, **options)
        with harmony.Run(model, folder, every=100, save_on_error=True, **objects) as run:
            for step in range(run.resume(), 4):
                counter.value += 1
                x = batch(step)[0] + torch.randn(8, 8)
                now = fails and step == 2
                if now and where == "data":
                    raise ValueError("no data")
                net.broken = now and where == "step"
                if own:
                    square_loss(model(x), x).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                else:
                    model.train_step(x, x)
                if now and where == "after":
                    raise ValueError("before run.step()")
                run.step()
            used = optimizer if own else model.optimizer
            assert used is not None
            return state_of(model, used), counter.value

    torch.manual_seed(0)
    net = Breaks()
    fresh, third = copy.deepcopy(net), copy.deepcopy(net)
    torch.manual_seed(3)
    expected, count = work(net, None, fails=False)
    torch.manual_seed(3)
    with pytest.raises((ValueError, HarmonyError), match=r"no data|has failed|before run"):
        work(fresh, tmp_path, fails=True)
    err = caplog.text
    if where == "after":
        assert "in the middle of step 2: its state is not that of a step, and is not saved" in err
        assert not tmp_path.exists() or not list(tmp_path.iterdir())
        return
    assert "after 2 steps: their state is saved in" in err
    torch.manual_seed(99)
    state, again = work(third, tmp_path, fails=False)
    assert count == again == 4
    assert all(map(torch.equal, state, expected))


def test_an_error_saves_nothing_that_is_saved_or_torn(
    vgpus: VirtualGPUs, tmp_path: Path, calm: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = small()
    with (
        pytest.raises(ValueError, match="by the way"),
        harmony.Run(model, tmp_path, every=1, save_on_error=True) as run,
    ):
        model.train_step(*batch(0))
        run.step()
        raise ValueError("by the way")
    assert "ValueError" not in caplog.text
    with (
        pytest.raises(ValueError, match="torn"),
        harmony.Run(model, tmp_path, every=100, save_on_error=True) as run,
    ):
        assert run.resume() == 1
        model.train_step(*batch(1))
        run.step()
        model._engine.whole._torn = "an update failed"
        raise ValueError("torn")
    assert "the state cannot be saved: an earlier step failed" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# Under harmony-run


@pytest.fixture
def outside() -> Iterator[Any]:
    """Options of the command line, as `harmony-run` sets them."""

    def use(**options: Any) -> None:
        session.activate(Options(active=True, **options))

    yield use
    session.deactivate()


def test_the_command_line_comes_before_the_script(
    outside: Any, vgpus: VirtualGPUs, tmp_path: Path, calm: None
) -> None:
    folder, theirs = tmp_path / "ours", tmp_path / "theirs"
    outside(checkpoint_dir=folder, checkpoint_every=Every(steps=2), keep=1)
    model = small()
    run = harmony.Run(model, theirs, every=1, keep=5)
    run.resume()
    for step in range(5):
        model.train_step(*batch(step))
        run.step()
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    assert not theirs.exists()
    (keeping,) = session.keepings()
    assert (keeping.folder, keeping.num_steps, keeping.saved_steps) == (folder, 5, 4)
    with pytest.raises(ConfigError, match=r"with one harmony\.Run"):
        harmony.Run(small())
    run.close()
    outside(checkpoint_dir=folder)
    with pytest.raises(ConfigError, match="holds checkpoints already"):
        harmony.Run(small()).resume()
    outside(checkpoint_dir=folder, resume="auto")
    assert harmony.Run(small()).resume() == 5
    outside(resume="auto")
    with pytest.raises(ConfigError, match="Add --checkpoint-dir"):
        harmony.Run(small())
    outside(resume=str(folder))
    assert harmony.Run(small(), theirs, resume=None).resume() == 5


@pytest.mark.parametrize("own", [False, True])
def test_a_script_that_does_not_resume_is_refused_before_its_first_step(
    own: bool, outside: Any, vgpus: VirtualGPUs, tmp_path: Path, calm: None
) -> None:
    outside(checkpoint_dir=tmp_path, resume="auto")
    model = harmony.Harmony(make(), devices=1) if own else small()
    values = copy.deepcopy(model.module.state_dict())
    with pytest.raises(ConfigError, match=r"--resume auto: .* without having resumed it. Add"):
        model(batch(0)[0]) if own else model.train_step(*batch(0))
    assert all(torch.equal(values[n], t) for n, t in model.module.state_dict().items())
    with torch.no_grad():
        model(batch(0)[0])  # nothing is trained by that
    run = harmony.Run(model)
    run.resume()
    model(batch(0)[0]) if own else model.train_step(*batch(0))
    run.close()


@pytest.mark.parametrize("kind", ["of the kernel", "a file"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_training(
    vgpus: VirtualGPUs, tmp_path: Path, kind: str
) -> None:
    """Not after the half hour until the first checkpoint; nothing is made meanwhile."""
    (tmp_path / "file").touch()
    folder = Path("/proc/runs") if kind == "of the kernel" else tmp_path / "file" / "runs"
    with pytest.raises(harmony.ConfigError, match=f"cannot be written to {folder}: "):
        harmony.Run(small(), folder)
    harmony.Run(small(), tmp_path / "new" / "runs").close()
    assert not (tmp_path / "new").exists()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk that takes nothing while this holds an error number."""
    write, numbers = writing._write_all, []

    def written(*args: Any) -> None:
        if numbers:
            raise OSError(numbers[0], os.strerror(numbers[0]))
        write(*args)

    monkeypatch.setattr(writing, "_write_all", written)
    return numbers


@pytest.mark.parametrize("form", ["step", "loop"])
def test_a_full_disk_is_a_warning_and_the_next_checkpoint_is_tried(
    form: str, vgpus: VirtualGPUs, tmp_path: Path, calm: None, full: list[int]
) -> None:
    expected, losses = train(form)

    def fill(text: str) -> None:
        if text == "step 3":
            full.append(errno.ENOSPC)
        if text == "step 7":
            full.clear()

    with pytest.warns(harmony.HarmonyWarning, match="No space left.*Training goes on") as said:
        state, kept = train(form, tmp_path, fill)
    assert [str(w.message).partition(" to ")[0] for w in said] == [
        f"cannot write the checkpoint of step {step}" for step in (4, 6)
    ]
    assert kept == losses
    assert all(map(torch.equal, state, expected))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000010", "step-00000012"]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(
    vgpus: VirtualGPUs, tmp_path: Path, calm: None, full: list[int]
) -> None:
    model = small()
    with (
        pytest.warns(harmony.HarmonyWarning, match=r"Input/output error.*Training goes on"),
        pytest.raises(harmony.NotSavedError, match=r"of step 1 .*Input/output error"),
        harmony.Run(model, tmp_path, every=1) as run,
    ):
        full.append(errno.EIO)
        model.train_step(*batch(0))
        run.step()
