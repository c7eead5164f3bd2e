"""The command line of `harmony-run`: which words are ours, which are the script's.

    harmony-run [OPTIONS] SCRIPT [OPTIONS] [SCRIPT ARGUMENTS]

Our options are taken wherever they stand. A word after SCRIPT that is none of them goes to the
script, and so does everything after ``--``.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmony.cli.plan_arguments import (
    IN_FOLDER,
    Parser,
    Read,
    add_machine,
    count,
    named,
    whole,
    words_of,
)
from harmony.core.files import is_file, is_folder
from harmony.core.options import PRECISIONS, Every, Options
from harmony.core.version import __version__
from harmony.errors import ConfigError
from harmony.profiling.catalog import find_gpu, find_host

_EPILOG = """\
Options may stand before SCRIPT or after it; --seed, --config and --log-level only before it, as
scripts have such options too. Everything else after SCRIPT goes to the script;
"--" ends the options, for a script with options of the same names.

  harmony-run train.py --gpus 4 --epochs 3
  harmony-run train.py --gpus 2 --virtual --gpu-memory 64MiB -- --mode fast
  harmony-run --plan-only train.py --gpus 4 --explain
  harmony-run --plan-only train.py --gpu "RTX 4090" --gpus 4 --host-memory 256GiB

  harmony-run -m my_package.train --gpus 2
  harmony-run --config runs/a.toml train.py            gpus = 4, gpu-memory = "20GiB", ...

  harmony-run plan --help     plans a model on any machine, without a script; compares
  harmony-run doctor          what this machine is like, and what to do about it
  harmony-run completion bash   (zsh, fish)    lets the shell complete all of this
A script that is called "plan", "doctor" or "completion" is run by: harmony-run ./plan
"""


@dataclass(frozen=True)
class Command:
    """What to run, and how.

    Attributes:
        script: the file.
        module: the module that was named by ``-m`` instead of a file.
        script_arguments: its ``sys.argv[1:]``.
        options: of the session.
        debug: whether errors of Harmony show their traceback.
        seed: for random numbers of torch, Python and NumPy, before the script begins.
        log_level: what is shown of the logger ``harmony``; None: nothing.
    """

    script: Path
    script_arguments: tuple[str, ...]
    options: Options
    debug: bool = False
    module: str | None = None
    seed: int | None = None
    log_level: str | None = None


_ONLY_BEFORE = frozenset({"-h", "--help", "--version", "--config", "--seed", "--log-level"})
"""Options that scripts have too: behind SCRIPT they are the script's."""

LOG_LEVELS = ("debug", "info", "warning", "error")


def parse(argv: Sequence[str]) -> Command:
    """Read the command line (without the program's name).

    Raises:
        ConfigError: if it cannot be read or makes no sense.
        SystemExit: after ``--help`` or ``--version`` have been printed.
    """
    parser = make_parser()
    ours, script, rest = _split(argv, parser)
    args = parser.parse_args(ours)
    if args.config is not None:
        args = parser.parse_args([*words_of(args.config, parser), *ours])
    if script is None:
        raise ConfigError("which script? Usage: harmony-run SCRIPT --gpus N [script arguments]")
    if script.startswith("-m "):
        return _module(script[3:], rest, args)
    path = Path(script)
    if is_folder(path):
        raise ConfigError(f"{script} is a folder. Name the script in it")
    if not is_file(path):
        hint = _similar_file(path)
        if script == "plan":
            hint = ". The command comes first: harmony-run plan --model-profile FILE ..."
        raise ConfigError(f"no such script: {script}{hint}")
    return _command(args, path, rest)


def _module(name: str, rest: Sequence[str], args: argparse.Namespace) -> Command:
    """A command that runs a module as ``python -m`` would.

    Raises:
        ConfigError: if there is no such module.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError):
        found = None
    finally:
        sys.path.pop(0)
    if found is None or found.origin is None:
        raise ConfigError(f"-m {name}: no such module, or a package without __main__")
    return _command(args, Path(found.origin), rest, name)


def _command(
    args: argparse.Namespace, script: Path, rest: Sequence[str], module: str | None = None
) -> Command:
    _check_elsewhere(args)
    options = Options(active=True, **named(args, Options))
    return Command(script, tuple(rest), options, args.debug, module, args.seed, args.log_level)


def mistyped(script_arguments: Sequence[str]) -> str | None:
    """A hint, where a word that went to the script looks like an option of ours."""
    for word in script_arguments:
        near = _near(word)
        if near is not None:
            return f"{word} is not an option of harmony-run and went to the script; {near}"
    return None


def make_parser() -> Parser:
    """The options of ``harmony-run SCRIPT``."""
    parser = Parser(
        prog="harmony-run",
        usage="harmony-run (SCRIPT | -m MODULE) --gpus N [OPTIONS] [SCRIPT ARGUMENTS]",
        description="Train a PyTorch script's model although it is larger than the GPUs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    add_machine(parser, "(with --plan-only: GPUs that are not there)")
    add(
        "--precision",
        choices=PRECISIONS,
        help="compute in fp32, or in bf16 or fp16 with fp32 masters",
    )
    add("--virtual", action="store_true", help="virtual GPUs even where there are real ones")
    add("--plan-only", action="store_true", help="show the plan and stop before training")
    add(
        "--plan",
        metavar="FILE",
        action=Read,
        convert=_plan,
        help="train by this saved plan, or refuse it",
    )
    add("--save-profile", **IN_FOLDER, help="keep layers and costs, for plan")
    add(
        "--overlap-updates",
        action="store_true",
        help="make updates behind the next step's forwards, the same bits",
    )
    no = {"action": "store_false"}
    add("--no-replan", dest="replan", **no, help="keep the first plan, whatever steps take")
    add("--no-cache", dest="cache", **no, help="measure again what earlier runs measured")
    add("--verify", action="store_true", help="compare the first step with plain PyTorch and stop")
    folder = {"metavar": "DIR", "action": Read, "convert": _checkpoints}
    add("--checkpoint-dir", **folder, help="save the script's harmony.Run there")
    period = {"metavar": "N|MINm", "action": Read, "convert": _every}
    add("--checkpoint-every", **period, help="steps or minutes between two (default: 30m)")
    add(
        "--keep",
        metavar="K",
        action=Read,
        convert=count,
        help="checkpoints to keep (default: all)",
    )
    add("--async-save", action="store_true", help="train on while a checkpoint is written")
    resume = {"metavar": "auto|DIR", "action": Read, "convert": _resume}
    add("--resume", **resume, help="go on from the newest one, or from that in DIR")
    seed = {"metavar": "N", "action": Read, "convert": whole}
    add("--seed", **seed, help="of torch, Python and NumPy, before the script begins")
    add("--log-level", choices=LOG_LEVELS, help="show the logger harmony from this level on")
    add("--version", action="version", version=f"harmony {__version__}")
    return parser


def _split(
    argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[list[str], str | None, list[str]]:
    """Divide the words: ours, SCRIPT, the script's."""
    takes_value = {
        name: action.nargs != 0 for action in parser._actions for name in action.option_strings
    }
    ours: list[str] = []
    rest: list[str] = []
    script: str | None = None
    words = list(argv)
    while words:
        word = words.pop(0)
        name = word.partition("=")[0]
        if word == "--":
            if script is None and words:
                script = words.pop(0)
            return ours, script, rest + words
        # The script has a --help of its own; ours is asked for before SCRIPT.
        is_ours = name in takes_value and not (script and name in _ONLY_BEFORE)
        if is_ours:
            ours.append(word)
            if takes_value[name] and word == name and words:
                ours.append(words.pop(0))
        elif script is not None:
            rest.append(word)
        elif word == "-m":
            if not words:
                raise ConfigError("-m: which module?")
            script = f"-m {words.pop(0)}"
        elif word.startswith("-"):
            near = _near(word) or "see harmony-run --help"
            raise ConfigError(f"no such option: {word}; {near}")
        else:
            script = word
    return ours, script, rest


def _plan(name: str, text: str) -> Path:
    if not is_file(Path(text)):
        raise ConfigError(f"no such plan: {text}")
    return Path(text)


def _checkpoints(name: str, text: str) -> Path:
    if is_file(Path(text)):
        raise ConfigError(f"{name} {text}: that is a file, name a folder")
    return Path(text)


def _resume(name: str, text: str) -> str:
    if text != "auto" and not is_folder(_checkpoints(name, text)):
        raise ConfigError(f"{name} {text}: there is no such folder. It takes auto, or one")
    return text


def _every(name: str, text: str) -> Every:
    try:
        return Every.of(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _check_elsewhere(args: argparse.Namespace) -> None:
    """Refuse options that go together only to plan for GPUs that are not there."""
    if args.as_json and not args.plan_only:
        raise ConfigError("--json shows a plan: add --plan-only (or see --report FILE.json)")
    if args.gpu is None:
        for name in ("host", "topology"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name} describes the machine of --gpu NAME: add that")
        return
    if not args.plan_only:
        raise ConfigError(
            f"--gpu {args.gpu}: planning for GPUs by name goes with --plan-only. How many GPUs to"
            " use here is --gpus N"
        )
    find_gpu(args.gpu)
    if args.host is not None:
        find_host(args.host)
    if args.host_memory_nbytes is None:
        raise ConfigError(
            "--host-memory: how much memory has the host of that machine? E.g. 256GiB"
        )
    if args.virtual or args.plan is not None:
        raise ConfigError("--gpu plans for GPUs not there: leave --virtual and --plan out")


def _near(word: str) -> str | None:
    """``did you mean --gpus?`` for a word that is almost an option."""
    name = word.partition("=")[0]
    known = [option for action in make_parser()._actions for option in action.option_strings]
    if not name.startswith("--") or name in known:
        return None
    swapped = [option for option in known if sorted(option) == sorted(name)]
    close = swapped or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else None


def _similar_file(path: Path) -> str:
    if not is_folder(path.parent):
        return f" (there is no folder {path.parent})"
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix == ".py"]
    except OSError:  # a folder that may not be looked into
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f". Did you mean {path.parent / close[0]}?" if close else ""
