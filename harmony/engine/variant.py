"""A variant: the captured layers of one kind of call, its plans, and what runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch

from harmony.capture import Captured, Footprint, GuardError, no_cast_cache, undisturbed
from harmony.capture.cost.costs import costs_nbytes
from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.engine.graph_bytes import with_bytes, with_saved, with_saved_of
from harmony.engine.inflight import InFlight, InFlightPool, Reached
from harmony.engine.minibatch import detached
from harmony.engine.other_lengths import (
    adapted,
    ratio_between,
    same_updates,
    stretched,
)
from harmony.engine.planned import Asked, Measured, Planned, microbatches_of
from harmony.engine.splitting import Splitting, Verdict
from harmony.errors import PlanError
from harmony.planner.check.verify import check_together, verify
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.plan_file import check_plan
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, Samples
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.search.candidates import REMEDY, Candidate
from harmony.planner.search.trial import for_phase
from harmony.profiling.layer_times import KnownTimes, measure_layers
from harmony.profiling.steady import Steady, choose_steadily
from harmony.profiling.update_times import UpdateCost
from harmony.runtime import interrupts
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.executor import Executor, PreparedSchedule
from harmony.runtime.exec.stage import Values
from harmony.runtime.exec.watchdog import Watching
from harmony.runtime.host.host_state import HostState
from harmony.runtime.host.pinned_memory import Place
from harmony.runtime.step.self_check import SelfCheck
from harmony.runtime.step.step import Weights


class Variant:
    """Everything that follows from one signature.

    What was captured is here from the start. What was measured is `measured`, and what is planned
    a `Planned` for each minibatch.

    Attributes:
        captured: the layers.
        captured_graph: their graph, optimizer state included.
        machine: as it was before the layers were measured.
        measured: None until they are.
        executor: runs its schedules; owns device memory only while the variant is the active one.
        in_flight_pool: what it runs them on.
    """

    def __init__(
        self,
        captured: Captured,
        graph: LayerGraph,
        machine: Machine,
        host: HostState,
        contexts: Sequence[DeviceContext],
        phase: Phase,
        steady: Steady | None = None,
        watching: Watching | None = None,
    ) -> None:
        self.captured = captured
        self.captured_graph = graph
        self.machine = machine
        self.measured: Measured | None = None
        self.host = host
        # Not a method of this: what the executor holds must not hold the executor.
        place_of = partial(_place_of, captured)
        self.executor = Executor(contexts, host, captured, place_of, watching)
        self.in_flight_pool = InFlightPool(self.executor)
        self._contexts = contexts
        self._phase = phase
        self._steady = steady
        self._plans: dict[int, Planned] = {}
        self._kin: Variant | None = None
        self._splitting = Splitting(captured)
        self._verdict = Verdict()
        self._checked: set[int] = set()

    @property
    def graph(self) -> LayerGraph:
        """The captured graph, with all that is known of it by now."""
        return self.host.graph

    @property
    def device(self) -> torch.device:
        """The device that its layers are measured on: the first."""
        return self._contexts[0].device

    @property
    def phase(self) -> Phase:
        """``TRAIN`` for whole steps, ``BACKWARD`` for a loop of the caller's own."""
        return self._phase

    def try_splitting(
        self, inputs: Values, minibatch: int, asked: int | None, loss_name: str
    ) -> None:
        """Find out whether batches may be parted (see `Splitting.found`)."""
        with no_cast_cache():
            verdict = self._splitting.found(
                self.captured_graph,
                self.host.weights,
                self._contexts[0],
                inputs,
                minibatch,
                asked,
                loss_name,
            )
        if verdict is None:
            return
        if self._kin is not None and verdict != self._kin._verdict:  # other sizes may work
            self._kin, self.measured = None, None
        self._judge(verdict)

    def forbid_parts(self, why: str) -> None:
        """Let every minibatch be one microbatch from now on."""
        self._judge(replace(self._verdict, whole_batch=why))
        self._plans.clear()
        self.in_flight_pool.drop()

    def _judge(self, verdict: Verdict) -> None:
        """Let the graph say what is known of parts of batches."""
        self._verdict = verdict
        known = self.measured
        self.host.graph = verdict.applied(self.captured_graph if known is None else known.graph)

    def _use(self, measured: Measured) -> None:
        self.measured = measured
        self._judge(self._verdict)

    def measure(
        self,
        inputs: Values,
        sizes: Sequence[int],
        update: UpdateCost | None,
        known: KnownTimes,
    ) -> Measured:
        """Measure the layers at these microbatch sizes, as far as each fits a device.

        Args:
            known: times of layers of other variants of the model; what is measured is added.
        """
        # It runs on memory as it was found: an anomaly there means nothing.
        with torch.autograd.set_detect_anomaly(False):
            measured = self._measure(inputs, sizes, update, known)
        self._use(measured)
        return measured

    def _measure(
        self,
        inputs: Values,
        sizes: Sequence[int],
        update: UpdateCost | None,
        known: KnownTimes,
    ) -> Measured:
        interrupts.check()
        nbytes = {size: costs_nbytes(self.captured, size) for size in sizes}
        graph = with_saved(self.captured_graph, nbytes)
        fitting = [size for size in sizes if self._fits_alone(size, nbytes[size])]
        if not fitting:
            # Nothing can run, so only the bytes are known; the search refuses the model with them.
            size = min(sizes)
            bare = [{size: LayerCost(0.0, 0.0, 0.0, *layer)} for layer in nbytes[size]]
            return Measured(graph, CostTable(tuple(bare)), self.machine)
        batches = {size: self.captured.part(inputs, 0, size) for size in fitting}
        costs, cpu_share = measure_layers(
            self._contexts[0],
            self.captured,
            self._verdict.applied(graph),
            self.host.weights,
            self.host.gradients,
            batches,
            nbytes,
            update,
            known,
        )
        # Of the time that a layer takes on a virtual GPU, only what it computes needs a core.
        machine = replace(self.machine, cpu_share=self.machine.cpu_share * cpu_share)
        return Measured(graph, with_bytes(costs, nbytes), machine)

    def borrow(self, others: Iterable[Variant]) -> None:
        """Take costs from a variant of another length that was measured, if there is one."""
        found: list[tuple[float, int, float, Variant, Measured]] = []
        for other in others:
            kin = other._kin or other  # which may have been forgotten meanwhile
            known = kin.measured
            if known is not None and kin.phase is self.phase:
                ratio = ratio_between(self.captured_graph, kin.captured_graph)
                if ratio is not None and same_updates(self.machine, known.machine):
                    found.append((abs(ratio - 1.0), len(found), ratio, kin, known))
        if found:
            _, _, ratio, self._kin, known = min(found)
            costs = stretched(known.costs, ratio)
            graph = with_saved_of(self.captured_graph, costs)
            self._verdict = self._kin._verdict  # until it is tried, or needs not be
            self._use(Measured(graph, costs, known.machine))

    def settled(self, minibatch: int) -> Planned | None:
        """The plan for a minibatch, if nothing is left to be found out before it runs."""
        planned = self._plans.get(minibatch)
        if planned is None or self.measured is None:
            return None
        is_open = self._splitting.is_open(self.captured_graph, minibatch)
        return None if is_open and not _is_whole(planned.plan) else planned

    def wants_trial(self, minibatch: int, asked: Callable[[], Asked]) -> bool:
        """Whether it is to be found out with a batch of this size whether it may be parted.

        Not where no batch of this size is parted, as none of the other length is.
        """
        if not self._splitting.is_open(self.captured_graph, minibatch):
            return False
        planned = self._plans.get(minibatch)
        if planned is None and _is_whole(self._like(minibatch, asked())):
            planned = self._adapted(minibatch, asked())
            if planned is not None:
                self._plans[minibatch] = planned
        return planned is None or not _is_whole(planned.plan)

    def _like(self, minibatch: int, asked: Asked) -> Plan | None:
        """The other length's plan for what is asked."""
        like = None if self._kin is None else self._kin._plans.get(minibatch)
        return None if like is None or like.asked != asked else like.plan

    def _adapted(self, minibatch: int, asked: Asked) -> Planned | None:
        """A plan like that of the other length, if one was made for what is asked now."""
        like, known = self._like(minibatch, asked), self.measured
        if like is None or known is None or self._kin is None:
            return None
        if self.graph.whole_batch and not _is_whole(like):
            return None  # batches of the other length may be parted, these may not
        if ratio_between(self.graph, self._kin.graph) is None:  # it may have learnt of this one
            return None
        plan = adapted(self.graph, known.costs, known.machine, like, asked[2])
        return None if plan is None else Planned(plan, self.graph, known)

    def _with_own_bytes(self, borrowed: Measured) -> Measured:
        """Have the bytes of layers themselves, in place of bounds: a plan of its own is due."""
        sizes = sorted(set().union(*borrowed.costs.by_layer))
        nbytes = {size: costs_nbytes(self.captured, size) for size in sizes}
        graph = with_saved(self.captured_graph, nbytes)
        own = replace(borrowed, graph=graph, costs=with_bytes(borrowed.costs, nbytes))
        self._kin = None
        self._use(own)
        return own

    def _fits_alone(self, size: int, nbytes: Sequence[Footprint]) -> bool:
        limit = self.machine.devices[0].memory_nbytes
        return all(
            self._alone_nbytes(layer.index, size, nbytes[layer.index]) <= limit
            for layer in self.graph.layers
        )

    def _alone_nbytes(self, index: int, size: int, nbytes: Footprint) -> int:
        """Bytes that one layer needs on a device to be measured alone."""
        layer, graph = self.graph.layers[index], self.graph
        values = sum(graph.values[v].nbytes(size) for v in (*layer.inputs, *layer.outputs))
        parameters = graph.weight_nbytes([index]) + graph.gradient_nbytes([index])
        return parameters + 2 * values + sum(nbytes)

    def plan(
        self,
        minibatch: int,
        measured: Measured,
        asked: Asked,
        pinned: Plan | None = None,
        like: Candidate | None = None,
    ) -> Planned:
        """Return the plan for a minibatch.

        Args:
            measured: what a new one is made from.
            pinned: the caller's own plan.
            like: whose bits a new one computes.
        """
        planned = self._plans.get(minibatch)
        if planned is None:
            # What counts the work of a layer may run it, with the random numbers that it draws.
            with undisturbed(self.device), no_cast_cache():
                planned = self._new_plan(minibatch, measured, asked, pinned, like)
            self._plans[minibatch] = planned
        return planned

    def _new_plan(
        self,
        minibatch: int,
        measured: Measured,
        asked: Asked,
        pinned: Plan | None,
        like: Candidate | None,
    ) -> Planned:
        mode, microbatch_size, activations = asked
        if pinned is not None and pinned.minibatch == minibatch:
            self._check_pinned(pinned, measured, microbatch_size)
            return Planned(pinned, self.graph, measured)
        if self._kin is not None:
            planned = self._adapted(minibatch, asked)
            if planned is not None:
                return planned
            measured = self._with_own_bytes(measured)
        assert self._steady is not None, "the machine is known before a plan is made"
        interrupts.check()
        graph = self.graph
        if microbatch_size is not None:  # of FORWARD too: layers may mix samples
            graph = replace(graph, sizes=(microbatch_size,))
        plan = choose_steadily(
            self._steady,
            self.captured,
            graph,
            measured.costs,
            measured.machine,
            minibatch,
            mode=mode,
            microbatch_size=microbatch_size or "auto",
            activations=activations,
            phase=self._phase,
            like=like,
        )
        return Planned(plan, self.graph, measured, asked)

    def learn(self, planned: Planned) -> None:
        """Go on with a plan that was made from better figures; later plans are made from them."""
        self.measured = planned.measured
        self._plans[planned.plan.minibatch] = planned

    def misfit(self, inputs: Values, planned: Planned, asked: int | None) -> Samples | None:
        """Return the first microbatch for which the forward takes another path, if any.

        The batch as a whole comes first, unless a microbatch size was asked for: what it decides
        is what plain PyTorch does.
        """
        for samples in self.on_one_path(planned, asked):
            if not self.captured.looks_at_inputs(samples[1] - samples[0]):
                continue
            try:
                self.captured.split(inputs, *samples)
            except GuardError:
                return samples
        return None

    def on_one_path(self, planned: Planned, asked: int | None) -> Iterable[Samples]:
        """The parts of a batch that have to take the variant's path (see `misfit`)."""
        whole = [(0, planned.plan.minibatch)] if asked is None else []
        return dict.fromkeys([*whole, *planned.microbatches])

    def _check_pinned(self, plan: Plan, measured: Measured, microbatch_size: int | None) -> None:
        why = self.graph.whole_batch
        if why and microbatch_size is None and len(microbatches_of(plan.spec)) > 1:
            raise PlanError(
                f"the plan parts a batch of {plan.minibatch} samples, but {why}. {REMEDY}"
            )
        check_plan(plan, self.graph, measured.machine, self._phase)
        for phase, schedule in plan.schedules.items():
            tasks = build_tasks(self.graph, for_phase(plan.spec, phase))
            verify(schedule, self.graph, measured.costs, phase, tasks)
        if plan.spec.phase is Phase.BACKWARD:
            check_together(plan.schedules[Phase.FORWARD], plan.schedule)

    def prepared(
        self, planned: Planned, phase: Phase, in_flight: InFlight | None = None
    ) -> PreparedSchedule:
        """Return the schedule of a phase of a plan, ready to run.

        Args:
            in_flight: whose values it works on; by default those of a phase that nothing follows.
        """
        if in_flight is None:
            in_flight = self.in_flight_pool.own(phase, planned.plan.minibatch)
        infers = phase is Phase.INFER
        schedule = planned.inference if infers else planned.plan.schedules[phase]
        return self.in_flight_pool.prepare(schedule, in_flight, in_flight.values)

    def prepared_backward(
        self, planned: Planned, in_flight: InFlight, reached: Reached, finds_kept: bool
    ) -> PreparedSchedule:
        """Return the backward from the outputs that a gradient has come for, ready to run.

        Args:
            finds_kept: whether what its forward was to leave is there.
        """
        values = in_flight.backward_values(reached, finds_kept)
        schedule = planned.backward(reached, finds_kept)
        return self.in_flight_pool.prepare(schedule, in_flight, values)

    def release(self) -> None:
        """Give the device memory back; the next `prepared` takes it again."""
        self.in_flight_pool.forget()
        self.executor.release()

    @cached_property
    def _scalars(self) -> list[int]:
        """Outputs that may be losses."""
        return [v for v in self.graph.output_ids if _is_scalar(self.captured, v)]

    def weights(self, inputs: Values, planned: Planned) -> tuple[Weights, str | None]:
        """Return how much the scalar outputs of each microbatch count.

        The second value says why their sum may not be the whole batch's; None where it is.
        """
        inputs = detached(inputs)
        weights: dict[tuple[int, Samples], float] = {}
        doubt = None
        for every in planned.in_order.values():
            for value in self._scalars:
                found, why = self._splitting.weigh(value, inputs, every)
                weights.update({(value, s): weight for s, weight in found.items()})
                if self.graph.values[value].requires_grad:
                    doubt = doubt or why
        return weights, doubt

    def self_check(self, plan: Plan) -> SelfCheck | None:
        """Return what the first forward and its backward are compared by; None from then on."""
        if plan.minibatch in self._checked:
            return None
        phases = (Phase.FORWARD, Phase.BACKWARD)
        return self.executor.new_check(*(plan.schedules[phase] for phase in phases))

    def checked(self, plan: Plan) -> None:
        """Note that a forward and its backward have agreed."""
        self._checked.add(plan.minibatch)


def _is_whole(plan: Plan | None) -> bool:
    return plan is not None and len(microbatches_of(plan.spec)) == 1


def _place_of(captured: Captured, index: int, num_samples: int) -> Place:
    """Form of a value for a number of samples."""
    shape, stride, dtype = captured.value_form(index, num_samples)
    return Place(0, shape, stride, dtype)


def _is_scalar(captured: Captured, value: int) -> bool:
    shape, _, dtype = captured.value_form(value, captured.num_samples)
    return not shape and dtype.is_floating_point
