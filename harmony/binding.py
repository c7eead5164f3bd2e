"""One signature of the inputs: captured layers, measured costs, plans, prepared schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from harmony.capture import Captured
from harmony.errors import ConfigError, PlanError
from harmony.layergraph import LayerGraph
from harmony.machine import Machine
from harmony.planner.build import build_tasks
from harmony.planner.cost import CostTable, LayerCost
from harmony.planner.plan import Plan
from harmony.planner.search import choose
from harmony.planner.simulate import simulate
from harmony.planner.tasks import Phase, Samples, StepSpec, TaskKind, TensorKind
from harmony.planner.verify import verify
from harmony.profiler import UpdateCost, measure_layers
from harmony.runtime.device import DeviceContext
from harmony.runtime.executor import Executor, PreparedSchedule
from harmony.runtime.hostmem import ArenaLayout, Place
from harmony.runtime.hoststate import HostState
from harmony.runtime.stage import Values
from harmony.runtime.step import HostValues
from harmony.timeline import Timeline

Signature = tuple[Any, ...]
"""All of a call that changes what is computed, but for the number of samples."""


def signature_of(net: nn.Module, call: Any, form: str) -> tuple[Signature, int]:
    """Return what identifies a call, and its number of samples.

    Args:
        call: positional and keyword arguments and targets, as one structure.

    Raises:
        ConfigError: if there is no tensor whose first dimension could count samples.
    """
    leaves, spec = tree_flatten(call)
    sized = [x for x in leaves if isinstance(x, torch.Tensor) and x.dim() > 0]
    if not sized:
        raise ConfigError("no input is a tensor whose dimension 0 could count samples")
    num_samples = sized[0].size(0)
    if num_samples == 0:
        raise ConfigError("the batch is empty: dimension 0 of the inputs is 0")
    described = tuple(_describe(leaf, num_samples) for leaf in leaves)
    modes = tuple(module.training for module in net.modules())
    trained = tuple(param.requires_grad for param in net.parameters())
    return (form, str(spec), described, modes, trained), num_samples


def _describe(leaf: Any, num_samples: int) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    shape = tuple(leaf.shape)
    if shape and shape[0] == num_samples:
        shape = (-1, *shape[1:])
    return shape, leaf.dtype


class Binding:
    """Everything that follows from one signature.

    Attributes:
        captured: the layers.
        graph: its layer graph, optimizer state included.
        executor: runs its schedules; owns device memory only while the binding is the active one.
    """

    def __init__(
        self,
        captured: Captured,
        graph: LayerGraph,
        machine: Machine,
        host: HostState,
        contexts: Sequence[DeviceContext],
        form: Phase,
    ) -> None:
        self.captured = captured
        self.graph = graph
        self.machine = machine
        self.host = host
        self.executor = Executor(contexts, host, captured, self.place_of)
        self.costs: CostTable | None = None
        self._contexts = contexts
        self._form = form
        self._plans: dict[int, Plan] = {}
        self._prepared: dict[tuple[Phase, int], PreparedSchedule] = {}
        self._values: dict[tuple[bool, int], HostValues] = {}

    def place_of(self, index: int, num_samples: int) -> Place:
        """Form of a value for a number of samples."""
        shape, stride, dtype = self.captured.value_form(index, num_samples)
        return Place(0, shape, stride, dtype)

    def measure(
        self, inputs: Values, sizes: Sequence[int], update: UpdateCost | None
    ) -> None:
        """Measure the layers at these microbatch sizes, as far as each fits a device."""
        nbytes = {size: self.captured.costs_nbytes(size) for size in sizes}
        fitting = [size for size in sizes if self._fits_alone(size, nbytes[size])]
        if not fitting:
            # Nothing can run, so only the bytes are known; the search refuses the model with them.
            size = min(sizes)
            bare = [{size: LayerCost(0.0, 0.0, 0.0, *layer)} for layer in nbytes[size]]
            self.costs = CostTable(tuple(bare))
            return
        batches = {size: self.captured.split(inputs, 0, size) for size in fitting}
        self.costs, cpu_share = measure_layers(
            self._contexts[0],
            self.captured,
            self.graph,
            self.host.weights,
            self.host.gradients,
            batches,
            nbytes,
            update,
        )
        # Of the time that a layer takes on a virtual GPU, only what it computes needs a core.
        self.machine = replace(self.machine, cpu_share=self.machine.cpu_share * cpu_share)

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
        self, minibatch: int, mode: str, microbatch_size: int | None, pinned: Plan | None
    ) -> tuple[Plan, Timeline]:
        """Return the plan for a minibatch, and what it predicts."""
        assert self.costs is not None, "measure comes before plan"
        plan = self._plans.get(minibatch)
        if plan is None and pinned is not None and pinned.minibatch == minibatch:
            plan = self._check_pinned(pinned)
        if plan is None:
            plan = choose(
                self.graph,
                self.costs,
                self.machine,
                minibatch,
                mode=mode,
                microbatch_size=microbatch_size or "auto",
                phase=self._form,
            )
        self._plans[minibatch] = plan
        return plan, simulate(plan.schedule, self.graph, self.costs, self.machine)

    def _check_pinned(self, plan: Plan) -> Plan:
        if plan.spec.backward_packs[-1].last != self.graph.num_layers:
            raise PlanError(
                f"the plan is for a model of {plan.spec.backward_packs[-1].last} layers, this one "
                f"has {self.graph.num_layers}: plan again, or leave plan= out"
            )
        if plan.schedule.num_devices > len(self._contexts):
            raise PlanError(
                f"the plan needs {plan.schedule.num_devices} devices, there are "
                f"{len(self._contexts)}: plan again, or leave plan= out"
            )
        tasks = build_tasks(self.graph, plan.spec)
        verify(plan.schedule, self.graph, self.costs, plan.spec.phase, tasks)
        return plan

    def prepared(self, plan: Plan, phase: Phase) -> PreparedSchedule:
        """Return the schedule of a phase of the plan, ready to run."""
        key = (phase, plan.minibatch)
        schedule = plan.schedules[phase]
        if key not in self._prepared or not self.executor.fits_slots(schedule):
            if not self.executor.fits_slots(schedule):
                self._prepared.clear()
            # INFER has host copies of its own: it may come between a forward and its backward.
            values = self._values.setdefault((phase is Phase.INFER, plan.minibatch), {})
            self._prepared[key] = self.executor.prepare(schedule, values)
        return self._prepared[key]

    def release(self) -> None:
        """Give the device memory back; the next `prepared` takes it again."""
        self._prepared.clear()
        self.executor.release()

    def load_inputs(self, prepared: PreparedSchedule, inputs: Values, spec: StepSpec) -> None:
        """Copy a whole minibatch into the pinned copies that the devices read.

        Raises:
            CaptureError: if the forward would take another path for one of the microbatches.
        """
        for kind in (TaskKind.FORWARD, TaskKind.BACKWARD):
            for replica in range(len(spec.shares)):
                for low, high in spec.microbatches(replica, kind):
                    self.captured.split(inputs, low, high)
        for index, stash in prepared.inputs.items():
            stash.fill(inputs[index], self.graph.values[index].batch_dim)

    def joined_outputs(self, prepared: PreparedSchedule) -> Values:
        """Return the outputs of the whole minibatch, on the host, as new tensors.

        Raises:
            ConfigError: if an output cannot be put together from the microbatches' ones.
        """
        found: Values = {}
        for index, stash in prepared.outputs.items():
            chunks = stash.chunks()
            value = self.graph.values[index]
            if value.batch_dim is not None:
                found[index] = torch.cat([chunk for _, chunk in chunks], value.batch_dim)
            elif _is_mean(chunks[0][1]):
                found[index] = weighted_mean(chunks, prepared.schedule.minibatch)
            elif value.requires_grad and len(chunks) > 1:
                raise ConfigError(
                    f"output {value.name} of shape {tuple(chunks[0][1].shape)} has no dimension "
                    f"that counts samples, so those of {len(chunks)} microbatches cannot be "
                    "joined. Return it per sample, or use one microbatch (microbatch_size="
                    f"{prepared.schedule.minibatch})"
                )
            else:  # a mask or a table: the same for every microbatch
                found[index] = chunks[0][1].clone()
        return found

    def load_gradients(
        self, prepared: PreparedSchedule, gradients: Mapping[int, torch.Tensor | None]
    ) -> None:
        """Hand the gradients of the outputs to the microbatches' backward."""
        for index, gradient in gradients.items():
            stash = prepared.values.get((TensorKind.VALUE_GRADIENT, index))
            if stash is None or gradient is None:
                continue
            dim = self.graph.values[index].batch_dim
            if dim is not None or not _is_mean(gradient):
                stash.fill(gradient, dim)
                continue
            for (low, high), chunk in stash.chunks():
                chunk.copy_(gradient * ((high - low) / prepared.schedule.minibatch))


def _is_mean(output: torch.Tensor) -> bool:
    """Whether an output that does not depend on the batch size is a loss: a mean over samples."""
    return output.dim() == 0 and output.is_floating_point()


def weighted_mean(
    chunks: Sequence[tuple[Samples, torch.Tensor]], minibatch: int
) -> torch.Tensor:
    """Mean of a value over microbatches, weighted by their size, added in their order."""
    total = torch.zeros_like(chunks[0][1])
    for (low, high), chunk in chunks:
        total = total + chunk * ((high - low) / minibatch)
    return total


def with_state(graph: LayerGraph, layout: ArenaLayout, bytes_per_element: float) -> LayerGraph:
    """Return the graph with the bytes of optimizer state of each layer filled in."""

    def state_nbytes(names: Mapping[str, Place]) -> int:
        elements = sum(torch.Size(place.shape).numel() for place in names.values())
        return round(elements * bytes_per_element)

    layers = tuple(
        replace(layer, state_nbytes=state_nbytes(layout.layers[layer.index].places))
        for layer in graph.layers
    )
    shared = tuple(
        replace(param, state_nbytes=state_nbytes(layout.shared[param.id].places))
        for param in graph.shared
    )
    return replace(graph, layers=layers, shared=shared)
