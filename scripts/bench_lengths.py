#!/usr/bin/env python3
"""What a step at a new length costs over the next ones at that length, and what 100 lengths take.

    scripts/bench_lengths.py [--json] [--models small gpt hf] [--forms step dropin] [--lengths 12]
                             [--many 100] [--microbatch-size 4]

A small GPT, a larger one, and a Llama of Hugging Face train on one virtual GPU, with one thread
of the CPU, on batches of ever new lengths around one that they were measured at. The figure is
the median, over the lengths, of the seconds of the first step at a length over the median of the
next three; with ``--cpu`` processor time instead, on a machine that is busy otherwise. Then the
small model trains on many lengths once each: what the process, the device, its threads and the
kept signatures take after a third of them, and at the end.
Exits 1 if a new length takes more than 3 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import make_model

import harmony

MOST = 3.0
BATCH, VOCAB, CONTEXT = 8, 4096, 512
MEMORY = "2GiB"

Step = Callable[[torch.Tensor], object]


def main() -> int:
    """Measure, print the figures, and return 1 if the bar is missed."""
    args = parse_arguments()
    torch.set_num_threads(1)
    harmony.virtual_gpus(count=1, memory=MEMORY, num_threads=1)
    found = {}
    for name in args.models:
        for form in args.forms:
            found[f"{name} {form}"] = figures = measure(name, form, args)
            if not args.json:
                print(
                    f"{name:6} {form:7} steady step {figures['steady_s']:.3f} s, first at a new "
                    f"length {figures['first_s']:.3f} s: {figures['ratio']:.1f} steps",
                    flush=True,
                )
    many = take_many(args.many) if args.many else []
    if args.json:
        print(json.dumps({"new_length": found, "many": many}))
    else:
        for line in many:
            print(", ".join(f"{key} {value}" for key, value in line.items()))
    return int(any(figures["ratio"] > MOST for figures in found.values()))


def measure(name: str, form: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the medians of a first and of a later step at a length, and of their ratios."""
    net, length = make(name)
    step = make_step(net, form, args.microbatch_size)
    for seed in range(2):
        step(tokens(length, seed))
    clock = time.process_time if args.cpu else time.perf_counter
    firsts, steadies = [], []
    for number in range(args.lengths):
        new = length + (number // 2 + 1) * (1 if number % 2 else -1)
        taken = [timed(step, tokens(new, seed), clock) for seed in range(4)]
        firsts.append(taken[0])
        steadies.append(statistics.median(taken[1:]))
    ratios = [first / steady for first, steady in zip(firsts, steadies, strict=True)]
    medians = map(statistics.median, (firsts, steadies, ratios))
    return dict(zip(("first_s", "steady_s", "ratio"), medians, strict=True))


def take_many(count: int) -> list[dict[str, float]]:
    """Train a small model on so many lengths; return what it takes on the way."""
    net, _ = make("small")
    model = harmony.Harmony(net, optimizer=torch.optim.AdamW, loss_fn=loss_fn, devices=1)
    found = []
    for number in range(count):
        x = tokens(32 + number, number)
        model.train_step(x[:, :-1], x[:, 1:])
        if number + 1 in (count // 3, 2 * count // 3, count):
            status = Path("/proc/self/status").read_text().splitlines()
            now = dict(line.split(":", 1) for line in status)
            found.append(
                {
                    "lengths": number + 1,
                    "host MiB": round(int(now["VmRSS"].split()[0]) / 1024),
                    "device MiB": round(device_nbytes() / 2**20, 1),
                    "signatures": len(model._engine.variants._paths),
                    "threads": int(now["Threads"]),
                }
            )
    return found


def device_nbytes() -> int:
    """Bytes of the virtual GPU that are in use."""
    free, total = torch.get_device_module("vgpu").mem_get_info(0)
    return int(total - free)


def make(name: str) -> tuple[torch.nn.Module, int]:
    """Return a model, and the length that it begins with."""
    torch.manual_seed(0)
    if name == "small":
        return make_model(128, 4, 4, CONTEXT), 64
    if name == "gpt":
        return make_model(384, 6, 6, CONTEXT), 96
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    return transformers.LlamaForCausalLM(config), 96


def make_step(net: torch.nn.Module, form: str, size: int | None) -> Step:
    """Return a training step on tokens of shape (samples, length + 1)."""
    hugging = type(net).__module__.startswith("transformers")
    options: dict[str, Any] = {"devices": 1, "microbatch_size": size or "auto"}

    def inputs(x: torch.Tensor) -> dict[str, torch.Tensor]:
        ids = x[:, :-1]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    if form == "step":
        loss = None if hugging else loss_fn
        model = harmony.Harmony(net, optimizer=torch.optim.AdamW, loss_fn=loss, **options)
        if hugging:
            return lambda x: model.train_step(inputs(x))
        return lambda x: model.train_step(x[:, :-1], x[:, 1:])
    model = harmony.Harmony(net, **options)
    optimizer = torch.optim.AdamW(net.parameters())

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = model(**inputs(x)).loss if hugging else loss_fn(model(x[:, :-1]), x[:, 1:])
        loss.backward()
        optimizer.step()

    return step


def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tokens(length: int, seed: int) -> torch.Tensor:
    """Random tokens of shape (BATCH, length + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (BATCH, length + 1), generator=generator)


def timed(step: Step, batch: torch.Tensor, clock: Callable[[], float]) -> float:
    """Seconds of a step."""
    started = clock()
    step(batch)
    return clock() - started


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["small", "gpt", "hf"])
    parser.add_argument("--forms", nargs="+", default=["step", "dropin"])
    parser.add_argument("--lengths", type=int, default=12, help="new lengths of each (12)")
    parser.add_argument("--many", type=int, default=100, help="lengths of the memory test (100)")
    parser.add_argument("--microbatch-size", type=int, help="default: Harmony chooses")
    parser.add_argument("--cpu", action="store_true", help="processor time, not seconds")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
