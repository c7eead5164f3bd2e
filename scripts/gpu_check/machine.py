"""What machine it is, and what is installed."""

from __future__ import annotations

import contextlib
import io
import json
import platform
import shutil
import subprocess
from importlib import metadata

import torch

from gpu_check.steps import Note
from harmony.cli import doctor_command

_ASKED = (
    "name,driver_version,pcie.link.gen.current,pcie.link.width.current,memory.used,power.limit"
)
_PACKAGES = ("transformers", "deepspeed", "roundpipe", "pytest", "rich", "psutil", "nvidia-ml-py")


def describe(note: Note, small: bool) -> bool:
    """Note versions, GPUs, and what `harmony-run doctor` finds; errors of these fail the step."""
    note(
        what="software",
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=_cudnn(),
        architectures=torch.cuda.get_arch_list(),
    )
    note(what="packages", **{name: _version(name) for name in _PACKAGES})
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        note(
            what=f"GPU {number}",
            name=found.name,
            capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multi_processor_count,
            total_gib=total / 2**30,
            free_gib=free / 2**30,
        )
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        note(what="nvidia-smi", said=done.stdout.splitlines() or done.stderr[-300:])
    text = io.StringIO()
    with contextlib.redirect_stderr(io.StringIO()):
        errors = doctor_command.run(["--json"], text)
    for finding in json.loads(text.getvalue())["findings"]:
        if finding["status"] != "ok":
            note(what=f"doctor, {finding['status']}", name=finding["name"], said=finding["text"])
    return not errors


def _cudnn() -> int | str | None:
    try:
        found: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return str(error).partition(".")[0]
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
