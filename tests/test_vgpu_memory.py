"""The virtual GPU's memory: the hard limit, statistics, reuse between streams, settings."""

import gc
import os

import pytest
import torch

from harmony.errors import VirtualGPUError
from harmony.vgpu import api as vgpu

MIB = 1 << 20


@pytest.fixture(autouse=True)
def gpus():
    gc.collect()
    vgpu.virtual_gpus(count=2, memory="64MiB")
    torch.accelerator.synchronize(0)


def take(nbytes, device="vgpu:0"):
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def test_the_limit_is_hard_and_exact():
    held = [take(16 * MIB) for _ in range(4)]
    with pytest.raises(torch.OutOfMemoryError) as error:
        take(1)
    message = str(error.value)
    assert "vgpu:0" in message and "allocate 1 bytes" in message
    assert f"capacity {64 * MIB}" in message and f"{64 * MIB} are live" in message
    take(64 * MIB, "vgpu:1")  # the other device has a limit of its own
    held.pop()
    take(16 * MIB)


def test_statistics():
    torch.accelerator.reset_peak_memory_stats(0)
    before = torch.accelerator.memory_allocated(0)
    kept, temporary = take(1000), take(MIB)
    assert torch.accelerator.memory_allocated(0) == before + 1024 + MIB
    del temporary
    assert torch.accelerator.memory_allocated(0) == before + 1024
    assert torch.accelerator.max_memory_allocated(0) == before + 1024 + MIB
    free, total = torch.accelerator.get_memory_info(0)
    assert total == 64 * MIB and free == total - before - 1024
    assert torch.accelerator.memory_stats(0)["allocation.all.current"] >= 1
    assert torch.vgpu.mem_get_info("vgpu:0") == (free, total)
    del kept


def test_fragmentation_is_not_out_of_memory():
    blocks = [take(MIB) for _ in range(64)]
    del blocks[::2]  # 32 MiB free, but never two MiB in a row
    big = take(32 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        take(1)
    del blocks, big


def test_limit_does_not_depend_on_what_streams_still_do():
    streams = [torch.Stream(device="vgpu:0") for _ in range(4)]
    for _ in range(20):
        for stream in streams:
            with stream:
                x = take(48 * MIB)  # waits until the other streams are done with theirs
                x.add_(1)
                del x
    torch.accelerator.synchronize(0)


def test_addresses_are_aligned():
    assert all(take(n).data_ptr() % 512 == 0 for n in (1, 513, 4097))


def test_freed_memory_is_reused_by_its_stream_at_once_and_by_others_later():
    stream, other = torch.Stream(device="vgpu:0"), torch.Stream(device="vgpu:0")
    with stream:
        x = take(MIB)
        address = x.data_ptr()
        with vgpu.held(stream):
            x.zero_()
            del x
            with other:
                assert take(MIB).data_ptr() != address
            assert take(MIB).data_ptr() == address
    torch.accelerator.synchronize(0)


def test_record_stream_defers_reuse():
    stream, user = torch.Stream(device="vgpu:0"), torch.Stream(device="vgpu:0")
    with stream:
        x = take(MIB)
        address = x.data_ptr()
    with vgpu.held(user):
        with user:
            x.add_(1)
        x.record_stream(user)
        del x
        with stream:
            y = take(MIB)
            assert y.data_ptr() != address
    user.synchronize()
    with stream:
        assert take(MIB).data_ptr() in (address, address + MIB) or y.data_ptr() != address


def test_settings_cannot_change_under_live_tensors():
    x = take(1000)
    with pytest.raises(VirtualGPUError, match=r"1024 bytes of device memory are in use.*delete"):
        vgpu.virtual_gpus(count=4, memory="64MiB")
    del x
    vgpu.virtual_gpus(count=4, memory="1MiB")
    assert torch.accelerator.device_count() == 4
    x = torch.ones(3, device="vgpu:3", requires_grad=True)
    x.sum().backward()  # autograd has a thread for the new device
    del x
    vgpu.virtual_gpus(count=1, memory="1MiB")
    with pytest.raises(RuntimeError, match="invalid device index 1"):
        take(1, "vgpu:1")


def test_settings_from_the_environment(monkeypatch):
    monkeypatch.setenv("HARMONY_VGPU", "count=3,memory=2MiB")
    vgpu.virtual_gpus()
    assert torch.accelerator.device_count() == 3
    assert torch.accelerator.get_memory_info(0)[1] == 2 * MIB
    monkeypatch.setenv("HARMONY_VGPU", "cuont=3")
    with pytest.raises(VirtualGPUError, match="unknown key 'cuont'"):
        vgpu.virtual_gpus()


def test_forked_child_is_refused_and_leaves_cleanly():
    x = torch.ones(3, device="vgpu:0")
    child = os.fork()
    if child == 0:
        try:
            torch.ones(3, device="vgpu:0")
        except RuntimeError as error:
            os._exit(0 if "forked" in str(error) and torch.vgpu._is_in_bad_fork() else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert x.sum().item() == 3
