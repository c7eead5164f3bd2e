"""One device's program, prepared once and issued every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from harmony.core.timeline import Span
from harmony.planner.ir.schedule import DeviceSpec, Instruction, Op
from harmony.planner.ir.tasks import Samples, TaskKind, TensorKind, TensorRef
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.event_issue import EventIssuer, Events
from harmony.runtime.exec.packs_of import packs_of, writers_of
from harmony.runtime.exec.residents import Residents
from harmony.runtime.exec.signals import Stopped
from harmony.runtime.exec.stage import Stage
from harmony.runtime.exec.task_issue import Env, Issue, SavedForwards, TaskIssuer
from harmony.runtime.host.arena import Piece
from harmony.runtime.host.arena_layout import ArenaLayout
from harmony.runtime.host.boundary_values import saved_buffer
from harmony.runtime.host.host_state import HostState
from harmony.runtime.host.pinned_memory import HostBuffer, Place
from harmony.runtime.step.step import HostValues, Step


@dataclass(frozen=True)
class Surroundings:
    """What a program shares with the others of its schedule.

    Attributes:
        envs: per device, the values that are on it now.
        events: of the schedule.
        place_of: form of a value for a number of samples.
        saved: host memory for what forwards save and is not to stay on the device.
        residents: per device, the weights that stay there.
        kept: per device, what forwards have left there for their backwards.
    """

    host: HostState
    values: HostValues
    envs: Sequence[Env]
    events: Events
    place_of: Callable[[int, int], Place]
    saved: dict[TensorRef, HostBuffer]
    residents: Sequence[Residents]
    kept: Sequence[SavedForwards]


@dataclass
class Prepared:
    """An instruction ready to be issued, with the events that time it if it takes time.

    Attributes:
        is_update: whether it updates resident weights, or copies the new ones to the host.
    """

    instruction: Instruction
    label: str
    index: int
    issue: Issue
    begin: torch.Event | None = None
    end: torch.Event | None = None
    kind: str = ""
    nbytes: int = 0
    is_update: bool = False


class DeviceProgram:
    """Issues the instructions of one device; `issue` runs on the device's thread.

    Attributes:
        name: ``gpu0``, ``gpu1``, ...
        issuing: the index of the instruction that is issued now.
    """

    def __init__(
        self,
        index: int,
        program: Sequence[Instruction],
        context: DeviceContext,
        stage: Stage,
        around: Surroundings,
        kinds: Sequence[str],
        spec: DeviceSpec,
    ) -> None:
        self.name = f"gpu{index}"
        self._index = index
        self._context = context
        self._stage = stage
        self._around = around
        self._env = around.envs[index]
        self._saved = around.kept[index]
        self._staged: dict[TensorRef, int] = {}
        self._tasks = TaskIssuer(stage, self._env, around.host, self._saved)
        self._residents = around.residents[index]
        self._slot_of = self._residents.slots(spec)
        self._packs = packs_of(program)
        self._writers = writers_of(program)
        self._moves = [(step.op, step.ref) for step in program]
        self._reads = {ref for step in program for ref in step.reads}
        self._kinds = kinds
        self._base = context.new_event(timing=True)
        self._base_s = 0.0
        self._updates = True
        self.issuing = 0
        events = EventIssuer(around.events, context)
        makers: dict[Op, Callable[[int, Instruction], Issue]] = {
            Op.RUN: self._run,
            Op.ALLOC: self._alloc,
            Op.SWAP_IN: self._swap_in,
            Op.SWAP_OUT: self._swap_out,
            Op.SEND: self._send,
            Op.DROP: self._drop,
            Op.RECORD: lambda _, instruction: events.record(instruction),
            Op.WAIT: lambda _, instruction: events.wait(instruction),
        }
        self._prepared = [
            self._prepare(at, instruction, makers[instruction.op](at, instruction))
            for at, instruction in enumerate(program)
        ]
        self._issued = [prepared for prepared in self._prepared if prepared.issue is not _nothing]
        self._held = [prepared for prepared in self._issued if prepared.is_update]

    def issue(self, step: Step, peers: Sequence[torch.device]) -> None:
        """Issue the whole program and wait until the device has run it.

        Updates on the device that the step holds back are left for `finish`.
        """
        context = self._context
        context.enter(peers)
        self._updates = step.apply_updates
        self.issuing = 0
        self._base_s = step.now_s()
        compute = context.use("compute")
        if self._residents.refs:
            self._residents.refresh()
        compute.record_event(self._base)
        holds = step.holds_updates
        for prepared in self._issued:
            if not (holds and prepared.is_update):
                self._issue(prepared, step)
        self.issuing = len(self._prepared)
        step.running[self.name] = "the end of the step"
        context.synchronize()

    def finish(self, step: Step) -> None:
        """Run the updates that were held back; without updates, let the host have gradients."""
        if not self._held or not step.holds_updates:
            return
        if step.apply_updates:
            step.signals.wait(step.approval)
            for prepared in self._held:
                self._issue(prepared, step)
                self._context.synchronize()  # events between them were recorded long ago
        else:
            self._context.use("d2h")
            for ref in self._residents.trained:
                self._give_gradients(ref)
            self._context.synchronize()

    def _issue(self, prepared: Prepared, step: Step) -> None:
        if step.signals.failure is not None:
            raise Stopped
        step.running[self.name] = prepared.label
        self.issuing = prepared.index
        name, context = prepared.instruction.stream, self._context
        stream = context.streams[name] if context.current == name else context.use(name)
        if prepared.begin is not None and prepared.end is not None:
            stream.record_event(prepared.begin)
            prepared.issue(step)
            stream.record_event(prepared.end)
        else:
            prepared.issue(step)

    def _give_gradients(self, ref: TensorRef) -> None:
        pack = self._writers.get(ref)
        if pack is None:  # all that its layers train is shared, and given by itself
            return
        self._around.host.touched[ref] = frozenset(self._stage.touched_by.get(pack, ()))
        _copy_all([(target, memory) for memory, target in self._residents.pairs(ref)])

    def clear(self) -> None:
        """Forget what a step left on the device; only a failed one leaves anything."""
        self._env.clear()
        self._saved.clear()

    def positions(self) -> dict[str, tuple[int, bool]]:
        """Where each stream is that still has something to do; any thread may ask.

        Returns:
            By stream, the index of the first instruction that is not over, and whether it has
            begun; as far as instructions take time.
        """
        found: dict[str, tuple[int, bool]] = {}
        for prepared in self._prepared[: self.issuing]:
            stream = prepared.instruction.stream
            if stream in found or prepared.begin is None or prepared.end is None:
                continue
            if not prepared.end.query():
                found[stream] = prepared.index, prepared.begin.query()
        return found

    def spans(self) -> list[Span]:
        """What the device did in the step that was issued last."""
        found = []
        for p in self._prepared:
            if p.begin is None or p.end is None or (p.is_update and not self._updates):
                continue
            start_s = self._base_s + self._base.elapsed_time(p.begin) / 1e3
            end_s = self._base_s + self._base.elapsed_time(p.end) / 1e3
            lane = f"{self.name}.{p.instruction.stream}"
            found.append(Span(lane, p.label, p.kind, start_s, end_s, p.nbytes, p.index))
        return found

    def _prepare(self, at: int, instruction: Instruction, issue: Issue) -> Prepared:
        prepared = Prepared(instruction, str(instruction), at, issue)
        ref, task = instruction.ref, instruction.task
        prepared.is_update = task is not None and task.kind is TaskKind.UPDATE
        if instruction.op is Op.SWAP_OUT and ref is not None and ref.is_parameter:
            prepared.is_update = True
        if instruction.op in (Op.RUN, Op.SWAP_IN, Op.SWAP_OUT, Op.SEND):
            graph = self._around.host.graph
            prepared.begin = self._context.new_event(timing=True)
            prepared.end = self._context.new_event(timing=True)
            prepared.kind = self._kinds[at]
            prepared.nbytes = 0 if instruction.ref is None else instruction.ref.nbytes(graph)
        return prepared

    # One method an operation: each looks everything up and returns what is to be issued. That
    # must not hold the program, which holds it: such a cycle keeps device memory for a while.

    def _run(self, at: int, instruction: Instruction) -> Issue:
        assert instruction.task is not None
        slot = self._slot(instruction.reads, parameters=True)
        if instruction.task.kind is TaskKind.UPDATE:
            return self._tasks.update(instruction, slot)
        if instruction.task.kind is TaskKind.FORWARD:
            return self._tasks.forward(instruction, slot)
        gradient_slot = self._slot(instruction.writes, parameters=False)
        return self._tasks.backward(instruction, slot, gradient_slot)

    def _alloc(self, at: int, instruction: Instruction) -> Issue:
        ref = _ref(instruction)
        if instruction.slot is not None:
            self._slot_of[ref] = instruction.slot
            return _nothing
        if ref.is_kept:
            saved = self._saved
            return lambda _: saved[ref].take_memory()
        env, device = self._env, self._context.device
        place = self._around.place_of(ref.first, ref.num_samples)

        def issue(_: Step) -> None:
            env[ref] = torch.empty_strided(
                place.shape, place.stride, dtype=place.dtype, device=device
            )

        return issue

    def _swap_in(self, at: int, instruction: Instruction) -> Issue:
        ref, env = _ref(instruction), self._env
        if ref.is_kept:
            saved, buffers = self._saved, self._around.saved
            return lambda _: saved[ref].memory.copy_from(buffers[ref])
        if ref.is_value:
            chunk = self._around.values[ref.kind, ref.first].chunk(_samples(ref))
            return lambda _: _copy_all([(env[ref], chunk)])
        host, stage, grows = self._around.host, self._stage, ref.is_gradient_part
        low, high = self._in_slot(at, ref, (host.gradients if grows else host.weights).layout)
        slot, into = self._slot_of[ref], stage.gradient_range if grows else stage.weight_range
        if ref in self._staged:
            staged = host.stage_bytes(self._index, self._staged[ref], high - low)
            pieces = [Piece(0, staged)] if high > low else []
        else:
            pieces = host.gradient_pieces(ref) if grows else host.parameter_pieces(ref)
        pairs = [
            (into(slot, low + p.offset, low + p.offset + p.data.numel()), p.data) for p in pieces
        ]

        def issue(_: Step) -> None:
            _copy_all(pairs)

        return issue

    def _swap_out(self, at: int, instruction: Instruction) -> Issue:
        ref, env, host = _ref(instruction), self._env, self._around.host
        if ref.is_kept:
            return _offloading(ref, self._saved, self._around.saved)
        if ref.is_value:
            chunk = self._around.values[ref.kind, ref.first].chunk(_samples(ref))
            return lambda _: _copy_value(chunk, env[ref])
        if ref.is_parameter:
            out = [(source, memory) for memory, source in self._residents.pairs(ref)]
            return lambda _: _copy_all(out)
        low, high = self._in_slot(at, ref, host.gradients.layout)
        slot, stage = self._slot_of[ref], self._stage
        pieces = host.gradient_pieces(ref)
        staged = torch.empty(0)
        if instruction.slot is not None:
            self._staged[ref] = instruction.slot
            staged = host.stage_bytes(self._index, instruction.slot, high - low)
            pieces = [Piece(0, staged)] if high > low else []
        pairs = [
            (p.data, stage.gradient_range(slot, low + p.offset, low + p.offset + p.data.numel()))
            for p in pieces
        ]
        touched_by, pack = stage.touched_by, self._packs[at]
        assert pack is not None
        is_staged = instruction.slot is not None

        def issue(_: Step) -> None:
            host.touched[ref] = frozenset(touched_by.get(pack, ()))
            if is_staged:  # here, not when it is prepared: another schedule may have its own
                host.staged[ref] = staged
            _copy_all(pairs)

        return issue

    def _send(self, at: int, instruction: Instruction) -> Issue:
        ref, env = _ref(instruction), self._env
        assert instruction.peer is not None
        peer = self._around.envs[instruction.peer]
        return lambda _: _copy_value(peer[ref], env[ref])

    def _drop(self, at: int, instruction: Instruction) -> Issue:
        ref, env = _ref(instruction), self._env
        if ref.is_kept:
            # Its backward may be in another schedule, behind this one.
            is_out = (Op.SWAP_OUT, ref) in self._moves[:at] and ref not in self._reads
            comes_back = is_out or (Op.SWAP_IN, ref) in self._moves[at:]
            return _dropping(ref, self._saved, comes_back)
        if not ref.is_value:
            return _nothing

        def issue(_: Step) -> None:
            del env[ref]

        return issue

    def _slot(self, refs: Sequence[TensorRef], *, parameters: bool) -> int:
        """Slot of the parameters, or gradients, among ``refs``; -1 if there are none."""
        wanted = [r for r in refs if (r.is_parameter if parameters else r.is_gradient_part)]
        return next((self._slot_of[r] for r in wanted if r in self._slot_of), -1)

    def _in_slot(self, at: int, ref: TensorRef, layout: ArenaLayout) -> tuple[int, int]:
        """Byte range within its slot of a pack's own range, or of one of its shared parameters."""
        if ref.kind in (TensorKind.WEIGHTS, TensorKind.WEIGHT_GRADIENTS):
            low, high = layout.span(ref.first, ref.last)
            return 0, high - low
        pack = self._packs[at]
        assert pack is not None, f"no task of gpu{self._index} uses {ref}"
        shared = self._around.host.graph.shared_in(pack.first, pack.last)
        start = layout.shared_offset(pack.first, pack.last, shared, ref.first)
        return start, start + layout.shared[ref.first].nbytes


def _offloading(
    ref: TensorRef, saved: SavedForwards, buffers: dict[TensorRef, HostBuffer]
) -> Issue:
    """Copy what a forward saved to the host, into memory of the size that the plan said."""

    def issue(_: Step) -> None:
        found = saved[ref].memory
        if buffers[ref].tensor.numel() < found.nbytes:  # alignment can make it a little more
            buffers[ref] = saved_buffer(ref, found.nbytes, found.device)
        found.copy_to(buffers[ref])

    return issue


def _dropping(ref: TensorRef, saved: SavedForwards, comes_back: bool) -> Issue:
    """Give the memory back of what a forward saved; all of it, unless it comes back."""
    if comes_back:
        return lambda _: saved[ref].let_go()
    return lambda _: saved.__delitem__(ref)


def _copy_value(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy what a device has made, which may lie in another order than what it is copied to.

    It gets that order first, where it is, on the stream of the copy. CUDA's own copy to a peer
    does it over there, on a stream that no event of the schedule is recorded on.
    """
    if source.stride() != target.stride():
        strides = zip(source.shape, source.stride(), target.stride(), strict=True)
        if any(size > 1 and a != b for size, a, b in strides):
            source = torch.empty_like(target, device=source.device).copy_(source)
    target.copy_(source, non_blocking=True)


def _copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def _nothing(_: Step) -> None:
    """Nothing to issue: the schedule needs the instruction, the device does not."""


def _ref(instruction: Instruction) -> TensorRef:
    assert instruction.ref is not None
    return instruction.ref


def _samples(ref: TensorRef) -> Samples:
    assert ref.samples is not None
    return ref.samples
