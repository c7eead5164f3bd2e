"""What is measured of a server: shared links from figures, and all of it on virtual GPUs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

import harmony
from harmony.core.machine import Device, Host, Machine, Switch
from harmony.profiling import server as machineprofile
from harmony.profiling.server import find_switches, measure_machine, memory_rate
from harmony.profiling.update_times import UpdateCost, measure_update, with_device_updates
from harmony.runtime import native
from harmony.runtime.device import DeviceContext, available_devices
from harmony.runtime.update.optimizer import PackOptimizer

Rates = tuple[float, float]


def switches_of(groups: Sequence[Sequence[int]], upstream: float, root: float) -> tuple[Any, ...]:
    """Measure, on paper, four links of 12 behind switches of ``upstream`` and one of ``root``."""

    def together(chosen: Sequence[int]) -> Rates:
        got = 0.0
        for group in groups:
            members = sum(12.0 for device in chosen if device in group)
            got += min(members, upstream) if len(group) > 1 else members
        return min(got, root), min(got, root)

    pairs = {(a, b): together((a, b)) for a in range(4) for b in range(a + 1, 4)}
    everything = together(range(4))
    return find_switches([(12.0, 12.0)] * 4, pairs, everything, together)


def test_links_that_slow_each_other_down_are_behind_one_switch() -> None:
    assert switches_of(((0, 1), (2, 3)), 13.0, 100.0) == (
        Switch((0, 1), 13.0, 13.0),
        Switch((2, 3), 13.0, 13.0),
    )
    assert switches_of(((0, 2), (1,), (3,)), 13.0, 100.0) == (Switch((0, 2), 13.0, 13.0),)
    assert switches_of(((0, 1, 2, 3),), 14.0, 100.0) == (Switch((0, 1, 2, 3), 14.0, 14.0),)


def test_a_limit_that_only_all_links_together_meet_is_a_switch_above_them() -> None:
    every_one = ((0,), (1,), (2,), (3,))
    assert switches_of(every_one, 12.0, 30.0) == (Switch((0, 1, 2, 3), 30.0, 30.0),)
    assert switches_of(((0, 1), (2, 3)), 13.0, 21.0) == (
        Switch((0, 1), 13.0, 13.0),
        Switch((2, 3), 13.0, 13.0),
        Switch((0, 1, 2, 3), 21.0, 21.0),
    )
    assert switches_of(every_one, 12.0, 100.0) == ()


def test_where_any_two_devices_slow_each_other_down_only_what_all_get_is_known() -> None:
    assert switches_of(((0, 1), (2, 3)), 13.0, 16.0) == (Switch((0, 1, 2, 3), 16.0, 16.0),)


def test_a_machine_reads_back_what_it_wrote() -> None:
    machine = with_device_updates(
        Machine(
            (Device("toy", 1, 2.0, 3.0, 4.0), Device("toy", 1, 2.0, 3.0, 4.0)),
            Host(5, memory_bytes_per_s=7.0),
            1.5,
            (Switch((0, 1), 3.0, 4.0),),
            "host",
        ),
        UpdateCost(1.0, device_bytes_per_s=9.0),
    )
    assert machine.devices[0].update_bytes_per_s == 9.0
    assert Machine.from_json(machine.to_json()) == machine
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine
    bare = {"name": "toy", "memory_nbytes": 1, "h2d_bytes_per_s": 1.0, "d2h_bytes_per_s": 1.0}
    old = {"devices": [{**bare, "p2p_bytes_per_s": 1.0}], "host": {"memory_nbytes": 5}}
    assert Machine.from_json(old).switches == ()


class OnlyOnTheHost(torch.optim.SGD):
    """An optimizer that refuses parameters on a device."""

    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            raise RuntimeError("CPU only")
        return super().step(closure)


@pytest.fixture
def contexts() -> list[DeviceContext]:
    harmony.virtual_gpus(count=2, memory="64MiB")
    return [DeviceContext(device) for device in available_devices()]


def test_virtual_gpus_have_links_of_their_own(contexts: list[DeviceContext]) -> None:
    machine = measure_machine(contexts)
    assert machine.num_devices == 2 and machine.switches == ()
    assert machine.cpu_share >= 1.0 and machine.host.memory_bytes_per_s == 0.0
    # The way it is measured on real ones runs on these as well.
    samples = machineprofile._Samples(contexts, 1 << 16)
    assert min(samples.together((0, 1))) > 0.0


def test_the_update_is_tried_on_the_device(contexts: list[DeviceContext]) -> None:
    def made(kind: Any, **options: Any) -> PackOptimizer:
        return PackOptimizer({"weight": torch.nn.Parameter(torch.zeros(30, 20))}, kind, options)

    adam = measure_update(made(torch.optim.AdamW), contexts[0])
    assert adam.state_nbytes == {"torch.float32/2": 8.0} and adam.seconds > 0.0
    assert adam.device_bytes_per_s > 0.0
    assert measure_update(made(torch.optim.AdamW)).device_bytes_per_s == 0.0
    stubborn = measure_update(made(OnlyOnTheHost, lr=0.1), contexts[0])
    assert stubborn.seconds > 0.0 and stubborn.device_bytes_per_s == 0.0


def test_host_memory_is_measured_with_several_threads() -> None:
    assert memory_rate(2) > 1e6


@pytest.mark.parametrize(
    ("joined", "reaches", "expected"),
    [
        ({frozenset("ab"), frozenset("bc"), frozenset("ac")}, True, True),
        ({frozenset("ab"), frozenset("bc"), frozenset("ac")}, False, False),
        ({frozenset("ab")}, True, False),  # each of a bridged pair has an NVLink; not to the third
        (set(), True, False),
        (None, True, False),  # NVML has no answer
    ],
)
def test_links_of_their_own_are_believed_where_nvml_joins_every_pair_by_nvlink(
    monkeypatch: pytest.MonkeyPatch,
    joined: set[frozenset[str]] | None,
    reaches: bool,
    expected: bool,
) -> None:
    def status(a: str, b: str, kind: int) -> int:
        if joined is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        assert kind == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        return int(frozenset((a, b)) not in joined)

    def properties(device: torch.device) -> Any:
        return SimpleNamespace(uuid="abc"[device.index])

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: name[-1])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetP2PStatus", status)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: reaches)
    gpus = [torch.device("cuda", index) for index in range(3)]
    assert native.have_own_links(gpus) is expected
