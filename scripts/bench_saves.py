#!/usr/bin/env python3
"""What checkpoints cost: none, one that is waited for, one that is written while training goes on.

    scripts/bench_saves.py [--folder DIR] [--rounds 5] [--every 20] [--nbytes 1GiB] [--json]

A GPT trains on one virtual GPU whose memory is a quarter of the training state. Rounds of
`every` steps without a checkpoint, with one that is waited for, and with one that is not take
turns; the figures are the medians over the rounds of the ratios of their throughput to that
without. The disk's own rate (as many bytes, written in a row and made durable, in the same
round) says what could be had. Counted on the threads that do it, however busy the machine is
with other things: the processor's time of a save (what training waits for before it goes on,
copies of packs, the thread that writes), as a part of that of the steps between two saves.

Then a larger model is saved, waited for, and loaded into a new one; in the same round as many
bytes are written in a row and made durable, and read in a row, all of it past the cache: into one
block over and over, and into new memory, in huge pages, as much as is read. (What the system takes
for a page that a process writes to first is no part of the disk's rate, but a load of what was not
in memory before cannot be without it.) The figures are the medians of the ratios. Exits 1 if
training keeps less than 98 % of its throughput, if copies have taken more than two packs, or if a
save comes to less than 80 % of the disk's own rate, or a load of that into new memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import Batch, batches, loss_fn, make_model

import harmony
import harmony.checkpoint.model_checkpoints as saved_by
from harmony.checkpoint.saving import Snapshot
from harmony.core.units import format_bytes, parse_bytes
from harmony.runtime.host.pinned_memory import new_tensor
from harmony.runtime.unsaved import Unsaved

BAR, RATE_BAR = 0.98, 0.8
WIDTH, DEPTH, HEADS, CONTEXT = 384, 6, 6, 128
BATCH, MICROBATCH = 8, 2
WAYS = ("none", "waited for", "meanwhile")
RATES = ("write", "save", "read", "read into new memory", "load")
BESIDE = (("save", "write"), ("load", "read"), ("load", "read into new memory"))


SAVING_S = [0.0]
"""Processor time of all that saves while training goes on."""


def count(owner: Any, name: str) -> None:
    """Add the processor time of the calling thread in a function to what saving takes."""
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        began_s = time.thread_time()
        try:
            return original(*args, **kwargs)
        finally:
            SAVING_S[0] += time.thread_time() - began_s

    setattr(owner, name, counted)


def main() -> int:
    """Run the rounds, print the figures, and return 1 if one misses its bar."""
    args = parse_arguments()
    torch.set_num_threads(1)
    net = make_model(WIDTH, DEPTH, HEADS, CONTEXT)
    memory_nbytes = 4 * sum(p.nbytes for p in net.parameters()) // 4
    harmony.virtual_gpus(count=1, memory=memory_nbytes, num_threads=1)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-4, "fused": True},
        loss_fn=loss_fn,
        microbatch_size=MICROBATCH,
        replan=False,
    )
    data = list(batches(args.every, BATCH, CONTEXT))
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    work: dict[str, list[float]] = {way: [] for way in WAYS}
    copied, waited, disk, saving = [], [], [], []
    for owner, name in ((Snapshot, "write"), (Unsaved, "_copy"), (saved_by, "snapshot")):
        count(owner, name)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        for number in range(args.rounds + 1):
            for way in WAYS:
                began_s, SAVING_S[0] = time.process_time(), 0.0
                rate = steps_per_s(model, data, root, way)
                if number:  # round 0 warms up: capture, measuring, planning, caches
                    rates[way].append(rate)
                    work[way].append(time.process_time() - began_s)
            if number and model.saving is not None:
                copied.append(model.saving.copied_nbytes)
                saving.append(SAVING_S[0])
                waited.append(model.saving.waited_s)
                sizes = [p.stat().st_size for p in root.rglob("*.safetensors")]
                disk.append(write_rate(root, sum(sizes)))
    figures = summary(model, rates, work, saving, copied, waited, disk)
    model.close()
    figures |= disk_rates(args.folder, args.nbytes, args.rounds)
    figures["passed"] &= (
        min(figures["save / write"], figures["load / read into new memory"]) >= RATE_BAR
    )
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures, args.every)
    return 0 if figures["passed"] else 1


def steps_per_s(model: harmony.Harmony, data: list[Batch], root: Path, way: str) -> float:
    """Steps per second of one round; a checkpoint is made behind its first step."""
    started = time.perf_counter()
    for number, (inputs, targets) in enumerate(data):
        model.train_step(inputs, targets)
        if number == 0 and way != "none":
            model.save_checkpoint(root, keep=1, async_save=way == "meanwhile")
    rate = len(data) / (time.perf_counter() - started)
    if model.saving is not None:
        model.saving.wait()
    return rate


def write_rate(root: Path, nbytes: int) -> float:
    """Bytes per second that the disk takes: in a row, then made durable."""
    block, file = os.urandom(1 << 24), root / "rate"
    started = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        for low in range(0, nbytes, len(block)):
            out.write(block[: nbytes - low])
        os.fsync(out.fileno())
    rate = nbytes / (time.perf_counter() - started)
    file.unlink()
    return rate


def disk_rates(folder: Path | None, nbytes: int, rounds: int) -> dict[str, Any]:
    """Save and load so many bytes beside the disk's own rate; medians over the rounds."""
    width, every = 1024, {name: [] for name in RATES}  # type: ignore[var-annotated]

    def made() -> harmony.Harmony:
        layers = [torch.nn.Linear(width, width) for _ in range(max(1, nbytes // (12 * width**2)))]
        return harmony.Harmony(
            torch.nn.Sequential(*layers),
            optimizer=torch.optim.AdamW,
            loss_fn=torch.nn.functional.mse_loss,
            updates="host",
            device_memory="64MiB",
            devices=1,
        )

    harmony.virtual_gpus(count=1, memory="64MiB", num_threads=1)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root, model = Path(name), made()
        model.train_step(torch.ones(2, width), torch.zeros(2, width))
        for number in range(rounds):
            every["write"].append(write_rate(root, nbytes))
            began_s = time.perf_counter()
            found = model.save_checkpoint(root / str(number))  # what is there before is no part
            wrote_s = time.perf_counter() - began_s
            size = sum(path.stat().st_size for path in found.iterdir())
            every["save"].append(size / wrote_s)
            forget(found)
            for way, into_new in (("read", False), ("read into new memory", True)):
                every[way].append(read_rate(found, into_new))
                forget(found)
            other = made()
            began_s = time.perf_counter()
            other.load_checkpoint(found)
            every["load"].append(size / (time.perf_counter() - began_s))
            other.close()
            shutil.rmtree(found)
        model.close()
    ratios = {
        f"{way} / {own}": [a / b for a, b in zip(every[way], every[own], strict=True)]
        for way, own in BESIDE
    }
    return {
        "rates": every,
        "rate_ratios": ratios,
        "rates_nbytes": size,
        **{way: statistics.median(found) for way, found in ratios.items()},
    }


def forget(folder: Path) -> None:
    """Have the system forget what it keeps of the files in memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(folder: Path, into_new: bool) -> float:
    """Bytes per second that come from the disk, file by file, in a row.

    Args:
        into_new: whether each byte has a place of its own, in memory that is new.
    """
    paths, began_s = sorted(folder.iterdir()), time.perf_counter()
    sizes = [path.stat().st_size for path in paths]
    kept = [new_tensor((size,), torch.uint8).numpy() for size in sizes] if into_new else []
    block = memoryview(bytearray(1 << 24))
    for number, path in enumerate(paths):
        low = 0
        with path.open("rb", buffering=0) as file:
            while low < sizes[number]:
                room = kept[number].data[low : low + len(block)] if into_new else block
                low += file.readinto(room) or 0
    return sum(sizes) / (time.perf_counter() - began_s)


def summary(
    model: harmony.Harmony,
    rates: dict[str, list[float]],
    work: dict[str, list[float]],
    saving: list[float],
    copied: list[int],
    waited: list[float],
    disk: list[float],
) -> dict[str, Any]:
    """The figures of all rounds."""
    state = {n: 3 * p.nbytes + 4 for n, p in model.module.named_parameters()}
    two_packs = model._engine.two_packs_nbytes(state)
    none = rates["none"]
    ratios = {
        way: [a / b for a, b in zip(rates[way], none, strict=True)]
        for way in ("waited for", "meanwhile")
    }
    kept = {way: statistics.median(found) for way, found in ratios.items()}
    return {
        "step_s": 1 / statistics.median(none),
        "checkpoint_nbytes": sum(state.values()),
        "disk_nbytes_per_s": statistics.median(disk),
        "kept": kept,
        "ratios": ratios,
        "processor": statistics.median(saving) / statistics.median(work["none"]),
        "waited_s": statistics.median(waited),
        "copied_nbytes": max(copied),
        "two_packs_nbytes": two_packs,
        "passed": kept["meanwhile"] >= BAR and max(copied) <= two_packs,
    }


def show(figures: dict[str, Any], every: int) -> None:
    """Print the figures."""
    kept, ratios = figures["kept"], figures["ratios"]
    size, rate = figures["checkpoint_nbytes"], int(figures["disk_nbytes_per_s"])
    print(
        f"a checkpoint of {format_bytes(size)} every {every} steps of {figures['step_s']:.3f} s; "
        f"the disk takes {format_bytes(rate)}/s"
    )
    for way, value in kept.items():
        low, high = min(ratios[way]), max(ratios[way])
        print(f"{way}: {value:.3f} of the throughput without (rounds: {low:.3f} to {high:.3f})")
    copied, packs = figures["copied_nbytes"], figures["two_packs_nbytes"]
    print(
        f"meanwhile training has waited {figures['waited_s']:.3f} s for the disk, and saving has "
        f"taken {figures['processor']:.4f} of the processor's time of the steps; copies took "
        f"{format_bytes(copied)}, two packs are {format_bytes(packs)}"
    )
    for way, own in BESIDE:
        found = figures["rate_ratios"][f"{way} / {own}"]
        size, rate = figures["rates_nbytes"], int(statistics.median(figures["rates"][own]))
        print(
            f"a {way} of {format_bytes(size)}: {statistics.median(found):.2f} of the disk's rate "
            f"to {own}, {format_bytes(rate)}/s (rounds: {min(found):.2f} to {max(found):.2f})"
        )
    print(
        f"the bars are {BAR}, two packs and {RATE_BAR}: "
        f"{'held' if figures['passed'] else 'MISSED'}"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--nbytes", type=parse_bytes, default="1GiB", help="of the larger model")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
