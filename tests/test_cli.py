"""harmony-run: exit codes, messages, what a script sees, and the terminal it leaves behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harmony.cli import main as cli
from harmony.cli.progress import Progress
from harmony.core.options import Options, current_options
from harmony.errors import ConfigError
from harmony.planner.ir.plan_file import load_plan

TESTS = Path(__file__).parent

TRAIN = """
from harmony.report import session
from tests.synthetic import make_plan, make_timeline
record = session.register("GPT", {})
record.planned(make_plan(), make_timeline())
for step in range(3):
    record.stepped(session.StepStats(step, 5.0 - step, 8, 512, 0.5, make_timeline(2, 0.5)))
    print("step", step)
"""

GPUS = """
from harmony.core.options import current_options
print(current_options().gpus)
"""

Outcome = tuple[int, str, str]
RunScript = Callable[..., Outcome]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> RunScript:
    """Run a script's text in this process, without GPUs: exit code, output, errors."""
    monkeypatch.setattr(cli, "_set_up_gpus", lambda options, progress: None)
    monkeypatch.syspath_prepend("replaced")  # as the command's own folder is, by the script's

    def run_text(text: str, *words: str) -> Outcome:
        script = tmp_path / "train.py"
        script.write_text(text)
        code = cli.main([str(script), *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run_text


VERIFIED = """
from harmony.report import session
from harmony.verification.verification import Difference, Verification
from harmony.report.session import Verified
record = session.register("GPT", {{}})
gradients = tuple(Difference(f"w{{i}}", 1e-9, {relative} / (1 + i), 1e-5) for i in range(30))
raise Verified(Verification(gradients, (), 2.0, 2.0, 4, "the CPU"))
"""


@pytest.mark.parametrize(("relative", "expected"), [(1e-7, 0), (1e-3, 1)])
def test_verify_shows_the_worst_parameters_and_its_exit_code_says_whether_it_held(
    run: RunScript, relative: float, expected: int
) -> None:
    code, out, err = run(VERIFIED.format(relative=relative), "--verify")
    assert code == expected
    assert out.index("w0") < out.index("w19") < out.index("10 more")
    assert "w20" not in out
    assert ("DIFFERENT: largest relative difference 0.001 (w0)" in out) is (expected == 1)
    assert "30 gradients, 4 microbatches, loss 2 (plain PyTorch 2)" in out
    assert "--verify: stopped before training" in err


def test_verify_of_a_script_that_trains_nothing_fails(run: RunScript) -> None:
    code, _, err = run("print('hello')", "--verify")
    assert code == 1
    assert "nothing was compared" in err


def test_the_report_comes_after_what_the_script_prints(run: RunScript) -> None:
    code, out, _ = run(TRAIN)
    assert code == 0
    assert out.index("step 2") < out.index("Harmony · GPT")
    assert "3 steps, loss 5.0000 -> 3.0000" in out


def test_the_script_sees_what_python_would_show_it(run: RunScript, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("value = 7")
    before = list(sys.argv), list(sys.path), sys.modules["__main__"]
    code, out, _ = run(
        "import sys, neighbour, __main__\nlocal = 3\n"
        "print(sys.argv, __name__, __file__, neighbour.value, __main__.local)",
        "--gpus", "2", "--epochs", "3",
    )  # fmt: skip
    script = str(tmp_path / "train.py")
    assert out.startswith(f"['{script}', '--epochs', '3'] __main__ {script} 7 3")
    assert code == 0
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before


def test_a_session_is_over_when_the_command_ends(run: RunScript) -> None:
    _, out, _ = run(GPUS, "--gpus", "2")
    assert out.startswith("2\n")
    assert current_options() == Options()


def test_a_script_without_harmony_is_told_so(run: RunScript) -> None:
    code, out, err = run("print('hello')")
    assert (code, out) == (0, "hello\n")
    assert "never made a harmony.Harmony model" in err


def test_a_model_that_never_ran_is_named(run: RunScript) -> None:
    code, _, err = run(
        "import torch, harmony\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "model = harmony.Harmony(net)\n"
        "net(torch.randn(2, 4)).sum().backward()\n"
    )
    assert code == 0
    assert "a harmony.Harmony model of Sequential was made, but never ran" in err


@pytest.mark.parametrize(
    ("statement", "code", "shown"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('bad data')", 1, "bad data"),
        ("import sys; sys.exit(-1)", 255, ""),
    ],
)
def test_the_exit_code_is_the_scripts(
    run: RunScript, statement: str, code: int, shown: str
) -> None:
    found, out, err = run(f"{TRAIN}\n{statement}")
    assert found == code
    assert shown in err
    assert "Harmony · GPT" in out, "the report of what ran"


def test_an_exception_shows_the_users_frames_only(run: RunScript) -> None:
    code, out, err = run(f"{TRAIN}\ndef fail():\n    raise KeyError('lost')\nfail()")
    assert code == 1
    assert "KeyError: 'lost'" in err
    assert "in fail" in err
    assert "runpy" not in err
    assert "harmony/cli" not in err
    assert "3 steps" in out, "the report of what ran so far"


def test_a_syntax_error_shows_its_line(run: RunScript) -> None:
    code, _, err = run("x = = 1")
    assert code == 1
    assert "x = = 1" in err
    assert "runpy" not in err


def test_an_error_of_harmony_is_one_message(run: RunScript) -> None:
    text = "from harmony.errors import DoesNotFitError\nraise DoesNotFitError('layer 3 is big')"
    code, _, err = run(text)
    assert code == 1
    assert "harmony: error: layer 3 is big" in err
    assert "Traceback" not in err
    code, _, err = run(text, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "harmony: error: layer 3 is big" in err


def test_an_interrupt_says_where_and_reports(run: RunScript) -> None:
    code, out, err = run(f"{TRAIN}\nraise KeyboardInterrupt")
    assert code == 130
    assert err.count("interrupted") == 1
    assert "harmony: interrupted at step 3\n" in err
    assert "3 steps" in out


def test_what_was_not_saved_is_said_at_the_end(run: RunScript, tmp_path: Path) -> None:
    words = ("--checkpoint-dir", str(tmp_path / "runs"))
    code, _, err = run(TRAIN, *words)
    assert code == 0
    assert err.count("harmony: nothing was saved: the script makes no harmony.Run. Add run") == 1
    assert "harmony: nothing was saved" in run(TRAIN, "--async-save")[2]
    _, _, err = run(TRAIN)
    assert "saved" not in err
    code, _, err = run("raise ValueError('before the first step')", *words)
    assert code == 1 and "nothing was saved" not in err
    kept = (
        f"{TRAIN}\nfrom pathlib import Path\nsession.say('a word')\n"
        "session.keep(session.Keeping(Path('runs'), num_steps=7, saved_steps=5))\n"
    )
    _, _, err = run(kept, *words)
    assert "the last 2 of 7 steps are in no checkpoint in runs" in err
    assert "harmony: a word\n" in err
    _, _, err = run(kept.replace("=5", "=7"), *words)
    assert "no checkpoint" not in err


def test_plan_only_shows_the_plan_and_trains_nothing(run: RunScript) -> None:
    code, out, err = run(TRAIN, "--plan-only")
    assert code == 0
    assert "step 0" not in out
    assert out.startswith("Plan · GPT on vgpu:0, vgpu:1, minibatch 8\n")
    assert "gpu1  compute" in out
    assert "stopped before training" in err


def test_plan_only_has_a_form_for_programs(run: RunScript) -> None:
    code, out, _ = run(TRAIN, "--plan-only", "--json")
    assert code == 0
    assert json.loads(out)["minibatch"] == 8


def test_why_the_plan_was_chosen_is_explained_before_or_after_training(run: RunScript) -> None:
    for words in (("--explain",), ("--explain", "--plan-only")):
        _, out, _ = run(TRAIN, *words)
        assert "What was decided, and what else there was:" in out


def test_the_first_plan_is_kept_in_a_file(run: RunScript, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, _, err = run(TRAIN, "--save-plan", str(path))
    assert code == 0
    assert f"plan written to {path}" in err
    assert load_plan(path).minibatch == 8


def test_a_plan_that_cannot_be_read_is_refused_before_the_script_runs(
    run: RunScript, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{}")
    code, out, err = run(TRAIN, "--plan", str(path))
    assert (code, out) == (1, "")
    assert "not a plan of Harmony" in err


def test_a_module_runs_as_python_would_run_it(
    run: RunScript,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = tmp_path / "tools"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("value = 7")
    (package / "train.py").write_text(
        "import sys\nfrom tools.part import value\nprint(sys.argv, __name__, __package__, value)\n"
        "raise SystemExit(3)"
    )
    monkeypatch.chdir(tmp_path)
    code = cli.main(["-m", "tools.train", "--gpus", "2", "--epochs", "3"])
    file = package / "train.py"
    assert capsys.readouterr().out == f"['{file}', '--epochs', '3'] __main__ tools 7\n"
    assert code == 3
    (package / "train.py").write_text("def f():\n    raise ValueError('bad')\nf()")
    assert cli.main(["-m", "tools.train"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f'Traceback (most recent call last):\n  File "{file}", line 3')


def test_a_seed_makes_what_a_script_draws_repeatable(
    tmp_path: Path, run: RunScript, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "draw.py"
    script.write_text("import random, torch\nprint(random.random(), torch.rand(1).item())")
    drawn = []
    for seed in ("1", "1", "2"):
        assert cli.main(["--seed", seed, str(script)]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_log_is_shown_from_a_level_on(
    tmp_path: Path, run: RunScript, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    assert cli.main(["--log-level", "debug", str(script)]) == 0
    error = capsys.readouterr().err
    assert error.count("GPT: planned, 1.00 s a step expected") == 1
    assert "harmony: GPT: step 1, loss 4.0, 0.5 s" in error
    assert cli.main([str(script)]) == 0
    error = capsys.readouterr().err
    assert error.count("GPT: planned") == 1 and "loss 4.0" not in error


def test_the_report_goes_to_a_file_too(run: RunScript, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    code, out, err = run(TRAIN, "--report", str(path))
    assert code == 0
    assert "Harmony · GPT" in out
    assert str(path) in err
    assert json.loads(path.read_text())["models"][0]["num_steps"] == 3


def test_a_report_that_cannot_be_written_is_an_error(run: RunScript, tmp_path: Path) -> None:
    code, out, err = run(TRAIN, "--report", str(tmp_path / f"{'r' * 300}.json"))
    assert code == 1
    assert "cannot write the report" in err
    assert "Harmony · GPT" in out


def test_a_mistyped_option_is_named_when_the_script_stumbles_over_it(run: RunScript) -> None:
    code, _, err = run("import argparse; argparse.ArgumentParser().parse_args()", "--gpuss", "4")
    assert code == 2
    assert "did you mean --gpus?" in err


def test_a_bad_command_line_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["missing.py"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "harmony: error: no such script: missing.py\n")


def real_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_more_real_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real_gpus(monkeypatch, 2)
    progress = Progress(sys.stderr)
    cli._set_up_gpus(Options(gpus=2), progress)
    with pytest.raises(ConfigError, match="this machine has 2"):
        cli._set_up_gpus(Options(gpus=4), progress)
    with pytest.raises(ConfigError, match="--virtual"):
        cli._set_up_gpus(Options(link="8GB/s"), progress)


def test_for_gpus_that_are_not_there_it_does_not_matter_how_many_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[dict[str, object]] = []
    fake = SimpleNamespace(virtual_gpus=lambda **options: made.append(options), MAX_COUNT=16)
    monkeypatch.setitem(sys.modules, "harmony.vgpu.api", fake)  # type: ignore[arg-type]
    for present in (2, 0):
        real_gpus(monkeypatch, present)
        cli._set_up_gpus(Options(gpu="H100", gpus=64, plan_only=True), Progress(sys.stderr))
    assert made == [{"count": 1}]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("present", "virtual"), [(0, False), (2, True)])
def test_virtual_gpus_are_made_and_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    present: int,
    virtual: bool,
) -> None:
    real_gpus(monkeypatch, present)
    made: list[dict[str, object]] = []
    fake = SimpleNamespace(virtual_gpus=lambda **options: made.append(options), MAX_COUNT=16)
    monkeypatch.setitem(sys.modules, "harmony.vgpu.api", fake)  # type: ignore[arg-type]
    cli._set_up_gpus(Options(gpus=4, virtual=virtual, link="8GB/s"), Progress(sys.stderr))
    with pytest.raises(ConfigError, match="at most 16"):
        cli._set_up_gpus(Options(gpus=17, virtual=virtual), Progress(sys.stderr))
    assert made == [{"count": 4, "memory": 64 * 2**20, "link": "8GB/s"}]
    err = capsys.readouterr().err
    assert "4 virtual GPUs of 64.0 MiB" in err
    assert ("no NVIDIA GPU found" in err) is (present == 0)


def command(tmp_path: Path, text: str, *words: str) -> tuple[list[str], dict[str, str]]:
    """A command that runs a script's text in another process, without GPUs."""
    script = tmp_path / "train.py"
    script.write_text(text)
    start = (
        "import sys; from harmony.cli import main as cli; cli._set_up_gpus = lambda *a: None; "
        "sys.exit(cli.main())"
    )
    paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TERM": "xterm"}
    return [sys.executable, "-c", start, str(script), *words], env


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("number", "code", "words_of_it"),
    [(signal.SIGINT, 130, "interrupted at step 3"), (signal.SIGTERM, 143, "asked to end at")],
)
def test_a_signal_in_a_running_script_ends_it_with_its_report(
    tmp_path: Path, number: signal.Signals, code: int, words_of_it: str
) -> None:
    """The script sets the handler: a shell may have started the tests with SIGINT ignored."""
    text = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{TRAIN}"
    text += "\nprint('ready', flush=True)\nsignal.pause()"
    words, env = command(tmp_path, text)
    process = subprocess.Popen(
        words, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    while "ready" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code
    assert f"harmony: {words_of_it}" in err
    assert "Traceback" not in err
    assert "Harmony · GPT" in out


@pytest.mark.timeout(60)
def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    words, env = command(tmp_path, TRAIN + "import os; os.close(1); os.dup2(broken(), 1)")
    text = Path(words[3]).read_text().replace(
        "import os;", "import os\ndef broken():\n    r, w = os.pipe(); os.close(r); return w\n"
    )  # fmt: skip
    Path(words[3]).write_text(text)
    done = subprocess.run(words, env=env, text=True, capture_output=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.timeout(60)
def test_on_a_terminal_the_line_steps_aside_and_is_gone_at_the_end(tmp_path: Path) -> None:
    text = "from harmony.cli import progress\nprogress.REDRAW_S = 0\n" + TRAIN
    text = text.replace('print("step", step)', 'print("printed", step)')
    words, env = command(tmp_path, text)
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
    os.close(ours)
    assert process.returncode == 0
    output = shown.decode()
    assert "loss 4" in output
    assert "printed 2\r\n" in output
    screen = _screen(output)
    assert [line for line in screen if line.startswith("printed")] == [
        "printed 0", "printed 1", "printed 2",
    ]  # fmt: skip
    assert not any("samples/s" in line for line in screen if line.startswith("step"))
    assert "\x1b[?25l" not in output, "the cursor was never hidden"


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""  # Linux: the other end is closed


def _screen(output: str) -> list[str]:
    """Lines as they stand on the screen at the end: an erased line is gone."""
    lines = output.replace("\r\n", "\n").split("\n")
    return [line.rpartition("\x1b[2K")[2] for line in lines]
