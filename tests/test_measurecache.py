"""What earlier runs measured is used again, exactly, and only where it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.core.files import cache_folder
from harmony.core.options import Options
from harmony.errors import ConfigError
from harmony.profiling import layer_times as profiler
from harmony.profiling import measured
from harmony.profiling.cache import (
    MeasureCache,
    code_identity,
    machine_identity,
    open_cache,
    optimizer_identity,
)
from harmony.profiling.layer_times import KnownTimes
from harmony.profiling.server import usable_nbytes
from harmony.profiling.update_times import UpdateCost
from harmony.report import session
from harmony.runtime.device import DeviceContext
from harmony.runtime.update.optimizer import PackOptimizer
from harmony.vgpu import api as vgpu
from tests.toys import server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, on."""
    vgpu.ensure_available()  # built and loaded from the usual place
    monkeypatch.delenv("HARMONY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HARMONY_MEASUREMENTS", "on")
    return tmp_path / "harmony"


@pytest.fixture
def contexts() -> list[DeviceContext]:
    vgpu.virtual_gpus(count=2, memory="64MiB")
    return [DeviceContext(torch.device("vgpu", index)) for index in range(2)]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often something was measured."""
    calls: dict[str, int] = {}

    def count(name: str, home: Any) -> None:
        original: Callable[..., Any] = getattr(home, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(home, name, counted)

    count("measure_machine", measured)
    count("measure_update", measured)
    count("_measure", profiler._LayerRun)
    yield calls


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def trained(**options: Any) -> harmony.Harmony:
    torch.manual_seed(0)
    model = harmony.Harmony(Net(), optimizer=torch.optim.AdamW, devices=2, **options)
    model.train_step(torch.ones(8, 32))
    return model


def costs_of(model: harmony.Harmony) -> tuple[Any, Any]:
    (variant,) = model._engine.variants
    return variant.measured.costs, variant.measured.machine


@pytest.mark.usefixtures("contexts")
def test_a_second_start_measures_nothing_and_plans_the_same(
    folder: Path, counting: dict[str, int]
) -> None:
    first = trained()
    assert counting["measure_machine"] == counting["measure_update"] == 1
    before = dict(counting)
    assert before["_measure"] > 0
    second = trained()
    assert counting == before
    (costs, machine), (costs_again, machine_again) = costs_of(first), costs_of(second)
    assert costs_again == costs
    assert machine_again.cpu_share == machine.cpu_share
    rates = [(d.h2d_bytes_per_s, d.d2h_bytes_per_s, d.p2p_bytes_per_s) for d in machine.devices]
    assert rates == [
        (d.h2d_bytes_per_s, d.d2h_bytes_per_s, d.p2p_bytes_per_s) for d in machine_again.devices
    ]
    assert first.plan is not None and second.plan is not None
    assert second.plan.spec == first.plan.spec
    kinds = {path.name.partition("-")[0] for path in folder.iterdir()}
    assert kinds - {"cpu"} == {"layers", "machine", "update"}  # kernels are built once a process


@pytest.mark.usefixtures("contexts")
def test_what_is_not_known_yet_is_measured_and_added(
    folder: Path, counting: dict[str, int]
) -> None:
    trained(microbatch_size=8)
    before = counting["_measure"]
    trained(microbatch_size=4)
    added = counting["_measure"] - before
    assert added > 0
    trained(microbatch_size=4)
    trained(microbatch_size=8)
    assert counting["_measure"] == before + added


@pytest.mark.usefixtures("contexts")
@pytest.mark.parametrize("off", ["variable", "option"])
def test_it_can_be_turned_off(
    folder: Path, counting: dict[str, int], off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if off == "variable":
        monkeypatch.setenv("HARMONY_MEASUREMENTS", "off")
    with session.running(Options(cache=off != "option")):
        trained()
        trained()
    assert counting["measure_machine"] == 2
    assert not folder.exists()


@pytest.mark.usefixtures("contexts")
def test_a_damaged_file_is_measured_again_with_one_line(
    folder: Path, counting: dict[str, int]
) -> None:
    trained()
    for path in folder.iterdir():
        path.write_text("{" if path.name.startswith("machine") else "[]")
    model = trained()
    assert counting["measure_machine"] == 2
    assert len(model.record.warnings) == 3
    assert all(line.startswith("measuring again: ") for line in model.record.warnings)
    assert trained().record.warnings == []


def test_a_folder_that_cannot_be_written_is_done_without(
    folder: Path, contexts: list[DeviceContext]
) -> None:
    folder.write_text("a file is in the way")
    said: list[str] = []
    cache = MeasureCache(folder, "machine", said.append)
    cache.keep_times(Net(), KnownTimes({("a", 1): (1.0, 2.0, 0.5)}, 0.5))
    assert len(said) == 1
    assert "the next run has to measure again" in said[0]


def test_times_are_read_back_exactly(folder: Path) -> None:
    cache = MeasureCache(folder, "machine", pytest.fail)
    known = KnownTimes(
        {("Linear:ab", 8): (0.1, 1 / 3, 0.01), ("Linear:ab", 1): (1e-9, 0.0, 0.0)}, 0.7
    )
    cache.keep_times(Net(), known)
    assert cache.times(Net()) == known
    other = MeasureCache(folder, "another machine", pytest.fail)
    assert other.times(Net()) == KnownTimes()


def test_memory_is_that_of_now(folder: Path, contexts: list[DeviceContext]) -> None:
    cache = MeasureCache(folder, "m", pytest.fail)
    first = cache.machine(contexts, None, 5000, lambda: server(2, memory=123))
    assert first == server(2, memory=123)
    again = cache.machine(contexts, None, 5000, pytest.fail)
    usable = [usable_nbytes(context) for context in contexts]
    assert [device.memory_nbytes for device in again.devices] == usable != [123, 123]
    assert again.host.memory_nbytes == 5000
    assert again.devices[0].h2d_bytes_per_s == first.devices[0].h2d_bytes_per_s
    # For another number of devices, and under another limit, it is measured.
    assert cache.machine(contexts[:1], None, 5000, lambda: server(1)) == server(1)
    assert cache.machine(contexts, 4096, 5000, lambda: server(2)) == server(2)


def test_the_key_changes_with_the_links_of_virtual_gpus() -> None:
    vgpu.virtual_gpus(count=2, memory="64MiB")
    contexts = [DeviceContext(torch.device("vgpu", 0))]
    plain = machine_identity(contexts)
    assert machine_identity(contexts) == plain
    vgpu.virtual_gpus(count=2, memory="64MiB", link="1GB/s")
    assert machine_identity(contexts) != plain
    vgpu.virtual_gpus(count=2, memory="64MiB")


def test_the_key_changes_with_the_code_of_the_forward() -> None:
    def make(text: str) -> nn.Module:
        space: dict[str, Any] = {"nn": nn}
        body = f"class Net(nn.Module):\n    def forward(self, x):\n        return {text}\n"
        exec(body, space)
        found: nn.Module = space["Net"]()
        return found

    assert code_identity(make("x + 1")) == code_identity(make("x + 1"))
    assert code_identity(make("x + 1")) != code_identity(make("x + 2"))
    assert code_identity(make("x + 1")) != code_identity(make("x.sin()"))
    assert code_identity(make("(lambda y: y + 1)(x)")) != code_identity(
        make("(lambda y: y + 2)(x)")
    )


def test_only_optimizers_whose_cost_their_name_tells_are_kept(folder: Path) -> None:
    def made(kind: Any, dtype: torch.dtype = torch.float32, **options: Any) -> PackOptimizer:
        return PackOptimizer({"w": nn.Parameter(torch.zeros(3, 2, dtype=dtype))}, kind, options)

    class Own(torch.optim.SGD):
        pass

    sgd, own = made(torch.optim.SGD, fused=True), made(Own)
    adam = optimizer_identity(made(torch.optim.AdamW, lr=0.1, fused=True))
    assert adam == optimizer_identity(made(torch.optim.AdamW, fused=True, lr=0.2))
    assert adam != optimizer_identity(made(torch.optim.AdamW, lr=0.1, fused=False))
    assert adam != optimizer_identity(made(torch.optim.AdamW, torch.bfloat16, fused=True))
    assert adam != optimizer_identity(sgd)
    assert optimizer_identity(own) == ""
    cache = MeasureCache(folder, "m", pytest.fail)
    costs = [UpdateCost(1.0, {"a": 8.0}), UpdateCost(2.0, {"a": 8.0})]
    assert cache.update(sgd, lambda: costs[0]) == costs[0]
    assert cache.update(sgd, lambda: costs[1]) == costs[0]
    assert cache.update(own, lambda: costs[1]) == costs[1]


def test_on_virtual_gpus_it_is_on_only_under_harmony_run(
    contexts: list[DeviceContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HARMONY_MEASUREMENTS")
    assert open_cache(contexts, pytest.fail) is None
    with session.running(Options(active=True)):
        assert open_cache(contexts, pytest.fail) is not None
    monkeypatch.setenv("HARMONY_MEASUREMENTS", "maybe")
    with pytest.raises(ConfigError, match="it is on or off"):
        open_cache(contexts, pytest.fail)


def test_it_lies_where_the_system_wants_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARMONY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/harmony")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("~/.cache/harmony").expanduser()
    monkeypatch.setenv("HARMONY_CACHE", "/own")  # one setting for all caches
    assert cache_folder() == Path("/own")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"cpu_share": 0.5, "seconds": [["a", 1, NaN, 1.0, 0.5]]}',
        '{"cpu_share": 0.5, "seconds": [["a", 1, -1.0, 1.0, 0.5]]}',
        '{"cpu_share": 0.5, "seconds": [["a", 1.5, 1.0, 1.0, 0.5]]}',
        '{"cpu_share": 1e999, "seconds": []}',
        '{"cpu_share": 0.5, "seconds": [["\\u001b[2J", 1, 1.0, 1.0, 0.5]]}',
        "[]",
        "{}",
    ],
)
def test_times_that_nothing_takes_are_measured_again(folder: Path, text: str) -> None:
    said = list[str]()
    cache = MeasureCache(folder, "m", said.append)
    cache.keep_times(Net(), KnownTimes({("a", 1): (1.0, 2.0, 0.5)}))
    (path,) = folder.iterdir()
    path.write_text(text)
    assert cache.times(Net()).seconds == {}
    assert len(said) == 1 and "measuring again" in said[0] and str(path) in said[0]


@pytest.mark.parametrize("field", ["h2d_bytes_per_s", "memory_nbytes", "task_overhead_s"])
@pytest.mark.parametrize("value", ["-1", "0", "null", '"1"', "1e999"])
def test_a_machine_that_nobody_has_is_measured_again(
    folder: Path, contexts: list[DeviceContext], field: str, value: str
) -> None:
    if (field, value) == ("task_overhead_s", "0"):
        return  # that is what it is
    said = list[str]()
    cache = MeasureCache(folder, "m", said.append)
    cache.machine(contexts, None, None, lambda: server(2))
    (path,) = folder.iterdir()
    data = json.loads(path.read_text())
    for device in data["devices"]:
        device[field] = "HERE"
    path.write_text(json.dumps(data).replace('"HERE"', value))
    assert cache.machine(contexts, None, None, lambda: server(2, rate=3e9)) == server(2, rate=3e9)
    assert len(said) == 1 and "measuring again" in said[0]


def test_the_files_are_json(folder: Path) -> None:
    MeasureCache(folder, "m", pytest.fail).keep_times(
        Net(), KnownTimes({("a", 1): (1.0, 2.0, 0.5)})
    )
    (path,) = folder.iterdir()
    assert json.loads(path.read_text()) == {
        "cpu_share": None,
        "seconds": [["a", 1, 1.0, 2.0, 0.5]],
    }
