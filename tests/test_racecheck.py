"""The race checker: silent on a correct program, and it finds every removed synchronisation."""

import gc
import queue
import re
import threading

import pytest
import torch

from harmony.errors import RaceError
from harmony.runtime import native
from harmony.runtime.traced_lock import TracedLock
from harmony.vgpu import access_trace
from harmony.vgpu.access_trace import Access, Record
from tests import devices
from tests import race_check as racecheck
from tests.devices import device

NUM_LAYERS, NUM_SLOTS, SIZE = 5, 2, 256


@pytest.fixture(autouse=True)
def gpus():
    gc.collect()
    devices.provide(count=2, memory="64MiB")


SYNCHRONISATIONS = (
    "compute waits for weights",
    "slot is free before the next load",
    "offload waits for gradients",
    "gradient slot is free before the next backward",
    "update waits for the offload",
    "next load waits for the update",
    "peer waits for the activation",
    "next step waits for the peer copy",
)


class Streaming:
    """Weights streamed through slots, gradients out, an update thread, a second device."""

    def __init__(self, without=()):
        self.without = without
        self.device = device()
        streams = (torch.Stream(device=self.device) for _ in range(4))
        self.h2d, self.d2h, self.compute, self.p2p = streams
        self.peer = torch.Stream(device=device(1))
        self.weights = torch.ones(NUM_LAYERS, SIZE).pin_memory()
        self.gradients = torch.zeros(NUM_LAYERS, SIZE).pin_memory()
        self.slots = [torch.zeros(SIZE, device=self.device) for _ in range(NUM_SLOTS)]
        self.grad_slots = [torch.zeros(SIZE, device=self.device) for _ in range(NUM_SLOTS)]
        self.x = torch.ones(SIZE, device=self.device)
        self.far = torch.zeros(SIZE, device=device(1))
        for index in range(2):
            torch.accelerator.synchronize(index)

    def wait(self, name, stream, event):
        if name not in self.without and event is not None:
            stream.wait_event(event)

    def layer(self, i, slot_free, grad_free):
        slot, grad = self.slots[i % NUM_SLOTS], self.grad_slots[i % NUM_SLOTS]
        self.wait("slot is free before the next load", self.h2d, slot_free)
        with self.h2d:
            slot.copy_(self.weights[i], non_blocking=True)
        self.wait("compute waits for weights", self.compute, self.h2d.record_event())
        self.wait("gradient slot is free before the next backward", self.compute, grad_free)
        with self.compute:
            self.x.mul_(slot)
            torch.mul(self.x, 2, out=grad)
        computed = self.compute.record_event()
        self.wait("offload waits for gradients", self.d2h, computed)
        with self.d2h:
            self.gradients[i].copy_(grad, non_blocking=True)
        return computed, self.d2h.record_event()

    def update(self, i, arrived):
        if "update waits for the offload" not in self.without:
            arrived.synchronize()
        for tensor, write in ((self.gradients[i], False), (self.weights[i], True)):
            access_trace.host_access(f"update {i}", tensor.data_ptr(), tensor.nbytes, write)
        self.weights[i] -= 0.1 * self.gradients[i]
        access_trace.host_release(i)

    def step(self):
        computed, arrived = [None] * NUM_SLOTS, [None] * NUM_SLOTS
        updates = queue.SimpleQueue()

        def update_all():
            for update in iter(updates.get, None):
                self.update(*update)

        thread = threading.Thread(target=update_all)
        for i in range(NUM_LAYERS):
            slot = i % NUM_SLOTS
            computed[slot], arrived[slot] = self.layer(i, computed[slot], arrived[slot])
            updates.put((i, arrived[slot]))
        updates.put(None)
        self.wait("peer waits for the activation", self.p2p, self.compute.record_event())
        with self.peer, self.p2p:  # where it lands, and where it runs
            self.far.copy_(self.x, non_blocking=True)
        self.wait("next step waits for the peer copy", self.compute, self.p2p.record_event())
        thread.start()
        thread.join()
        if "next load waits for the update" not in self.without:
            for i in range(NUM_LAYERS):
                access_trace.host_acquire(i)


def run(without=(), steps=2):
    program = Streaming(without)
    with racecheck.checked() as trace:
        for _ in range(steps):
            program.step()
    for index in range(2):
        torch.accelerator.synchronize(index)
    return trace


@pytest.mark.parametrize("jitter_us", [0, 300])
def test_silent_on_the_correct_program(jitter_us):
    devices.provide(count=2, memory="64MiB", jitter_us=jitter_us)
    trace = run()
    assert len(trace.records) > 50


@pytest.mark.parametrize("name", SYNCHRONISATIONS)
def test_finds_a_removed_synchronisation(name):
    for _ in range(3):  # in every run, whatever the timing
        with pytest.raises(RaceError, match="raced"):
            run((name,))


def test_the_report_names_both_operations_streams_and_bytes():
    x = torch.zeros(100, device=device())
    torch.accelerator.synchronize(0)
    streams = [torch.Stream(device=device()) for _ in range(2)]
    with pytest.raises(RaceError) as error, racecheck.checked():
        for stream, operation in zip(streams, (x.add_, x.mul_), strict=True):
            with stream:
                operation(2)
    for part in ("aten::add_", "aten::mul_", "400 bytes", hex(x.data_ptr())):
        assert part in str(error.value)
    places = re.findall(rf"{device()} stream (\d+)", str(error.value))
    assert len(set(places)) == 2
    if devices.TYPE == "vgpu":
        assert {int(place) for place in places} == {stream.stream_id for stream in streams}


def test_an_event_recorded_too_early_orders_nothing():
    x = torch.zeros(100, device=device())
    torch.accelerator.synchronize(0)
    writer, reader = (torch.Stream(device=device()) for _ in range(2))
    for is_early in (True, False):
        with access_trace.trace() as trace:
            early = writer.record_event()
            with writer:
                x.add_(1)
            reader.wait_event(early if is_early else writer.record_event())
            with reader:
                x.sum()
            torch.accelerator.synchronize(0)
        assert bool(racecheck.analyse(trace.records)) == is_early


def test_memory_freed_under_a_reader_is_a_race_unless_recorded():
    for is_recorded in (False, True):
        stream, reader = (torch.Stream(device=device()) for _ in range(2))
        with access_trace.trace() as trace, devices.held(reader):
            with stream:
                x = torch.ones(1000, device=device())
            reader.wait_event(stream.record_event())
            with reader:
                x.sum()
            if is_recorded:
                x.record_stream(reader)
            del x
            with stream:
                y = torch.ones(1000, device=device())
        races = racecheck.analyse(trace.records)
        assert bool(races) != is_recorded, races
        del y


def test_memory_goes_from_thread_to_thread_by_way_of_the_allocators():
    """What one thread has seen to be over is over for whoever gets the memory next."""
    user, owner = (torch.Stream(device=device()) for _ in range(2))
    kept = torch.zeros(1000, device=device())
    torch.accelerator.synchronize(0)

    def on_a_thread(work):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    def give_up():
        with owner:
            block = torch.ones(1000, device=device())
        user.wait_event(owner.record_event())
        pinned = torch.ones(1000, pin_memory=True)
        with user:
            block.mul_(2)
            kept.copy_(pinned, non_blocking=True)
        block.record_stream(user)

    def take():
        with owner:
            block = torch.ones(1000, device=device())
            block.copy_(torch.ones(1000, pin_memory=True), non_blocking=True)

    with racecheck.checked() as trace:
        for _ in range(4):
            on_a_thread(give_up)
            user.synchronize()  # by a thread that gets none of it
            on_a_thread(take)
        torch.accelerator.synchronize(0)
    addresses = [r.accesses[0].ptr for r in trace.records if r.kind == "A"]
    assert len(set(addresses)) < len(addresses)  # it was used again


def test_backward_belongs_to_the_thread_that_called_it():
    x = torch.ones(100, device=device(), requires_grad=True)
    side = torch.Stream(device=device())
    torch.accelerator.synchronize(0)
    with racecheck.checked():
        with side:
            y = x.detach() * 2
        side.synchronize()  # the calling thread knows; autograd's thread enqueues the reader
        (x * y).sum().backward()


def test_rows_of_a_strided_matrix_do_not_conflict():
    x = torch.zeros(8, 64, device=device())
    torch.accelerator.synchronize(0)
    left, right = (torch.Stream(device=device()) for _ in range(2))
    with racecheck.checked():
        with left:
            x[:, :32].add_(1)
        with right:
            x[:, 32:].add_(1)


def access(ptr, nbytes, is_write):
    return (Access(ptr, nbytes, is_write),)


def kernel(stream, accesses, what="k"):
    return Record("K", 0, 0, stream, 0, what, accesses)


def test_analyse_by_hand():
    def record(kind, stream, aux):
        return Record(kind, 0, 0, stream, aux, "", ())

    write, read = kernel(1, access(0, 100, True)), kernel(2, access(50, 100, False))
    ordered = [write, record("R", 1, 7), record("W", 2, 7), read]
    assert racecheck.analyse(ordered) == []
    assert racecheck.analyse([write, record("E", -1, 7), read])  # event not recorded
    assert racecheck.analyse([write, record("S", 1, 0), read]) == []
    assert racecheck.analyse([write, record("D", -1, 0), read]) == []
    assert racecheck.analyse([read, read]) == []
    (race,) = racecheck.analyse([write, read])
    assert (race.ptr, race.nbytes) == (50, 50)
    assert race.first.is_write and not race.second.is_write
    # recorded before the write: orders nothing
    assert racecheck.analyse([record("R", 1, 7), write, record("W", 2, 7), read])


def test_host_threads_are_ordered_by_their_tokens():
    def host(kind, thread, aux=0, accesses=()):
        return Record(kind, thread, -1, -1, aux, "", accesses)

    mine, theirs = (host("H", t, accesses=access(0, 8, True)) for t in (0, 1))
    assert racecheck.analyse([mine, theirs])
    assert not racecheck.analyse([mine, host("P", 0, 5), host("Q", 1, 5), theirs])


@pytest.mark.parametrize("turns", [TracedLock(), threading.RLock()], ids=["turns", "a plain lock"])
def test_threads_that_take_turns_are_in_order(turns):
    memory = torch.zeros(8)

    def write():
        with turns, turns:  # a thread may come in again
            native.trace_host_access("write", memory, write=True)

    threads = [threading.Thread(target=write) for _ in range(3)]
    with access_trace.trace() as trace:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    races = racecheck.analyse(trace.records)
    # The checker knows nothing of a lock of Python's.
    assert bool(races) is not isinstance(turns, TracedLock)


def test_a_trace_cannot_be_opened_twice():
    from harmony.errors import VirtualGPUError

    trace = access_trace.trace
    with trace(), pytest.raises(VirtualGPUError, match="open already"), trace():
        pass


def test_an_exception_of_the_block_comes_through():
    with pytest.raises(KeyError), racecheck.checked():
        raise KeyError
    assert not access_trace.is_open
