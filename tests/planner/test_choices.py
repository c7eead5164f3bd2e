"""More choices, or more memory, never make the chosen plan slower by more than 1 %.

Each variant takes a choice away from the search. What it then finds was among what the whole
search may choose from; so if it is faster, the whole search has given up too early.
`scripts/ablation.py` shows the same for more cases and variants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.policy import Policy
from harmony.planner.predict.cost import CostTable
from harmony.planner.search import candidates, keeping, ranking, search
from harmony.planner.search.candidates import Candidate
from harmony.planner.search.ranking import handicap
from harmony.profiling.original_format import to_layers
from research.original.machine import machine_of
from research.original.profile import read_profile

PROFILES = Path(__file__).parents[1] / "data" / "reference" / "profiles"
CASES = [
    (gpus, samples, gigabytes, links)
    for gpus, samples, gigabytes in (
        (1, 16, 5),
        (1, 32, 4),
        (1, 64, 9),
        (2, 32, 6),
        (4, 16, 5),
        (4, 64, 9),
        (8, 16, 11),
        (8, 64, 5),
    )
    for links in (1, 4)
]
"""GPUs, samples, gigabytes of a GPU, and a factor on the links of the original's server."""


@cache
def model(name: str) -> tuple[LayerGraph, CostTable]:
    return to_layers(read_profile(PROFILES / f"{name}.json"))


def server(gpus: int, gigabytes: float, links: int) -> Machine:
    machine = machine_of(gpus, int(gigabytes * 10**9))
    devices, switches = (
        tuple(
            replace(
                part,
                h2d_bytes_per_s=part.h2d_bytes_per_s * links,
                d2h_bytes_per_s=part.d2h_bytes_per_s * links,
            )
            for part in parts
        )
        for parts in (machine.devices, machine.switches)
    )
    return replace(machine, devices=devices, switches=switches)


def no_finer_choices(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ranking, "REFINED", 0)


def no_parts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(keeping, "PARTS", ())


def two_policies(patch: pytest.MonkeyPatch) -> None:
    two = (Policy(2, 2, 2), Policy(1, 1, 1))
    for module in (candidates, ranking, search):
        patch.setattr(module, "POLICIES", two)


def counted_s(plan: Plan) -> float:
    """Seconds of a step, and more where weights stream that need not, as the search counts."""
    return plan.step_s * handicap(Candidate(plan.mode, plan.spec, plan.policy))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_choice_that_is_taken_away_makes_a_plan_faster(
    case: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus, samples, gigabytes, links = case
    graph, costs = model("bert_large")
    machine = server(gpus, gigabytes, links)
    whole = counted_s(search.choose(graph, costs, machine, samples))
    variants: tuple[Callable[[pytest.MonkeyPatch], None], ...]
    variants = (no_finer_choices, no_parts, two_policies)
    for variant in variants:
        with monkeypatch.context() as patch:
            variant(patch)
            found = counted_s(search.choose(graph, costs, machine, samples))
        assert whole <= 1.01 * found, f"{variant.__name__}: {found:.4f} s instead of {whole:.4f} s"


@pytest.mark.parametrize("gpus", [4, 8])
def test_more_memory_makes_no_plan_slower(gpus: int) -> None:
    graph, costs = model("gpt2_xl")
    best_s = float("inf")
    for gigabytes in (4.6, 5, 5.5):
        plan = search.choose(graph, costs, server(gpus, gigabytes, 1), 64)
        assert plan.step_s <= 1.01 * best_s, f"{gigabytes} GB: {plan.step_s} s after {best_s} s"
        best_s = min(best_s, plan.step_s)
        slower = [d.why for d in plan.decisions if "faster" in d.why and "because" not in d.why]
        assert slower == [], "what is faster by estimate is said with its reason"
