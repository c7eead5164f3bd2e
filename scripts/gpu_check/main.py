"""The command line: runs the steps one after the other, and keeps what they find."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_check.page import as_text
from gpu_check.steps import STEPS, Step

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("psutil", "networkx", "nvidia-ml-py", "rich", "safetensors", "numpy"),
    *("pytest", "pytest-timeout", "hypothesis"),
)
LIMIT_S = 480
FORMAT, VERSION = "harmony gpu-check", 1


def main(text: str | None) -> int:
    """Do what the command line says; return the exit code.

    Args:
        text: what ``--help`` says.
    """
    args = parse_arguments(text or "")
    if args.list:
        print(*(f"{step.name:12} {step.what}" for step in STEPS), sep="\n")
        return 0
    if args.fetch:
        return fetch()
    if args.child is not None:
        return run_here(args.child, args.small, args.out)
    why = why_not()
    if why:
        print(f"gpu-check: {why}", file=sys.stderr)
        return 2
    return run_all(args)


def parse_arguments(text: str) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=Path, default=Path("gpu-check-results"), metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="keep the steps that are done")
    parser.add_argument("--small", action="store_true", help="tiny models: a rehearsal")
    parser.add_argument("--steps", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--list", action="store_true", help="name the steps")
    parser.add_argument("--fetch", action="store_true", help="download the packages it needs")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args()


def fetch() -> int:
    """Put the packages beside torch where a checkout finds them."""
    words = [sys.executable, "-m", "pip", "install", "--upgrade", "--target"]
    return subprocess.run([*words, str(ROOT / "build" / "gpu-check"), *PACKAGES]).returncode


def why_not() -> str | None:
    """Say why nothing can be checked here; None if something can."""
    try:
        import torch
    except ImportError as error:
        return f"{error}: a CUDA build of torch has to be installed"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA GPU on this machine"
    try:
        import harmony.module  # noqa: F401
    except ImportError as error:
        return (
            f"{error}: install it, or run scripts/gpu-check --fetch where there is a network and "
            "bring build/gpu-check along"
        )
    return None


def run_all(args: argparse.Namespace) -> int:
    """Run the steps that were asked for, and write what is known after each."""
    signal.signal(signal.SIGTERM, _stop)  # as at the end of a lease: no step runs on
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.json"
    found: dict[str, Any] = {"format": FORMAT, "version": VERSION, "small": args.small}
    found |= {"commit": commit(), "steps": {}}
    if args.resume and results.exists():
        found = resumed(json.loads(results.read_text(encoding="utf-8")), found)
    if not found["steps"]:
        for step in STEPS:
            forget(args.out, step)
    for step in STEPS:
        if step.name not in args.steps or found["steps"].get(step.name, {}).get("state") == "ok":
            continue
        print(f"{step.name}: {step.what} ...", flush=True)
        found["steps"][step.name] = done = run_step(step, args)
        print(f"{step.name}: {done['state']}, {done['seconds']:.0f} s", flush=True)
        write(results, json.dumps(found, indent=1) + "\n")
        write(args.out / "page.txt", as_text(found))
    print(f"\n{as_text(found)}\nAll of it: {results}")
    return int(any(step["state"] not in ("ok", "skipped") for step in found["steps"].values()))


def resumed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What to go on with: what was found by the same commit, else nothing."""
    same = all(before.get(key) == now[key] for key in ("format", "version", "commit", "small"))
    if not same:
        print("--resume: the results there are of another commit or size; starting anew")
    return before if same else now


def run_step(step: Step, args: argparse.Namespace) -> dict[str, Any]:
    """Run a step in a process of its own, and end it when its time is over."""
    figures, log = figures_of(args.out, step), args.out / f"{step.name}.log"
    if not (args.resume and step.goes_on):
        forget(args.out, step)
    words = [sys.executable, str(ROOT / "scripts" / "gpu-check"), "--child", step.name]
    words += ["--out", str(args.out), *(["--small"] if args.small else [])]
    start_s = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    found = noted(figures)
    skipped = next((f["skipped"] for f in found if "skipped" in f), None)
    state = "timed out" if code is None else "FAILED" if code else "skipped" if skipped else "ok"
    return {
        "state": state,
        "seconds": time.monotonic() - start_s,
        "figures": found,
        "error": last_lines(log) if state in ("FAILED", "timed out") else None,
    }


def figures_of(out: Path, step: Step) -> Path:
    """Where a step writes what it finds, a line each."""
    return out / f"{step.name}.jsonl"


def noted(figures: Path) -> list[dict[str, Any]]:
    """What a step has written there so far; a line that it had not ended counts for nothing."""
    lines = figures.read_text(encoding="utf-8").splitlines(True) if figures.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forget(out: Path, step: Step) -> None:
    """Remove what a step has found: it is to begin anew."""
    if figures_of(out, step).is_file():
        figures_of(out, step).unlink()


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_here(name: str, small: bool, out: Path) -> int:
    """Run a step in this process."""
    if "FAKECUDA_KERNELS" in os.environ:  # the rehearsal without a GPU
        from tests.cuda import standin

        standin.install()
    step = next(step for step in STEPS if step.name == name)
    before = noted(figures_of(out, step))
    with figures_of(out, step).open("w", encoding="utf-8") as file:

        def note(**figures: Any) -> None:
            file.write(json.dumps(figures, default=str) + "\n")
            file.flush()

        good = step.run(note, small, before) if step.goes_on else step.run(note, small)
        return 0 if good else 1


def last_lines(log: Path, count: int = 12) -> str:
    """The end of what a step printed."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def commit() -> str:
    """The commit of the checkout, if git knows it."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write(path: Path, text: str) -> None:
    """Replace a file, or leave it as it was."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
