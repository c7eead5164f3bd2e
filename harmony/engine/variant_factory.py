"""Makes variants: captures a call, and gives it its place in the arena and on the machine.

The arena of the model's parameters is one for all variants, and so are its measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from harmony.capture import (
    Captured,
    capture,
    no_cast_cache,
    or_eager,
    undisturbed,
)
from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.engine.call_key import Call, CallKind
from harmony.engine.grad_alias import check_plain
from harmony.engine.graph_bytes import with_state
from harmony.engine.offline_plan import (
    only_captured,
    profile_later,
    unmeasured_profile,
)
from harmony.engine.options import EngineOptions
from harmony.engine.planned import Measured
from harmony.engine.variant import Variant
from harmony.errors import HarmonyError
from harmony.planner.search.candidates import sizes_that_work
from harmony.profiling.measured import Measurements
from harmony.profiling.model_profile import ModelProfile
from harmony.profiling.update_times import (
    NO_UPDATE,
    UpdateCost,
    with_copies,
    with_device_updates,
)
from harmony.report import header as facts
from harmony.report import session
from harmony.report.session import ModelRecord
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.stage import Values
from harmony.runtime.exec.watchdog import Watching
from harmony.runtime.host.arena import (
    ArenaView,
    HostArena,
    Modules,
    tensors_in,
    tensors_of,
)
from harmony.runtime.host.arena_layout import ArenaLayout
from harmony.runtime.host.host_state import HostState
from harmony.runtime.host.pinned_memory import HostBuffer
from harmony.runtime.host.working_arena import WorkingArena
from harmony.runtime.update.native_step import takes_all
from harmony.runtime.update.optimizer import PackOptimizer
from harmony.runtime.update.param_hooks import any_hooked
from harmony.weights.meta_init import check_values, materialise


class VariantFactory:
    """Captures and measures; one a model.

    Attributes:
        arenas: of the weights and of the gradients; None before the first batch.
        generation: counts how often all captures were forgotten.
    """

    def __init__(
        self,
        net: nn.Module,
        contexts: Sequence[DeviceContext],
        options: EngineOptions,
        optimizer: PackOptimizer | None,
        record: ModelRecord,
    ) -> None:
        self.arenas: tuple[HostArena, HostArena] | None = None
        self.generation = 0
        self._net = net
        self._contexts = contexts
        self._options = options
        self._optimizer = optimizer
        self._record = record
        self._difference: str | None = None
        self._stages: dict[int, tuple[HostBuffer, int]] = {}
        limits = options.device_memory_nbytes, options.host_memory_nbytes
        self._measured = Measurements(net, contexts, limits, record.warn)

    def forget(self) -> None:
        """Note that all captures are forgotten: the model is another."""
        self._stages.clear()
        self.generation += 1

    def hooked(self) -> bool:
        """Whether a trained parameter has hooks, which want its gradient on the host."""
        return self._optimizer is not None and any_hooked(self._optimizer.params())

    def waits(self) -> bool:
        """Whether all gradients are wanted on the host before the first update."""
        optimizer = self._optimizer
        return optimizer is not None and (optimizer.waits is not None or self.hooked())

    def cover(self) -> None:
        """Settle the optimizer, and refuse to train a step that leaves a parameter out.

        Raises:
            ConfigError: naming the parameters that the optimizer does not have.
        """
        self.settle_optimizer()
        if self._optimizer is not None:
            self._optimizer.check_covers(dict(self._net.named_parameters()))

    def _steps_at_once(self) -> bool:
        """Whether all parameters are updated together, so that none can be left to later."""
        optimizer = self._optimizer
        return optimizer is None or optimizer.together is not None or self.hooked()

    def settle_optimizer(self) -> None:
        """Let the optimizer be that of the parameters that there are now, from now on."""
        if self._optimizer is not None:
            params = dict(self._net.named_parameters())
            self._optimizer.settle(params, lambda: self._options.groups_of(self._net))

    def take_in(self, modules: Modules) -> str | None:
        """Let the arena hold the module's tensors, whatever was done to them since the last call.

        Where parameters are others, or something has another form, the captures are of another
        model: they are to be forgotten, and what is new moves into the arena with the next one.

        Args:
            modules: of the model, as they are now.

        Returns:
            How the model is another; None if it is not.
        """
        if self.arenas is None:
            check_plain(self._net)
            return None
        weights = self.arenas[0]
        with torch._C.DisableTorchFunctionSubclass():  # it asks where they are, not what they hold
            if weights.holds(tensors_in(modules)):
                weights.refresh()
                return None
            check_plain(self._net)
            now = tensors_of(self._net)
            difference = weights.difference(now)
            if difference is None:
                weights.take_in(now)
        self._difference = difference or self._difference
        return difference

    def make(self, kind: CallKind, call: Call, known: Captured | None) -> Variant:
        """Capture a call, and make a variant of that.

        Args:
            known: a capture of another call of this kind.
        """
        if self.arenas is None:
            check_values(self._net)
        return self.bind(self.capture(kind, call, known), kind)

    def capture(self, kind: CallKind, call: Call, known: Captured | None) -> Captured:
        """Record the forward of a call."""
        options, (args, kwargs, targets) = self._options, call
        options.precision.check(self._net)
        with or_eager(self._net), self._blaming_difference():
            return capture(
                self._net,
                args,
                kwargs,
                loss=options.loss_fn if kind is CallKind.TRAIN_STEP else None,
                targets=targets,
                output_loss=kind is CallKind.TRAIN_STEP and options.loss_fn is None,
                batch_dims=options.batch_dims_of(kind),
                target=self._contexts[0].device if self._contexts else None,
                known=known,
                param_dtype=options.precision.dtype,
            )

    @contextmanager
    def _blaming_difference(self) -> Iterator[None]:
        """Say of a forward that fails since the model was changed that this may be why."""
        try:
            yield
        except Exception as error:
            if self._difference is None or isinstance(error, HarmonyError):
                raise
            raise HarmonyError(
                f"the forward fails since {self._difference}. {type(error).__name__}: {error}"
            ) from error

    def bind(self, captured: Captured, kind: CallKind) -> Variant:
        """Make a variant of a capture."""
        if kind is CallKind.TRAIN_STEP:
            self.cover()
        machine = self._measured.machine()
        update = NO_UPDATE if kind is not CallKind.TRAIN_STEP else self.update_cost()
        if kind is CallKind.TRAIN_STEP and self.waits():
            machine = replace(machine, updates_wait=True)
        elif kind is CallKind.TRAIN_STEP and self._options.updates == "auto":
            machine = with_device_updates(machine, update)
        if kind is CallKind.TRAIN_STEP and self._options.overlap_updates:
            machine = replace(machine, updates_overlap=not self._steps_at_once())
        captured.graph = self._whole_for(captured, kind)
        host = self._host_state(captured, machine)
        graph = with_state(captured.graph, host.gradients.layout, update, self._keeps_state())
        host = replace(host, graph=graph)
        phase = kind.phase
        steady = self._measured.steady()
        watch = self._options.watch
        watching = None if watch is None else Watching(watch, session.say)
        return Variant(captured, graph, machine, host, self._contexts, phase, steady, watching)

    def _keeps_state(self) -> Callable[[str], bool]:
        """Whether this process keeps the optimizer's state of a parameter."""
        owners = self._options.owners
        if owners is None:
            return lambda _: True
        owners.assign(self._net.named_parameters())
        return owners.is_mine

    def _whole_for(self, captured: Captured, kind: CallKind) -> LayerGraph:
        """Return the graph; of a whole batch, if the loss counts how often it is called."""
        graph, reads = captured.graph, captured.loss_reads
        free = kind is CallKind.TRAIN_STEP and self._options.microbatch_size is None
        if not free or reads is None or reads.steered_by is None or graph.whole_batch:
            return graph
        why = f"the loss changes {reads.steered_by}, by which it may go on, once in a batch"
        return replace(graph, whole_batch=why)

    def _host_state(self, captured: Captured, machine: Machine) -> HostState:
        """See the arena as this capture of the model does; the first one makes it."""
        graph = captured.graph
        stored = [*captured.params, *captured.buffers]
        sizes = (graph.num_layers, len(graph.shared))
        weights = ArenaLayout(stored, *sizes)
        trained = [p.as_master() for p in captured.params if p.requires_grad]
        gradients = ArenaLayout(trained, *sizes)
        if self.arenas is None:
            device = self._contexts[0].device
            arenas = (self._weight_arena(weights), HostArena(gradients, device, "the gradients"))
            arenas[0].adopt(self._net, materialise, traced_real=captured.real)
            self.arenas = arenas  # only now: values may be missing
        else:
            arenas = self.arenas
            for arena, layout in zip(arenas, (weights, gradients), strict=True):
                arena.keep(weights.places)
                arena.extend(layout)
            arenas[0].adopt(self._net, materialise, traced_real=captured.real)
        views = ArenaView(arenas[0], weights), ArenaView(arenas[1], gradients)
        params = dict(self._net.named_parameters())
        host = HostState(graph, *views, params, self._optimizer, self.generation)
        host.stages = self._stages
        update = self._measured.known_update or NO_UPDATE
        owners = self._options.owners
        shares = 1 if owners is None else owners.size
        self._record.facts.update(
            facts.of_memory(host, machine, update, self._keeps_state(), shares)
        )
        return host

    def _weight_arena(self, layout: ArenaLayout) -> HostArena:
        device, what = self._contexts[0].device, "the weights"
        if self._options.precision.dtype is None:
            return HostArena(layout, device, what)
        return WorkingArena(layout, device, what, always=self._options.updates == "host")

    def measure(
        self,
        variant: Variant,
        kind: CallKind,
        minibatch: int,
        inputs: Values,
        sizes: Sequence[int] | None,
    ) -> Measured:
        """Measure a variant, which has the devices.

        Args:
            inputs: by value.
            sizes: of the microbatches to measure; None: chosen here.
        """
        sizes = sizes or self.sizes_to_measure(minibatch, variant.graph)
        update = self.update_cost() if kind is CallKind.TRAIN_STEP else None
        known = self._measured.times()
        with undisturbed(self._contexts[0].device), no_cast_cache():
            measured = variant.measure(inputs, sizes, update, known)
        self._measured.keep()
        return measured

    def sizes_to_measure(self, minibatch: int, graph: LayerGraph) -> list[int]:
        """Microbatch sizes to measure: the one that was asked for, or a few to interpolate."""
        if self._options.microbatch_size is not None:
            return [min(self._options.microbatch_size, minibatch)]
        if graph.whole_batch or graph.sizes:
            return list(sizes_that_work(graph, minibatch))
        return sorted({1, max(1, minibatch // 4), minibatch})

    def update_cost(self) -> UpdateCost:
        """What the optimizer costs; measured once."""
        assert self._optimizer is not None
        known = self._measured.update(self._optimizer)
        if self._options.owners is not None:  # on average, as the largest go round
            known = replace(known, seconds=known.seconds / self._options.owners.size)
        dtype = self._options.precision.dtype
        if dtype is torch.bfloat16 and takes_all(self._optimizer.full):
            return known  # the kernel writes the copies in the same pass
        return with_copies(known, dtype)

    def profile_of(self, variant: Variant, minibatch: int) -> Callable[[], ModelProfile]:
        """Return what makes the profile of a variant, when somebody wants it."""
        name, sizes = type(self._net).__name__, self.sizes_to_measure(minibatch, variant.graph)
        return profile_later(name, variant, sizes, minibatch, clips=self.waits())

    def unmeasured(
        self, name: str, kind: CallKind, call: Call, minibatch: int, known: Captured | None
    ) -> ModelProfile:
        """Return the layers that a call runs, with their work, which is counted and not run.

        Args:
            name: of the model, for people.
            known: a capture of another call of this kind.

        Raises:
            CaptureError: if the layers cannot be known without running them.
        """
        with only_captured():
            captured = self.capture(kind, call, known)
        update = self.update_cost() if kind is CallKind.TRAIN_STEP else NO_UPDATE
        sizes = self.sizes_to_measure(minibatch, captured.graph)
        return unmeasured_profile(
            name, captured, sizes, minibatch, update, kind.phase, clips=self.waits()
        )
