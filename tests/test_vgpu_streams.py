"""Streams, events, copies, pinned memory and links of the virtual GPU."""

import gc
import mmap

import pytest
import torch

from harmony.errors import VirtualGPUError
from harmony.vgpu import api as vgpu

MIB = 1 << 20


@pytest.fixture(autouse=True)
def gpus():
    gc.collect()
    vgpu.virtual_gpus(count=2, memory="64MiB")


@pytest.fixture
def stream():
    return torch.Stream(device="vgpu:0")


def ones(n=1000, device="vgpu:0"):
    x = torch.ones(n, device=device)
    torch.accelerator.synchronize(device)
    return x


def test_kernels_are_asynchronous_and_in_order(stream):
    x = ones()
    with stream, vgpu.held(stream):
        x.mul_(3)
        x.add_(1)
        done = stream.record_event()
        assert not done.query() and not stream.query()
    done.synchronize()
    assert stream.query() and done.query() and torch.all(x == 4)


def test_a_stream_waits_for_an_event_of_another_device(stream):
    far = torch.Stream(device="vgpu:1")
    x = ones(device="vgpu:1")
    with vgpu.held(stream):
        stream_event = torch.Event(device="vgpu:0")
        stream_event.record(stream)
        far.wait_event(stream_event)
        with far:
            x.mul_(2)
        assert not far.query()
    far.synchronize()
    assert torch.all(x == 2)


def test_a_wait_is_for_the_recording_before_it(stream):
    other = torch.Stream(device="vgpu:0")
    event = stream.record_event()
    other.wait_event(event)
    with vgpu.held(stream):
        event.record(stream)  # again, and not reached: must not matter to `other`
        other.synchronize()


def test_event_timing(stream):
    vgpu.virtual_gpus(count=2, memory="64MiB", delay_us=2000)
    begin, end = (torch.Event(device="vgpu:0", enable_timing=True) for _ in range(2))
    x = ones()
    with stream:
        begin.record()
        x.add_(1)
        end.record()
    end.synchronize()
    assert begin.elapsed_time(end) >= 2.0  # milliseconds; no upper bound: the machine is shared
    with pytest.raises(ValueError, match="enable_timing"):
        begin.elapsed_time(stream.record_event())


def test_kernel_errors_come_at_the_next_synchronize(stream):
    table, index = ones(), torch.tensor([5000], device="vgpu:0")
    torch.accelerator.synchronize(0)
    with stream:
        torch.gather(table, 0, index)
    with pytest.raises(RuntimeError, match="out of bounds"):
        stream.synchronize()
    stream.synchronize()  # reported once


def test_pinned_copies_are_asynchronous_and_pageable_ones_are_not(stream):
    pinned, x = torch.ones(MIB).pin_memory(), torch.zeros(MIB, device="vgpu:0")
    torch.accelerator.synchronize(0)
    assert pinned.is_pinned() and not torch.ones(3).is_pinned()
    with stream:
        with vgpu.held(stream):
            x.copy_(pinned, non_blocking=True)
            x.mul_(2)
            pinned_back = torch.empty(MIB, pin_memory=True)
            pinned_back.copy_(x, non_blocking=True)
        pageable = torch.zeros(MIB)
        pageable.copy_(x, non_blocking=True)  # synchronous whatever is asked for
        assert torch.all(pageable == 2) and torch.all(pinned_back == 2)


def test_pinned_memory_is_not_reused_before_its_copy(stream):
    x = torch.zeros(MIB, device="vgpu:0")
    torch.accelerator.synchronize(0)
    source = torch.full((MIB,), 7.0).pin_memory()
    address = source.data_ptr()
    with stream, vgpu.held(stream):
        x.copy_(source, non_blocking=True)
        del source
        again = torch.zeros(MIB).pin_memory()
        assert again.data_ptr() != address
    stream.synchronize()
    assert torch.all(x == 7)
    del again
    assert torch.zeros(MIB).pin_memory().data_ptr()


def test_a_registered_range_is_pinned(stream):
    memory = mmap.mmap(-1, 4 * MIB)
    arena = torch.frombuffer(memory, dtype=torch.float32)
    x = torch.zeros(1000, device="vgpu:0")
    torch.accelerator.synchronize(0)
    vgpu.host_register(arena.data_ptr(), 4 * MIB)
    assert arena[5000:6000].is_pinned()
    with pytest.raises(VirtualGPUError, match="overlaps"):
        vgpu.host_register(arena.data_ptr() + 4096, 4096)
    arena[5000:6000] = 3
    with stream, vgpu.held(stream):
        x.copy_(arena[5000:6000], non_blocking=True)
    vgpu.host_unregister(arena.data_ptr())  # waits for the copy
    assert torch.all(x == 3) and not arena.is_pinned()
    with pytest.raises(VirtualGPUError, match="no range"):
        vgpu.host_unregister(arena.data_ptr())


def test_peer_copy_is_fenced_on_both_sides():
    far = torch.accelerator.current_stream(1)
    x, y = ones(), ones(device="vgpu:1")
    torch.accelerator.set_device_index(0)
    with vgpu.held(far):
        y.mul_(5)  # must be over before the copy overwrites it
        y.copy_(x * 3, non_blocking=True)
        y.add_(1)  # must see the copy
    assert torch.all(y == 4)
    assert torch.equal(x.to("vgpu:1").cpu(), x.cpu())


def test_strided_and_converting_copies():
    host = torch.arange(24.0).reshape(4, 6)
    pinned = host.pin_memory()
    for source in (pinned.t(), pinned[:, ::2], pinned[0].expand(3, 6), host.double()):
        there = torch.empty(source.shape, dtype=torch.float32, device="vgpu:0")
        there.copy_(source, non_blocking=True)
        assert torch.equal(there.cpu(), source.float())
        assert torch.equal(there.t().to("vgpu:1").cpu(), source.float().t())
    z = torch.randn(5, dtype=torch.complex64)
    assert torch.equal(z.to("vgpu:0").conj().cpu(), z.conj())


def test_link_counters():
    vgpu.reset_link_traffic()
    x = torch.zeros(1000).to("vgpu:0")
    x.cpu()
    y = x.to("vgpu:1")
    torch.accelerator.synchronize(0)
    assert vgpu.link_traffic(0) == vgpu.LinkTraffic(4000, 4000, 4000, 0)
    assert vgpu.link_traffic(1) == vgpu.LinkTraffic(0, 0, 0, 4000)
    del y


def test_a_link_is_no_faster_than_it_should_be():
    vgpu.virtual_gpus(count=2, memory="64MiB", h2d="200MB/s", d2h="100MB/s")
    host, x = torch.zeros(MIB).pin_memory(), torch.empty(MIB, device="vgpu:0")
    torch.accelerator.synchronize(0)
    begin, end = (torch.Event(device="vgpu:0", enable_timing=True) for _ in range(2))
    begin.record()
    x.copy_(host, non_blocking=True)
    host.copy_(x, non_blocking=True)
    end.record()
    end.synchronize()
    # Of both: a copy makes up for what the one before it on the stream was late.
    ideal_h2d_ms, ideal_d2h_ms = 4 * MIB / 200e6 * 1e3, 4 * MIB / 100e6 * 1e3
    assert begin.elapsed_time(end) > 0.98 * (ideal_h2d_ms + ideal_d2h_ms)


def test_streams_come_from_a_bounded_pool():
    assert len({torch.Stream(device="vgpu:0").stream_id for _ in range(100)}) == 32
