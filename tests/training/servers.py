"""Runs functions in several processes that form a group over gloo.

One launch runs many functions, one after the other, as each process takes seconds to start.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

ENDED = "it has ended"
"""In place of what a process that has not come to the end of a function would have found."""

LIMIT_S = 250.0
"""For all of a launch; then each process says where it is, and ends."""


def on_servers(
    size: int, *calls: str, timeout_s: float = 60.0, races: bool = True
) -> dict[str, list[Any]]:
    """Call functions ``module:name`` with ``(rank, size)`` in each of ``size`` processes.

    Args:
        timeout_s: of the group.
        races: whether what runs is checked for races.

    Returns:
        By name, per rank, what it returned, or the text of what it raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TESTS_FOLDER": folder}
        line = [sys.executable, "-m", "tests.training.servers", folder, str(size)]
        line += [str(timeout_s), str(int(races)), *calls]
        with Path(folder, "log").open("wb") as log:
            started = [
                subprocess.Popen(
                    line, cwd=ROOT, env={**environment, "RANK": str(rank)}, stdout=log, stderr=log
                )
                for rank in range(size)
            ]
            for process in started:
                process.wait()
        said = Path(folder, "log").read_text(errors="replace")
        found = {
            call.partition(":")[2]: [_found(folder, call, r) for r in range(size)]
            for call in calls
        }
    sys.stderr.write(said[-6000:])
    return found


def _found(folder: str, call: str, rank: int) -> Any:
    path = Path(folder, f"{call.rpartition(':')[2]}-{rank}")
    return pickle.loads(path.read_bytes()) if path.exists() else ENDED


def _main(folder: str, size: int, timeout_s: float, races: bool, calls: list[str]) -> None:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    import torch
    import torch.distributed as dist

    from tests import devices, race_check

    rank = int(os.environ["RANK"])
    del os.environ["RANK"]
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    wait = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    for call in calls:
        module, _, name = call.partition(":")
        try:
            gc.collect()
            devices.provide(count=2, memory="64MiB")
            with race_check.checked(ordered_frees=True) if races else nullcontext():
                found = getattr(importlib.import_module(module), name)(rank, size)
        except BaseException:
            found = traceback.format_exc()
        path = Path(folder, f"{call.rpartition(':')[2]}-{rank}")
        path.with_suffix(".part").write_bytes(pickle.dumps(found))
        path.with_suffix(".part").rename(path)
    sys.stderr.flush()
    os._exit(0)  # who ends first takes no part in what the others still do


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), bool(int(sys.argv[4])), sys.argv[5:])
