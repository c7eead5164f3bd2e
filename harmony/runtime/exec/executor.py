"""Runs a Schedule: one host thread a device issues its program, one more runs the updates.

Nothing is decided here. What runs where, in which order and behind which event is all in the
schedule; an instruction is looked up once, when the schedule is prepared, and issued every step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from harmony.capture import Captured
from harmony.core.timeline import Timeline
from harmony.core.units import format_bytes
from harmony.errors import ExecutionError, PlanError, text_of
from harmony.planner.ir.kinds import span_kinds
from harmony.planner.ir.schedule import HOST, DeviceSpec, Op, Schedule, Slots
from harmony.planner.ir.tasks import Pack, TaskKind, TensorKind, TensorRef
from harmony.runtime import native
from harmony.runtime.device import DeviceContext, streams_restored
from harmony.runtime.exec.device_program import DeviceProgram, Surroundings
from harmony.runtime.exec.event_issue import Events
from harmony.runtime.exec.failed_step import raise_error
from harmony.runtime.exec.left_behind import LeftBehind
from harmony.runtime.exec.memory_bound import BOUND_RUNS, MemoryBound, is_held
from harmony.runtime.exec.residents import Residents
from harmony.runtime.exec.room import gather
from harmony.runtime.exec.signals import Signals, Stopped
from harmony.runtime.exec.stage import Stage
from harmony.runtime.exec.task_issue import Env
from harmony.runtime.exec.watchdog import Watchdog, Watching
from harmony.runtime.exec.workers import Countdown, Worker
from harmony.runtime.host.boundary_values import is_input, reserve_saved, reserve_values
from harmony.runtime.host.host_program import HostProgram
from harmony.runtime.host.host_state import HostState
from harmony.runtime.host.late_updates import LateUpdates
from harmony.runtime.host.limits import give_back_freed
from harmony.runtime.host.pinned_memory import Place, Stash
from harmony.runtime.interrupts import held_back
from harmony.runtime.peers.exchange import Exchange
from harmony.runtime.step.finite import FirstBad
from harmony.runtime.step.recompute import ReplayState
from harmony.runtime.step.self_check import SelfCheck
from harmony.runtime.step.step import HostValues, Step, Weights
from harmony.runtime.update.optimizer import PackOptimizer

Program = DeviceProgram | HostProgram


@dataclass
class PreparedSchedule:
    """A schedule with everything it needs on devices and host.

    Attributes:
        inputs: host copies that the caller fills before a step, per value.
        outputs: host copies that hold the model's outputs, per value, after a step.
        tokens: of a run's hand-overs: its signals, the beginnings of its programs, their ends.
        needs_nbytes: per device, what the last run took beyond what was there before it.
        excess: how its last run broke the limit of device memory, if that was looked at; else "".
        leaves: whether it leaves activations for a backward to come.
    """

    schedule: Schedule
    programs: list[DeviceProgram]
    host_program: HostProgram
    values: HostValues
    inputs: dict[int, Stash]
    outputs: dict[int, Stash]
    num_events: int
    tokens: range
    num_runs: int = 0
    needs_nbytes: list[int] = field(default_factory=list)
    excess: str = ""
    leaves: bool = False


@dataclass
class Job:
    """One run of a prepared schedule.

    Attributes:
        replay: the random states of the microbatches, started, and what layers change.
        weights: how much the scalars of each microbatch count.
        apply_updates: whether parameters are updated; if not, the gradients are all that is new.
        late: the updates that the step before has left; the schedule makes them first.
        check: figures of a forward that ran before, or are to be compared with a backward to
            come. A schedule that has both is checked in its first run without it.
        approve: called before the first update of an optimizer that waits for all gradients;
            may raise.
        look: is shown all that is computed.
        ahead_nbytes: per device, what the run behind this one takes, slots included.
        begun: the updates that the run has begun; from the first one on, parameters are of two
            steps until the run is over.
        loss_scale: what the loss is multiplied by for the backward.
        exchange: of the gradients with other processes, before the updates.
        limit_nbytes: of each device's memory, to be held in the first two runs of a schedule.
        kept_for: whose backward is to find what this run leaves.
        finds_kept: whether it is a backward that finds what its forward has left.
    """

    replay: ReplayState
    weights: Weights
    apply_updates: bool = True
    late: LateUpdates | None = None
    check: SelfCheck | None = None
    approve: Callable[[], None] = lambda: None
    look: FirstBad | None = None
    ahead_nbytes: Sequence[int] = ()
    begun: list[str] = field(default_factory=list)
    loss_scale: float = 1.0
    exchange: Exchange | None = None
    limit_nbytes: int | None = None
    kept_for: object = None
    finds_kept: bool = False


class Executor:
    """The devices, their threads and their memory, kept from step to step.

    Attributes:
        left: what a forward has left for its backward, in a loop of the caller's own.
    """

    def __init__(
        self,
        contexts: Sequence[DeviceContext],
        host: HostState,
        code: Captured,
        place_of: Callable[[int, int], Place],
        watching: Watching | None = None,
    ) -> None:
        self.contexts = list(contexts)
        self._devices = [context.device for context in contexts]
        self._host = host
        self._place_of = place_of
        self._watching = watching
        layouts = (host.weights.layout, host.gradients.layout)
        self._stages = [Stage(context, code, host.graph, *layouts) for context in self.contexts]
        self._envs: list[Env] = [{} for _ in contexts]
        self.left = LeftBehind(self._devices)
        self._slot_sizes = [_NO_SLOTS] * len(self.contexts)
        self._residents = [Residents(context, host, ()) for context in self.contexts]
        self._workers = [Worker(f"harmony-gpu{i}") for i in range(len(contexts))]
        self._update_worker = Worker("harmony-update")

    # Preparing

    def prepare(self, schedule: Schedule, values: HostValues) -> PreparedSchedule:
        """Look up everything that the schedule names, and reserve its memory.

        Args:
            values: host copies of values that exist already (of an earlier phase of the same
                batch); new ones are added to it.
        """
        _check_updates(schedule, self._host.optimizer)
        with streams_restored(self.contexts):
            self._reserve_slots(schedule)
        graph, device = self._host.graph, self.contexts[0].device
        reserve_values(schedule, graph, values, self._place_of, device)
        events = Events.of(schedule, self.contexts)
        comes, goes = (_moves_kept(schedule, op) for op in (Op.SWAP_IN, Op.SWAP_OUT))
        saved = reserve_saved(schedule, graph, device, self.left.on_host if comes != goes else {})
        around = Surroundings(
            self._host,
            values,
            self._envs,
            events,
            self._place_of,
            saved,
            list(self._residents),
            self.left.on_devices,
        )
        kinds = span_kinds(schedule, graph)
        programs = [
            DeviceProgram(
                i,
                program,
                self.contexts[i],
                self._stages[i],
                around,
                kinds[f"gpu{i}"],
                schedule.devices[i],
            )
            for i, program in enumerate(schedule.programs)
        ]
        ids = {index for kind, index in values if kind is TensorKind.VALUE}
        return PreparedSchedule(
            schedule,
            programs,
            HostProgram(schedule.host, self._host, events.torch_events, kinds[HOST]),
            values,
            {i: values[TensorKind.VALUE, i] for i in ids if is_input(graph.values[i])},
            {i: values[TensorKind.VALUE, i] for i in ids if graph.values[i].is_output},
            events.count,
            native.new_tokens(events.count + 3 * (len(programs) + 1)),
            leaves=(goes and not comes) or any(device.left for device in schedule.devices),
        )

    def fits_slots(self, schedule: Schedule) -> bool:
        """Whether the slots that exist serve this schedule as they are."""
        return all(
            _slot_sizes(schedule, index) == held
            if index < schedule.num_devices
            else not held.resident
            for index, held in enumerate(self._slot_sizes)
        )

    def slots_nbytes(self) -> list[int]:
        """Bytes of the slots, and of the memory of what stays, on each device."""
        every = [(*r.weights, *r.gradients) for r in self._residents]
        return [
            spec.weight_slots.total_nbytes
            + spec.gradient_slots.total_nbytes
            + sum(memory.numel() for memory in resident)
            for spec, resident in zip(self._slot_sizes, every, strict=True)
        ]

    def release(self) -> None:
        """Give all device memory back; what was prepared must be prepared anew."""
        self.left.forget()
        self._slot_sizes = [_NO_SLOTS] * len(self.contexts)
        for index, (stage, env) in enumerate(zip(self._stages, self._envs, strict=True)):
            stage.set_slots([], [])
            env.clear()
            self._reserve_residents(index, ())

    def _reserve_slots(self, schedule: Schedule) -> None:
        for index, item in enumerate(schedule.devices):
            self._host.set_stages(index, item.stages, self.contexts[index].device)
        if self.fits_slots(schedule):
            return
        self.left.forget()
        # Devices that it leaves out too: weights that stay there would be of an earlier step.
        for index in range(len(self.contexts)):
            spec = wanted = _slot_sizes(schedule, index)
            if wanted == self._slot_sizes[index]:
                continue
            self._slot_sizes[index] = _NO_SLOTS  # until all of them are there
            self._stages[index].set_slots([], [])  # give the old ones back first
            device = self.contexts[index].device
            self.contexts[index].enter()
            self.contexts[index].use("compute")
            torch.accelerator.empty_cache()  # else slots lie for good in the gaps of other memory
            if index < schedule.num_devices:
                gather(schedule, index, self._host, device)
            resident = self._reserve_residents(index, spec.resident)
            slots = [
                [torch.empty(s.nbytes, dtype=torch.uint8, device=device) for _ in range(s.count)]
                for s in (spec.weight_slots, spec.gradient_slots)
            ]
            weights = [*slots[0], *resident.weights]
            self._stages[index].set_slots(weights, [*slots[1], *resident.gradients])
            self._slot_sizes[index] = wanted

    def _reserve_residents(self, index: int, refs: Sequence[TensorRef]) -> Residents:
        """Return what is resident on a device; what was, and is no longer, leaves first."""
        if self._residents[index].refs != tuple(refs):
            self._residents[index].leave()
            for wanted in ((), refs):
                self._residents[index] = Residents(self.contexts[index], self._host, wanted)
        return self._residents[index]

    # Running

    def run(self, prepared: PreparedSchedule, job: Job) -> Timeline:
        """Run one step and wait until all of it is done.

        The first run of a schedule keeps all updates back until every backward has succeeded: what
        fails (memory, shapes) mostly fails there, and then no parameter has changed. So does one
        whose memory is not this process's yet, as others may take it meanwhile.

        Ctrl-C lets the step end first, so that all parameters belong to the same step; a second
        one stops it, and says which parameters are of the step after.

        Raises:
            ExecutionError: if a task fails; names the task.
        """
        self._wait_for_caller()
        if not job.finds_kept:
            self.left.let_go()
        self.left.make_room()
        bound, limit = None, job.limit_nbytes
        is_new = prepared.num_runs < BOUND_RUNS
        if limit is not None and is_new and is_held(self.contexts[0].device, limit):
            bound = MemoryBound(self.contexts, self._held_nbytes(), limit)
        try:
            with job.replay.random.borrowed(self.contexts):
                timeline = self._run(prepared, job, bound)
        finally:
            if bound is not None:
                bound.lift()
        prepared.excess = "" if bound is None else bound.excess()
        if prepared.leaves:
            self.left.keep_for(job.kept_for)
        return timeline

    def _held_nbytes(self) -> list[int]:
        """Bytes on each device that are this executor's between two runs."""
        optimizer, slots = self._host.optimizer, self.slots_nbytes()
        if optimizer is None:
            return slots
        return [
            nbytes + optimizer.state_nbytes(context.device)
            for nbytes, context in zip(slots, self.contexts, strict=True)
        ]

    def _run(self, prepared: PreparedSchedule, job: Job, bound: MemoryBound | None) -> Timeline:
        if job.ahead_nbytes:
            pairs = zip(job.ahead_nbytes, self.slots_nbytes(), strict=False)
            self._check_room([needed - held for needed, held in pairs])
        owns_room = self._owns_room(prepared)
        if not owns_room:
            found = self.left.nbytes()
            pairs = zip(prepared.needs_nbytes, found, strict=False)
            self._check_room([needed - nbytes for needed, nbytes in pairs])
        before = self._used_nbytes() if prepared.leaves else []
        step = self._new_step(prepared, job, bound, owns_room)
        for context, stage in zip(self.contexts, self._stages, strict=True):
            torch.accelerator.reset_peak_memory_stats(context.device)
            stage.look = job.look
        self._host.begin_step()
        job.replay.random.check = step.signals.check
        with held_back() as held, held.stopped_by(partial(step.signals.fail, "")):
            self._issue(prepared, step)
            self._raise_failure(prepared, step)
        if prepared.leaves:
            pairs = zip(self._used_nbytes(), before, strict=True)
            self.left.taken_nbytes = [max(0, now - then) for now, then in pairs]
        prepared.num_runs += 1
        if prepared.num_runs == 1:
            give_back_freed()  # what capture, measuring and planning have left
        return self._timeline(prepared, step)

    def _used_nbytes(self) -> list[int]:
        return [context.taken_nbytes()[1] for context in self.contexts]

    def _new_step(
        self, prepared: PreparedSchedule, job: Job, bound: MemoryBound | None, owns_room: bool
    ) -> Step:
        """Say what a run is like, above all whether its updates wait for the whole backward."""
        first_time = prepared.num_runs == 0
        check = job.check
        if check is None and first_time:
            check = self.new_check(prepared.schedule)
        optimizer = self._host.optimizer
        waits = optimizer is not None and optimizer.waits is not None and job.apply_updates
        holds = first_time or waits or check is not None or bound is not None or not owns_room
        leaves = job.apply_updates and bool(prepared.host_program.late)
        approval = prepared.num_events + len(prepared.programs)
        ends = range(prepared.num_events, approval)
        return Step(
            Signals(prepared.tokens),
            job.replay,
            job.weights,
            holds=holds,
            before_updates=tuple(ends) if holds or leaves else (),
            approval=approval,
            waits=waits,
            late=job.late,
            apply_updates=job.apply_updates,
            approve=job.approve,
            check=check,
            approved=partial(bound.approve, compact=first_time) if bound else lambda: None,
            updated=job.begun,
            loss_scale=job.loss_scale,
            exchange=job.exchange,
        )

    def _issue(self, prepared: PreparedSchedule, step: Step) -> None:
        """Let every thread issue its program, and wait until all of them have."""
        programs: list[Program] = [*prepared.programs, prepared.host_program]
        workers = [*self._workers[: len(prepared.programs)], self._update_worker]
        begin = prepared.tokens[-2 * len(programs) : -len(programs)]
        done = prepared.tokens[-len(programs) :]
        countdown = Countdown(len(programs))
        look = None
        if self._watching is not None:
            watched = prepared.programs
            look = Watchdog(self._watching, prepared.schedule, watched, step).look
        try:
            for index, (worker, program) in enumerate(zip(workers, programs, strict=True)):
                native.trace_release(begin[index])
                end = prepared.num_events + index
                tokens = (begin[index], done[index])
                worker.submit(partial(self._work, program, step, tokens, end), countdown.done)
            countdown.wait(look)
        except BaseException as error:  # some have their job, and would wait for the others
            step.signals.fail("the start of the step", error)
            self._drain_workers()
        for token in done:
            native.trace_acquire(token)

    def _owns_room(self, prepared: PreparedSchedule) -> bool:
        """Whether nobody else can take what the last run needed: all but the first have it."""
        pairs = zip(self.contexts, prepared.needs_nbytes, strict=False)
        return all(native.owned_nbytes(context.device) >= needed for context, needed in pairs)

    def _wait_for_caller(self) -> None:
        """Wait for what the script itself has enqueued where it may change optimizer state."""
        for context, resident in zip(self.contexts, self._residents, strict=True):
            if not resident.refs:
                continue
            try:
                context.wait_for_caller()
            except RuntimeError as error:
                where, after = f"what runs on {context.device}", "No parameter was changed"
                if native.is_lost(context.device):
                    raise native.device_lost(where, error, after) from error
                said = f"{where} failed. {type(error).__name__}: {text_of(error)}. {after}"
                raise ExecutionError(said, where) from error

    def _check_room(self, needs_nbytes: Sequence[int]) -> None:
        """Refuse to begin where others have taken the memory that an earlier run needed."""
        for context, needed in zip(self.contexts, needs_nbytes, strict=False):
            free = context.free_nbytes()
            if free < needed:
                short = torch.OutOfMemoryError(
                    f"the step takes {format_bytes(needed)} on {context.device} beside what lies "
                    f"there between steps, and {format_bytes(free)} are free: others have taken "
                    "memory"
                )
                raise ExecutionError(f"{short}. No parameter was changed") from short

    def _drain_workers(self) -> None:
        """Wait until no thread has a job any more."""
        workers = [*self._workers, self._update_worker]
        countdown = Countdown(len(workers))
        for worker in workers:
            worker.submit(lambda: None, countdown.done)
        countdown.wait()

    def new_check(self, *schedules: Schedule) -> SelfCheck | None:
        """Return an empty self-check of a forward and its backward; None if nothing runs twice."""
        tasks = [step.task for s in schedules for p in s.programs for step in p if step.task]
        if {TaskKind.FORWARD, TaskKind.BACKWARD}.difference(task.kind for task in tasks):
            return None
        return SelfCheck(self._host.graph, self.contexts[0].device, schedules)

    def _work(self, program: Program, step: Step, tokens: tuple[int, int], end: int) -> None:
        """Issue a program; on its thread, which hears of what fails by the step's signals."""
        native.trace_acquire(tokens[0])
        step.threads[program.name] = threading.get_ident()
        try:
            if isinstance(program, DeviceProgram):
                program.issue(step, self._devices)
                step.signals.issue(end)
                program.finish(step)
            else:
                program.issue(step)
            step.finished.append(program.name)
        except Stopped:
            pass
        except BaseException as error:
            at = step.running.get(program.name) or "the beginning of the step"
            step.signals.fail(f"{at} on {program.name}", error)
        finally:
            native.trace_release(tokens[1])

    def _raise_failure(self, prepared: PreparedSchedule, step: Step) -> None:
        if step.signals.failure is None:
            return
        where, error = step.signals.failure
        if not where and len(step.finished) > len(prepared.programs):
            return  # it was to stop, but was over
        step.signals.failure = None  # its frames hold the step: a cycle with device memory in it
        for context in self.contexts:  # all of them first: a peer may still be copying to another
            context.drain()
        for program in prepared.programs:
            program.clear()
        self.left.let_go()
        try:
            raise_error(where, error, step, self._devices)
        finally:
            del error

    def _timeline(self, prepared: PreparedSchedule, step: Step) -> Timeline:
        timeline = Timeline(spans=list(step.spans), step_s=step.now_s())
        prepared.needs_nbytes.clear()
        left = self.left.nbytes()  # of a forward; a backward has taken it
        for context, program, nbytes in zip(self.contexts, prepared.programs, left, strict=False):
            timeline.spans.extend(program.spans())
            peak, used = context.taken_nbytes()
            timeline.peak_nbytes.append(peak)
            prepared.needs_nbytes.append(peak - used + nbytes)
        return timeline


_NO_SLOTS = DeviceSpec(0)


def _slot_sizes(schedule: Schedule, index: int) -> DeviceSpec:
    """What a schedule wants to have on a device from step to step; nothing where it has none."""
    if index >= schedule.num_devices:
        return _NO_SLOTS
    return replace(schedule.devices[index], memory_nbytes=0, stages=Slots(), left=(), found=())


def _moves_kept(schedule: Schedule, op: Op) -> bool:
    """Whether a kind of instruction copies what forwards leave for their backwards."""
    steps = (step for program in schedule.programs for step in program)
    return any(step.op is op and step.ref is not None and step.ref.is_kept for step in steps)


def _check_updates(schedule: Schedule, optimizer: PackOptimizer | None) -> None:
    updated = [r for spec in schedule.devices for r in spec.resident if r.is_gradient_part]
    why = None if optimizer is None else optimizer.waits
    if updated and why is not None:
        raise PlanError(
            f"{why}: all gradients have to be on the host before the "
            f"first update, but the plan updates {Pack(updated[0].first, updated[0].last)} on "
            "its device. Plan again"
        )


__all__ = ["HOST", "Executor", "Job", "PreparedSchedule"]
