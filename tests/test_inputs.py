"""Damaged files and senseless settings: one error with the file and the reason, nothing raw."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import harmony
from harmony.core.files import check_types, parse_json, read_json, write_text
from harmony.core.units import parse_bytes, parse_rate
from harmony.errors import ConfigError, HarmonyError, PlanError, printable
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.plan_file import load_plan, save_plan
from harmony.planner.search.search import choose
from tests.toys import MIB, chain, server, uniform_costs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import fuzz_inputs

DEEP = "[" * 100_000


def file(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def test_hundreds_of_damaged_inputs_end_in_an_error_of_harmony() -> None:
    """`scripts/fuzz_inputs.py` does the same ten thousand times."""
    ended, failures = fuzz_inputs.fuzz(450, seed=1)
    assert not failures
    assert all(counts["refused"] or counts["accepted"] for counts in ended.values())


# The cases of files and settings that ended in raw exceptions


def test_a_plan_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    """Raised RecursionError."""
    with pytest.raises(PlanError, match=r"p\.json: it is not JSON \(it is nested too deeply"):
        load_plan(file(tmp_path, "p.json", DEEP))


@pytest.mark.parametrize(
    "shape", ["[Infinity]", "[1e999]", "[-1]", "[2.5]", '["4"]', "[true]", "4", f"[{'9' * 400}]"]
)
def test_a_shape_that_no_tensor_has_is_refused(tmp_path: Path, shape: str) -> None:
    """Raised OverflowError."""
    text = f'{{"weight": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 16]}}}}'
    path = file(tmp_path, "a.safetensors", safetensors(text.encode()))
    with pytest.raises(ConfigError, match=r"a\.safetensors is damaged"):
        harmony.load_pretrained(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize("header", [DEEP.encode(), b"[]", b"{", b"\xff\xfe", b'{"a": 1}'])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    """Raised RecursionError."""
    path = file(tmp_path, "b.safetensors", safetensors(header))
    with pytest.raises(ConfigError, match=r"b\.safetensors is damaged"):
        harmony.load_pretrained(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ('{"weight_map": {"a": 1}}', "is not an index"),  # raised TypeError
        (json.dumps({"weight_map": {"a": "x" * 5000}}), "files that are not there"),  # OSError
        ('{"weight_map": {"a": "../b.bin"}}', "outside of its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "outside of its folder"),
        ('{"weight_map": ["a"]}', "is not an index"),
        ('{"weight_map": {"a": "b\\u0000"}}', "is not an index"),
        ("[]", "is not an index"),
        (DEEP, "is not an index"),
    ],
)
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, index: str, why: str) -> None:
    path = file(tmp_path, "model.safetensors.index.json", index)
    with pytest.raises(ConfigError, match=why):
        harmony.load_pretrained(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize("size", ["9" * 400, 2**70, 1.5e9, None, True, "1e9", b"1", "0", -1, [1]])
def test_sizes_are_whole_numbers_that_a_memory_may_have(size: Any) -> None:
    """Raised OverflowError and TypeError."""
    with pytest.raises(ConfigError):
        parse_bytes(size)


@pytest.mark.parametrize("rate", ["9" * 400 + "/s", float("nan"), float("inf"), None, 0, "8GB"])
def test_rates_are_finite(rate: Any) -> None:
    with pytest.raises(ConfigError):
        parse_rate(rate)


@pytest.mark.parametrize(
    "setting",
    [
        "slowdown=nan",
        "slowdown=0.5",
        "delay_us=-5",
        "num_threads=-1",
        "jitter_us=inf",
        "count=0",
        "count=17",
        "jitter_seed=-1",
        "memory=-1",
        "link=nan",
        "count=" + "9" * 5000,
        "nonsense",
        "memory=",
    ],
)
def test_virtual_gpus_that_nobody_can_have_are_refused(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Were accepted, some to hang."""
    monkeypatch.setenv("HARMONY_VGPU", setting)
    with pytest.raises(HarmonyError):
        harmony.virtual_gpus()


@pytest.mark.parametrize(
    "options",
    [
        {"seed": "a"},
        {"seed": 1.5},
        {"batch_dims": {"targets": "0"}},
        {"batch_dims": ["targets"]},
        {"optimizer_kwargs": "lr=1"},
        {"devices": ["nonsense"]},
        {"devices": ["vgpu:15"]},
        {"devices": ["meta"]},
        {"devices": 1.5},
        {"device_memory": 1.5e9},
        {"max_grad_norm": "1"},
    ],
)
def test_options_of_another_type_are_refused(options: dict[str, Any]) -> None:
    harmony.virtual_gpus(count=2)
    with pytest.raises(ConfigError):
        harmony.Harmony(torch.nn.Linear(2, 2), optimizer=torch.optim.SGD, **options)


# What all of it stands on


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("NaN", "NaN is no number"),
        ("-Infinity", "is no number"),
        ("1e999", "too large"),
        ("1" + "0" * 30, "31 digits"),
        ('"\\u001b[2J"', "control characters"),
        ('{"\\ud800": 1}', "control characters"),
        (DEEP, "nested too deeply"),
        ("{", "Expecting"),
    ],
)
def test_json_is_finite_and_can_be_shown(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_a_file_without_end_is_read_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harmony.core.files.MOST_NBYTES", 1000)
    with pytest.raises(PlanError, match="more than 1000 bytes"):
        read_json(Path("/dev/zero"), "plan")
    with pytest.raises(ConfigError, match="cannot read the plan"):
        read_json(tmp_path, "plan")


def test_control_characters_of_files_never_reach_a_terminal(tmp_path: Path) -> None:
    header = json.dumps({"\x1b[2Jred": {"dtype": "X", "shape": [], "data_offsets": [0, 0]}})
    odd = file(tmp_path, "\x1b]0;title\x07.safetensors", safetensors(header.encode()))
    with pytest.raises(ConfigError) as error:
        harmony.load_pretrained(torch.nn.Linear(2, 2), odd)
    assert printable(str(error.value)) == str(error.value)
    assert "\\x1b]0;title\\x07" in str(error.value)
    assert str(HarmonyError("a\tb\nc é \u202e")) == "a\tb\nc é \\u202e"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("step_s",), "1"),
        (("step_s",), -1.0),
        (("peak_nbytes",), []),
        (("minibatch",), 7),
        (("spec", "backward_packs"), []),
        (("spec", "backward_packs"), [[0, 4], [6, 12]]),
        (("spec", "shares"), [[4, 0]]),
        (("spec", "forward_size"), 0),
        (("spec", "phase"), "infer"),
        (("policy", "hold"), "many"),
        (("machine", "devices"), []),
        (("schedules",), {}),
        (("advice",), None),
    ],
)
def test_a_plan_of_other_types_or_without_sense_is_refused(
    tmp_path: Path, key: tuple[str, ...], value: Any
) -> None:
    """Ended in whatever the first reader of the field raised."""
    graph = chain(12, weight=2 * MIB)
    plan = choose(graph, uniform_costs(graph), server(1, memory=24 * MIB), 8)
    path = tmp_path / "plan.json"
    save_plan(plan, path)
    assert load_plan(path) == plan
    data = json.loads(path.read_text())
    holder = data
    for name in key[:-1]:
        holder = holder[name]
    holder[key[-1]] = value
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"plan\.json: not a plan of this version"):
        load_plan(path)


def test_types_are_checked_down_to_the_last_field() -> None:
    graph = chain(3)
    plan = choose(graph, uniform_costs(graph), server(1), 2)
    check_types(plan, Plan)
    object.__setattr__(plan.machine.devices[0], "memory_nbytes", 1.5)
    with pytest.raises(TypeError, match=r"machine\.devices\[0\]\.memory_nbytes is '1\.5'"):
        check_types(plan, Plan)


# Files that are written


def test_a_link_laid_in_the_way_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    """The neighbour's name cannot be foreseen, and only a new file is opened."""
    victim = file(tmp_path, "victim", "precious")
    (tmp_path / f".plan.json.{os.getpid()}").symlink_to(victim)
    write_text("a plan", tmp_path / "plan.json", "the plan")
    assert (tmp_path / "plan.json").read_text() == "a plan"
    assert victim.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir() if "plan.json" in p.name) == [
        f".plan.json.{os.getpid()}",
        "plan.json",
    ]


def test_a_name_that_no_file_can_have_is_an_error_of_harmony(tmp_path: Path) -> None:
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match="cannot write the plan"):
            write_text("", tmp_path / name, "the plan")
        with pytest.raises(HarmonyError):
            load_plan(tmp_path / name)
        with pytest.raises(ConfigError, match="there is no file"):
            harmony.load_pretrained(torch.nn.Linear(2, 2), tmp_path / name)
