"""The command line of `harmony-run plan`."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from harmony.core.files import MOST_DIGITS, is_folder
from harmony.core.options import MODES, PRECISIONS
from harmony.core.units import parse_bytes_with_unit, parse_rate
from harmony.errors import ConfigError
from harmony.profiling.catalog import HOSTS, TOPOLOGIES, find_gpu
from harmony.profiling.plan_request import PlanRequest
from harmony.profiling.presets import PRESETS
from harmony.report.text import FORMS, form_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


_EPILOG = """\
A model is a Hugging Face configuration, a folder that holds one, or a preset:
  {presets}
A profile is saved by:  harmony-run --save-profile gpt.json train.py
Files of the original Harmony's profiles are read as well.

  harmony-run plan --model llama-7b --gpu "RTX 4090" --host-memory 256GiB
  harmony-run plan --model ./config.json --lora 16 --tokens 4096 --host-memory 256GiB \\
                   --compare "RTX 4090" A100 4xL40S
  harmony-run plan --model-profile gpt.json --gpu "RTX 4090" --gpus 4 --host-memory 256GiB \\
                   --minibatch 64 --explain
  harmony-run plan --model-profile gpt.json --gpu A100 --host-memory 512GiB --save-plan a.json
  harmony-run plan --compare a.json b.json

A script that is called "plan" is run by: harmony-run ./plan
"""


class Read(argparse.Action):
    """An option whose text becomes what is asked for: ``convert`` takes its name and the text."""

    def __init__(self, *, convert: Callable[[str, Any], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._convert = convert

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None
    ) -> None:
        """Set the attribute that is named by ``dest``."""
        setattr(namespace, self.dest, self._convert(self.option_strings[0], values))


def named(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """Those options that a dataclass has fields of the same name for."""
    return {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting with a usage text."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Refuse the command line."""
        raise ConfigError(message)


def parse_plan(argv: Sequence[str]) -> PlanRequest:
    """Read the words after ``harmony-run plan``.

    Raises:
        ConfigError: if they make no sense.
        SystemExit: after ``--help`` has been printed.
    """
    parser = make_parser()
    args = parser.parse_args(list(argv))
    if args.config is not None:
        args = parser.parse_args([*words_of(args.config, parser), *argv])
    _check_model(args)
    args.compare, args.link_bytes_per_s = tuple(args.compare), rate(args.link)
    args.servers, args.network_bytes_per_s = args.servers or 1, rate(args.network)
    return PlanRequest(**named(args, PlanRequest))


def _check_model(args: argparse.Namespace) -> None:
    """Refuse options about a model that are not there, or twice.

    Raises:
        ConfigError: naming the option.
    """
    if args.model is not None and args.model_profile is not None:
        raise ConfigError("--model and --model-profile: name one of them")
    if args.model is not None and args.gpu is None and not args.compare:
        raise ConfigError('--gpu: which GPU? E.g. --gpu "RTX 4090"; --list-gpus shows all')
    if args.model is not None and args.host_memory_nbytes is None:
        raise ConfigError("--host-memory: how much memory has the host? E.g. 256GiB")
    for name in ("gpu", "report", "plan", "save_plan", "explain"):
        if args.compare and getattr(args, name):
            raise ConfigError(f"--compare shows a table: leave --{name.replace('_', '-')} out")
    if args.gpu is not None:
        find_gpu(args.gpu)  # refused before the model is looked at
    for name in ("tokens", "precision", "lora", "save_profile"):
        if getattr(args, name) is not None and args.model is None:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} describes the model of --model: add that")


def make_parser() -> Parser:
    """The options of ``harmony-run plan``."""
    parser = Parser(
        prog="harmony-run plan",
        description="Plan the training of a model on a machine, and show the plan.",
        epilog=_EPILOG.replace("{presets}", "\n  ".join(textwrap.wrap(", ".join(PRESETS), 95))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="CONFIG", help="a Hugging Face config.json, its folder, or a preset")
    add("--tokens", **COUNT, help="of each sample of --model (default: 2048, or its most)")
    add("--precision", choices=PRECISIONS, help="of --model (default: bf16, with fp32 masters)")
    add(
        "--lora",
        metavar="R",
        action=Read,
        convert=count,
        help="train adapters of this rank on the frozen --model",
    )
    add("--model-profile", metavar="FILE", type=Path, help="a saved model: its layers and costs")
    add("--save-profile", **IN_FOLDER, help="keep what was counted of --model")
    add_machine(parser, "(default: the machine of the profile)")
    add("--tf32", action="store_true", help="products of fp32 may run as TF32")
    add(
        "--clip",
        dest="clips",
        action="store_true",
        help="updates wait for the norm of all gradients",
    )
    add("--overlap-updates", action="store_true", help="updates may run into the next step")
    add("--servers", **COUNT, help="that train together, each such a machine (default: 1)")
    add(
        "--shard-optimizer-state",
        action="store_true",
        help="each server keeps and updates its part of it",
    )
    add(
        "--network",
        metavar="RATE",
        action=Read,
        convert=checked_rate,
        help="of each server, each way, e.g. 12.5GB/s",
    )
    add("--minibatch", **COUNT, help="samples of a step (default: the profile's; of --model 8)")
    add(
        "--microbatch",
        dest="microbatch_size",
        **COUNT,
        help="samples of a microbatch (default: the best)",
    )
    add("--plan", metavar="FILE", type=Path, help="show this saved plan instead of searching")
    add("--smallest-minibatch", action="store_true", help="that hides the transfers")
    add("--largest-model", action="store_true", help="that fits, with more of the same blocks")
    add(
        "--compare",
        nargs="+",
        metavar="A",
        default=(),
        help='GPUs by name, as "RTX 4090" 4xA100, in one table; or two saved plans',
    )
    add("--list-gpus", action="store_true", help="the GPUs that are known by name")
    return parser


def add_machine(parser: argparse.ArgumentParser, default_gpu: str) -> None:
    """Add what describes a machine and how its plan is shown: the same for every command.

    Args:
        default_gpu: what ``--gpu`` says of itself beside its example.
    """
    add = parser.add_argument
    add("--gpu", metavar="NAME", help=f'e.g. "RTX 4090" {default_gpu}')
    add("--gpus", **COUNT, help="how many GPUs (default: all that are there; of --gpu 1)")
    add("--gpu-memory", dest="gpu_memory_nbytes", **SIZE, help="bytes to use on each, e.g. 20GiB")
    add("--host-memory", dest="host_memory_nbytes", **SIZE, help="host memory to use, e.g. 256GiB")
    add("--host", metavar="KIND", help=f"of --gpu: {', '.join(kind.name for kind in HOSTS)}")
    add("--topology", choices=tuple(TOPOLOGIES), help="of --gpu: how the GPUs hang on the host")
    add(
        "--link",
        metavar="RATE",
        action=Read,
        convert=checked_rate,
        help="of each GPU's link to the host, e.g. 20GB/s",
    )
    add("--mode", choices=MODES, default="auto", help="pipeline, data parallel, or the fastest")
    add("--save-plan", **IN_FOLDER, help="keep the plan, for --plan FILE")
    add(
        "--report",
        metavar="FILE",
        action=Read,
        convert=report,
        help=f"also there: {', '.join(FORMS)}",
    )
    add("--explain", action="store_true", help="why everything was decided as it was")
    add("--json", dest="as_json", action="store_true", help="all figures of the plan as JSON")
    add("--config", metavar="FILE", type=Path, help="options as TOML; those of the line win")
    add("--debug", action="store_true", help="show the traceback of an error of Harmony")


def size(name: str, text: str) -> int:
    """Read the bytes that an option asks for.

    Raises:
        ConfigError: naming the option, if it is not a size, or does not say of what.
    """
    try:
        return parse_bytes_with_unit(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def rate(text: str | None) -> float | None:
    """The bytes per second of a text that `checked_rate` has seen."""
    return None if text is None else parse_rate(text)


def checked_rate(name: str, text: str) -> str:
    """Return the bytes per second that an option asks for, as text.

    Raises:
        ConfigError: naming the option, if it is not a rate.
    """
    try:
        rate(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return text


def count(name: str, text: str) -> int:
    """Read the whole number that an option asks for.

    Raises:
        ConfigError: naming the option, if it is not one of at least 1.
    """
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) < 1:
        raise ConfigError(f"{name} {text}: it takes a whole number, at least 1")
    return int(text)


def report(name: str, text: str) -> Path:
    """Return the file of a report, whose ending is known and whose folder is there.

    Raises:
        ConfigError: if they are not.
    """
    form_of(Path(text))
    return in_folder(name, text)


def whole(name: str, text: str) -> int:
    """Read a whole number of 64 bits that an option asks for.

    Raises:
        ConfigError: naming the option, if it is none.
    """
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) >= 2**63:
        raise ConfigError(f"{name} {text}: it takes a whole number from 0 on")
    return int(text)


def words_of(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a TOML file as words: ``gpus = 4`` is ``--gpus 4``.

    ``true`` and ``false`` are for options without a value; several values are a list.

    Raises:
        ConfigError: if it cannot be read, or names no option.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    lines = path.read_text(encoding="utf-8").splitlines()
    known = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option not in ("--config", "--help", "--version")
    }
    words = []
    for key, value in found.items():
        name = key.replace("_", "-")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{_place(path, lines, key)}: there is no option {key}{hint}")
        if isinstance(value, bool) != (known[name].nargs == 0):
            wanted = "true or false" if known[name].nargs == 0 else "a value"
            raise ConfigError(f"{_place(path, lines, key)}: {key} takes {wanted}")
        values = value if isinstance(value, list) else [value]
        if value is False:
            continue
        word = [f"--{name}", *(str(one) for one in values if one is not True)]
        try:
            parser.parse_args(word)
        except ConfigError as error:
            raise ConfigError(f"{_place(path, lines, key)}: {error}") from None
        words += word
    return words


def _place(path: Path, lines: Sequence[str], key: str) -> str:
    """Where a key of a TOML file is, for people."""
    begins = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
    found = [number for number, line in enumerate(lines, 1) if begins.match(line)]
    return f"--config {path}, line {found[0]}" if found else f"--config {path}"


def in_folder(name: str, text: str) -> Path:
    """Return a file to write, whose folder is there.

    Raises:
        ConfigError: naming the option, if it is not.
    """
    path = Path(text)
    if not is_folder(path.parent):
        raise ConfigError(f"{name} {path}: there is no folder {path.parent}")
    if is_folder(path):
        raise ConfigError(f"{name} {path}: that is a folder, name a file")
    return path


COUNT: dict[str, Any] = {"metavar": "N", "action": Read, "convert": count}
SIZE: dict[str, Any] = {"metavar": "SIZE", "action": Read, "convert": size}
IN_FOLDER: dict[str, Any] = {"metavar": "FILE", "action": Read, "convert": in_folder}
