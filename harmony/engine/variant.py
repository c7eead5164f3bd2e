"""A variant: captured layers, measured costs, plans, prepared schedules of one kind of call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch

from harmony.capture import Captured, GuardError
from harmony.capture.cost.costs import costs_nbytes
from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.core.timeline import Timeline
from harmony.engine.graph_bytes import with_bytes, with_saved, with_saved_of
from harmony.engine.inflight import (
    InFlight,
    InFlightPool,
    Reached,
    backward_schedule,
    differentiable_outputs,
)
from harmony.engine.other_lengths import (
    adapted,
    ratio_between,
    same_updates,
    stretched,
)
from harmony.engine.splitting import Splitting, Verdict
from harmony.errors import PlanError
from harmony.planner.check.verify import verify
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.plan_file import check_plan
from harmony.planner.ir.schedule import Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, Samples, StepSpec, TaskKind
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.predict.simulate import simulate
from harmony.planner.search.candidates import REMEDY
from harmony.planner.search.trial import inference_schedule
from harmony.profiling.layer_times import KnownTimes, measure_layers
from harmony.profiling.steady import Steady, choose_steadily
from harmony.profiling.update_times import UpdateCost
from harmony.report.metrics import forward_seconds
from harmony.runtime import interrupts
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.executor import Executor, PreparedSchedule
from harmony.runtime.exec.stage import Values
from harmony.runtime.host.host_state import HostState
from harmony.runtime.host.pinned_memory import Place
from harmony.runtime.step.self_check import SelfCheck
from harmony.runtime.step.step import Weights

Asked = tuple[str, int | None, str]
"""What a plan is asked for beside its minibatch: mode, microbatch size, activations."""


def microbatches_of(spec: StepSpec) -> list[Samples]:
    """All microbatches, of FORWARD and BACKWARD, each once, in order."""
    replicas = range(len(spec.shares))
    every = {
        samples
        for kind in (TaskKind.FORWARD, TaskKind.BACKWARD)
        for replica in replicas
        for samples in spec.microbatches(replica, kind)
    }
    return sorted(every)


class Variant:
    """Everything that follows from one signature.

    Attributes:
        captured: the layers.
        graph: its layer graph, optimizer state included.
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
    ) -> None:
        self.captured = captured
        self.graph = graph
        self.machine = machine
        self.host = host
        # Not a method of this: what the executor holds must not hold the executor.
        self.executor = Executor(contexts, host, captured, partial(_place_of, captured))
        self.in_flight_pool = InFlightPool(self.executor)
        self.costs: CostTable | None = None
        self._contexts = contexts
        self._phase = phase
        self._steady = steady
        self._plans: dict[int, Plan] = {}
        self._asked: dict[int, Asked] = {}
        self._kin: Variant | None = None
        self._predicted: dict[int, tuple[Plan, Timeline]] = {}
        self._backwards: dict[tuple[int, Reached], Schedule] = {}
        self._inferences: dict[int, tuple[Plan, Schedule]] = {}
        self._bare, self._unmeasured = graph, machine
        self._splitting = Splitting(captured)
        self._verdict = Verdict()
        self._checked: set[int] = set()

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
        verdict = self._splitting.found(
            self._bare,
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
            self._kin, self.costs, self.machine = None, None, self._unmeasured
        self._judge(verdict)

    def forbid_parts(self, why: str) -> None:
        """Let every minibatch be one microbatch from now on."""
        self._judge(replace(self._verdict, whole_batch=why))
        self._plans.clear()
        self._backwards.clear()
        self.in_flight_pool.drop()

    def _judge(self, verdict: Verdict) -> None:
        """Let the graph say what is known of parts of batches."""
        self._verdict = verdict
        graph = self._bare if self.costs is None else with_saved_of(self._bare, self.costs)
        self.graph = self.host.graph = verdict.applied(graph)

    def measure(
        self,
        inputs: Values,
        sizes: Sequence[int],
        update: UpdateCost | None,
        known: KnownTimes,
    ) -> None:
        """Measure the layers at these microbatch sizes, as far as each fits a device.

        Args:
            known: times of layers of other variants of the model; what is measured is added.
        """
        # It runs on memory as it was found: an anomaly there means nothing.
        with torch.autograd.set_detect_anomaly(False):
            self._measure(inputs, sizes, update, known)

    def _measure(
        self,
        inputs: Values,
        sizes: Sequence[int],
        update: UpdateCost | None,
        known: KnownTimes,
    ) -> None:
        interrupts.check()
        nbytes = {size: costs_nbytes(self.captured, size) for size in sizes}
        self.graph = self.host.graph = with_saved(self.graph, nbytes)
        fitting = [size for size in sizes if self._fits_alone(size, nbytes[size])]
        if not fitting:
            # Nothing can run, so only the bytes are known; the search refuses the model with them.
            size = min(sizes)
            bare = [{size: LayerCost(0.0, 0.0, 0.0, *layer)} for layer in nbytes[size]]
            self.costs = CostTable(tuple(bare))
            return
        batches = {size: self.captured.part(inputs, 0, size) for size in fitting}
        self.costs, cpu_share = measure_layers(
            self._contexts[0],
            self.captured,
            self.graph,
            self.host.weights,
            self.host.gradients,
            batches,
            nbytes,
            update,
            known,
        )
        self.costs = with_bytes(self.costs, nbytes)
        # Of the time that a layer takes on a virtual GPU, only what it computes needs a core.
        self.machine = replace(self.machine, cpu_share=self.machine.cpu_share * cpu_share)

    def borrow(self, others: Iterable[Variant]) -> bool:
        """Take costs from a variant of another length that was measured, if there is one."""
        found: list[tuple[float, int, float, Variant]] = []
        for other in others:
            other = other._kin or other  # which may have been forgotten meanwhile
            if other.costs is not None and other.phase is self.phase:
                ratio = ratio_between(self._bare, other._bare)
                if ratio is not None and same_updates(self.machine, other.machine):
                    found.append((abs(ratio - 1.0), len(found), ratio, other))
        if not found:
            return False
        _, _, ratio, kin = min(found)
        assert kin.costs is not None
        self._kin, self.machine = kin, kin.machine
        self.costs = stretched(kin.costs, ratio)
        self._judge(kin._verdict)  # until it is tried, or needs not be
        return True

    def runs_whole(self, minibatch: int, asked: Callable[[], Asked]) -> bool:
        """Whether no batch of this size is parted, as none of the other length is.

        Then nothing needs to be known of its parts.
        """
        if self._splitting.is_tried:
            return False
        plan = self._plans.get(minibatch)
        if plan is None and self._is_whole(self._like(minibatch, asked())):
            plan = self._adapted(minibatch, asked())
            if plan is not None:
                self._plans[minibatch] = plan
        return self._is_whole(plan)

    @staticmethod
    def _is_whole(plan: Plan | None) -> bool:
        return plan is not None and len(microbatches_of(plan.spec)) == 1

    def _like(self, minibatch: int, asked: Asked) -> Plan | None:
        """The other length's plan for what is asked."""
        kin = self._kin
        same = kin is not None and kin._asked.get(minibatch) == asked
        return kin._plans.get(minibatch) if kin is not None and same else None

    def _adapted(self, minibatch: int, asked: Asked) -> Plan | None:
        """A plan like that of the other length, if one was made for what is asked now."""
        kin, plan = self._kin, None
        if kin is None:
            return None
        same = ratio_between(self.graph, kin.graph) is not None  # it may have learnt of this one
        like = self._like(minibatch, asked)
        if like is not None and self.graph.whole_batch and not self._is_whole(like):
            like = None  # batches of the other length may be parted, these may not
        if same and like is not None:
            assert self.costs is not None
            plan = adapted(self.graph, self.costs, self.machine, like, asked[2])
        return plan

    def _count_bytes(self) -> None:
        """Have the bytes of layers themselves, in place of bounds: a plan of its own is due."""
        assert self.costs is not None
        sizes = sorted(set().union(*self.costs.by_layer))
        nbytes = {size: costs_nbytes(self.captured, size) for size in sizes}
        self.graph = self.host.graph = with_saved(self.graph, nbytes)
        self.costs, self._kin = with_bytes(self.costs, nbytes), None

    def _fits_alone(self, size: int, nbytes: Sequence[tuple[int, int, int]]) -> bool:
        limit = self.machine.devices[0].memory_nbytes
        return all(
            self._alone_nbytes(layer.index, size, nbytes[layer.index]) <= limit
            for layer in self.graph.layers
        )

    def _alone_nbytes(self, index: int, size: int, nbytes: tuple[int, int, int]) -> int:
        """Bytes that one layer needs on a device to be measured alone."""
        layer, graph = self.graph.layers[index], self.graph
        values = sum(graph.values[v].nbytes(size) for v in (*layer.inputs, *layer.outputs))
        parameters = graph.weight_nbytes([index]) + graph.gradient_nbytes([index])
        return parameters + 2 * values + sum(nbytes)

    def plan(
        self,
        minibatch: int,
        mode: str,
        microbatch_size: int | None,
        activations: str,
        pinned: Plan | None,
    ) -> Plan:
        """Return the plan for a minibatch."""
        assert self.costs is not None, "measure comes before plan"
        plan = self._plans.get(minibatch)
        if plan is None and pinned is not None and pinned.minibatch == minibatch:
            plan = self._check_pinned(pinned, microbatch_size)
        asked = mode, microbatch_size, activations
        if plan is None and self._kin is not None:
            plan = self._adapted(minibatch, asked)
            if plan is None:
                self._count_bytes()
        if plan is None:
            assert self._steady is not None, "the machine is known before a plan is made"
            interrupts.check()
            graph = self.graph
            if microbatch_size is not None:  # of FORWARD too: layers may mix samples
                graph = replace(graph, sizes=(microbatch_size,))
            plan = choose_steadily(
                self._steady,
                self.captured,
                graph,
                self.costs,
                self.machine,
                minibatch,
                mode=mode,
                microbatch_size=microbatch_size or "auto",
                activations=activations,
                phase=self._phase,
            )
            self._asked[minibatch] = asked
        self._plans[minibatch] = plan
        return plan

    def learn(self, costs: CostTable, machine: Machine, plan: Plan) -> None:
        """Go on with a plan that was made from better figures; later plans are made from them."""
        self.costs, self.machine = costs, machine
        self._plans[plan.minibatch] = plan

    def predicted(self, plan: Plan) -> Timeline:
        """Return what a plan is expected to do."""
        assert self.costs is not None, "measure comes before plan"
        known = self._predicted.get(plan.minibatch)
        if known is None or known[0] is not plan:
            timeline = simulate(plan.schedule, self.graph, self.costs, self.machine)
            known = self._predicted[plan.minibatch] = (plan, timeline)
        return known[1]

    def forward_s(self, plan: Plan) -> float:
        """Predicted seconds of the forward where it has a schedule of its own; else 0."""
        assert self.costs is not None, "measure comes before plan"
        return forward_seconds(plan, self.graph, self.costs, self.machine)

    def misfit(self, inputs: Values, spec: StepSpec, asked: int | None) -> Samples | None:
        """Return the first microbatch for which the forward takes another path, if any.

        The batch as a whole comes first, unless a microbatch size was asked for: what it decides
        is what plain PyTorch does.
        """
        whole = [(0, spec.minibatch)] if asked is None else []
        for samples in dict.fromkeys([*whole, *microbatches_of(spec)]):
            try:
                self.captured.split(inputs, *samples)
            except GuardError:
                return samples
        return None

    def _check_pinned(self, plan: Plan, microbatch_size: int | None) -> Plan:
        why = self.graph.whole_batch
        if why and microbatch_size is None and len(microbatches_of(plan.spec)) > 1:
            raise PlanError(
                f"the plan parts a batch of {plan.minibatch} samples, but {why}. {REMEDY}"
            )
        check_plan(plan, self.graph, self.machine, self._phase)
        tasks = build_tasks(self.graph, plan.spec)
        verify(plan.schedule, self.graph, self.costs, plan.spec.phase, tasks)
        return plan

    def prepared(
        self, plan: Plan, phase: Phase, in_flight: InFlight | None = None
    ) -> PreparedSchedule:
        """Return the schedule of a phase of the plan, ready to run.

        Args:
            in_flight: whose values it works on; by default those of a phase that nothing follows.
        """
        if in_flight is None:
            in_flight = self.in_flight_pool.own(phase, plan.minibatch)
        return self.in_flight_pool.prepare(plan.schedules[phase], in_flight, in_flight.values)

    def prepared_inference(self, plan: Plan) -> PreparedSchedule:
        """Return a forward that nothing follows, with a plan's packs, ready to run."""
        found = self._inferences.get(plan.minibatch)
        if found is None or found[0] is not plan:
            assert self.costs is not None, "measure comes before plan"
            schedule = inference_schedule(
                self.graph, self.costs, plan.machine, plan.spec, plan.policy
            )
            found = self._inferences[plan.minibatch] = (plan, schedule)
        in_flight = self.in_flight_pool.own(Phase.INFER, plan.minibatch)
        return self.in_flight_pool.prepare(found[1], in_flight, in_flight.values)

    def prepared_backward(
        self, plan: Plan, in_flight: InFlight, reached: Reached
    ) -> PreparedSchedule:
        """Return the backward from the outputs that a gradient has come for, ready to run."""
        key = (plan.minibatch, reached)
        if reached == differentiable_outputs(self.graph):
            schedule = plan.schedules[Phase.BACKWARD]
        elif key in self._backwards:
            schedule = self._backwards[key]
        else:
            assert self.costs is not None, "measure comes before plan"
            schedule = backward_schedule(plan, self.graph, self.costs, reached)
            self._backwards[key] = schedule
        return self.in_flight_pool.prepare(schedule, in_flight, in_flight.backward_values(reached))

    def release(self) -> None:
        """Give the device memory back; the next `prepared` takes it again."""
        self.in_flight_pool.forget()
        self.executor.release()

    def weights(self, inputs: Values, spec: StepSpec) -> tuple[Weights, str | None]:
        """Return how much the scalar outputs of each microbatch count.

        The second value says why their sum may not be the whole batch's; None where it is.
        """
        weights: dict[tuple[int, Samples], float] = {}
        doubt = None
        scalars = [v for v in self.graph.output_ids if _is_scalar(self.captured, v)]
        for kind in (TaskKind.FORWARD, TaskKind.BACKWARD):
            every = [s for r in range(len(spec.shares)) for s in spec.microbatches(r, kind)]
            for value in scalars:
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


def _place_of(captured: Captured, index: int, num_samples: int) -> Place:
    """Form of a value for a number of samples."""
    shape, stride, dtype = captured.value_form(index, num_samples)
    return Place(0, shape, stride, dtype)


def _is_scalar(captured: Captured, value: int) -> bool:
    shape, _, dtype = captured.value_form(value, captured.num_samples)
    return not shape and dtype.is_floating_point
