"""The command line of `harmony-run plan`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from harmony.core.files import MOST_DIGITS, is_folder
from harmony.core.units import parse_bytes, parse_rate
from harmony.errors import ConfigError
from harmony.profiling.catalog import HOSTS, TOPOLOGIES
from harmony.profiling.plan_request import PlanRequest

MODES = ("auto", "pp", "dp")

_EPILOG = """\
A profile is saved by:  harmony-run --save-profile gpt.json train.py
Files of the original Harmony's profiles are read as well.

  harmony-run plan --model-profile gpt.json --gpu "RTX 4090" --gpus 4 --host-memory 256GiB \\
                   --minibatch 64 --explain
  harmony-run plan --model-profile gpt.json --gpu A100 --host-memory 512GiB --save-plan a.json
  harmony-run plan --compare a.json b.json

A script that is called "plan" is run by: harmony-run ./plan
"""


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
    args = _parser().parse_args(list(argv))
    return PlanRequest(
        model_profile=args.model_profile,
        gpu=args.gpu,
        gpus=None if args.gpus is None else count("--gpus", args.gpus),
        host_memory_nbytes=size("--host-memory", args.host_memory),
        gpu_memory_nbytes=size("--gpu-memory", args.gpu_memory),
        host=args.host,
        topology=args.topology,
        link_bytes_per_s=rate("--link", args.link),
        minibatch=None if args.minibatch is None else count("--minibatch", args.minibatch),
        mode=args.mode,
        microbatch_size=(
            None if args.microbatch is None else count("--microbatch", args.microbatch)
        ),
        tf32=args.tf32,
        plan=args.plan,
        save_plan=None if args.save_plan is None else in_folder("--save-plan", args.save_plan),
        compare=None if args.compare is None else (args.compare[0], args.compare[1]),
        as_json=args.json,
        explain=args.explain,
        smallest_minibatch=args.smallest_minibatch,
        largest_model=args.largest_model,
        list_gpus=args.list_gpus,
        debug=args.debug,
    )


def _parser() -> Parser:
    parser = Parser(
        prog="harmony-run plan",
        description="Plan the training of a saved model on a machine, and show the plan.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-profile", metavar="FILE", type=Path, help="the model: its layers and costs")
    add("--gpu", metavar="NAME", help='e.g. "RTX 4090" (default: the machine of the profile)')
    add("--gpus", metavar="N", help="how many (default: 1, or those of the profile)")
    add("--gpu-memory", metavar="SIZE", help="bytes to use on each, e.g. 20GiB")
    add("--host-memory", metavar="SIZE", help="memory of the host, e.g. 256GiB")
    add("--host", metavar="KIND", help=f"its memory: {', '.join(kind.name for kind in HOSTS)}")
    add("--topology", choices=tuple(TOPOLOGIES), help="how the GPUs hang on the host")
    add("--link", metavar="RATE", help="of each GPU's link to the host, e.g. 20GB/s")
    add("--tf32", action="store_true", help="products of fp32 may run as TF32")
    add("--minibatch", metavar="N", help="samples of a step (default: as in the profile)")
    add("--microbatch", metavar="N", help="samples of a microbatch (default: the best)")
    add("--mode", choices=MODES, default="auto", help="pipeline, data parallel, or the fastest")
    add("--plan", metavar="FILE", type=Path, help="show this saved plan instead of searching")
    add("--save-plan", metavar="FILE", type=Path, help="keep the plan, for harmony-run --plan")
    add("--explain", action="store_true", help="why everything was decided as it was")
    add("--smallest-minibatch", action="store_true", help="that hides the transfers")
    add("--largest-model", action="store_true", help="that fits, with more of the same blocks")
    add("--json", action="store_true", help="all figures as JSON")
    add("--compare", nargs=2, metavar=("A", "B"), type=Path, help="two saved plans")
    add("--list-gpus", action="store_true", help="the GPUs that are known by name")
    add("--debug", action="store_true", help="show the traceback of an error of Harmony")
    return parser


def size(name: str, text: str | None) -> int | None:
    """Read the bytes that an option asks for.

    Raises:
        ConfigError: naming the option, if it is not a size.
    """
    try:
        return None if text is None else parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def rate(name: str, text: str | None) -> float | None:
    """Read the bytes per second that an option asks for.

    Raises:
        ConfigError: naming the option, if it is not a rate.
    """
    try:
        return None if text is None else parse_rate(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def count(name: str, text: str) -> int:
    """Read the whole number that an option asks for.

    Raises:
        ConfigError: naming the option, if it is not one of at least 1.
    """
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) < 1:
        raise ConfigError(f"{name} {text}: it takes a whole number, at least 1")
    return int(text)


def in_folder(name: str, path: Path) -> Path:
    """Return a file to write, whose folder is there.

    Raises:
        ConfigError: naming the option, if it is not.
    """
    if not is_folder(path.parent):
        raise ConfigError(f"{name} {path}: there is no folder {path.parent}")
    if is_folder(path):
        raise ConfigError(f"{name} {path}: that is a folder, name a file")
    return path
