"""The console command `harmony-run`: runs a training script with Harmony configured.

`harmony-run plan` plans a saved model instead (see `harmony.cli.plan_command`),
`harmony-run doctor` says what the machine is like (`harmony.cli.doctor_command`), and `harmony-run
completion` is for shells (`harmony.cli.completion_command`).

Exit codes: the script's own; 1 for an exception of the script or an error of Harmony, if
``--verify`` found a difference, or if nothing fits; 2 for a command line that makes no sense;
130 for Ctrl-C; 143 if the process is asked to end (SIGTERM). Either way the report is written.
"""

from __future__ import annotations

import contextlib
import logging
import random
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from harmony.cli import completion_command, doctor_command, plan_command
from harmony.cli.arguments import Command, mistyped, parse
from harmony.cli.plan_arguments import parse_plan
from harmony.cli.progress import Progress
from harmony.cli.save_plans import Keeper
from harmony.cli.streams import flush_output, open_streams, stop_writing
from harmony.core.options import Options
from harmony.core.units import format_bytes
from harmony.errors import ConfigError, HarmonyError
from harmony.planner.ir.plan_file import load_plan
from harmony.report import session
from harmony.report.plan_view import explanation, view_of
from harmony.report.session import Verified
from harmony.report.text import print_report, write_report

if TYPE_CHECKING:
    from harmony.verification.verification import Verification

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

VIRTUAL_MEMORY_NBYTES = 64 * 2**20
"""Memory of a virtual GPU if the command line does not say: small, to have something to stream."""


class _Terminated(SystemExit):
    """Somebody has asked the process to end: the script tidies up as behind ``sys.exit``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: the words after ``harmony-run``; default: those of this process.
    """
    try:
        with _terminable():
            code = _main(argv)
    except KeyboardInterrupt:  # before the script, or behind it
        code = EXIT_INTERRUPTED
    except _Terminated:
        code = EXIT_TERMINATED
    if argv is None and code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends: no traceback, no other exit code
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the script as an exception, so that its report is written."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        raise _Terminated(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _main(argv: Sequence[str] | None) -> int:
    """Do what `main` does."""
    open_streams()
    progress = Progress(sys.stderr)
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["plan"]:
        return _answer("the plan", _plan, words[1:], progress)
    if words[:1] == ["doctor"]:
        return _answer("the findings", doctor_command.run, words[1:], progress)
    if words[:1] == ["completion"]:
        return _answer("the script", completion_command.run, words[1:], progress)
    try:
        command = parse(words)
    except ConfigError as error:
        progress.say(f"error: {error}")
        return EXIT_USAGE
    with session.running(command.options):
        session.observe(progress)
        session.hear(progress.say)
        session.observe(Keeper(command.options, progress.say))
        try:
            if command.options.plan is not None:
                load_plan(command.options.plan)  # refused before the script has done anything
            _set_up_gpus(command.options, progress)
            _seed(command.seed)
        except HarmonyError as error:
            return _refuse(error, progress, debug=command.debug)
        code = _run(command, progress)
        return _finish(command, progress, code)


def _plan(words: Sequence[str], out: TextIO) -> int:
    """Run ``harmony-run plan`` and return the exit code."""
    plan_command.run(parse_plan(words), out)
    return 0


def _answer(
    what: str,
    command: Callable[[Sequence[str], TextIO], int],
    words: Sequence[str],
    progress: Progress,
) -> int:
    """Run a command that only writes to standard output, and return the exit code."""
    code = 0
    try:
        code = command(words, sys.stdout)
        flush_output()
    except BrokenPipeError:
        _reader_has_gone()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except HarmonyError as error:
        return _refuse(error, progress, debug="--debug" in words)
    except OSError as error:
        return _lost(what, error, progress)
    return code


def _refuse(error: HarmonyError, progress: Progress, *, debug: bool) -> int:
    """Say why nothing was started; the exit code says whether the command line is to blame."""
    if debug:
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc()
    progress.say(f"error: {error}")
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_ERROR


def _set_up_gpus(options: Options, progress: Progress) -> None:
    """Make sure that there are as many GPUs as asked for; make virtual ones where needed.

    Raises:
        ConfigError: if there are fewer real GPUs than asked for, or an option needs virtual ones.
        VirtualGPUError: if the virtual GPU cannot be built.
    """
    import torch  # late: a wrong command line is refused without waiting for torch

    if torch.cuda.is_available() and not options.virtual:
        if options.gpu is not None:  # what is planned for is not here
            return
        present = torch.cuda.device_count()
        if options.gpus is not None and options.gpus > present:
            raise ConfigError(
                f"--gpus {options.gpus}: this machine has {present}. "
                f"Use --gpus {present}, or --virtual to try more GPUs than there are"
            )
        if options.link is not None:
            raise ConfigError("--link sets the speed of virtual GPUs: add --virtual")
        return
    from harmony.vgpu.api import virtual_gpus
    from harmony.vgpu.torch_device import MAX_COUNT

    if options.gpu is not None:  # only the model is looked at
        virtual_gpus(count=1)
        return
    count = options.gpus or 1
    if count > MAX_COUNT:
        raise ConfigError(f"--gpus {count}: there are at most {MAX_COUNT} virtual GPUs")
    memory = options.gpu_memory_nbytes or VIRTUAL_MEMORY_NBYTES
    virtual_gpus(count=count, memory=memory, link=options.link)
    why = "" if options.virtual else "no NVIDIA GPU found: "
    link = f" behind {options.link} links" if options.link else ""
    size = format_bytes(memory)
    gpus = f"1 virtual GPU of {size}" if count == 1 else f"{count} virtual GPUs of {size} each"
    progress.say(f"{why}training on {gpus}{link} (PyTorch's CPU kernels)")


def _seed(seed: int | None) -> None:
    """Seed what scripts draw from, as they would at their beginning."""
    if seed is None:
        return
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    with contextlib.suppress(ImportError):
        import numpy as np

        np.random.seed(seed % 2**32)


class _Shown(logging.Handler):
    """Shows what is logged as whole lines, beside the line of progress."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message."""
        self._say(record.getMessage())


@contextmanager
def _showing_log(level: str | None, say: Callable[[str], None]) -> Iterator[None]:
    """Show the logger ``harmony`` from a level on while the block runs."""
    if level is None:
        yield
        return
    before, handler = session.LOG.level, _Shown(say)
    session.LOG.setLevel(level.upper())
    session.LOG.addHandler(handler)
    try:
        yield
    finally:
        session.LOG.removeHandler(handler)
        session.LOG.setLevel(before)


def _run(command: Command, progress: Progress) -> int:
    """Run the script as ``__main__`` and return the exit code that it earned."""
    code = 0
    try:
        shown = _showing_log(command.log_level, progress.say)
        with _as_main(command), progress.around_output(), shown:
            if command.module is not None:
                runpy.run_module(command.module, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(command.script), run_name="__main__")
        if command.options.verify:
            progress.say("--verify: the script trained no step, so nothing was compared")
            code = EXIT_ERROR
    except session.PlanOnly:
        progress.say("--plan-only: stopped before training")
    except Verified as found:
        code = _show(found.verification, progress)
    except _Terminated:
        progress.say(f"asked to end at step {progress.next_step}")
        code = EXIT_TERMINATED
    except SystemExit as error:
        code = _exit_code(error)
    except KeyboardInterrupt:
        progress.say(f"interrupted at step {progress.next_step}")
        code = EXIT_INTERRUPTED
    except HarmonyError as error:
        if command.debug:
            _print_traceback(error, command.script)
        hint = "" if command.debug else "\n  (--debug shows where it was raised)"
        progress.say(f"error: {error}{hint}")
        code = EXIT_ERROR
    except BaseException as error:
        _print_traceback(error, command.script)
        code = EXIT_ERROR
    return _flush(code, progress)


def _show(verification: Verification, progress: Progress) -> int:
    """Print the comparison with plain PyTorch; the exit code says whether it held."""
    from rich.console import Console

    try:
        Console().print(verification.table())
        sys.stdout.write(verification.summary() + "\n")
        flush_output()
    except OSError as error:
        return _lost("the comparison", error, progress)
    progress.say("--verify: stopped before training")
    return 0 if verification.ok else EXIT_ERROR


def _finish(command: Command, progress: Progress, code: int) -> int:
    """Print and write the report of what ran."""
    records = [record for record in session.records() if record.runs]
    if command.options.verify:  # nothing was trained: what there is to say has been said
        records = []
    hint = mistyped(command.script_arguments) if code else None
    if hint:
        progress.say(hint)
    if not session.records() and code == 0:
        progress.say(
            f"{command.script} never made a harmony.Harmony model, so there is nothing to report. "
            "Wrap the module: model = harmony.Harmony(module, ...)"
        )
    for idle in (record for record in session.records() if not record.runs):
        if code == 0 and not command.options.verify:
            progress.say(
                f"a harmony.Harmony model of {idle.name} was made, but never ran: nothing was "
                "trained by it. Call the model itself, not the module that it wraps or a part of "
                "it, or model.train_step(inputs, targets)"
            )
    _say_what_is_kept(command.options, progress)
    if not records:
        return code
    try:
        _show_runs(records, command.options)
        flush_output()
    except BrokenPipeError:
        _reader_has_gone()
    except OSError as error:
        code = code or _lost("the report", error, progress)
    if command.options.report is None:
        return code
    try:
        write_report(records, command.options.report)
    except HarmonyError as error:
        progress.say(f"error: {error}")
        return code or EXIT_ERROR
    progress.say(f"report written to {command.options.report}")
    return code


def _say_what_is_kept(options: Options, progress: Progress) -> None:
    """Say what a script has not saved, though it was asked to."""
    asked = (options.checkpoint_dir, options.checkpoint_every, options.keep, options.resume)
    wanted = options.async_save or any(option is not None for option in asked)
    if options.plan_only or options.verify:
        return
    trained = any(record.runs for record in session.records())
    if trained and not session.keepings() and wanted:
        progress.say(
            "nothing was saved: the script makes no harmony.Run. Add run = harmony.Run(model) "
            "and, behind each step, run.step()"
        )
    for keeping in session.keepings():
        lost = keeping.num_steps - keeping.saved_steps
        if keeping.folder is not None and lost:
            progress.say(
                f"the last {lost} of {keeping.num_steps} steps are in no checkpoint in "
                f"{keeping.folder}: with harmony.Run(...) as run: saves them when the script ends"
            )


def _show_runs(records: Sequence[session.ModelRecord], options: Options) -> None:
    """Print what was planned, or the report of what ran."""
    if options.plan_only:
        for record in records:
            plan_command.show(
                view_of(record, profiled=True), sys.stdout, options.as_json, options.explain
            )
        return
    print_report(records)
    for record in records:
        if options.explain and record.run is not None:
            plan_command.write_lines(["", *explanation(record.run.plan)], sys.stdout)


def _reader_has_gone() -> None:
    """Stop writing (`| head`). Python would complain once more when it exits."""
    stop_writing(sys.stdout)


def _lost(what: str, error: OSError, progress: Progress) -> int:
    """Say that standard output did not take something; return the exit code."""
    stop_writing(sys.stdout)
    progress.say(f"error: cannot write {what}: {error}")
    return EXIT_ERROR


@contextmanager
def _as_main(command: Command) -> Iterator[None]:
    """Give the script the ``sys.argv`` and ``sys.path[0]`` that python would give it."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(command.script), *command.script_arguments]
    # As `harmony-run`, sys.path[0] is the folder of that command; as `python -m`, the cwd.
    folder = command.script.resolve().parent if command.module is None else Path.cwd()
    sys.path[0] = str(folder)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _exit_code(error: SystemExit) -> int:
    """What python would exit with; prints a text argument as python does."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{error.code}\n")
    return EXIT_ERROR


def _print_traceback(error: BaseException, script: Path) -> None:
    """Print the traceback as python would have: from the script's frame on."""
    frames = _from_script(error.__traceback__, script)
    with contextlib.suppress(OSError, ValueError):  # standard error is closed, or its disk full
        traceback.print_exception(type(error), error, frames)


def _from_script(frames: TracebackType | None, script: Path) -> TracebackType | None:
    """Cut off the frames above the script's; none are left if it never began (a SyntaxError)."""
    here = frames
    while here is not None and here.tb_frame.f_code.co_filename != str(script):
        here = here.tb_next
    return here


def _flush(code: int, progress: Progress) -> int:
    """Write out what the script has printed; return its exit code, or 1 if some of it is lost."""
    try:
        flush_output()
    except BrokenPipeError:
        _reader_has_gone()
    except ValueError:
        return code  # the script has closed it
    except OSError as error:
        return code or _lost("what the script printed", error, progress)
    return code
