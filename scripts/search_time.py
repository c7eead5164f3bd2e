#!/usr/bin/env python3
"""How long a plan takes to find, and how much memory, over layers and GPUs.

    scripts/search_time.py [--json] [--layers 25 50 100 200 500] [--gpus 1 2 4 8]

The model is a chain of equal transformer-like layers twelve times as large as a GPU's memory
holds of weights, trained on 8 samples a GPU. Each search runs in a process of its own, whose peak
memory is read when it ends; the collection of figures is a table with a bar for each time. Exit
code 1 if a bar is missed: 100 layers on 8 GPUs under 5 s, 500 layers under 20 s, under 500 MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harmony.core.layergraph import MODEL_INPUT, Layer, LayerGraph, Value
from harmony.core.machine import Device, Host, Machine, Switch
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.search.search import choose

MIB = 2**20
LAYERS = (25, 50, 100, 200, 500)
GPUS = (1, 2, 4, 8)
BARS_S = {100: 5.0, 500: 20.0}
MAX_NBYTES = 500_000_000
SAMPLES = 8


def model(num_layers: int) -> tuple[LayerGraph, CostTable]:
    """A chain of layers of 128 MiB, embedding and loss of other sizes."""
    values = tuple(
        Value(
            v,
            f"x{v}",
            v - 1 if v else MODEL_INPUT,
            (v,) if v < num_layers else (),
            4 if v == num_layers else 8192 if v == 0 else 6 * MIB,
            requires_grad=v > 0,
            is_output=v == num_layers,
        )
        for v in range(num_layers + 1)
    )
    layers = []
    for index in range(num_layers):
        ends = index in (0, num_layers - 1)
        weight = (300 if ends else 128) * MIB
        layers.append(
            Layer(
                index,
                f"layer{index}",
                "end" if ends else "block",
                (f"w{index}",),
                weight,
                weight,
                2 * weight,
                inputs=(index,),
                outputs=(index + 1,),
                saved_nbytes_per_sample=60 * MIB,
                products_nbytes_per_sample=26 * MIB,
            )
        )
    cost = {}
    for size in (1, 8):
        seconds, saved = 1e-3 + 9e-3 * size, 60 * MIB * size
        products = 26 * MIB * size, 0.8 * seconds
        cost[size] = LayerCost(
            seconds, 2 * seconds, 0.04, 8 * MIB * size, saved, 30 * MIB, *products
        )
    return LayerGraph(tuple(layers), values, (), loss=num_layers), CostTable((cost,) * num_layers)


def machine(num_gpus: int, num_layers: int) -> Machine:
    """GPUs whose memories hold a twelfth of the weights each, two behind each switch."""
    memory = max(2048, num_layers * 128 // 12) * MIB
    device = Device("gpu", memory, 12e9, 12e9, 10e9, 5e-5)
    pairs = [(g, g + 1) for g in range(0, num_gpus - 1, 2)]
    switches = tuple(Switch(pair, 16e9, 16e9) for pair in pairs)
    host = Host(16 * num_layers * 128 * MIB + 2**40, memory_bytes_per_s=80e9)
    return Machine((device,) * num_gpus, host, switches=switches)


def measure(num_layers: int, num_gpus: int) -> dict[str, float]:
    """Search once, here."""
    graph, costs = model(num_layers)
    server = machine(num_gpus, num_layers)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    plan = choose(graph, costs, server, SAMPLES * num_gpus)
    return {
        "layers": num_layers,
        "gpus": num_gpus,
        "seconds": time.perf_counter() - start_s,
        "cpu_seconds": time.process_time() - start_cpu_s,
        "memory_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "step_s": plan.step_s,
        "bound_s": plan.bound_s,
        "packs": len(plan.spec.backward_packs),
    }


def measured_apart(num_layers: int, num_gpus: int) -> dict[str, float]:
    """Search in a process of its own: memory that another search took would count."""
    command = [sys.executable, __file__, "--one", str(num_layers), str(num_gpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{num_layers} layers on {num_gpus} GPUs failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def missed(row: dict[str, float]) -> list[str]:
    """The bars that a search misses."""
    found = []
    layers = int(row["layers"])
    most_s = BARS_S.get(layers)
    if most_s is not None and row["seconds"] > most_s:
        found.append(
            f"{layers} layers on {row['gpus']:.0f} GPUs took {row['seconds']:.1f} s,"
            f" the bar is {most_s:.0f} s"
        )
    if row["memory_nbytes"] > MAX_NBYTES:
        found.append(
            f"{layers} layers on {row['gpus']:.0f} GPUs took {row['memory_nbytes'] / 1e6:.0f} MB,"
            f" the bar is {MAX_NBYTES / 1e6:.0f} MB"
        )
    return found


def show(rows: list[dict[str, float]]) -> None:
    """Print the table, with a bar of one # per quarter second."""
    print("layers  gpus  seconds   cpu s     MB   step s   of bound  packs")
    for row in rows:
        print(
            f"{row['layers']:6.0f} {row['gpus']:5.0f} {row['seconds']:8.2f}"
            f" {row['cpu_seconds']:7.2f} {row['memory_nbytes'] / 1e6:6.0f}"
            f" {row['step_s']:8.3f}   x{row['step_s'] / row['bound_s']:7.3f} {row['packs']:6.0f}"
            f"  {'#' * round(4 * row['seconds'])}"
        )


def main() -> int:
    """Run the searches; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return 0
    rows = [measured_apart(layers, gpus) for layers in options.layers for gpus in options.gpus]
    problems = [text for row in rows for text in missed(row)]
    if options.json:
        print(json.dumps({"searches": rows, "missed": problems}, indent=2))
    else:
        show(rows)
        print("\n".join(problems) or "every bar is met")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
