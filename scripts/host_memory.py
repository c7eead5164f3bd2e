#!/usr/bin/env python3
"""Peak memory of the host over some steps, beside the bytes that the plan predicts.

    scripts/host_memory.py [--json] [--width 512] [--depth 8] [--batch 8] [--steps 5]
                           [--precision fp32] [--gpus 1] [--dropout 0]

A GPT is trained by AdamW on virtual GPUs that may use a quarter of the training state together.
Measured is the largest resident memory of the process over the steps behind the first two, less
what is not the host's part in training:

- what the process held before there was the model. A model of the same width and of a quarter of
  the depth has been trained and closed by then: PyTorch, its threads, kernels, and the buffers
  that MKL and oneDNN keep for each thread are there. So are the batches.
- the memory of the virtual GPUs, whose pages are the host's as well.

Random numbers are drawn on the host when a virtual GPU's operator is enqueued, and wait there for
it, as on no other GPU: with dropout that adds a few per cent. Exits 1 if the measured bytes are
more than 5 % off the prediction.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import Batch, batches, loss_fn, make_model

import harmony
from harmony.core.units import format_bytes
from harmony.report.memory import host_memory

BAR = 0.05
WARM_STEPS = 2
CONTEXT = 128
GPU_NBYTES = 8 << 30


def main() -> int:
    """Measure, print, and return 1 if the bar is missed."""
    args = parse_arguments()
    torch.set_num_threads(1)
    harmony.virtual_gpus(count=args.gpus, memory=GPU_NBYTES, num_threads=1)
    found = batches(WARM_STEPS + args.steps, args.batch, CONTEXT)
    data = [(inputs.clone(), targets.clone()) for inputs, targets in found]
    del found
    trained(args, max(2, args.depth // 4), data[: WARM_STEPS + 1]).close()
    gc.collect()
    before = resident("VmRSS") - on_virtual_gpus()
    model = trained(args, args.depth, data[:WARM_STEPS])
    start_nbytes = resident("VmHWM") - before - on_virtual_gpus()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    for batch in data[WARM_STEPS:]:
        model.train_step(*batch)
    assert model.plan is not None
    on_gpus = on_virtual_gpus()
    measured, predicted = resident("VmHWM") - before - on_gpus, model.plan.host_nbytes
    run = model.record.run
    assert run is not None and run.layers is not None
    parts = host_memory(model.plan, run.layers[0])
    off = measured / predicted - 1
    if args.json:
        figures = {"measured": measured, "predicted": predicted, "parts": parts, "off": off}
        print(json.dumps(figures | {"gpus": on_gpus, "before": before, "start": start_nbytes}))
        return int(abs(off) > BAR)
    kinds = ", ".join(f"{kind} {format_bytes(nbytes)}" for kind, nbytes in parts.items())
    print(
        f"host memory: {format_bytes(measured)} measured, {format_bytes(predicted)} predicted "
        f"({off:+.1%}): {kinds}\n"
        f"beside it: {format_bytes(before)} of libraries, {format_bytes(on_gpus)} of virtual GPUs;"
        f" peak up to the first steps {format_bytes(start_nbytes)}; "
        f"{args.batch * CONTEXT} tokens a step"
    )
    return int(abs(off) > BAR)


def trained(args: argparse.Namespace, depth: int, data: list[Batch]) -> harmony.Harmony:
    """Return a model of some blocks that has taken a step with each batch."""
    net = make_model(args.width, depth, 8, CONTEXT, args.dropout)
    state_nbytes = 16 * sum(p.numel() for p in net.parameters())
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-4},
        loss_fn=loss_fn,
        precision=args.precision,
        devices=args.gpus,
        device_memory=max(state_nbytes // 4 // args.gpus, 64 * args.width**2 * 4),
        replan=False,
    )
    for batch in data:
        model.train_step(*batch)
    return model


def resident(name: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/self/status does not say {name}")


def on_virtual_gpus() -> int:
    """Resident bytes of the ranges of addresses that virtual GPUs have for their memory."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if first == "Rss:" and counts:
            found += int(line.split()[1]) << 10
        elif not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            counts = high - low >= GPU_NBYTES
    return found


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=512, help="of the GPT (512)")
    parser.add_argument("--depth", type=int, default=8, help="blocks (8)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (8)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are looked at (5)")
    parser.add_argument("--gpus", type=int, default=1, help="virtual GPUs (1)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the GPT (0)")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
