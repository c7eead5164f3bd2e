"""The variant cache: one variant for each key of a call and each path of the forward.

They share one arena of parameters, and take turns in having the memory of the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import nn

from harmony.capture import (
    Batch,
    Captured,
    DynamicOnlyError,
    GuardError,
    capture,
    check_hooks,
    or_eager,
    undisturbed,
)
from harmony.capture.guards.torch_settings import mode_of_users
from harmony.capture.loss.weights import parts_asked_for
from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.core.options import current_options
from harmony.engine.call_key import Call, call_key_of
from harmony.engine.call_kind import CallKind
from harmony.engine.grad_alias import check_plain
from harmony.engine.graph_bytes import with_state
from harmony.engine.offline_plan import (
    only_captured,
    plan_elsewhere,
    profile_later,
    unmeasured_profile,
)
from harmony.engine.options import EngineOptions
from harmony.engine.paths import MAX_CHANGES, MAX_PATHS, Paths, PathsKey, use_last
from harmony.engine.planned import Asked, Measured, Planned
from harmony.engine.resumed import BitChoices
from harmony.engine.step_result import ReadyStep
from harmony.engine.variant import Variant
from harmony.errors import ConfigError, HarmonyError, PlanError
from harmony.planner.ir.plan_file import check_minibatch
from harmony.planner.ir.tasks import StepSpec
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
from harmony.runtime.host.arena import ArenaView, HostArena, tensors_of
from harmony.runtime.host.arena_layout import ArenaLayout
from harmony.runtime.host.host_state import HostState
from harmony.runtime.host.pinned_memory import HostBuffer
from harmony.runtime.host.working_arena import WorkingArena
from harmony.runtime.update.native_step import takes_all
from harmony.runtime.update.optimizer import PackOptimizer
from harmony.runtime.update.param_hooks import is_hooked
from harmony.weights.meta_init import check_values, materialise

OTHER_WAY = "the forward goes another way for other values"


class VariantCache:
    """Captures, measures and plans; one a model.

    Attributes:
        active: the variant that has the devices' memory.
        before_others: called before other layers than those of the last step are looked at.
        kept: how batches were parted before a checkpoint that was loaded.
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
        self.active: Variant | None = None
        self.before_others: Callable[[], object] = lambda: None
        self.arenas: tuple[HostArena, HostArena] | None = None
        self.generation = 0
        self.kept: BitChoices | None = None
        self._difference: str | None = None
        self._net = net
        self._contexts = contexts
        self._options = options
        self._optimizer = optimizer
        self._record = record
        self._paths: dict[PathsKey, Paths] = {}
        self._stages: dict[int, tuple[HostBuffer, int]] = {}
        limits = options.device_memory_nbytes, options.host_memory_nbytes
        self._measured = Measurements(net, contexts, limits, record.warn)
        self._pinned_seen = False
        self._noted: Planned | None = None

    def __iter__(self) -> Iterator[Variant]:
        for paths in self._paths.values():
            yield from paths.variants

    def paths(self, kind: CallKind, call: Call) -> tuple[Paths, Batch]:
        """Return what the signature of a call has led to, and its inputs."""
        self._take_in()
        key, batch, whole = self.key(kind, call)
        found = use_last(self._paths, key)
        if whole is not None and found.dynamic is None:
            found.dynamic = self._as_it_is(whole, batch.num_samples)
        return found, batch

    def _as_it_is(self, why: str, minibatch: int) -> DynamicOnlyError:
        """Say that a batch is run in one piece, by the module's own Python."""
        size = self._options.microbatch_size
        if size is not None and size < minibatch:
            raise ConfigError(
                f"microbatch_size={size} parts the batch, but {why}, which cannot be parted: "
                "leave microbatch_size out"
            )
        return DynamicOnlyError(why, type(self._net).__name__, eager=True)

    def key(self, kind: CallKind, call: Call) -> tuple[PathsKey, Batch, str | None]:
        """What paths are kept by, the inputs, and why a call runs whole, as it is.

        A plan may be one for updates that wait, or not.
        """
        batch_dims = self._options.batch_dims_of(kind)
        key, batch, whole = call_key_of(self._net, call, kind, batch_dims)
        return (key, kind is CallKind.TRAIN_STEP and self.waits()), batch, whole

    def hooked(self) -> bool:
        """Whether a trained parameter has hooks, which want its gradient on the host."""
        return self._optimizer is not None and any(map(is_hooked, self._optimizer.params()))

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

    def _take_in(self) -> None:
        """Let the arena hold the module's tensors, whatever was done to them since the last call.

        Where parameters are others, or something has another form, the captures are of another
        model: they are forgotten, and what is new moves into the arena with the next one.
        """
        check_plain(self._net)
        if self.arenas is None:
            return
        weights, now = self.arenas[0], tensors_of(self._net)
        with torch._C.DisableTorchFunctionSubclass():  # it asks where they are, not what they hold
            difference = weights.difference(now)
            if difference is None:
                weights.take_in(now)
        if difference is not None:
            self.forget()
            self._difference = difference

    def check_current(self, generation: int) -> None:
        """Refuse to go on with what was captured of a model that is another now.

        Raises:
            HarmonyError: if all captures were forgotten since then.
        """
        if generation != self.generation:
            raise HarmonyError(
                "backward() after parameters or buffers of the model were replaced, added, "
                "deleted, or given another shape or dtype, and the model was called again: its "
                "forward belongs to another model. Call backward() before that"
            )

    def forget(self) -> None:
        """Forget all captures: the model is another."""
        self.before_others()
        self.activate(None)
        self._noted = None
        self._paths.clear()
        self._stages.clear()
        self.generation += 1

    def ready(self, kind: CallKind, call: Call) -> ReadyStep:
        """Return what runs for a call: captured, measured and planned where that is not done yet.

        Raises:
            DynamicOnlyError: if no trace stands for the call: it has to be run dynamically.
        """
        paths, batch = self.paths(kind, call)
        minibatch = batch.num_samples
        _check_modes(self._net)
        if current_options().gpu is not None:
            profile = self.unmeasured(type(self._net).__name__, kind, call)
            plan_elsewhere(
                profile, self._record, self._options.mode, self._options.microbatch_size
            )
        self._check_pinned(kind, minibatch)
        for _ in range(MAX_PATHS):
            if paths.dynamic is not None:
                raise paths.dynamic.again()
            misfit: tuple[int, int] | None = None
            standing = paths.standing(type(self._net).__name__)
            for variant in standing:
                if variant.captured.only_size not in (None, minibatch):
                    continue
                inputs = variant.captured.inputs_of(batch)
                self.activate(variant)
                try:
                    planned, misfit = self._fitting(variant, kind, minibatch, inputs)
                except GuardError as error:
                    paths.dynamic = DynamicOnlyError(OTHER_WAY, error.where)
                    raise paths.dynamic.again() from error
                if misfit is None and not paths.adds_up(variant, planned, self._options):
                    break
                if misfit is None:
                    paths.use(variant)
                    return self._with_plan(variant, planned, inputs) or self.ready(kind, call)
            self._add_path(paths, standing, kind, call, misfit)
        raise DynamicOnlyError("the microbatches of a minibatch take different paths", "?")

    def _with_plan(self, variant: Variant, planned: Planned, inputs: Values) -> ReadyStep | None:
        """Say how a batch is run by its variant's plan; None if it may not be parted like that."""
        minibatch = planned.plan.minibatch
        planned = variant.settled(minibatch) or self.plan(variant, minibatch, planned.measured)
        self._note(variant, planned)
        weights, doubt = variant.weights(inputs, planned)
        asked = self._options.microbatch_size
        if doubt is not None and asked is None:
            variant.forbid_parts(f"the loss of a batch is not that of its parts: {doubt}")
            return None
        if doubt is not None:
            said = parts_asked_for(doubt, minibatch, planned.plan.spec.backward_size)
            self._record.warn(said)
        low, high = planned.microbatches[-1]
        set_up = variant.captured.traces.set_up(minibatch if asked is None else high - low)
        return ReadyStep(variant, planned, inputs, weights, set_up=set_up)

    def _planned(
        self, variant: Variant, kind: CallKind, minibatch: int, inputs: Values
    ) -> Planned:
        """Return the plan, measured before where that is not done yet."""
        known = variant.settled(minibatch)
        if known is not None:
            return known
        measured = self.measured(variant, kind, minibatch, inputs)
        return self.plan(variant, minibatch, measured)

    def _note(self, variant: Variant, planned: Planned) -> None:
        """Let the report know of the plan, where it is not that of the step before."""
        record = self._record
        if self._noted is planned and record.plan is planned.plan:
            return
        record.profile = self._profile_of(variant, planned.plan.minibatch)
        if current_options().plan_only:
            record.forward_s = planned.forward_s
        measured = planned.measured
        record.planned(planned.plan, planned.predicted, (measured.graph, measured.costs))
        self._noted = planned

    def _fitting(
        self, variant: Variant, kind: CallKind, minibatch: int, inputs: Values
    ) -> tuple[Planned, tuple[int, int] | None]:
        """Return a plan, and a microbatch that takes another path than the variant's, if any.

        Where only parts of the batch do, the batch is not parted.
        """
        planned = self._planned(variant, kind, minibatch, inputs)
        options = self._options
        misfit = variant.misfit(inputs, planned, options.microbatch_size)
        whole = (0, minibatch)
        if misfit in (None, whole) or options.microbatch_size is not None:
            return planned, misfit
        if options.mode == "dp" or options.plan is not None:
            return planned, misfit
        variant.forbid_parts("parts of a batch take another way through the forward than it does")
        return self.plan(variant, minibatch, planned.measured), None

    def recorded(self, kind: CallKind, call: Call) -> Captured | None:
        """Return a recording of calls like this one, though it may not stand for it."""
        paths, _ = self.paths(kind, call)
        return next((variant.captured for variant in paths.variants), paths.recorded)

    def _add_path(
        self,
        paths: Paths,
        standing: Sequence[Variant],
        kind: CallKind,
        call: Call,
        misfit: tuple[int, int] | None,
    ) -> None:
        """Capture the path that a microbatch takes, the whole batch at first."""
        self.before_others()
        part = call
        if misfit is not None:
            part = standing[0].captured.part_of_call(call, *misfit)
            if any(other.captured.stands_for(part) for other in standing):
                raise DynamicOnlyError(
                    "the microbatches of a minibatch take different paths",
                    standing[0].captured.first_guard(),
                )
        try:
            check_hooks(self._net)
            variant = self._make(kind, part)
            if variant.captured.eager is not None:
                paths.recorded = variant.captured
                where = type(self._net).__name__
                raise DynamicOnlyError(variant.captured.eager, where, eager=True)
            paths.add(variant)
        except DynamicOnlyError as error:
            if error.passing:
                raise
            paths.dynamic = error.again()

    def measured(
        self,
        variant: Variant,
        kind: CallKind,
        minibatch: int,
        inputs: Values,
        sizes: Sequence[int] | None = None,
    ) -> Measured:
        """Measure a variant, which has the devices, if that was not done before.

        Args:
            inputs: by value.
            sizes: of the microbatches to measure; chosen here by default.
        """
        if variant.measured is None:
            variant.borrow(self)
        if variant.wants_trial(minibatch, self._asked):
            asked, name = self._options.microbatch_size, self._options.loss_name(kind)
            with undisturbed(self._contexts[0].device):
                variant.try_splitting(inputs, minibatch, asked, name)
        measured = variant.measured
        if measured is None:
            sizes = sizes or self._sizes_to_measure(minibatch, variant.graph)
            update = self.update_cost() if kind is CallKind.TRAIN_STEP else None
            known = self._measured.times()
            with undisturbed(self._contexts[0].device):
                measured = variant.measure(inputs, sizes, update, known)
            self._measured.keep()
        return measured

    def capture_mode(self) -> str:
        """How the model is captured, at worst (see `harmony.Harmony.capture_mode`)."""
        known = self._paths.values()
        if any(p.dynamic is not None and p.dynamic.eager for p in known):
            return "eager"
        if any(p.dynamic is not None or p.changes > MAX_CHANGES for p in known):
            return "dynamic"
        real = any(variant.captured.real for variant in self)
        return "real-run trace" if real else "trace"

    def activate(self, variant: Variant | None) -> None:
        """Let a variant have the device memory; the others take theirs again when they run."""
        if variant is not self.active:
            self.before_others()
            if self.active is not None:
                self.active.release()
            self.active = variant

    def plan(self, variant: Variant, minibatch: int, measured: Measured) -> Planned:
        """Return the plan of a variant for a minibatch.

        A run that is resumed goes on with a plan of the same bits, if that is what is asked for,
        and fits.
        """
        asked, pinned, kept = self._asked(), self._options.plan, self.kept
        if kept is not None and kept.minibatch == minibatch and pinned is None:
            like = kept.like(variant.graph, variant.phase)
            if like is not None and _answers(like.spec, asked, len(self._contexts)):
                with suppress(PlanError, ConfigError):
                    return variant.plan(minibatch, measured, asked, like=like)
        return variant.plan(minibatch, measured, asked, pinned)

    def _asked(self) -> Asked:
        options = self._options
        # Hooks on parameters see one microbatch after the other, where these are fixed.
        in_turn = options.microbatch_size is not None and self.hooked()
        return "pp" if in_turn else options.mode, options.microbatch_size, options.activations

    def _make(self, kind: CallKind, call: Call) -> Variant:
        if self.arenas is None:
            check_values(self._net)
        return self.bind(self._capture(kind, call), kind)

    def _capture(self, kind: CallKind, call: Call) -> Captured:
        options, (args, kwargs, targets) = self._options, call
        options.precision.check(self._net)
        known = [v for v in self if v.phase is kind.phase]
        with or_eager(self._net), self._blaming_difference():
            return capture(
                self._net,
                args,
                kwargs,
                loss=options.loss_fn if kind is CallKind.TRAIN_STEP else None,
                targets=targets,
                output_loss=kind is CallKind.TRAIN_STEP and options.loss_fn is None,
                batch_dims=options.batch_dims_of(kind),
                target=self._contexts[0].device,
                known=known[-1].captured if known else None,
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
        graph = with_state(captured.graph, host.gradients.layout, update)
        host = replace(host, graph=graph)
        phase = kind.phase
        steady = self._measured.steady()
        watch = self._options.watch
        watching = None if watch is None else Watching(watch, session.say)
        return Variant(captured, graph, machine, host, self._contexts, phase, steady, watching)

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
        self._record.facts.update(facts.of_memory(host, machine, update))
        return host

    def _weight_arena(self, layout: ArenaLayout) -> HostArena:
        device, what = self._contexts[0].device, "the weights"
        if self._options.precision.dtype is None:
            return HostArena(layout, device, what)
        return WorkingArena(layout, device, what, always=self._options.updates == "host")

    def _sizes_to_measure(self, minibatch: int, graph: LayerGraph) -> list[int]:
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
        kernel = takes_all(self._optimizer.full)  # writes the copies in the same pass
        return known if kernel else with_copies(known, self._options.precision.dtype)

    def _check_pinned(self, kind: CallKind, minibatch: int) -> None:
        """Refuse a plan of the caller's that is not for the batches that are trained first."""
        plan = self._options.plan
        trains = kind is CallKind.TRAIN_STEP or (
            self._options.optimizer is None and torch.is_grad_enabled()
        )
        if plan is None or self._pinned_seen or not trains:
            return
        self._pinned_seen = True
        check_minibatch(plan, minibatch)

    def _profile_of(self, variant: Variant, minibatch: int) -> Callable[[], ModelProfile]:
        name, sizes = type(self._net).__name__, self._sizes_to_measure(minibatch, variant.graph)
        return profile_later(name, variant, sizes, minibatch, clips=self.waits())

    def unmeasured(self, name: str, kind: CallKind, call: Call) -> ModelProfile:
        """Return the layers that a call runs, with their work, which is counted and not run.

        Args:
            name: of the model, for people.

        Raises:
            CaptureError: if the layers cannot be known without running them.
        """
        minibatch = self.paths(kind, call)[1].num_samples
        with only_captured():
            captured = self._capture(kind, call)
        update = self.update_cost() if kind is CallKind.TRAIN_STEP else NO_UPDATE
        sizes = self._sizes_to_measure(minibatch, captured.graph)
        return unmeasured_profile(
            name, captured, sizes, minibatch, update, kind.phase, clips=self.waits()
        )


def _answers(spec: StepSpec, asked: Asked, num_devices: int) -> bool:
    """Whether microbatches and replicas are those that are asked for."""
    mode, size, _ = asked
    most = min(num_devices, spec.minibatch)
    counts = {"pp": (1,), "dp": (most,)}.get(mode, tuple(range(1, most + 1)))
    sizes = {spec.forward_size, spec.backward_size}
    return len(spec.shares) in counts and (size is None or sizes == {size})


def _check_modes(net: nn.Module) -> None:
    """Let the model run as it is while a mode of the program's own sees every function.

    Raises:
        DynamicOnlyError: naming the mode.
    """
    mode = mode_of_users()
    if mode is not None:
        raise DynamicOnlyError(
            f"{mode} sees every function that the forward calls",
            type(net).__name__,
            eager=True,
            passing=True,
        )
