"""Saved profiles: read back as they were, matched with GPUs, refused when damaged."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harmony.core.files import write_json
from harmony.errors import ConfigError, HarmonyError, PlanError
from harmony.profiling.analytic import LayerWork, Work, WorkTable
from harmony.profiling.catalog import find_gpu
from harmony.profiling.model_profile import ModelProfile, load_profile, save_profile
from tests.toys import chain, server, uniform_costs

GRAPH = chain(6, tied=True, skips=((1, 4),), random_layer=2)
WORK = WorkTable(tuple({1: LayerWork(Work({"fp32": 1e9}, 1e6, 1e6, 3), Work())} for _ in range(6)))


def profile(**changes: Any) -> ModelProfile:
    fields: dict[str, Any] = {
        "name": "Toy",
        "graph": GRAPH,
        "costs": uniform_costs(GRAPH),
        "device": "NVIDIA GeForce RTX 3090",
        "work": WORK,
        "machine": server(2),
        "minibatch": 8,
        "torch_version": "2.13.0",
    }
    return ModelProfile(**{**fields, **changes})


def test_a_profile_is_read_back_as_it_was(tmp_path: Path) -> None:
    for number, saved in enumerate((profile(), profile(work=None, machine=None, minibatch=None))):
        path = tmp_path / f"{number}.json"
        save_profile(saved, path)
        assert load_profile(path) == saved
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_fingerprint_is_the_models_and_nothing_elses() -> None:
    assert profile(costs=uniform_costs(GRAPH, 1.0), device="").fingerprint == profile().fingerprint
    others = [chain(6), chain(7, tied=True), chain(6, per_sample=2048), chain(6, frozen=(1,))]
    prints = [graph.fingerprint for graph in (GRAPH, *others)]
    assert len(set(prints)) == len(prints)


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something"}, "not a model profile"),
        ({"version": 99}, "of version 99, this Harmony reads 1"),
        ({"graph": {}}, "damaged: KeyError"),
        ({"costs": []}, "6 layers, costs of 0"),
        ({"fingerprint": "0"}, "changed after it was saved"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "p.json"
    save_profile(profile(), path)
    change(path, **changes)
    with pytest.raises(PlanError, match=message) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there_or_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model profile"):
        load_profile(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match="cannot read"):
        load_profile(tmp_path)
    for text, message in (("{", "not JSON"), ("[1]", "not a model profile")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(PlanError, match=message):
            load_profile(tmp_path / "p.json")
    with pytest.raises(ConfigError, match="cannot write the profile"):
        save_profile(profile(), tmp_path / "nowhere" / "p.json")


def test_on_the_gpu_that_was_measured_the_measured_seconds_stand() -> None:
    saved = profile()
    costs, source = saved.costs_on(find_gpu("RTX 3090"), 1e11, 8)
    assert costs is saved.costs
    assert source == "measured on NVIDIA GeForce RTX 3090"


def test_on_another_gpu_flops_and_bytes_decide() -> None:
    costs, source = profile().costs_on(find_gpu("RTX 4090"), 1e11, 8)
    assert source.startswith("analytic")
    assert costs.layer(0, 1).forward_s == pytest.approx(1e9 / (82.6e12 * 0.75) + 1e6 / 8.064e11)


def test_without_flops_measured_seconds_are_scaled_and_that_is_said() -> None:
    costs, source = profile(work=None).costs_on(find_gpu("RTX 4090"), 1e11, 8)
    assert "2.3 times as fast here by fp32 rates" in source
    assert costs.layer(0, 1).forward_s == pytest.approx(1e-3 * 35.6 / 82.6)


def test_seconds_of_an_unknown_device_say_nothing_about_another() -> None:
    with pytest.raises(PlanError, match="which is not in the catalog"):
        profile(work=None, device="virtual GPU").costs_on(find_gpu("T4"), 1e11, 8)


def test_the_original_profiles_are_read(tmp_path: Path) -> None:
    layers = range(4)
    columns = {
        name: {"1": [float(value)] * 4, "2": [2.0 * value] * 4}
        for name, value in (
            ("time_s_FWD", 1),
            ("time_s_BWD", 3),
            ("mem_bytes_FWD", 5000),
            ("mem_bytes_BWD", 9000),
        )
    }
    data = {
        "model": "toy",
        "R": 4,
        "W": [1024 for _ in layers],
        "B": [0 for _ in layers],
        "K": [2048 for _ in layers],
        "X_per_sample": [256 for _ in layers],
        "upd_cpu_s": [0.01 for _ in layers],
        **columns,
    }
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(data))
    found = load_profile(path)
    assert (found.name, found.graph.num_layers, found.work) == ("toy", 4, None)
    costs, source = found.costs_on(find_gpu("GTX 1080 Ti"), 1e11, 4)
    assert costs is found.costs
    assert source == "measured on GTX 1080 Ti"
    assert found.costs.layer(1, 1).forward_s == 1.0
    change(path, W=[1024])
    with pytest.raises(PlanError, match="W is not a list of 4 numbers"):
        load_profile(path)


def test_what_is_no_ordinary_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json({"a": 1}, pipe, "the profile")
        assert json.loads(os.read(reader, 1000)) == {"a": 1}
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    finally:
        os.close(reader)


def test_a_full_disk_is_no_wrong_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, *_: str, **__: str) -> None:
        os.close(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("harmony.core.files.os.fdopen", full)
    with pytest.raises(HarmonyError, match=r"cannot write the plan to .*No space") as caught:
        write_json({"a": 1}, tmp_path / "plan.json", "the plan")
    assert not isinstance(caught.value, ConfigError)
    assert list(tmp_path.iterdir()) == []


def test_what_a_parameter_takes_on_the_host_is_said_by_kind() -> None:
    layers = tuple(
        replace(layer, weight_nbytes=20, master_nbytes=40, gradient_nbytes=40, state_nbytes=80)
        for layer in GRAPH.layers
    )
    graph = replace(GRAPH, layers=layers, shared=())
    known = profile(graph=graph, num_params=10 * len(layers))
    assert known.host_notes == (
        "60 parameters, 18 bytes each on the host: weights 2, masters 4, gradients 4, optimizer 8",
    )
    assert profile(num_params=0).host_notes == ()
