"""Plans in files: saved, read back, matched, compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harmony.core.machine import Host, Machine
from harmony.errors import ConfigError, PlanError
from harmony.planner.ir.plan_file import (
    check_minibatch,
    check_plan,
    compare_plans,
    load_plan,
    save_plan,
)
from harmony.planner.ir.tasks import Phase
from tests.synthetic import MIB, PACKS, make_plan
from tests.toys import chain

GRAPH = chain(18)
PLAN = make_plan(model=GRAPH.fingerprint)


def test_a_plan_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(PLAN, path)
    assert load_plan(path) == PLAN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "not a plan of Harmony"),
        ({"version": 0}, "of version 0"),
        ({"spec": {}}, "not a plan of this version"),
    ],
)
def test_a_file_that_holds_no_plan_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "plan.json"
    save_plan(PLAN, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such plan"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_that_matches_is_accepted() -> None:
    check_plan(PLAN, GRAPH, PLAN.machine, Phase.TRAIN)
    check_plan(make_plan(), GRAPH, PLAN.machine, Phase.TRAIN)  # one that names no model
    check_minibatch(PLAN, 8)


def machine(num_gpus: int = 2, memory: int = 64 * MIB, host: int = 100 * 1024 * MIB) -> Machine:
    devices = tuple(
        replace(PLAN.machine.devices[0], memory_nbytes=memory) for _ in range(num_gpus)
    )
    return Machine(devices, Host(host))


@pytest.mark.parametrize(
    ("graph", "found", "phase", "message"),
    [
        (chain(17), machine(), Phase.TRAIN, "a model of 18 layers, this one has 17"),
        (chain(18, per_sample=8), machine(), Phase.TRAIN, "another model of 18 layers"),
        (GRAPH, machine(1), Phase.TRAIN, "needs 2 devices, there are 1"),
        (GRAPH, machine(memory=49 * MIB), Phase.TRAIN, "50.0 MiB on gpu0, which has 49.0 MiB"),
        (GRAPH, machine(host=MIB), Phase.TRAIN, "800 MiB of host memory, the limit is 1.00 MiB"),
        (GRAPH, machine(), Phase.BACKWARD, r"whole steps \(train_step\), this is a loop of one's"),
    ],
)
def test_a_plan_that_does_not_match_is_refused_with_the_figures(
    graph: Any, found: Machine, phase: Phase, message: str
) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        check_plan(PLAN, graph, found, phase)
    assert "plan again" in str(caught.value)


def test_a_plan_for_other_minibatches_is_refused() -> None:
    with pytest.raises(PlanError, match="minibatches of 8 samples, this one has 6"):
        check_minibatch(PLAN, 6)


def test_equal_plans_are_called_equal() -> None:
    text = "\n".join(compare_plans(PLAN, PLAN, ("a.json", "b.json")))
    assert "B takes as long as A" in text
    assert "decide everything alike" in text


def test_differences_are_named_with_their_figures() -> None:
    spec = replace(PLAN.spec, forward_size=2, saved=PACKS[1:3])
    other = replace(
        PLAN,
        spec=spec,
        step_s=0.8,
        traffic={("h2d", "weights"): 10 * MIB},
        policy=replace(PLAN.policy, lookahead=4, offload=PACKS[1:2]),
    )
    lines = compare_plans(PLAN, other, ("a.json", "b.json"))
    text = "\n".join(lines)
    assert "B is predicted to take 20.0% less time a step than A." in text
    rows = {line.split("  ")[0]: line.split() for line in lines if "  " in line}
    assert rows["microbatch F / B"][-6:] == ["4", "/", "4", "2", "/", "4"]
    assert rows["lookahead"][-2:] == ["2", "4"]
    assert rows["activations saved for"][-4:] == ["none", "2:", "[3:6]", "[6:9]"]
    assert rows["h2d a step"][-4:] == ["0", "B", "10.0", "MiB"]
    assert "BACKWARD packs" not in rows
    assert "The same in both: machine, minibatch, mode" in text


def test_a_plan_that_takes_many_times_as_long_is_said_to() -> None:
    text = "\n".join(compare_plans(PLAN, replace(PLAN, step_s=3.0), ("a", "b")))
    assert "B is predicted to take 3 times as long as A." in text


def test_plans_for_different_models_or_minibatches_are_said_to_be() -> None:
    other = make_plan(minibatch=16, model="another")
    text = "\n".join(compare_plans(PLAN, other, ("a", "b")))
    assert "different models" in text
    assert "B trains 2 times as many samples a second" in text
