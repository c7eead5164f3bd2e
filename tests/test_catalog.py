"""GPUs by name, and machines made of them."""

from __future__ import annotations

import pytest

from harmony.errors import ConfigError
from harmony.profiling.catalog import (
    GPUS,
    HOSTS,
    find_gpu,
    find_host,
    known_gpu,
    machine_of,
    usual_host,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("AMD Instinct MI300X", "MI300X"),
        ("GeForce GTX 1080 Ti", "GTX 1080 Ti"),
    ],
)
def test_a_gpu_is_found_as_people_and_drivers_write_it(written: str, name: str) -> None:
    assert find_gpu(written).name == name
    assert known_gpu(written) is find_gpu(name)


def test_an_unknown_gpu_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean RTX 4090"):
        find_gpu("RTX 4091")
    with pytest.raises(ConfigError, match="Known: GTX 1080 Ti"):
        find_gpu("abacus")
    assert known_gpu("virtual GPU") is None


def test_names_are_told_apart() -> None:
    names = [gpu.name for gpu in GPUS]
    assert len(set(names)) == len(names)
    for gpu in GPUS:
        assert known_gpu(gpu.name) is gpu


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_row_has_a_source_and_figures_that_go_together(gpu: object) -> None:
    found = find_gpu(gpu.name)  # type: ignore[attr-defined]
    assert found.source
    assert 0 < found.usable_nbytes < found.memory_nbytes
    # Tensor cores are never slower than the others, and never faster than 64 times.
    for rate in found.flops.values():
        assert found.flops["fp32"] <= rate <= 64 * found.flops["fp32"]
    if "bf16" in found.flops:
        assert found.flops["bf16"] == found.flops["fp16"]
        assert found.achievable("bf16") < found.peak("bf16")
    # A GPU reads its memory some ten times faster than its link to the host.
    assert 10 < found.memory_bytes_per_s / {3: 12.3e9, 4: 24.8e9, 5: 55.6e9}[found.pcie] < 250


def test_a_type_without_units_of_its_own_runs_as_fp32() -> None:
    old = find_gpu("GTX 1080 Ti")
    assert old.peak("bf16") == old.peak("fp32")
    assert old.achievable("tf32") == old.achievable("fp32") < old.peak("fp32")


def test_a_machine_is_made_of_its_parts() -> None:
    gpu = find_gpu("RTX 3090")
    machine = machine_of(gpu, 4, 256 * GIB, topology="switch")
    assert machine.num_devices == 4
    assert machine.host.memory_nbytes == 256 * GIB
    assert machine.host.memory_bytes_per_s == usual_host(gpu, 4).bytes_per_s
    assert [switch.devices for switch in machine.switches] == [(0, 1), (2, 3)]
    assert machine.peer_links == "host"
    one = machine.devices[0]
    assert one.memory_nbytes == gpu.usable_nbytes
    assert one.h2d_bytes_per_s == machine.switches[0].h2d_bytes_per_s == 24.8e9
    assert one.update_bytes_per_s * machine.host.update_memory_factor < gpu.memory_bytes_per_s


def test_links_follow_the_topology() -> None:
    gpu = find_gpu("A100")
    direct = machine_of(gpu, 2, GIB)
    assert direct.peer_links == "direct"
    assert direct.devices[0].p2p_bytes_per_s == gpu.peer_bytes_per_s
    half = machine_of(gpu, 2, GIB, topology="x8").devices[0]
    assert half.h2d_bytes_per_s == direct.devices[0].h2d_bytes_per_s / 2
    assert half.p2p_bytes_per_s < half.h2d_bytes_per_s
    asked = machine_of(gpu, 1, GIB, link_bytes_per_s=7e9, gpu_memory_nbytes=8 * GIB)
    assert (asked.devices[0].d2h_bytes_per_s, asked.devices[0].memory_nbytes) == (7e9, 8 * GIB)


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (0, {}, "at least 1 GPU"),
        (1, {"topology": "ring"}, "no topology 'ring'"),
        (2, {"topology": "nvlink"}, "RTX 4090 has no NVLink"),
        (1, {"gpu_memory_nbytes": 100 * GIB}, "has 24.0 GiB, not 100.0 GiB"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(
    count: int, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        machine_of(find_gpu("RTX 4090"), count, GIB, **changes)  # type: ignore[arg-type]


def test_hosts_are_found_and_refused() -> None:
    assert find_host("Server-DDR5") is next(kind for kind in HOSTS if kind.name == "server-ddr5")
    with pytest.raises(ConfigError, match="did you mean server-ddr"):
        find_host("server-ddr3")
    assert usual_host(find_gpu("RTX 4090"), 1).name == "desktop-ddr5"
    assert usual_host(find_gpu("RTX 4090"), 4).name == "server-ddr4"
    assert usual_host(find_gpu("H100"), 1).name == "server-ddr5"
