"""The engine behind the wrapper: captures the module, plans, and runs the steps.

A *variant* is what one kind of call leads to: captured layers, measured costs, plans,
an executor. The parameters' arena is one for all variants.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import nn

from harmony.capture import DynamicOnlyError, GuardError
from harmony.core.timeline import Timeline
from harmony.core.units import format_bytes
from harmony.core.warn import warn
from harmony.engine.autograd import (
    ForwardCall,
    ForwardObserver,
    Gradients,
    attach,
    check_surroundings,
    hooks_of_others_off,
    input_gradients,
)
from harmony.engine.call_key import Call
from harmony.engine.call_kind import CallKind
from harmony.engine.dynamic import DynamicRunner
from harmony.engine.eager import EagerRunner
from harmony.engine.generate import generate
from harmony.engine.grad_alias import AliasedGradients, check_unchanged
from harmony.engine.hooked import hooked_step
from harmony.engine.inflight import parameters_read
from harmony.engine.late import Late
from harmony.engine.minibatch import (
    detached,
    joined_outputs,
    load_gradients,
    load_inputs,
    to_device_of,
    weighted_sum,
)
from harmony.engine.options import EngineOptions
from harmony.engine.replan import MOST_SHRINKS, Feedback, shrunk
from harmony.engine.resumed import BitChoices
from harmony.engine.step_result import (
    RanStep,
    ReadyStep,
    StepResult,
    count_tokens,
    replay_state_of,
)
from harmony.engine.variants import OTHER_WAY, VariantCache
from harmony.engine.wholeness import Wholeness, alone
from harmony.errors import DoesNotFitError, ExecutionError, NonFiniteError, text_of
from harmony.planner.ir.tasks import Phase
from harmony.profiling.model_profile import ModelProfile
from harmony.report import header as facts
from harmony.report import session
from harmony.report.session import StepStats
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.executor import Job
from harmony.runtime.exec.out_of_memory import is_undone, with_room
from harmony.runtime.interrupts import held_back
from harmony.runtime.step.finite import FirstBad, check_finite
from harmony.runtime.step.replay_state import ReplayState
from harmony.runtime.traced_lock import TracedLock

R = TypeVar("R")


class Engine:
    """Captures, plans and runs; one a model.

    Attributes:
        num_steps: training steps done, which random numbers depend on.
        resumed: how batches were parted before the checkpoint that was loaded, until it is known
            whether they still are.
        net: the module.
        devices: the GPUs.
        record: what the report is made of.
        whole: whether it can go on.
        late: updates that the last step has left to the next one.
        lock: who runs it now.
        verifier: sees every forward and backward of an own loop, where one is set.
        optimizer: the full optimizer of `train_step`, once training has begun or asked for.
    """

    def __init__(
        self, net: nn.Module, devices: Sequence[torch.device], options: EngineOptions
    ) -> None:
        self.options = options
        self.num_steps = 0
        self.resumed: BitChoices | None = None
        self.verifier: ForwardObserver | None = None
        self.last_timeline: Timeline | None = None
        self.net = net
        self.devices = list(devices)
        self._contexts = [DeviceContext(device) for device in devices]
        self._aliased: AliasedGradients | None = None
        self.lock = TracedLock()
        self._optimizer = options.make_optimizer(net)
        self.whole = Wholeness(net, self._optimizer)
        self.late = Late(self.whole, self.lock, self._optimizer)
        self.record = session.register(
            type(net).__name__, facts.of_model(net, self._contexts, self._optimizer)
        )
        if options.optimizer is None and (notice := facts.sparse_notice(net)) is not None:
            self.record.warn(notice)
            warn(notice)
        watched = options.replan and options.plan is None
        self._feedback = Feedback(self.record, options.activations) if watched else None
        self.variants = VariantCache(net, self._contexts, options, self._optimizer, self.record)
        self.variants.before_others = self.late.flush
        self._dynamic = DynamicRunner(
            net, self._contexts[0], options, self.variants, self._optimizer, self.record
        )
        self._eager = EagerRunner(
            net, self._contexts[0], options, self.variants, self._dynamic.say
        )

    def __del__(self) -> None:
        # A `weakref.finalize` would keep the module, and so whatever the module's code can see.
        if "late" in self.__dict__:
            self.late.give_up()

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The full optimizer, for LR schedulers and checkpoints."""
        if self._optimizer is None:
            return None
        self.variants.settle_optimizer()
        return self._optimizer.full

    @property
    def last_grad_norm(self) -> torch.Tensor | None:
        """Norm of all gradients of the last step, before they were clipped."""
        norm = None if self._optimizer is None else self._optimizer.last_norm
        return None if norm is None else norm.clone()  # updates that are left still want it

    @property
    def dynamic_size(self) -> int | None:
        """Samples of a microbatch of a dynamic step; None before there was one."""
        return self._dynamic.size

    # Steps

    @alone
    def train(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any) -> torch.Tensor:
        """Run one training step, record it, and return the loss."""
        started = time.perf_counter()
        done = self.train_step(args, kwargs, targets)
        loss, seconds = float(done.loss), time.perf_counter() - started
        samples, tokens = done.num_samples, done.num_tokens
        number = self.num_steps - 1
        if done.timeline is not None:  # else there is no plan to report on
            self.record.stepped(StepStats(number, loss, samples, tokens, seconds, done.timeline))
        return done.loss

    @alone
    def train_step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any
    ) -> StepResult:
        """Run one training step."""
        self.whole.check()
        args, kwargs = self.options.precision.cast((args, kwargs))
        with self.late.step():
            return self._train_step((args, kwargs, targets))

    def _train_step(self, call: Call) -> StepResult:
        ready: ReadyStep | None = None
        timeline: Timeline | None
        with self.whole.together() as begun:
            try:
                run = functools.partial(self._planned, call, begun)
                ready, step = self._in_room(CallKind.TRAIN_STEP, call, run, begun)
                minibatch = ready.planned.plan.minibatch
                self._dynamic.commit(ready, step.replay, begun)
                loss, timeline = step.loss, step.timeline
            except (DynamicOnlyError, GuardError) as reason:
                minibatch = self.variants.paths(CallKind.TRAIN_STEP, call)[1].num_samples
                loss, timeline = self._train_dynamic(call, minibatch, reason)
                self._dynamic.update(begun)
            self.num_steps += 1
            self.last_timeline = timeline
        if ready is not None and timeline is not None:
            ready.variant.captured.bring_home(self.devices)
            if self._feedback is not None and not self.variants.hooked():
                self._feedback.stepped(ready.variant, ready.planned, timeline)
        return StepResult(loss, minibatch, count_tokens(call[:2]), timeline)

    def _train_dynamic(
        self, call: Call, minibatch: int, reason: DynamicOnlyError | GuardError
    ) -> tuple[torch.Tensor, Timeline | None]:
        """Run what no trace stands for up to its gradients: recorded on its way, or as it is."""
        self.late.flush()
        reason = self._goes_dynamic(CallKind.TRAIN_STEP, call, reason)
        if not reason.eager:
            try:
                step = self._dynamic.train(call, minibatch, self.num_steps, self._run_gradients)
            except DynamicOnlyError as found:
                if not found.eager:
                    raise
                self._goes_dynamic(CallKind.TRAIN_STEP, call, found)
            else:
                return step.loss, step.timeline
        self.variants.cover()
        captured = self.variants.recorded(CallKind.TRAIN_STEP, call)
        return self._eager.train(call, minibatch, self.num_steps, captured), None

    def _prepare(self, kind: CallKind, call: Call) -> ReadyStep:
        """Do what `ready` does; Ctrl-C is heard in it, as nothing has changed."""
        with held_back() as held, held.open():
            ready = self.ready(kind, *call)
        if self.resumed is not None and ready.planned.plan.minibatch == self.resumed.minibatch:
            self.resumed.compare(ready.planned.plan, ready.planned.graph)
            self.resumed = None
        return ready

    def _in_room(
        self,
        kind: CallKind,
        call: Call,
        run: Callable[[ReadyStep], R],
        begun: Sequence[str] = (),
    ) -> tuple[ReadyStep, R]:
        """Run a planned call; again by a smaller plan if others have taken device memory.

        That is where nothing has changed yet: what is repeated begins from the same state, and
        computes the same.
        """
        for attempt in range(MOST_SHRINKS + 1):
            with hooks_of_others_off() if kind is CallKind.OWN_LOOP else nullcontext():
                ready = self._prepare(kind, call)
            try:
                return ready, run(ready)
            except (ExecutionError, DoesNotFitError) as error:
                may = self._feedback is not None and not self.variants.hooked()
                if attempt == MOST_SHRINKS or not (may and is_undone(error, begun)):
                    raise
                why = text_of(error.__cause__ or error)
            self._shrink(ready, why, attempt)  # only here its frames hold no device memory
        raise AssertionError("it has returned, or raised")

    def _shrink(self, ready: ReadyStep, why: str, attempt: int) -> None:
        """Go on with a plan for the device memory that there is now."""
        self.variants.activate(None)
        gc.collect()
        torch.accelerator.empty_cache()
        options, before = self.options, ready.planned
        limit = options.device_memory_nbytes
        planned = shrunk(before, self._contexts, limit, options.activations, attempt)
        ready.variant.learn(planned)
        nbytes = min(device.memory_nbytes for device in planned.measured.machine.devices)
        said = (
            f"step {self.num_steps} ran out of device memory ({why}). Nothing had changed: it is "
            f"planned again for {format_bytes(nbytes)} of each GPU, and repeated"
        )
        self.record.facts["plan changed"] = said
        warn(said)

    def _planned(self, call: Call, begun: list[str], ready: ReadyStep) -> RanStep:
        """Run a planned step, with its updates; gradients go through hooks where there are any."""
        if not self.variants.hooked():
            try:
                return self.run_step(ready)
            except NonFiniteError as error:
                said = text_of(error)
            raise self._blamed(ready, said)
        ran = hooked_step(self, call, ready, self._run_gradients)
        self._dynamic.update(begun)
        return ran

    def _blamed(self, ready: ReadyStep, said: str) -> NonFiniteError:
        """Repeat a step that has changed nothing, and say what was not finite first."""
        look = FirstBad(ready.variant.graph)
        with suppress(NonFiniteError):
            self.run_step(ready, look=look)
        before = [n for n, p in self.net.named_parameters() if not bool(p.isfinite().all())]
        if before:
            said += f"; {before[0]} itself is not finite, before the step"
        return NonFiniteError(
            f"step {self.num_steps}: {said}: {look.found() or 'it is when the step is repeated'}. "
            "Nothing was updated"
        )

    def _run_gradients(self, ready: ReadyStep) -> RanStep:
        """Run a step up to its gradients, and leave them as ``grad``."""
        ran = self.run_step(ready, apply_updates=False)
        ready.variant.host.publish_all()
        return ran

    def _goes_dynamic(
        self, kind: CallKind, call: Call, reason: DynamicOnlyError | GuardError
    ) -> DynamicOnlyError:
        """Note that no trace stands for the calls of this signature; return why.

        A decision by computed values shows only when the layers run; the forward of all layers
        comes before the first update, so nothing has changed then.
        """
        known = isinstance(reason, DynamicOnlyError)
        found = reason if known else DynamicOnlyError(OTHER_WAY, reason.where)
        assert isinstance(found, DynamicOnlyError)
        if found.eager:
            self.options.precision.refuse(f"{found.reason} ({found.where})")
        paths, _ = self.variants.paths(kind, call)
        if not found.passing:
            paths.dynamic = found.again()
        self._dynamic.notice(found)
        return found

    def ready(
        self, kind: CallKind, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any
    ) -> ReadyStep:
        """Capture, measure and plan for a batch, as far as that was not done before."""
        self.whole.check()
        args, kwargs = self.options.precision.cast((args, kwargs))
        call = (args, kwargs, targets)
        find = functools.partial(self.variants.ready, kind, call)
        try:
            return with_room("measuring the model", self.devices, find)
        except DynamicOnlyError as reason:
            if kind is CallKind.TRAIN_STEP or reason.eager:
                raise
            self._dynamic.notice(reason)
            self._runs_whole(call)
            return self._dynamic.ready(kind, call, self.num_steps, 0)

    def _runs_whole(self, call: Call) -> None:
        """Say that a loop of the caller's own runs a batch whole where no trace stands for it."""
        asked = self.options.microbatch_size
        if asked is None or not torch.is_grad_enabled():
            return
        minibatch = self.variants.paths(CallKind.OWN_LOOP, call)[1].num_samples
        if asked < minibatch:
            self._dynamic.say(
                f"microbatch_size={asked} does not part the batches of this loop: the forward is "
                f"known only as it runs, so each runs whole ({minibatch} samples in this one). "
                "Where samples mix (BatchNorm in training) that is another training: give the "
                f"model batches of {asked}, or use train_step, which parts them"
            )

    @alone
    def unmeasured(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelProfile:
        """Return the profile of a `train_step` of a model that makes its loss; nothing runs."""
        args, kwargs = self.options.precision.cast((args, kwargs))
        return self.variants.unmeasured(name, CallKind.TRAIN_STEP, (args, kwargs, None))

    def run_step(
        self, ready: ReadyStep, *, apply_updates: bool = True, look: FirstBad | None = None
    ) -> RanStep:
        """Run the schedule of a training step, with its updates or up to the gradients.

        Args:
            look: is shown all that is computed.

        Raises:
            NonFiniteError: if that is looked for, and found.
        """
        variant = ready.variant
        prepared = variant.prepared(ready.planned, Phase.TRAIN)
        load_inputs(prepared, variant.graph, ready.inputs)
        packs = prepared.host_program.late if apply_updates else ()
        late = self.late.take(variant.host, packs)
        if late is None:  # else its gradients are those of the step before, and nobody has them
            if self._aliased is not None:
                self._aliased.take_back()
            variant.host.forget_gradients()
        replay = self._replay_state(ready)
        loss = variant.graph.loss
        assert loss is not None
        chunks = prepared.outputs[loss].chunks()
        job = Job(replay, ready.weights, apply_updates, late, look=look, begun=self.whole.begun)
        if self.options.detect_nonfinite:
            counted = [(s, chunk) for s, chunk in chunks if ready.weights.get((loss, s), 1.0)]
            job.approve = functools.partial(check_finite, counted, variant.host.params)
        timeline = variant.executor.run(prepared, job)
        self.late.leave(variant.host, packs)
        # As a loop adds up what it shows: in fp32, though the losses may be in bf16.
        total = weighted_sum(chunks, loss, ready.weights, torch.zeros(()))
        return RanStep(total, timeline, replay)

    @alone
    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module forward, ready for a backward."""
        self.late.flush()
        args, kwargs = self.options.precision.cast((args, kwargs))
        return self._or_dynamic(self._forward, args, kwargs)

    def _or_dynamic(
        self, run: Callable[[Any, Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a forward; dynamically if it turns out that no trace stands for it."""
        for _ in range(3):
            try:
                return run(args, kwargs)
            except (GuardError, DynamicOnlyError) as reason:
                found = self._goes_dynamic(CallKind.OWN_LOOP, (args, kwargs, None), reason)
            if found.eager:
                break
        self.whole.check()
        check_surroundings()
        self.options.precision.refuse(OTHER_WAY)
        self._runs_whole((args, kwargs, None))
        out = self._eager.forward(args, kwargs, self.num_steps)
        self.num_steps += torch.is_grad_enabled()
        self.last_timeline = None
        return out

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.whole.check()
        check_surroundings()
        run = functools.partial(self._run_forward, args, kwargs)
        return self._in_room(CallKind.OWN_LOOP, (args, kwargs, None), run)[1]

    def _run_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], ready: ReadyStep) -> Any:
        variant, plan = ready.variant, ready.planned.plan
        inputs, weights = ready.inputs, ready.weights
        replay, check, step = self._replay_state(ready), variant.self_check(plan), self.num_steps
        in_flight = variant.in_flight_pool.take(plan.minibatch)
        call = ForwardCall(
            self.backward, variant, ready.planned, replay, weights, in_flight, step, check
        )
        if self.verifier is not None:
            call.plain = self.verifier.before_forward(call, args, kwargs)
        prepared = variant.prepared(ready.planned, Phase.FORWARD, in_flight)
        load_inputs(prepared, variant.graph, detached(inputs))
        self.last_timeline = variant.executor.run(
            prepared, Job(replay, weights, check=check, ahead_nbytes=ready.planned.backward_nbytes)
        )
        joined = joined_outputs(prepared, variant.graph, weights)
        if self.verifier is not None:
            call.values = {v: tensor.detach() for v, tensor in joined.items()}
        values = attach(joined, inputs, call)
        out = variant.captured.unflatten_output(
            to_device_of((args, kwargs), values), plan.minibatch
        )
        with self.whole.together() as begun:
            self._dynamic.commit(ready, replay, begun)
            self.num_steps += 1
        return out

    @alone
    def backward(self, call: ForwardCall, gradients: Gradients) -> Gradients:
        """Run the backward of a forward, from the gradients of its outputs.

        Returns:
            The gradients of its inputs that require one, and of the trained parameters.
        """
        self.whole.check()
        self.late.flush()
        self.variants.check_current(call.variant.host.generation)
        variant, host = call.variant, call.variant.host
        self.variants.activate(variant)
        given = {v: g for v, g in zip(call.outputs, gradients, strict=True) if g is not None}
        prepared = variant.prepared_backward(call.planned, call.in_flight, frozenset(given))
        read = set(parameters_read(prepared.schedule, host.weights.layout))
        check_unchanged(call.versions, host.weights.arena, read)
        load_gradients(prepared, variant.graph, given, call.weights)
        if self._aliased is None:
            self._aliased = AliasedGradients(host.gradients.arena, host.weights.arena.tensors)
        self._aliased.take_back()
        job = Job(call.replay, call.weights, check=call.check)
        timeline = variant.executor.run(prepared, job)
        variant.checked(call.planned.plan)
        pairs = zip(prepared.needs_nbytes, variant.executor.slots_nbytes(), strict=False)
        call.planned.backward_nbytes[:] = [needed + held for needed, held in pairs]
        self.last_timeline = timeline
        if self.verifier is None:
            seconds = timeline.step_s
            stats = StepStats(
                call.step, None, call.planned.plan.minibatch, None, seconds, timeline
            )
            self.record.stepped(stats)
        made = self._aliased.hand_out(frozenset().union(*host.touched.values()))
        if self.verifier is not None:
            self.verifier.after_backward(call, given, made)
        return [*input_gradients(prepared, call), *(made.get(name) for name in call.params)]

    @alone
    def infer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module forward without gradients."""
        self.late.flush()
        args, kwargs = self.options.precision.cast((args, kwargs))
        return self._or_dynamic(self._infer, args, kwargs)

    def _infer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = functools.partial(self._run_inference, args, kwargs)
        return self._in_room(CallKind.OWN_LOOP, (args, kwargs, None), run)[1]

    def _run_inference(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], ready: ReadyStep
    ) -> Any:
        variant, weights = ready.variant, ready.weights
        prepared = variant.prepared(ready.planned, Phase.INFER)
        load_inputs(prepared, variant.graph, detached(ready.inputs))
        replay = self._replay_state(ready, recomputed=False)
        variant.executor.run(prepared, Job(replay, weights))
        values = joined_outputs(prepared, variant.graph, weights)
        out = variant.captured.unflatten_output(
            to_device_of((args, kwargs), values), ready.planned.plan.minibatch
        )
        with self.whole.together() as begun:
            self._dynamic.commit(ready, replay, begun)
        return out

    @alone
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run Hugging Face's ``generate`` of the module, its forwards on the first GPU."""
        self.whole.check()
        self.late.flush()
        self.variants.activate(None)  # the forwards need the memory
        return generate(self.net, self.devices[0], self.options.precision, args, kwargs)

    # State

    @alone
    def close(self) -> None:
        """Give back threads, device memory and the arena; the module keeps all values."""
        self.late.flush()
        self.whole.closed = True
        self._aliased = None
        self.verifier = None
        self._dynamic.forget()
        self.variants.forget()
        self.variants.arenas = None

    def bit_choices(self) -> BitChoices | None:
        """How the last plan parts a batch, for a checkpoint; None before the first step."""
        plan = self.record.plan
        return self.resumed if plan is None else BitChoices.of(plan)

    def two_packs_nbytes(self, nbytes: Mapping[str, int]) -> int:
        """Bytes of the two largest packs, where these are the bytes of each parameter."""
        plan, active = self.record.plan, self.variants.active
        if plan is None or active is None:
            return 0
        updated = map(active.host.updated_by, plan.spec.backward_packs)
        sizes = sorted(sum(nbytes.get(name, 0) for name in names) for names in updated)
        return sum(sizes[-2:])

    def restored(self, missing: Collection[str] = ()) -> None:
        """Note that a state was loaded, without the tensors named ``missing``."""
        if self.whole.restored(missing):
            self.variants.activate(None)  # what stays on devices may be of the step that failed

    def _replay_state(self, ready: ReadyStep, recomputed: bool = True) -> ReplayState:
        run_seed = self.options.seed
        return replay_state_of(
            self.net, ready, self._contexts[0], self.num_steps, run_seed, recomputed
        )
