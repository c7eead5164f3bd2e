"""The variant cache: one variant for each key of a call and each path of the forward.

They share one arena of parameters, and take turns in having the memory of the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import nn

from harmony.capture import (
    Batch,
    Captured,
    DynamicOnlyError,
    GuardError,
    check_hooks,
    undisturbed,
)
from harmony.capture.guards.torch_settings import mode_of_users
from harmony.capture.loss.weights import parts_asked_for
from harmony.core.options import current_options
from harmony.engine.call_key import Call, CallKind, call_key_of
from harmony.engine.offline_plan import plan_elsewhere
from harmony.engine.options import EngineOptions
from harmony.engine.paths import MAX_CHANGES, MAX_PATHS, Paths, PathsKey, use_last
from harmony.engine.planned import Asked, Measured, Planned
from harmony.engine.resumed import BitChoices
from harmony.engine.step_result import ReadyStep
from harmony.engine.variant import Variant
from harmony.engine.variant_factory import VariantFactory
from harmony.errors import ConfigError, HarmonyError, PlanError
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.plan_file import check_minibatch
from harmony.planner.ir.tasks import StepSpec
from harmony.profiling.model_profile import ModelProfile
from harmony.report.session import ModelRecord
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.left_behind import let_all_go
from harmony.runtime.exec.stage import Values
from harmony.runtime.host.arena import Modules

OTHER_WAY = "the forward goes another way for other values"


class VariantCache:
    """What calls have led to, and which of it runs for one; one a model.

    Attributes:
        active: the variant that has the devices' memory.
        before_others: called before other layers than those of the last step are looked at.
        kept: how batches were parted before a checkpoint that was loaded.
    """

    def __init__(
        self,
        net: nn.Module,
        contexts: Sequence[DeviceContext],
        options: EngineOptions,
        factory: VariantFactory,
        record: ModelRecord,
    ) -> None:
        self.active: Variant | None = None
        self.before_others: Callable[[], object] = lambda: None
        self.kept: BitChoices | None = None
        self._net = net
        self._contexts = contexts
        self._options = options
        self._factory = factory
        self._batch_dims = {kind: options.batch_dims_of(kind) for kind in CallKind}
        self._record = record
        self._paths: dict[PathsKey, Paths] = {}
        self._pinned_seen = False
        self._noted: Planned | None = None

    def __iter__(self) -> Iterator[Variant]:
        for paths in self._paths.values():
            yield from paths.variants

    def paths(self, kind: CallKind, call: Call) -> tuple[Paths, Batch]:
        """Return what the signature of a call has led to, and its inputs."""
        modules = list(self._net.named_modules())  # of one walk, which takes its time
        if self._factory.take_in(modules) is not None:
            self.forget()
        key, batch, whole = self.key(kind, call, modules)
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
        remedy = "give the forward ordinary tensors, whose dimension 0 counts samples"
        return DynamicOnlyError(why, type(self._net).__name__, eager=True, remedy=remedy)

    def key(
        self, kind: CallKind, call: Call, modules: Modules | None = None
    ) -> tuple[PathsKey, Batch, str | None]:
        """What paths are kept by, the inputs, and why a call runs whole, as it is.

        A plan may be one for updates that wait, or not.

        Args:
            modules: of the model, where they are known.
        """
        modules = modules or list(self._net.named_modules())
        key, batch, whole = call_key_of(modules, call, kind, self._batch_dims[kind])
        return (key, kind is CallKind.TRAIN_STEP and self._factory.waits()), batch, whole

    def check_current(self, generation: int) -> None:
        """Refuse to go on with what was captured of a model that is another now.

        Raises:
            HarmonyError: if all captures were forgotten since then.
        """
        if generation != self._factory.generation:
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
        self._factory.forget()

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
        if self._options.plan is not None and not self._pinned_seen:
            self._check_pinned(self._options.plan, kind, minibatch)
        for _ in range(MAX_PATHS):
            if paths.dynamic is not None:
                raise paths.dynamic.again()
            misfit: tuple[int, int] | None = None
            standing = paths.standing(type(self._net).__name__)
            settled = paths.next(minibatch, standing)
            ready = None if settled is None else settled.ready(batch)
            if ready is not None:
                self.activate(ready.variant)
                self._note(ready.variant, ready.planned)
                return ready
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
                    ready = self._with_plan(variant, planned, inputs)
                    if ready is None:
                        return self.ready(kind, call)
                    asked = self._options.microbatch_size
                    paths.settle(ready, variant.on_one_path(ready.planned, asked))
                    return ready
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
        record.profile = self._factory.profile_of(variant, planned.plan.minibatch)
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
            variant = self._factory.make(kind, part, self._known(kind))
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
        known = variant.measured
        return known or self._factory.measure(variant, kind, minibatch, inputs, sizes)

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
            let_all_go()  # what other models have left may be in the way
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
        in_turn = options.microbatch_size is not None and self._factory.hooked()
        return "pp" if in_turn else options.mode, options.microbatch_size, options.activations

    def unmeasured(self, name: str, kind: CallKind, call: Call) -> ModelProfile:
        """Return the layers that a call runs (see `VariantFactory.unmeasured`)."""
        minibatch = self.paths(kind, call)[1].num_samples
        return self._factory.unmeasured(name, kind, call, minibatch, self._known(kind))

    def _known(self, kind: CallKind) -> Captured | None:
        """The last capture of such a call, which may spare half of the work of the next."""
        known = [variant for variant in self if variant.phase is kind.phase]
        return known[-1].captured if known else None

    def _check_pinned(self, plan: Plan, kind: CallKind, minibatch: int) -> None:
        """Refuse a plan of the caller's that is not for the batches that are trained first."""
        own_loop = self._options.optimizer is None and torch.is_grad_enabled()
        if kind is CallKind.TRAIN_STEP or own_loop:
            self._pinned_seen = True
            check_minibatch(plan, minibatch)


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
            remedy="call the model outside of it",
        )
