#!/usr/bin/env python3
"""Peak memory of the host over some steps, beside the bytes that the plan predicts.

    scripts/host_memory.py [--json] [--width 512] [--depth 8] [--batch 8] [--steps 5]
                           [--precision fp32]

A GPT is trained by AdamW on one virtual GPU that may use a quarter of the training state.
Measured is the largest resident memory of the process over the steps behind the first, less what
it was before there was the model (a small one has been trained before that, so that libraries,
threads and kernels are there), and less the largest use of the virtual GPU, whose memory is the
host's as well. Exits 1 if that is more than 5 % off the prediction.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import GPT, batches, loss_fn, make_model

import harmony
from harmony.core.units import format_bytes

BAR = 0.05


def main() -> int:
    """Measure, print, and return 1 if the bar is missed."""
    args = parse_arguments()
    torch.set_num_threads(1)
    harmony.virtual_gpus(count=1, memory="8GiB", num_threads=1)
    trained(make_model(64, 2, 2, 64), args, steps=3).close()
    before = resident("VmRSS")
    model = trained(make_model(args.width, args.depth, 8, 128), args, steps=2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    for inputs, targets in batches(args.steps, args.batch, 128):
        model.train_step(inputs, targets)
    assert model.plan is not None and model.last_timeline is not None
    on_gpu = sum(model.last_timeline.peak_nbytes)
    measured = resident("VmHWM") - before - on_gpu
    off = measured / model.plan.host_nbytes - 1
    found = {"measured": measured, "predicted": model.plan.host_nbytes, "gpu": on_gpu, "off": off}
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"host memory: {format_bytes(measured)} measured, "
            f"{format_bytes(model.plan.host_nbytes)} predicted ({off:+.1%}); "
            f"virtual GPU {format_bytes(on_gpu)}; {args.batch * 128} tokens a step"
        )
    return int(abs(off) > BAR)


def trained(net: GPT, args: argparse.Namespace, steps: int) -> harmony.Harmony:
    """Return a model that has taken some steps; what they have left over is given back."""
    state_nbytes = 16 * sum(p.numel() for p in net.parameters())
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-4},
        loss_fn=loss_fn,
        precision=args.precision,
        device_memory=max(state_nbytes // 4, 8 << 20),
        replan=False,
    )
    for inputs, targets in batches(steps, args.batch, net.positions.num_embeddings):
        model.train_step(inputs, targets)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return model


def resident(name: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/self/status does not say {name}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=512, help="of the GPT (512)")
    parser.add_argument("--depth", type=int, default=8, help="blocks (8)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (8)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are looked at (5)")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
