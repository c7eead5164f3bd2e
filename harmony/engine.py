"""What stands behind the wrapper: captures the module, plans, and runs the steps.

A *binding* is what one signature of the inputs leads to: captured layers, measured costs, plans,
an executor. The parameters' arena is one for all bindings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from harmony import facts, session
from harmony.binding import Binding, Signature, signature_of, weighted_mean, with_state
from harmony.capture import Captured, capture
from harmony.dropin import ForwardCall, attach
from harmony.errors import CaptureError, ConfigError, ExecutionError, HarmonyError
from harmony.machine import Machine
from harmony.planner.plan import Plan
from harmony.planner.tasks import Phase, TaskKind
from harmony.profiler import UpdateCost, measure_machine, measure_update
from harmony.runtime.device import DeviceContext
from harmony.runtime.executor import Job
from harmony.runtime.hostmem import ArenaLayout, HostArena
from harmony.runtime.hoststate import HostState
from harmony.runtime.optimizer import OptimizerFactory, PackOptimizer
from harmony.runtime.randomness import RandomStates, microbatch_seed
from harmony.runtime.stage import Values
from harmony.session import StepStats
from harmony.timeline import Timeline


@dataclass(frozen=True)
class EngineOptions:
    """The wrapper's arguments, checked and parsed."""

    optimizer: OptimizerFactory | None = None
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
    mode: str = "auto"
    microbatch_size: int | None = None
    device_memory_nbytes: int | None = None
    host_memory_nbytes: int | None = None
    plan: Plan | None = None
    seed: int = 0


@dataclass(frozen=True)
class StepResult:
    """What a training step gives back."""

    loss: torch.Tensor
    num_samples: int
    num_tokens: int | None
    timeline: Timeline


class Engine:
    """Captures, plans and runs; one a model.

    Attributes:
        num_steps: training steps done, which random numbers depend on.
        record: what the report is made of.
        optimizer: the full optimizer of the step form, once training has begun or asked for.
    """

    def __init__(
        self, net: nn.Module, devices: Sequence[torch.device], options: EngineOptions
    ) -> None:
        self.options = options
        self.num_steps = 0
        self.last_timeline: Timeline | None = None
        self._net = net
        self._contexts = [DeviceContext(device) for device in devices]
        self._host: HostState | None = None
        self._bindings: dict[Signature, Binding] = {}
        self._active: Binding | None = None
        self._machine: Machine | None = None
        self._torn: str | None = None
        self._generation = 0
        self._optimizer: PackOptimizer | None = None
        self._update: UpdateCost | None = None
        if options.optimizer is not None:
            params = dict(net.named_parameters())
            self._optimizer = PackOptimizer(params, options.optimizer, options.optimizer_kwargs)
        self.record = session.register(
            type(net).__name__, facts.of_model(net, self._contexts, self._optimizer)
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The full optimizer, for LR schedulers and checkpoints."""
        return None if self._optimizer is None else self._optimizer.full

    # Steps

    def train_step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any
    ) -> StepResult:
        """Run one training step."""
        self._check_whole()
        binding, minibatch, inputs = self._bind("step", args, kwargs, targets)
        plan = self._plan(binding, minibatch)
        prepared = binding.prepared(plan, Phase.TRAIN)
        binding.load_inputs(prepared, inputs, plan.spec)
        job = Job(self._random(binding, plan), minibatch)
        try:
            timeline = binding.executor.run(prepared, job)
        except ExecutionError as error:
            self._torn = str(error) if error.torn else None
            raise
        self.num_steps += 1
        self.last_timeline = timeline
        loss = binding.graph.loss
        assert loss is not None
        total = weighted_mean(prepared.outputs[loss].chunks(), minibatch)
        return StepResult(total, minibatch, _count_tokens((args, kwargs)), timeline)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module forward, ready for a backward."""
        self._check_whole()
        binding, minibatch, inputs = self._bind("dropin", args, kwargs, None)
        plan = self._plan(binding, minibatch)
        prepared = binding.prepared(plan, Phase.FORWARD)
        binding.load_inputs(prepared, inputs, plan.spec)
        random = self._random(binding, plan)
        self._generation += 1
        self.num_steps += 1
        self.last_timeline = binding.executor.run(prepared, Job(random, minibatch))
        values = binding.joined_outputs(prepared)
        call = ForwardCall(self.backward, binding, plan, random, tuple(values), self._generation)
        joined = attach(values, call)
        return binding.captured.unflatten_output(_to_device_of((args, kwargs), joined))

    def backward(self, call: ForwardCall, gradients: Sequence[torch.Tensor | None]) -> None:
        """Run the backward of a forward, from the gradients of its outputs."""
        if call.generation != self._generation:
            raise HarmonyError(
                "backward() of an earlier forward: the model has been called again since, which "
                "replaced what that backward needs. Call backward() after each forward"
            )
        binding, host = call.binding, call.binding.host
        prepared = binding.prepared(call.plan, Phase.BACKWARD)
        binding.load_gradients(prepared, dict(zip(call.outputs, gradients, strict=True)))
        earlier = {n: p.grad.clone() for n, p in host.params.items() if p.grad is not None}
        timeline = binding.executor.run(prepared, Job(call.random, call.plan.minibatch))
        self.last_timeline = timeline
        host.publish_all()
        for name, gradient in earlier.items():
            host.add_to_gradient(name, gradient)
        self._note_dropin(call.plan.minibatch, timeline)

    def infer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module forward without gradients."""
        self._check_whole()
        binding, minibatch, inputs = self._bind("dropin", args, kwargs, None)
        plan = self._plan(binding, minibatch)
        prepared = binding.prepared(plan, Phase.INFER)
        binding.load_inputs(prepared, inputs, plan.spec)
        binding.executor.run(prepared, Job(self._random(binding, plan), minibatch))
        values = binding.joined_outputs(prepared)
        return binding.captured.unflatten_output(_to_device_of((args, kwargs), values))

    # State

    def restored(self) -> None:
        """All parameters are of one step again: a state was loaded."""
        self._torn = None

    def check_not_started(self, what: str) -> None:
        """Refuse what is impossible once the parameters lie in the arena.

        Raises:
            ConfigError: if training has begun.
        """
        if self._host is not None:
            raise ConfigError(f"{what} is possible until the first batch, not after it")

    def _check_whole(self) -> None:
        if self._torn is not None:
            raise HarmonyError(
                "an earlier step failed after some parameters had been updated; load a checkpoint "
                f"with load_state_dict() before training goes on. The failure: {self._torn}"
            )

    # Setting up

    def _bind(
        self, form: str, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any
    ) -> tuple[Binding, int, Values]:
        """Return the binding of a call, its number of samples, and its tensors by value."""
        key, minibatch = signature_of(self._net, (args, kwargs, targets), form)
        binding = self._bindings.get(key)
        if binding is None:
            binding = self._bindings[key] = self._make_binding(form, args, kwargs, targets)
        inputs = binding.captured.flatten_inputs(args, kwargs, targets)
        if binding is not self._active:
            if self._active is not None:
                self._active.release()
            self._active = binding
        if binding.costs is None:
            sizes = self._sizes_to_measure(minibatch)
            binding.measure(inputs, sizes, self._update_cost() if form == "step" else None)
        return binding, minibatch, inputs

    def _make_binding(
        self, form: str, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any
    ) -> Binding:
        options = self.options
        captured = capture(
            self._net,
            args,
            kwargs,
            loss=options.loss_fn if form == "step" else None,
            targets=targets,
            output_loss=form == "step" and options.loss_fn is None,
        )
        if self._machine is None:
            self._machine = measure_machine(
                self._contexts, options.device_memory_nbytes, options.host_memory_nbytes
            )
        state = 0.0 if form != "step" else self._update_cost().state_nbytes
        host = self._host_state(captured, self._machine)
        graph = with_state(captured.graph, host.gradients.layout, state)
        host = replace(host, graph=graph)
        phase = Phase.TRAIN if form == "step" else Phase.BACKWARD
        return Binding(captured, graph, self._machine, host, self._contexts, phase)

    def _host_state(self, captured: Captured, machine: Machine) -> HostState:
        """Move the parameters into the arena, or check that this capture lays them out alike."""
        graph = captured.graph
        stored = [*captured.params, *captured.buffers]
        sizes = (graph.num_layers, len(graph.shared))
        weights = ArenaLayout(stored, *sizes)
        gradients = ArenaLayout([p for p in captured.params if p.requires_grad], *sizes)
        if self._host is None:
            device = self._contexts[0].device
            self._host = HostState(
                graph,
                HostArena(weights, device, "the weights"),
                HostArena(gradients, device, "the gradients"),
                {},
                self._optimizer,
            )
            self._host.params = self._host.weights.adopt(self._net)
            state = 0.0 if self._update is None else self._update.state_nbytes
            self.record.facts.update(facts.of_memory(self._host, machine, state))
        elif weights.places != self._host.weights.layout.places:
            raise CaptureError(
                "the model uses its layers in another order than in the first call, so its "
                "parameters would have to move. Make two Harmony models of it, one for each use"
            )
        elif gradients.places != self._host.gradients.layout.places:
            raise CaptureError(
                "other parameters are frozen than in the first call. Freeze or unfreeze before "
                "the first batch, or make a new Harmony model"
            )
        return self._host

    def _plan(self, binding: Binding, minibatch: int) -> Plan:
        options = self.options
        plan, predicted = binding.plan(
            minibatch, options.mode, options.microbatch_size, options.plan
        )
        self.record.planned(plan, predicted)
        return plan

    def _random(self, binding: Binding, plan: Plan) -> RandomStates:
        """Start every microbatch's random stream, if the model draws random numbers at all."""
        if not any(layer.uses_rng for layer in binding.graph.layers):
            return RandomStates(frozenset())
        spec = plan.spec
        packs = (*spec.forward_packs, *spec.backward_packs)
        states = RandomStates(frozenset(pack.first for pack in packs))
        kind = TaskKind.FORWARD if spec.forward_packs else TaskKind.BACKWARD
        every = [
            s for replica in range(len(spec.shares)) for s in spec.microbatches(replica, kind)
        ]
        for index, samples in enumerate(every):
            seed = microbatch_seed(self.num_steps, index, self.options.seed)
            states.start(samples, 0, self._contexts[0].seeded_state(seed))
        return states

    def _sizes_to_measure(self, minibatch: int) -> list[int]:
        """Microbatch sizes to measure: the one that was asked for, or a few to interpolate."""
        if self.options.microbatch_size is not None:
            return [min(self.options.microbatch_size, minibatch)]
        return sorted({1, max(1, minibatch // 4), minibatch})

    def _update_cost(self) -> UpdateCost:
        options = self.options
        assert options.optimizer is not None
        if self._update is None:
            self._update = measure_update(options.optimizer, options.optimizer_kwargs)
        return self._update

    def _note_dropin(self, minibatch: int, timeline: Timeline) -> None:
        stats = StepStats(self.num_steps - 1, None, minibatch, None, timeline.step_s, timeline)
        self.record.stepped(stats)


def _count_tokens(call: Any) -> int | None:
    """Tokens of a batch, if its first tensor is one of token ids."""
    first = next((x for x in tree_flatten(call)[0] if isinstance(x, torch.Tensor)), None)
    if first is None or first.dim() != 2 or first.dtype not in (torch.int64, torch.int32):
        return None
    return first.numel()


def _to_device_of(call: Any, values: Values) -> Values:
    """Put outputs on the device of the inputs, as plain PyTorch would."""
    first = next((x for x in tree_flatten(call)[0] if isinstance(x, torch.Tensor)), None)
    if first is None or first.device.type == "cpu":
        return values
    return {index: tensor.to(first.device) for index, tensor in values.items()}
