#!/usr/bin/env python3
"""Seconds and bytes that capturing a 70-billion-parameter Llama takes, built without memory.

    python scripts/capture_large.py [--layers 80] [--json]

Exit status 1 if the capture takes 5 s or more, or the process grows by 1 GB or more. The time that
counts is the processor's: one thread does all of it, so that on an idle machine it is the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import psutil
import torch

import harmony
from harmony.capture import capture
from harmony.core.units import format_bytes

MOST_S = 5.0
MOST_NBYTES = 10**9


def measure(num_layers: int, time_steps: int) -> dict[str, float]:
    """Build and capture; seconds, bytes of growth of the process, parameters and layers."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=num_layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        use_cache=False,
    )
    process = psutil.Process()
    before = process.memory_info().rss
    torch.set_num_threads(1)
    started = time.process_time()
    with harmony.meta_init():
        net = LlamaForCausalLM(config)
    built, clock = time.process_time(), time.perf_counter()
    ids = torch.zeros(2, time_steps, dtype=torch.long)
    captured = capture(net, (), {"input_ids": ids, "labels": ids}, output_loss=True)
    done, clock = time.process_time(), time.perf_counter() - clock
    return {
        "parameters": sum(param.numel() for param in net.parameters()),
        "weight_nbytes": captured.graph.weight_nbytes(),
        "layers": captured.graph.num_layers,
        "build_s": built - started,
        "capture_s": done - built,
        "capture_clock_s": clock,
        "growth_nbytes": _peak_nbytes() - before,
    }


def _peak_nbytes() -> int:
    """The most memory that this process has had."""
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80, help="blocks of the model (80)")
    parser.add_argument("--time-steps", type=int, default=512, help="tokens of a sample (512)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    found = measure(options.layers, options.time_steps)
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['parameters'] / 1e9:.1f} billion parameters "
            f"({format_bytes(int(found['weight_nbytes']))}) in {found['layers']} layers\n"
            f"built in {found['build_s']:.2f} s, captured in {found['capture_s']:.2f} s "
            f"of processor time (bar: {MOST_S:.0f} s), "
            f"{found['capture_clock_s']:.2f} s by the clock\n"
            f"memory grew by {format_bytes(int(found['growth_nbytes']))} "
            f"(bar: {format_bytes(MOST_NBYTES)})"
        )
    return int(found["capture_s"] >= MOST_S or found["growth_nbytes"] >= MOST_NBYTES)


if __name__ == "__main__":
    sys.exit(main())
