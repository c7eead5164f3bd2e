"""Profiles of the original: what is read, what is refused, and what they are to our planner."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from harmony.errors import PlanError
from harmony.profiling.original_format import to_layers
from research.original.profile import parse_profile, read_profile
from research.original.tables import read_cases, read_schedules

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "reference"
MODELS = ("bert_large", "bert_96", "gpt2_xl", "gpt2_10b")


def small(**changes: Any) -> dict[str, Any]:
    """A profile of two layers, measured at sizes 1 and 4."""
    sizes = {"1": [1.0, 2.0], "4": [4.0, 2.0]}
    nbytes = {"1": [400, 300], "4": [1000, 600]}
    data = {"model": "small", "R": 2, "W": [100, 0], "B": [8, 0], "K": [200, 0]}
    data |= {"X_per_sample": [10, 20], "upd_cpu_s": [0.5, 0.0]}
    data |= {"time_s_FWD": sizes, "time_s_BWD": {"1": [3.0, 4.0], "4": [12.0, 4.0]}}
    return data | {"mem_bytes_FWD": nbytes, "mem_bytes_BWD": nbytes} | changes


def test_sizes_between_those_measured_are_interpolated() -> None:
    profile = parse_profile(small())
    assert profile.column("time_s_FWD", 2) == (2.0, 2.0)
    assert profile.sized(3).backward_s == (0.0, 6.0, 8.0)
    with pytest.raises(PlanError, match="1 to 4 samples, not of 5"):
        profile.column("mem_bytes_BWD", 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W": [1]}, "W is not a list of 2 numbers"),
        ({"K": [1, "x"]}, "K, layer 1: 'x' is not a number"),
        ({"B": [1, -2]}, "B, layer 1: -2 is negative"),
        ({"R": 0}, "R is the number of layers"),
        ({"time_s_FWD": {}}, "needs one size at least"),
        ({"time_s_BWD": {"u": [1, 2]}}, "'u' is not a microbatch size"),
        ({"mem_bytes_FWD": {"1": [1, float("nan")]}}, "nan is negative or not finite"),
    ],
)
def test_a_malformed_profile_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message.replace("[", r"\[")):
        parse_profile(small(**changes))


def test_a_missing_column_is_named() -> None:
    data = small()
    del data["mem_bytes_BWD"]
    with pytest.raises(PlanError, match="lacks mem_bytes_BWD"):
        parse_profile(data)


def test_files_that_are_no_profiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no profile"):
        read_profile(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match="is not a profile"):
        read_profile(tmp_path / "bad.json")


@pytest.mark.parametrize("model", MODELS)
def test_a_profile_becomes_a_chain_of_layers(model: str) -> None:
    profile = read_profile(DATA / "profiles" / f"{model}.json")
    graph, costs = to_layers(profile)
    assert graph.num_layers == profile.num_layers
    assert graph.weight_nbytes() == profile.moved_nbytes[-1]
    assert graph.gradient_nbytes() == sum(profile.weight_nbytes)
    assert graph.state_nbytes() == sum(profile.state_nbytes)
    assert graph.loss == graph.output_ids[0] == profile.num_layers
    assert not graph.pins_microbatch()
    for index in range(graph.num_layers):
        assert graph.pack_inputs(index, index + 1) == (index,)
    cost = costs.layer(1, 2)
    both = profile.column("time_s_BWD", 2)[1]
    assert cost.forward_s + cost.backward_s == pytest.approx(both)
    assert costs.layer(1, 1).update_s == profile.update_s[1]


@pytest.mark.parametrize("model", MODELS)
def test_no_layer_needs_less_than_was_measured(model: str) -> None:
    profile = read_profile(DATA / "profiles" / f"{model}.json")
    graph, costs = to_layers(profile)
    for size, peaks in profile.columns["mem_bytes_BWD"].items():
        forward = profile.column("mem_bytes_FWD", size)
        for index, layer in enumerate(graph.layers):
            cost = costs.layer(index, size)
            ends = sum(graph.values[v].nbytes_per_sample for v in (index, index + 1)) * size
            kept = layer.weight_nbytes + ends
            assert kept + cost.forward_nbytes >= forward[index]
            alone = kept + layer.gradient_nbytes + cost.saved_nbytes + cost.backward_nbytes
            assert alone >= peaks[index]
            # What is saved is alive with weights, input and output as a backward begins.
            assert kept + cost.saved_nbytes <= peaks[index] + size


@pytest.mark.parametrize(
    ("model", "tokens", "width", "heads"),
    [("bert_large", 512, 1024, 16), ("gpt2_xl", 1024, 1600, 25)],
)
def test_saved_bytes_of_a_transformer_block_are_near_the_analytic_rule(
    model: str, tokens: int, width: int, heads: int
) -> None:
    graph, _ = to_layers(read_profile(DATA / "profiles" / f"{model}.json"))
    rule = 66 * tokens * width + 9 * heads * tokens**2
    assert rule < graph.layers[3].saved_nbytes_per_sample < 2 * rule


def test_beyond_the_sizes_measured_bytes_grow_by_the_most_that_they_grew() -> None:
    profile = read_profile(DATA / "profiles" / "gpt2_xl.json")
    _, costs = to_layers(profile)
    last = profile.max_backward_size
    for index in range(profile.num_layers):
        found = [costs.layer(index, size) for size in range(1, last + 1)]
        for name in ("forward_nbytes", "saved_nbytes", "backward_nbytes"):
            values = [getattr(cost, name) for cost in found]
            steps = [b - a for a, b in pairwise(values)]
            beyond = getattr(costs.layer(index, last + 3), name)
            assert beyond >= values[-1] + 3 * max(0, *steps) - 3
        assert costs.layer(index, 2 * last).forward_s >= found[-1].forward_s


def test_tables_say_which_line_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    with pytest.raises(PlanError, match="cannot be read"):
        read_cases(path)
    path.write_text("model,mode\nx,DP\n")
    with pytest.raises(PlanError, match="lacks the columns minibatch, gpus"):
        read_cases(path)
    text = (DATA / "search_results.csv").read_text()
    path.write_text(text.replace("gpt2_10b,32,DP,1", "gpt2_10b,32,XP,1"))
    with pytest.raises(PlanError, match="line 3: the mode is DP or PP, not 'XP'"):
        read_cases(path)
    path.write_text(text + "gpt2_xl,64\n")
    with pytest.raises(PlanError, match="fewer fields"):
        read_cases(path)
    lines = (DATA / "schedules.csv").read_text().replace('"[[0, 5]]"', '"[[0]]"', 1)
    path.write_text(lines)
    with pytest.raises(PlanError, match="line 2: a pack is"):
        read_schedules(path)


@pytest.mark.parametrize("script", ["paper_parity.py", "planner_vs_original.py"])
def test_a_script_that_cannot_read_its_table_exits_with_2(script: str, tmp_path: Path) -> None:
    option = "--schedules" if script == "paper_parity.py" else "--cases"
    command = [sys.executable, str(ROOT / "scripts" / script), option, str(tmp_path / "none.csv")]
    command += ["--profiles", str(DATA / "profiles")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "none.csv cannot be read" in done.stderr


def test_the_parity_script_passes_and_notices_what_is_off(tmp_path: Path) -> None:
    table = tmp_path / "schedules.csv"
    lines = (DATA / "schedules.csv").read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:3]))
    command = [sys.executable, str(ROOT / "scripts" / "paper_parity.py"), "--json"]
    command += ["--profiles", str(DATA / "profiles"), "--schedules", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["passes"] for row in json.loads(done.stdout)] == [True, True]
    table.write_text("".join(lines[:3]).replace("4.3994", "4.5994"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [row["passes"] for row in json.loads(done.stdout)] == [True, False]
    table.write_text("".join(lines[:3]).replace("bert_large,D32_vPP", "unknown,D32_vPP"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no profile of 'unknown'" in done.stderr
