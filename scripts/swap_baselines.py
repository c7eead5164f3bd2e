#!/usr/bin/env python3
"""Swap volume and throughput of Harmony's plans against what others do on the same machine.

    scripts/swap_baselines.py --profiles DIR [--cases gpt2_xl:64 gpt2_10b:32] [--gpus 1 2 4 8]

DIR holds profiles in the format of the original Harmony (per-layer seconds and bytes measured on
GTX 1080 Ti GPUs; github.com/msr-fiddle/harmony, MIT licence). Per-GPU LRU swapping under data
parallelism and in a 1F1B pipeline, each with and without recompute, ZeRO-3 offload, and the plan
that Harmony's search chooses are simulated on one machine model: GPUs of 9e9 bytes that share
11.5 GiB/s to the host in each direction and exchange 8.2 GiB/s each. Every baseline runs with the
microbatch size that is fastest for it, swapping also with microbatches of one sample.

The paper (PVLDB 15(11), 2022) claims up to 100 times less swap traffic and up to 7.6 times the
throughput of per-GPU swapping, and gives weights swapped as (4m+2)N|W| for DP and (4m+2)|W| for
PP, with m microbatches a GPU. All figures are predictions, none is a measurement of the paper.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Device, Host, Machine, Switch
from harmony.errors import DoesNotFitError, HarmonyError, PlanError
from harmony.planner.predict.cost import CostTable
from harmony.planner.search.search import choose
from harmony.profiling.original_format import to_layers
from research.baselines.baselines import SWAPS, Outcome, fastest
from research.baselines.swapping import swap_step
from research.baselines.zero3 import zero3_step
from research.original.profile import read_profile

GIB = 2**30
CASES = ("gpt2_xl:64", "gpt2_10b:32")
SWAP_RATE, PEER_RATE, MEMORY_NBYTES, HOST_NBYTES = 11.5 * GIB, 8.2 * GIB, 9 * 10**9, 750 * 10**9
UPDATE_RATE = 484e9 / 7
"""A GTX 1080 Ti's memory carries 484 GB/s (NVIDIA's specification); AdamW in fp32 moves 7 bytes a
byte of gradients."""

CLAIMED_TRAFFIC, CLAIMED_THROUGHPUT = 100.0, 7.6
PARAMETERS = ("weights", "gradients", "state", "shared", "shared gradients")


@dataclass(frozen=True)
class Case:
    """A model, its minibatch and the machine."""

    model: str
    graph: LayerGraph
    costs: CostTable
    minibatch: int
    machine: Machine

    @property
    def num_gpus(self) -> int:
        """How many GPUs there are."""
        return self.machine.num_devices

    def sizes(self, shares: int) -> list[int]:
        """Microbatch sizes that were measured and divide each share."""
        known = set.intersection(*(set(layer) for layer in self.costs.by_layer))
        share, rest = divmod(self.minibatch, shares)
        return [] if rest else [size for size in sorted(known) if share % size == 0]


def main() -> int:
    """Print the table; return 2 if a profile cannot be read."""
    args = parse_arguments()
    try:
        cases = list(read_cases(args))
    except (PlanError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for case in cases:
        found = compare(case)
        rows += found
        if not args.json:
            print(*map(describe, found), sep="\n", flush=True)
    summary = summarize(rows)
    if args.json:
        print(json.dumps({"summary": summary, "rows": rows}, indent=2))
    else:
        print(*verdict(summary), sep="\n")
    return 0


def paper_machine(num_gpus: int) -> Machine:
    """The paper's server: GTX 1080 Ti GPUs behind one link to the host."""
    rates = (SWAP_RATE, SWAP_RATE, PEER_RATE)
    gpu = Device("GTX 1080 Ti", MEMORY_NBYTES, *rates, update_bytes_per_s=UPDATE_RATE)
    switch = Switch(tuple(range(num_gpus)), SWAP_RATE, SWAP_RATE)
    return Machine((gpu,) * num_gpus, Host(HOST_NBYTES), switches=(switch,))


def read_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every model on every number of GPUs."""
    for text in args.cases:
        model, _, minibatch = text.partition(":")
        graph, costs = to_layers(read_profile(args.profiles / f"{model}.json"))
        if not minibatch.isdecimal() or not int(minibatch):
            raise ValueError(f"a case is MODEL:MINIBATCH, e.g. {CASES[0]}, not {text!r}")
        for count in args.gpus:
            yield Case(model, graph, costs, int(minibatch), paper_machine(count))


def compare(case: Case) -> list[dict[str, Any]]:
    """Rows of one case; Harmony's first, the others with their distance to it."""
    began = time.perf_counter()
    plan = choose(case.graph, case.costs, case.machine, case.minibatch)
    swapped = sum(n for (link, _), n in plan.traffic.items() if link in SWAPS)
    harmony: dict[str, Any] = {
        **head(case, f"Harmony ({plan.mode})"),
        "microbatch": plan.spec.backward_size,
        "step_s": plan.step_s,
        "samples_per_s": case.minibatch / plan.step_s,
        "swap_nbytes": swapped,
        "parameter_nbytes": parameter_nbytes(plan.traffic),
        "search_s": time.perf_counter() - began,
        "plan": plan.describe()[0],
    }
    rows = [harmony]
    for name, sizes, run in systems(case):
        try:
            rows.append(row_of(case, name, fastest(run, sizes), harmony))
        except DoesNotFitError as error:
            rows.append({**head(case, name), "refused": str(error)})
    return rows


def parameter_nbytes(traffic: Mapping[tuple[str, str], int]) -> int:
    """Bytes of weights, gradients and optimizer state between the host and the GPUs.

    Those of activations follow from the memory columns of the profiles, which bound them from
    above only.
    """
    found = traffic.items()
    return sum(n for (link, kind), n in found if link in SWAPS and kind in PARAMETERS)


def systems(case: Case) -> Iterator[tuple[str, list[int], Callable[[int], Outcome]]]:
    """Every baseline: its name, the microbatch sizes to try, and what a step takes."""
    question = (case.graph, case.costs, case.machine, case.minibatch)
    for mode in ("dp", "pp"):
        sizes = case.sizes(case.num_gpus if mode == "dp" else 1)
        for recompute in (False, True):
            name = f"{mode.upper()}-swap" + (", recompute" if recompute else "")
            run: Callable[[int], Outcome] = partial(
                lambda mode, recompute, size: swap_step(
                    *question, size, mode, recompute=recompute
                ),
                mode,
                recompute,
            )
            yield name, sizes, run
            if 1 in sizes:
                yield f"{name}, u=1", [1], run
    yield "ZeRO-3 offload", case.sizes(case.num_gpus), lambda size: zero3_step(*question, size)


def head(case: Case, system: str) -> dict[str, Any]:
    """What every row begins with."""
    names = {"model": case.model, "gpus": case.num_gpus, "minibatch": case.minibatch}
    return {**names, "system": system}


def row_of(case: Case, name: str, outcome: Outcome, harmony: dict[str, Any]) -> dict[str, Any]:
    """A baseline's row."""
    row = {
        **head(case, name),
        "microbatch": outcome.microbatch_size,
        "step_s": outcome.step_s,
        "bound_s": outcome.bound_s,
        "samples_per_s": case.minibatch / outcome.step_s,
        "swap_nbytes": outcome.swap_nbytes,
        "parameter_nbytes": parameter_nbytes(outcome.traffic),
        "parameter_ratio": parameter_nbytes(outcome.traffic) / max(1, harmony["parameter_nbytes"]),
        "traffic_ratio": outcome.swap_nbytes / max(1, harmony["swap_nbytes"]),
        "throughput_ratio": outcome.step_s / harmony["step_s"],
        "hidden_throughput_ratio": outcome.bound_s / harmony["step_s"],
    }
    if "swap" in name:
        row |= closed_form(case, name, outcome.microbatch_size)
    return row


def closed_form(case: Case, name: str, size: int) -> dict[str, Any]:
    """Bytes of weights that the paper's formula gives, and those of the simulation.

    The formula counts every access as a miss and every eviction as a write; the simulation here
    writes like that too, but weights that are still there are not fetched again.
    """
    mode = "dp" if name.startswith("DP") else "pp"
    copies = case.num_gpus if mode == "dp" else 1
    count = case.minibatch // copies // size
    formula = (4 * count + 2) * copies * case.graph.weight_nbytes()
    question = (case.graph, case.costs, case.machine, case.minibatch, size)
    outcome = swap_step(
        *question,
        "dp" if mode == "dp" else "pp",
        recompute="recompute" in name,
        always_writes=True,
    )
    return {"formula_nbytes": formula, "weights_nbytes": outcome.nbytes("weights", "shared")}


def describe(row: dict[str, Any]) -> str:
    """One line."""
    start = f"{row['model']:<9} {row['gpus']} GPU  {row['system']:<24}"
    if "refused" in row:
        return f"{start} {row['refused']}"
    line = (
        f"{start} u={row['microbatch']:<2} {row['step_s']:8.1f} s {row['samples_per_s']:6.2f}/s"
        f"  swap {row['swap_nbytes'] / GIB:7.1f} GiB"
    )
    if "throughput_ratio" not in row:
        return f"{line}  (planned in {row['search_s']:.1f} s: {row['plan']})"
    line += (
        f" {row['traffic_ratio']:6.1f} x Harmony's (parameters {row['parameter_ratio']:5.1f} x);"
        f" Harmony is {row['throughput_ratio']:5.2f} x as"
        f" fast ({row['hidden_throughput_ratio']:4.2f} if its copies were hidden)"
    )
    if "formula_nbytes" in row:
        share = row["weights_nbytes"] / row["formula_nbytes"]
        line += f"; weights {share:4.0%} of (4m+2)k|W|"
    return line


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per system the smallest and the largest ratios to Harmony over all cases."""
    found: dict[str, Any] = {}
    for system in dict.fromkeys(row["system"] for row in rows if "traffic_ratio" in row):
        own = [row for row in rows if row["system"] == system and "traffic_ratio" in row]
        found[system] = {
            key: [min(row[key] for row in own), max(row[key] for row in own)]
            for key in ("traffic_ratio", "parameter_ratio", "throughput_ratio")
        }
    return found


def verdict(summary: dict[str, Any]) -> Iterator[str]:
    """What holds of the paper's claims, against each kind of swapping."""
    yield "over all cases, smallest to largest; the paper claims up to 100 times and 7.6 times:"
    for system, ratios in summary.items():
        traffic, parameters = ratios["traffic_ratio"], ratios["parameter_ratio"]
        speed = ratios["throughput_ratio"]
        held = [
            what
            for what, value, claimed in (
                ("traffic", traffic[1], CLAIMED_TRAFFIC),
                ("throughput", speed[1], CLAIMED_THROUGHPUT),
            )
            if value >= claimed
        ]
        yield (
            f"  {system:<24} moves {traffic[0]:5.1f} to {traffic[1]:5.1f} times Harmony's bytes"
            f" (of parameters {parameters[0]:5.1f} to {parameters[1]:5.1f});"
            f" Harmony is {speed[0]:5.2f} to {speed[1]:5.2f} times as fast;"
            f" claims reached: {' and '.join(held) or 'none'}"
        )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--profiles", type=Path, required=True, help="folder of MODEL.json files")
    parser.add_argument("--cases", nargs="+", default=CASES, help="MODEL:MINIBATCH")
    parser.add_argument("--gpus", nargs="+", type=int, default=(1, 2, 4, 8))
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HarmonyError as error:
        sys.exit(f"error: {error}")
