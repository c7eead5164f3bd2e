#!/usr/bin/env python3
"""Tokens per second of Harmony on virtual GPUs, beside plain PyTorch, FSDP2 and DeepSpeed.

    scripts/bench_peers.py [--json] [--size 57M|25M|5M] [--precision fp32 bf16] [--rounds 5]
                           [--steps 2] [--only NAME ...]

All train the same GPT by AdamW with 1,024 tokens a step. Harmony has virtual GPUs whose memory is
a quarter of the training state in all (16 bytes a parameter); the others have all the memory they
want. Every process has one compute thread a GPU or rank. Plain PyTorch takes microbatches of 2,
with and without recomputing each block, in bf16 by autocast; FSDP2 shards each block over its
ranks (gloo, parameters offloaded to the CPU), recomputes, and takes its share of the batch whole.
DeepSpeed (ZeRO-3) is named absent where it is not installed: scripts/install-peers. A contestant
is a process that is idle while another runs; a round lets each take ``--steps`` steps, in turns.
Figures are medians over the rounds: tokens per second, seconds of processor time a step (of all
threads and ranks), and the ratio of tokens per second to plain PyTorch within a round.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import GPT, batches, loss_fn, make_model

import harmony

SIZES = {"57M": (768, 8, 12, 128), "25M": (512, 8, 8, 128), "5M": (192, 12, 6, 128)}
BATCH, MICROBATCH = 8, 2
NUM_TOKENS = BATCH * 128
BASE = "plain"
Step = Callable[[torch.Tensor, torch.Tensor], float]


def main() -> int:
    """Run the rounds and print the figures; or, started by that, be one of the contestants."""
    args = parse_arguments()
    warnings.simplefilter("ignore")
    if args.contestant:
        compete(args.contestant, args.size, args.precision[0], args.rank)
        return 0
    found = {p: figures(rounds_of(args, p)) for p in args.precision}
    if args.json:
        print(json.dumps({"size": args.size, "tokens a step": NUM_TOKENS, **found}, indent=1))
        return 0
    for precision, rows in found.items():
        print(f"GPT of {args.size}, {precision}, {NUM_TOKENS} tokens a step, {args.rounds} rounds")
        print(f"{'':32}{'tokens/s':>10}{'CPU s/step':>12}{'of plain':>10}  (rounds)")
        for name, row in rows.items():
            print(
                f"{name:32}{row['tokens_per_s']:10.0f}{row['cpu_s']:12.2f}{row['ratio']:10.2f}"
                f"  ({row['low']:.2f} to {row['high']:.2f})"
            )
    if importlib.util.find_spec("deepspeed") is None:
        print("DeepSpeed is not installed here: not compared (scripts/install-peers)")
    return 0


# The rounds


def rounds_of(args: argparse.Namespace, precision: str) -> dict[str, list[dict[str, float]]]:
    """What each contestant took, round by round."""
    names = [name for name in CONTESTANTS if not args.only or name in (BASE, *args.only)]
    if importlib.util.find_spec("deepspeed") is None:
        names = [name for name in names if not name.startswith("DeepSpeed")]
    processes = {name: started(name, args.size, precision) for name in names}
    took: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    try:
        for number in range(args.rounds + 1):
            for name in names[:: 1 if number % 2 else -1]:
                answer = asked(processes[name], args.steps)
                if number:  # round 0 captures, measures, plans, and warms up
                    took[name].append(answer)
    finally:
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    return took


def started(name: str, size: str, precision: str, rank: int = 0) -> subprocess.Popen[str]:
    """Start a contestant, or another rank of it."""
    words = [sys.executable, __file__, "--contestant", name, "--rank", str(rank)]
    words += ["--size", size, "--precision", precision]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def asked(process: subprocess.Popen[str], steps: int) -> dict[str, float]:
    """Let a contestant take some steps; return what it says of them."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            answer: dict[str, float] = json.loads(line)
            return answer
    raise SystemExit(f"a contestant failed: {' '.join(map(str, process.args[3:]))}")


def figures(took: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds."""
    found = {}
    for name, rounds in took.items():
        ratios = [b["s"] / a["s"] for a, b in zip(rounds, took[BASE], strict=True)]
        found[name] = {
            "tokens_per_s": NUM_TOKENS / statistics.median(row["s"] for row in rounds),
            "cpu_s": statistics.median(row["cpu_s"] for row in rounds),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "loss": rounds[-1]["loss"],
        }
    return found


# The contestants


def compete(name: str, size: str, precision: str, rank: int) -> None:
    """Take steps as often as the standard input says a number of them; say what they took."""
    torch.set_num_threads(1)
    kind, ranks = CONTESTANTS[name]
    other = None
    if kind is by_fsdp:
        if rank == 0:
            os.environ["MASTER_PORT"] = str(free_port())
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(ranks)}
        other = started(name, size, precision, 1) if ranks == 2 and rank == 0 else None
    step = kind(SIZES[size], precision, ranks)
    data = list(batches(16, BATCH, SIZES[size][3]))
    for line in sys.stdin:
        if other is not None and other.stdin is not None:
            other.stdin.write(line)
            other.stdin.flush()
        start_s, start_cpu_s, count = time.perf_counter(), cpu_s(), int(line)
        for index in range(count):
            loss = step(*data[index % len(data)])
        took = {"s": (time.perf_counter() - start_s) / count, "loss": loss}
        took["cpu_s"] = (cpu_s() - start_cpu_s) / count * (ranks if other is not None else 1)
        if rank == 0:
            print(json.dumps(took), flush=True)
    if other is not None:
        assert other.stdin is not None
        other.stdin.close()
        other.wait()


def cpu_s() -> float:
    """Seconds of the processor that this process has taken."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def free_port() -> int:
    """A port that nobody listens on."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def model_of(shape: tuple[int, int, int, int]) -> GPT:
    """The GPT, the same for all."""
    return make_model(*shape)


def by_harmony(shape: tuple[int, int, int, int], precision: str, gpus: int) -> Step:
    """`train_step` on virtual GPUs that have a quarter of the training state."""
    net = model_of(shape)
    state_nbytes = 16 * sum(p.numel() for p in net.parameters())
    harmony.virtual_gpus(count=gpus, memory=state_nbytes // 4 // gpus, num_threads=1)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-4},
        loss_fn=loss_fn,
        precision=precision,
    )
    return lambda inputs, targets: float(model.train_step(inputs, targets))


def by_harmony_loop(shape: tuple[int, int, int, int], precision: str, gpus: int) -> Step:
    """The drop-in form: a loop of one's own."""
    net = model_of(shape)
    state_nbytes = 16 * sum(p.numel() for p in net.parameters())
    harmony.virtual_gpus(count=gpus, memory=state_nbytes // 4 // gpus, num_threads=1)
    model = harmony.Harmony(net, precision=precision)
    return stepping(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), BATCH)


class Recomputed(nn.Module):
    """A block whose forward runs again in the backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> Any:
        """As the block's."""
        return checkpoint(self.block, x, use_reentrant=False)


def recomputing(net: GPT) -> GPT:
    """Let every block run again in the backward."""
    for number, block in enumerate(net.blocks):
        net.blocks[number] = Recomputed(block)
    return net


def stepping(
    net: nn.Module, optimizer: torch.optim.Optimizer, size: int, precision: str = "fp32"
) -> Step:
    """A step of plain PyTorch in microbatches of ``size`` samples."""

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_fn(net(x), y) * (len(x) / len(inputs))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.step()
        return total

    return step


def by_plain(shape: tuple[int, int, int, int], precision: str, _: int) -> Step:
    """Plain PyTorch that keeps all activations."""
    net = model_of(shape)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    return stepping(net, optimizer, MICROBATCH, precision)


def by_checkpoints(shape: tuple[int, int, int, int], precision: str, _: int) -> Step:
    """Plain PyTorch that recomputes each block."""
    net = recomputing(model_of(shape))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    return stepping(net, optimizer, MICROBATCH, precision)


def by_fsdp(shape: tuple[int, int, int, int], precision: str, ranks: int) -> Step:
    """FSDP2, each block sharded over the ranks and recomputed."""
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (ranks,))
    dtype = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    net = recomputing(model_of(shape))
    for part in (*net.blocks, net):
        offload = CPUOffloadPolicy(pin_memory=False)
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=offload)
    own = stepping(net, torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True), BATCH)
    rank = dist.get_rank()

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        return own(inputs.chunk(ranks)[rank], targets.chunk(ranks)[rank])

    return step


def by_deepspeed(shape: tuple[int, int, int, int], precision: str, _: int) -> Step:
    """ZeRO-3 with parameters and optimizer on the CPU, in one process."""
    import deepspeed  # type: ignore[import-not-found]

    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "bf16": {"enabled": precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu"},
            "offload_optimizer": {"device": "cpu"},
        },
    }
    net = recomputing(model_of(shape))
    engine, *_rest = deepspeed.initialize(
        model=net, model_parameters=net.parameters(), config=config
    )

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        loss = loss_fn(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


CONTESTANTS: dict[str, tuple[Callable[[tuple[int, int, int, int], str, int], Step], int]] = {
    "plain": (by_plain, 1),
    "plain, checkpointing": (by_checkpoints, 1),
    "Harmony, 1 GPU": (by_harmony, 1),
    "Harmony, 2 GPUs": (by_harmony, 2),
    "Harmony's drop-in form, 1 GPU": (by_harmony_loop, 1),
    "Harmony's drop-in form, 2 GPUs": (by_harmony_loop, 2),
    "FSDP2, 1 rank": (by_fsdp, 1),
    "FSDP2, 2 ranks": (by_fsdp, 2),
    "DeepSpeed, 1 rank": (by_deepspeed, 1),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="57M", help="parameters of the GPT (57M)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a round (2)")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="these, beside plain")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
