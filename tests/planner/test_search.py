"""Choosing a plan: it fits, it is verified, it explains itself, and it says why nothing fits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Host
from harmony.errors import ConfigError, DoesNotFitError, PlanError
from harmony.planner.check.verify import check_together, verify
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Op, Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, TaskKind, weights
from harmony.planner.lower.passes import lower
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.predict.memory import Workspace, device_peak
from harmony.planner.predict.simulate import simulate
from harmony.planner.search.search import choose
from harmony.planner.search.trial import for_phase, inference_schedule
from tests.toys import MIB, chain, packs, server, step, uniform_costs

MODEL = chain(12, weight=2 * MIB, per_sample=64 * 1024)
COSTS = uniform_costs(MODEL)


def saving(graph: LayerGraph, nbytes: int) -> LayerGraph:
    """The same model whose layers save that much of each sample for their backward."""
    layers = tuple(replace(layer, saved_nbytes_per_sample=nbytes) for layer in graph.layers)
    return replace(graph, layers=layers)


def inferring(graph: LayerGraph, plan: Plan) -> Schedule:
    """Its schedule of inference."""
    return inference_schedule(graph, COSTS, plan.machine, plan.spec, plan.policy)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("mode", ["auto", "pp", "dp"])
@pytest.mark.parametrize("memory", [12, 24, 200])
def test_the_plan_fits_and_its_figures_are_those_of_its_schedule(
    num_devices: int, mode: str, memory: int
) -> None:
    machine = server(num_devices, memory=memory * MIB)
    plan = choose(MODEL, COSTS, machine, 8, mode=mode)
    assert all(peak <= memory * MIB for peak in plan.peak_nbytes)
    tasks = build_tasks(MODEL, plan.spec)
    verify(plan.schedule, MODEL, COSTS, Phase.TRAIN, tasks)
    timeline = simulate(plan.schedule, MODEL, COSTS, machine)
    assert timeline.step_s == plan.step_s
    assert timeline.bytes_by() == plan.traffic
    assert mode in ("auto", plan.mode) or num_devices == 1
    assert all(not isinstance(s, float) or s >= plan.step_s for _, s in plan.alternatives)
    assert plan.bound in ("compute", "h2d", "d2h", "peer", "update", "host")
    assert plan.advice.endswith(".")


def test_more_memory_is_never_slower() -> None:
    steps = [
        choose(MODEL, COSTS, server(1, memory=m * MIB), 8).step_s for m in (12, 16, 24, 48, 96)
    ]
    # The search is bounded, so allow it a percent.
    assert all(later <= earlier * 1.01 for earlier, later in pairwise(steps))


def test_a_larger_minibatch_is_not_slower_for_each_sample_where_rounds_hide() -> None:
    """The activations of few microbatches fit, those of many do only round by round."""
    graph = saving(MODEL, 512 * 1024)
    machine = server(1, memory=64 * MIB, rate=3e8)
    plans = [choose(graph, COSTS, machine, n, microbatch_size=1) for n in (8, 16, 32, 64)]
    assert [plan.spec.rounds for plan in plans] == [1, 2, 4, 8]
    each = [plan.step_s / plan.minibatch for plan in plans]
    assert each == sorted(each, reverse=True)
    longest = lowered_alone(graph, plans[-1], rounds=1)
    assert plans[-1].step_s < 0.99 * min(longest, 8 * plans[0].step_s)


def lowered_alone(graph: LayerGraph, plan: Plan, rounds: int) -> float:
    """Predicted seconds of a plan in so many rounds that recomputes what has no room then."""
    spec = replace(plan.spec, rounds=rounds, saved=(), saved_runs=0)
    tasks = build_tasks(graph, spec)
    policy = replace(plan.policy, offload=(), hold=0)
    schedule = lower(tasks, plan.machine, policy)
    verify(schedule, graph, COSTS, Phase.TRAIN, tasks)
    return simulate(schedule, graph, COSTS, plan.machine).step_s


FIRST_THREE = [weights(pack) for pack in packs(3, 6, 9)]


@pytest.mark.parametrize("hold", range(5))
@pytest.mark.parametrize("rounds", [2, 3, 6])
def test_weights_are_held_within_rounds_and_across_them(rounds: int, hold: int) -> None:
    tasks = build_tasks(
        MODEL, replace(step(6, 1, packs(3, 6, 9), packs(3, 6, 9, 12)), rounds=rounds)
    )
    schedule = lower(tasks, server(1, memory=512 * MIB), Policy(hold=hold))
    verify(schedule, MODEL, COSTS, Phase.TRAIN, tasks)
    come = [s.ref for s in schedule.programs[0] if s.op is Op.SWAP_IN and s.ref in FIRST_THREE]
    # Pack 0, which ends a round and begins the next one, comes once for both.
    several = 2 * 3 * rounds - (rounds - 1)
    assert len(come) == several - rounds * min(hold, 3)


def test_the_same_question_gets_the_same_plan() -> None:
    plans = [choose(MODEL, COSTS, server(2, memory=24 * MIB), 8) for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()


def test_plans_are_read_back_from_json() -> None:
    plan = choose(MODEL, COSTS, server(2, memory=24 * MIB), 8)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json({"mode": "pp"})


def test_a_plan_describes_itself() -> None:
    lines = choose(MODEL, COSTS, server(1, memory=24 * MIB), 8).describe()
    assert [line.split()[0] for line in lines] == ["pp,", "step", "memory", "traffic"]
    assert "gpu0 " in lines[2] and " of 24.0 MiB" in lines[2]


def test_what_was_asked_for_is_obeyed() -> None:
    plan = choose(MODEL, COSTS, server(1), 8, microbatch_size=4, num_packs=6)
    assert plan.spec.backward_size == 4
    assert len(plan.spec.backward_packs) == 6
    plan = choose(MODEL, COSTS, server(2), 8, mode="dp", microbatch_size=3)
    assert plan.spec.shares == ((0, 4), (4, 8)) and plan.spec.backward_size == 3


def test_microbatches_are_equal_where_a_layer_draws_random_numbers() -> None:
    # Forwards of two samples cost hardly more than of one: unequal sizes would be faster, where
    # what a forward saves is too much to keep or to offload.
    cheap = {
        1: LayerCost(1e-3, 2e-3, 0.0, 512, 2048, 1024),
        4: LayerCost(1.1e-3, 8e-3, 0.0, 512, 8192, 4096),
    }
    sizes = {}
    for name, layer in (("free", None), ("pinned", 3)):
        graph = saving(chain(12, weight=2 * MIB, random_layer=layer), 8 * MIB)
        plan = choose(
            graph, CostTable((cheap,) * 12), server(1, memory=24 * MIB), 8, microbatch_size=1
        )
        sizes[name] = (plan.spec.forward_size, plan.spec.backward_size)
    assert sizes == {"free": (4, 1), "pinned": (1, 1)}


def test_phases_of_the_drop_in_form_share_packs_and_microbatches() -> None:
    plan = choose(MODEL, COSTS, server(2, memory=24 * MIB), 8, phase=Phase.BACKWARD)
    assert plan.spec.forward_packs == plan.spec.backward_packs
    assert set(plan.schedules) == {Phase.FORWARD, Phase.BACKWARD}
    for phase, schedule in (*plan.schedules.items(), (Phase.INFER, inferring(MODEL, plan))):
        tasks = build_tasks(MODEL, for_phase(plan.spec, phase))
        verify(schedule, MODEL, COSTS, phase, tasks)
    assert plan.spec.saved
    check_together(plan.schedules[Phase.FORWARD], plan.schedules[Phase.BACKWARD])
    again = choose(
        MODEL, COSTS, server(2, memory=24 * MIB), 8, phase=Phase.BACKWARD, activations="recompute"
    )
    assert not again.spec.kept and plan.step_s < again.step_s
    said = next(d.chosen for d in again.decisions if d.name == "activations")
    assert said == f"recomputed in {len(again.spec.backward_packs)} packs"


def test_a_training_plan_can_infer() -> None:
    plan = choose(MODEL, COSTS, server(1, memory=24 * MIB), 8)
    runs = [i.task for i in inferring(MODEL, plan).programs[0] if i.task is not None]
    assert {task.kind for task in runs} == {TaskKind.FORWARD}
    assert runs[-1].pack.last == 12


def test_a_layer_that_fits_nowhere_is_named() -> None:
    with pytest.raises(DoesNotFitError, match=r"layer 0 \(layer0\) alone needs 4\.\d+ MiB"):
        choose(MODEL, COSTS, server(1, memory=4 * MIB), 8)


def test_an_option_that_does_not_fit_is_explained() -> None:
    wide = chain(4, weight=1000, per_sample=MIB)
    with pytest.raises(DoesNotFitError, match=r"Use a microbatch of 1, or .*--gpu-memory"):
        choose(wide, uniform_costs(wide), server(1, memory=16 * MIB), 8, microbatch_size=8)
    with pytest.raises(DoesNotFitError, match="2 packs are too few"):
        choose(MODEL, COSTS, server(1, memory=12 * MIB), 8, num_packs=2)


def test_host_memory_has_a_limit_too() -> None:
    machine = server(1, memory=24 * MIB)
    for limit, why in ((60, r"optimizer state need 96\.0 MiB .*train less of the model \(LoRA"),):
        small = replace(machine, host=Host(limit * MIB))
        with pytest.raises(DoesNotFitError, match=why):
            choose(MODEL, COSTS, small, 8)
    with pytest.raises(DoesNotFitError, match=r"of host memory; the limit is 97\.0 MiB"):
        choose(MODEL, COSTS, replace(machine, host=Host(97 * MIB)), 64)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mode": "tp"}, 'mode is "auto", "pp" or "dp"'),
        ({"microbatch_size": 0}, "positive number"),
        ({"num_packs": 13}, "between 1 and 12"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        choose(MODEL, COSTS, server(1), 8, **options)  # type: ignore[arg-type]


def test_the_planner_needs_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, harmony.planner as p\n"
        "[importlib.import_module(m.name)"
        " for m in pkgutil.walk_packages(p.__path__, 'harmony.planner.')]\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inference_is_lowered_leaner_where_the_policy_of_training_does_not_fit() -> None:
    """Outputs as wide as these fill a GPU that trains the model well."""
    values = [replace(v, nbytes_per_sample=1024) for v in MODEL.values]
    values[-2] = replace(values[-2], nbytes_per_sample=3 * MIB, is_output=True)
    graph = replace(MODEL, values=tuple(values))
    plan = choose(graph, COSTS, server(1, memory=40 * MIB), 8)
    tasks = build_tasks(graph, for_phase(plan.spec, Phase.INFER))
    wanted = Policy(2, 2, 4)
    schedule = lower(tasks, server(1), wanted)
    peak = device_peak(schedule, 0, graph, Workspace(graph, COSTS)).nbytes
    tight = server(1, memory=peak - MIB)
    with pytest.raises(DoesNotFitError):
        verify(lower(tasks, tight, wanted), graph, COSTS, Phase.INFER, tasks)
    leaner = inference_schedule(graph, COSTS, tight, plan.spec, wanted)
    verify(leaner, graph, COSTS, Phase.INFER, tasks)
    with pytest.raises(DoesNotFitError, match=r"inference does not fit .* Use a smaller minib"):
        inference_schedule(graph, COSTS, server(1, memory=4 * MIB), plan.spec, wanted)
