"""harmony-run doctor: a line for each thing, whatever is missing, broken or hangs."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harmony.cli import main as cli
from harmony.core.machine import Device, Host, Machine
from harmony.doctor import disk, gpus, host, models, software
from harmony.doctor.examine import probes
from harmony.doctor.findings import Finding, Probe, findings_of, ok
from harmony.runtime.host import limits as hostlimits

ROOT = Path(__file__).parents[1]
GIB = 2**30


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def doctor(
    *words: str, stdout: Any = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harmony", "doctor", *words]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=known, check=False
    )


def test_all_of_it_is_said_in_a_pipe_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folder, cache = tmp_path / "runs", tmp_path / "cache"
    folder.mkdir()
    done = doctor("--checkpoint-dir", str(folder), HARMONY_CACHE=str(cache))
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("torch", "Python", "NUMA", "memlock", "huge pages", "cache", "a 70B model"):
        assert f" {name} " in done.stdout
    assert f"{folder}:" in done.stdout.replace("\n" + " " * 28, "")
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert done.stdout.splitlines()[-1].startswith("0 errors, ")
    assert not any(folder.iterdir())
    assert not cache.exists()


def test_json_has_the_same_with_figures(tmp_path: Path) -> None:
    done = doctor("--json", "--checkpoint-dir", str(tmp_path / "new"))
    data = json.loads(done.stdout)
    assert (data["format"], data["version"], data["errors"]) == ("harmony doctor", 1, 0)
    found = {line["name"]: line for line in data["findings"]}
    assert {line["status"] for line in data["findings"]} <= {"ok", "warning"}
    assert found["checkpoint folder"]["figures"]["write_bytes_per_s"] > 0
    assert found["host memory"]["figures"]["total_nbytes"] > 0
    assert found["a 7B model"]["figures"]["host_nbytes"] == 16 * 6_738_415_616
    assert not (tmp_path / "new").exists()


def test_a_home_without_room_and_a_closed_output_are_no_tracebacks(tmp_path: Path) -> None:
    environment = {"HOME": "/proc", "HARMONY_CACHE": "", "XDG_CACHE_HOME": "", "NO_COLOR": "1"}
    done = doctor("--json", **environment)
    found = {line["name"]: line for line in json.loads(done.stdout)["findings"]}
    assert found["cache"]["status"] == "warning"
    assert "/proc/.cache/harmony cannot be made" in found["cache"]["text"]
    shell = f'exec "{sys.executable}" -m harmony doctor >&-'
    known = {**os.environ, "PYTHONPATH": str(ROOT), "HARMONY_CACHE": str(tmp_path)}
    closed = subprocess.run(shell, shell=True, capture_output=True, text=True, env=known)
    assert closed.returncode == 1
    assert closed.stderr.startswith("harmony: error: cannot write the findings: ")
    assert closed.stderr.count("\n") == 1
    full = Path("/dev/full")
    if full.exists():
        with full.open("w") as stream:
            done = doctor(stdout=stream)
        assert done.returncode == 1
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("colour", [False, True])
def test_a_narrow_terminal_shows_all_of_it(colour: bool, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {"COLUMNS": "60", "TERM": "xterm", "HARMONY_CACHE": str(tmp_path)}
    done = threading.Event()
    parts: list[bytes] = []

    def read() -> None:
        while not done.is_set():
            try:
                parts.append(os.read(ours, 65536))
            except OSError:  # the other side is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    code = doctor(stdout=theirs, **environment, **({} if colour else {"NO_COLOR": "1"})).returncode
    os.close(theirs)
    reader.join(30)
    done.set()
    os.close(ours)
    text = b"".join(parts).decode()
    assert code == 0
    assert ("\x1b[3" in text) is colour
    if not colour:
        plain = text.replace("\x1b[0m", "").replace("\x1b[1m", "").replace("\r", "")
        assert max(map(len, plain.splitlines())) <= 60
        assert "errors, " in plain
        assert "13B model" in plain


def test_a_probe_that_fails_or_hangs_takes_no_other_down() -> None:
    forever = threading.Event()

    def fails() -> Iterator[Finding]:
        yield ok("half", "seen")
        raise RuntimeError("no such\nthing \x1b[2J")

    def hangs() -> Iterator[Finding]:
        forever.wait()
        yield ok("never", "seen")

    def warns() -> list[Finding]:
        warnings.warn("the driver\nis old", UserWarning, stacklevel=1)
        return [ok("warns", "seen")]

    def exits() -> list[Finding]:
        raise SystemExit(3)

    found = findings_of(
        [
            Probe("fails", fails, "mend it", essential=True),
            Probe("hangs", hangs, "wait"),
            Probe("warns", warns),
            Probe("exits", exits),
        ],
        patience_s=0.2,
    )
    forever.set()
    assert [(f.name, f.status) for f in found] == [
        ("half", "ok"),
        ("fails", "error"),
        ("hangs", "warning"),
        ("warns", "ok"),
        ("warns", "warning"),
        ("exits", "warning"),
    ]
    assert found[1].text == "it cannot be looked at: RuntimeError: no such thing \\x1b[2J"
    assert found[1].remedy == "mend it"
    assert "no answer within" in found[2].text
    assert found[2].remedy == "look again when the machine is idle; if it stays so, wait"
    assert found[4].text == "the driver is old"


def test_without_torch_the_rest_is_still_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = by_name(findings_of([p for p in probes(None) if p.name != "checkpoint folder"]))
    assert found["torch"].status == "error"
    assert "pytorch.org" in found["torch"].remedy
    assert found["host memory"].status in ("ok", "warning")
    assert found["cores"].status == "ok"


def test_an_error_makes_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> list[Finding]:
        raise RuntimeError("broken")

    monkeypatch.setattr(
        "harmony.cli.doctor_command.probes", lambda _: [Probe("GPUs", fails, essential=True)]
    )
    assert cli.main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "error  GPUs  it cannot be looked at: RuntimeError: broken" in out
    assert out.endswith("1 error, 0 warnings\n")
    assert err == ""
    assert cli.main(["doctor", "--nonsense"]) == 2
    assert cli.main(["doctor", "--checkpoint-dir", __file__]) == 2


# GPUs, as NVML describes them


class Nvml:
    """Stands for pynvml: two GPUs, the second in a narrow slot, with broken memory if asked."""

    NVML_P2P_CAPS_INDEX_NVLINK = 2

    def __init__(self, nvlink: bool = False, broken: int = 0, free: int = 20) -> None:
        self.nvlink, self.broken, self.free = nvlink, broken, free

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return b"570.1"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-uuid-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "NVIDIA GeForce RTX 4090"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(free=self.free * GIB, total=24 * GIB)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: int) -> int:  # noqa: N802
        return 1  # idle

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:  # noqa: N802
        return 4

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:  # noqa: N802
        return 16 if handle == 0 else 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:  # noqa: N802
        return 16

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:  # noqa: N802
        if not self.broken:
            raise RuntimeError("Not Supported")
        return self.broken

    def nvmlDeviceGetP2PStatus(self, one: int, two: int, kind: int) -> int:  # noqa: N802
        return 0 if self.nvlink else 3

    def nvmlDeviceGetTopologyCommonAncestor(self, one: int, two: int) -> int:  # noqa: N802
        return 30


def test_gpus_and_links_are_what_nvml_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = by_name(list(gpus.look_at_gpus()))
    assert found["driver"].figures == {"version": "570.1"}
    assert (found["GPU 0"].status, found["GPU 1"].status) == ("ok", "warning")
    assert "20.0 GiB of 24.0 GiB free, PCIe 1 x4 (of 4 x16)" in found["GPU 1"].text
    assert found["GPU 0 - GPU 1"].text == "PCIe, joined by the host bridge"
    assert found["torch.cuda"].status == "error"
    assert "PyTorch sees none of 2 GPUs" in found["torch.cuda"].text
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(nvlink=True, broken=3))
    found = by_name(list(gpus.look_at_gpus()))
    assert found["GPU 0 - GPU 1"].text == "NVLink"
    assert found["GPU 0"].status == "error"
    assert "3 memory errors" in found["GPU 0"].text
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(free=5))
    assert "other programs" in by_name(list(gpus.look_at_gpus()))["GPU 0"].remedy


def test_a_gpu_that_shares_the_hosts_memory_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared(Nvml):
        def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
            raise RuntimeError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", Shared())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = by_name(list(gpus.look_at_gpus()))["GPU 0"]
    assert (found.status, found.text) == ("ok", "NVIDIA GeForce RTX 4090, PCIe 1 x16 (of 4 x16)")
    assert "free_nbytes" not in found.figures


@pytest.mark.parametrize(
    ("seen", "text"),
    [([1, 0], "cuda:0 is GPU 1, cuda:1 is GPU 0"), ([1], "cuda:0 is GPU 1"), ([0, 1], None)],
)
def test_numbers_of_pytorch_that_are_not_the_drivers_are_said(
    seen: list[int], text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(seen))
    properties = [SimpleNamespace(uuid=f"uuid-{number}") for number in seen]
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties[index])
    monkeypatch.setattr("harmony.runtime.native.can_run_kernels", lambda device: True)
    monkeypatch.setattr("harmony.runtime.native.pin_range", lambda *place: "not here")
    found = by_name(list(gpus.look_at_gpus()))
    assert found["torch.cuda"].text == f"PyTorch sees {len(seen)} of 2 GPUs"
    assert (found["numbers"].text if "numbers" in found else None) == text


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_settings_of_the_allocator_are_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "expandable_segments:True")
    shown = by_name(list(software.look_at_torch()))["CUDA variables"]
    assert f"{name}=expandable_segments:True" in shown.text


def test_what_was_measured_is_shown_and_what_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARMONY_CACHE", str(tmp_path))
    assert "none yet" in next(gpus.look_at_measured_links()).text
    devices = (Device("cuda:0", GIB, 25e9, 24e9, 12e9), Device("cuda:1", GIB, 12e9, 24e9, 12e9))
    machine = Machine(devices, Host(GIB))
    (tmp_path / "machine-one.json").write_text(json.dumps(machine.to_json()))
    (finding,) = gpus.look_at_measured_links()
    assert (
        finding.text == "2 x cuda, the slowest: in 12.0 GB/s, out 24.0 GB/s, to another 12.0 GB/s"
    )
    (tmp_path / "machine-one.json").write_text("{}")
    (finding,) = gpus.look_at_measured_links()
    assert finding.status == "warning"
    assert "machine-one.json" in finding.remedy


# The host


def test_limits_of_the_host_are_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostlimits, "CGROUP", tmp_path)
    monkeypatch.setattr(hostlimits, "OWN_GROUPS", tmp_path / "own")
    assert "no limit" in by_name(list(host.look_at_memory()))["cgroup"].text
    (tmp_path / "memory.max").write_text(f"{2**26}\n")
    (tmp_path / "memory.current").write_text(f"{2**26 - 2**20}\n")
    found = by_name(list(host.look_at_memory()))
    assert found["cgroup"].status == found["host memory"].status == "warning"
    assert "version 2: 63.0 MiB of 64.0 MiB used" in found["cgroup"].text
    monkeypatch.setattr(host, "OVERCOMMIT", tmp_path / "overcommit")
    (tmp_path / "overcommit").write_text("2\n")
    monkeypatch.setattr(host, "HUGE", tmp_path / "huge")
    (tmp_path / "huge").write_text("always [madvise] never\n")
    monkeypatch.setattr(host, "_reserved_huge_nbytes", lambda: 2**50)
    found = by_name(list(host.look_at_limits()))
    assert "vm.overcommit_memory=0" in found["overcommit"].remedy
    assert found["huge pages"].text == "transparent: madvise; reserved: 1024 TiB"
    assert "vm.nr_hugepages=0" in found["huge pages"].remedy
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert ("unlimited" in found["memlock"].text) or soft != resource.RLIM_INFINITY


def test_numa_nodes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "NODES", tmp_path)
    assert by_name(list(host.look_at_cores()))["NUMA"].text == "the system does not say"
    for index, cores in enumerate(("0-7", "8-15")):
        (tmp_path / f"node{index}").mkdir()
        (tmp_path / f"node{index}" / "cpulist").write_text(f"{cores}\n")
    numa = by_name(list(host.look_at_cores()))["NUMA"]
    assert numa.text == "2 nodes; node0: cores 0-7; node1: cores 8-15"


# The disk


def test_a_folder_that_takes_nothing_is_an_error_only_where_it_was_chosen(tmp_path: Path) -> None:
    for chosen, status in ((True, "error"), (False, "warning")):
        (finding,) = disk.look_at_checkpoint_folder(Path("/proc/runs"), chosen)
        assert finding.status == status
        assert "it cannot be written to" in finding.text
        assert "--checkpoint-dir" in finding.remedy


@pytest.mark.parametrize(
    ("kind", "rate", "word"), [("tmpfs", 1e9, "memory"), ("nfs4", 1e6, "faster disk")]
)
def test_a_disk_that_forgets_or_crawls_is_warned_of(
    kind: str, rate: float, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_file_system", lambda place: kind)
    monkeypatch.setattr(disk, "_measure", lambda place: (rate, rate))
    (finding,) = disk.look_at_checkpoint_folder(tmp_path, True)
    assert finding.status == "warning"
    assert word in finding.remedy


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    (finding,) = disk.look_at_checkpoint_folder(tmp_path, True)
    assert finding.status == "error"
    assert "No space left" in finding.text
    assert "make room" in finding.remedy


def test_a_cache_that_others_can_write_to_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("HARMONY_CACHE", str(cache))
    assert "made by the first run" in next(disk.look_at_caches()).text
    cache.mkdir(mode=0o700)
    (cache / "machine-x.json").write_text("12345")
    (finding,) = disk.look_at_caches()
    assert (finding.status, finding.figures["nbytes"]) == ("ok", 5)
    assert "1 file, 5 B" in finding.text
    assert "mode 700" in finding.text
    cache.chmod(0o777)
    (finding,) = disk.look_at_caches()
    assert finding.status == "warning"
    assert "chmod -R go-w" in finding.remedy


# Software and models


def test_virtual_gpus_and_update_kernels_want_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for look in (software.look_at_virtual_gpus, software.look_at_updates):
        (finding,) = look()
        assert finding.status == "warning"
        assert "apt-get install g++" in finding.remedy


def test_an_old_torch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.1+cu128")
    assert next(software.look_at_torch()).status == "error"
    monkeypatch.setattr("torch.__version__", "2.10.0")
    assert next(software.look_at_torch()).status == "ok"


def test_sizes_of_models_are_those_that_were_published() -> None:
    counts = {size.name: round(size.num_params / 1e9, 2) for size in models.SIZES}
    assert counts == {"1B": 1.1, "7B": 6.74, "13B": 13.02, "70B": 68.98}
    small = models.SIZES[0]
    host_nbytes, device_nbytes = 16 * small.num_params, 8 * 65_536_000
    fits = models.what_it_takes(small, int(host_nbytes), int(device_nbytes), "1 x H100")
    assert fits.text.startswith("fits, on 1 x H100. 1.1 billion parameters: 16.4 GiB of host")
    for free, device, lacking in (
        (host_nbytes - GIB, device_nbytes, "1.00 GiB of host memory more than is free"),
        (host_nbytes, device_nbytes - 1, "GPUs of more than"),
    ):
        not_fitting = models.what_it_takes(small, int(free), int(device), "1 x H100")
        assert not_fitting.status == "warning"
        assert lacking in not_fitting.text
        assert "precision=" in not_fitting.remedy or "LoRA" in not_fitting.remedy
