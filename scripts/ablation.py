#!/usr/bin/env python3
"""What each heuristic of the search is worth: the predicted step of the plan without it.

    scripts/ablation.py [--profiles DIR] [VARIANT ...]

For 22 cases (two models of the original's profiles on its server, 1 to 8 GPUs) the step of the
plan that is chosen with one heuristic switched off, beside the one with all of them. A variant
that is more than 1 % faster somewhere shows that the whole search gives up too early there; exit
code 1 then. `tests/planner/test_choices.py` holds a part of it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harmony.core.machine import Machine
from harmony.errors import DoesNotFitError
from harmony.planner.ir.policy import LEAN, Policy
from harmony.planner.search import candidates, keeping, ranking, search
from harmony.planner.search.candidates import Candidate
from harmony.profiling.original_format import to_layers
from research.original.machine import machine_of
from research.original.profile import read_profile

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("bert_large", "gpt2_xl")
CASES = (
    *((1, 16, 5, 1), (4, 16, 5, 1), (1, 64, 9, 1), (2, 32, 6, 1), (8, 64, 5, 1)),
    *((1, 32, 4, 4), (4, 64, 9, 4), (8, 16, 11, 4)),
    *((n, 64, gigabytes, 1) for n in (8, 4) for gigabytes in (4.6, 5, 5.5)),
)
"""GPUs, samples, gigabytes of a GPU, and a factor on its links; the last six for GPT2-XL only."""

TWO = (Policy(2, 2, 2), Policy(1, 1, 1))
Change = tuple[object, str, object]

VARIANTS: dict[str, tuple[Change, ...]] = {
    "no finer choices": ((ranking, "REFINED", 0),),
    "one finer choice": ((ranking, "REFINED", 1),),
    "no parts of microbatches": ((keeping, "PARTS", ()),),
    "no shares of packs": ((keeping, "OFFLOADED", (1.0,)),),
    "nothing offloaded": ((keeping, "OFFLOADED", ()), (keeping, "PARTS", ())),
    "two orders of keeping": ((keeping, "ORDERS", keeping.ORDERS[::2]),),
    "two policies": (
        *((module, "POLICIES", TWO) for module in (candidates, ranking, search)),
        (ranking, "KEEPING", (TWO[0], replace(LEAN, boundary="keep"))),
    ),
    "equal sizes only": ((search._Search, "_unequal", lambda self, best: []),),
    "nothing learned": ((ranking.Ranking, "learn", lambda self, candidate, seconds: None),),
    "nothing made smaller": ((ranking, "MAX_SHRUNK", 0),),
    "few lowered": ((search, "MAX_LOWERED", 4),),
    "no families": ((search, "MAX_ALIKE", 99),),
    "no twins": ((ranking, "MAX_TWINS", 99),),
}


@contextmanager
def without(changes: tuple[Change, ...]) -> Iterator[None]:
    """Change some names of modules or classes for a while."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def server(gpus: int, gigabytes: float, links: int) -> Machine:
    """The original's server with other memory and links."""
    machine = machine_of(gpus, int(gigabytes * 10**9))
    return replace(
        machine,
        devices=tuple(
            replace(
                device,
                h2d_bytes_per_s=device.h2d_bytes_per_s * links,
                d2h_bytes_per_s=device.d2h_bytes_per_s * links,
            )
            for device in machine.devices
        ),
        switches=tuple(
            replace(
                switch,
                h2d_bytes_per_s=switch.h2d_bytes_per_s * links,
                d2h_bytes_per_s=switch.d2h_bytes_per_s * links,
            )
            for switch in machine.switches
        ),
    )


def measure(profiles: Path) -> tuple[dict[str, tuple[float, float]], float]:
    """Seconds of a step of each case, also as the search counts them, and of CPU in all."""
    found, start_s = {}, time.process_time()
    for name in MODELS:
        graph, costs = to_layers(read_profile(profiles / f"{name}.json"))
        for case in CASES if name == "gpt2_xl" else CASES[:8]:
            gpus, samples, gigabytes, links = case
            step_s = counted_s = math.inf
            try:
                plan = search.choose(graph, costs, server(gpus, gigabytes, links), samples)
            except DoesNotFitError:
                pass
            else:
                step_s = plan.step_s
                candidate = Candidate(plan.mode, plan.spec, plan.policy)
                counted_s = step_s * ranking.handicap(candidate)
            key = f"{name} {gpus} x {gigabytes} GB, {samples} samples, links x {links}"
            found[key] = (step_s, counted_s)
    return found, time.process_time() - start_s


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiles", type=Path, default=ROOT / "tests/data/reference/profiles")
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    args = parser.parse_args()
    whole, cpu_s = measure(args.profiles)
    for key, (step_s, _) in whole.items():
        print(f"{key:52} {step_s:9.3f} s")
    print(f"all heuristics: {cpu_s:.1f} s of CPU", flush=True)
    faster = False
    for name in args.variants or VARIANTS:
        with without(VARIANTS[name]):
            found, cpu_s = measure(args.profiles)
        print(f"{name}: {cpu_s:.1f} s of CPU")
        for key, (step_s, counted_s) in found.items():
            change = step_s / whole[key][0] - 1
            faster |= counted_s < whole[key][1] / 1.01
            if abs(change) >= 0.001:
                print(f"  {key:50} {100 * change:+8.1f} %", flush=True)
    return int(faster)


if __name__ == "__main__":
    sys.exit(main())
