"""A loop of the user's own: forwards, the backwards that autograd asks for, inference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from harmony.capture import DynamicOnlyError, GuardError
from harmony.engine.autograd import (
    ForwardCall,
    Gradients,
    attach,
    check_surroundings,
    input_gradients,
)
from harmony.engine.call_key import CallKind
from harmony.engine.engine import Engine
from harmony.engine.grad_alias import AliasedGradients
from harmony.engine.inflight import parameters_read
from harmony.engine.minibatch import (
    detached,
    joined_outputs,
    load_gradients,
    load_inputs,
    to_device_of,
)
from harmony.engine.peers import BACKWARD, FORWARD, FORWARD_ALONE
from harmony.engine.planned import Planned
from harmony.engine.step_result import ReadyStep
from harmony.engine.variants import OTHER_WAY
from harmony.engine.wholeness import alone
from harmony.errors import ConfigError, NonFiniteError
from harmony.planner.ir.tasks import Phase
from harmony.report.session import StepStats
from harmony.runtime.changes import StepCount
from harmony.runtime.exec.executor import Job, PreparedSchedule
from harmony.runtime.step.finite import FirstBad, first_not_finite


class OwnLoop:
    """The forwards and backwards of one model, whose state its engine has."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.whole, self.lock, self.devices = engine.whole, engine.lock, engine.devices
        self.syncs = True
        self._steps = StepCount()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backwards of forwards in the block leave gradients of this process alone."""
        before, self.syncs = self.syncs, False
        try:
            yield
        finally:
            self.syncs = before

    @alone
    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module forward, ready for a backward."""
        with self._together():
            self._engine.late.flush()
            args, kwargs = self._engine.options.precision.cast((args, kwargs))
            return self._or_dynamic(self._forward, args, kwargs)

    def _together(self) -> AbstractContextManager[None]:
        """Let the block be what other processes do as well, where there are some."""
        peers = self._engine.peers
        return nullcontext() if peers is None else peers.step(self._engine.num_steps)

    def _announce(self, kind: str, number: int, planned: Planned) -> bool:
        """Agree with other processes, where there are some, that this is run.

        Returns:
            Whether parameters or buffers have other values now.
        """
        peers, parts = self._engine.peers, planned.in_order
        microbatches = max(map(len, parts.values()), default=1)
        samples = planned.plan.minibatch
        return peers is not None and peers.announce(kind, number, samples, microbatches)

    def _refuse_dynamic(self, why: DynamicOnlyError) -> None:
        """Refuse a forward that is known only as it runs, where other processes wait for it.

        Raises:
            ConfigError: with the remedy.
        """
        if self._engine.peers is not None:
            raise ConfigError(
                f"{why.reason} ({why.where}), so this forward is known only as it runs, which a "
                "loop of your own cannot do together with other processes (process_group=): use "
                "train_step, which can. No parameter was changed"
            )

    def _or_dynamic(
        self, run: Callable[[Any, Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a forward; dynamically if it turns out that no trace stands for it."""
        engine = self._engine
        for _ in range(3):
            try:
                return run(args, kwargs)
            except (GuardError, DynamicOnlyError) as reason:
                found = engine.goes_dynamic(CallKind.OWN_LOOP, (args, kwargs, None), reason)
                if torch.is_grad_enabled():
                    self._refuse_dynamic(found)
            if found.eager:
                break
        self.whole.check()
        check_surroundings(engine.net, (args, kwargs))
        engine.options.precision.refuse(OTHER_WAY)
        engine.runs_whole((args, kwargs, None))
        if engine.options.detect_nonfinite and torch.is_grad_enabled():
            engine.dynamic.say(
                "detect_nonfinite does not look at this loop: the model is run as it is, and its "
                "backward is autograd's. torch.autograd.set_detect_anomaly(True) helps here"
            )
        out = engine.eager.forward(args, kwargs, engine.num_steps)
        engine.dynamic.notice(found)
        engine.num_steps += torch.is_grad_enabled()
        engine.last_timeline = None
        return out

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.whole.check()
        check_surroundings(self._engine.net, (args, kwargs))
        run = functools.partial(self._run_forward, args, kwargs)
        return self._engine.in_room(CallKind.OWN_LOOP, (args, kwargs, None), run)[1]

    def _run_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], ready: ReadyStep) -> Any:
        engine = self._engine
        kind = FORWARD if self.syncs else FORWARD_ALONE
        if self._announce(kind, engine.num_steps, ready.planned):
            ready = engine.ready(CallKind.OWN_LOOP, args, kwargs, None)
        variant, plan = ready.variant, ready.planned.plan
        inputs, weights = ready.inputs, ready.weights
        replay, check = engine.replay_state(ready), variant.self_check(plan)
        in_flight = variant.in_flight_pool.take(plan.minibatch)
        call = ForwardCall(
            self.backward,
            variant,
            ready.planned,
            replay,
            weights,
            in_flight,
            engine.num_steps,
            self.syncs,
            check,
        )
        if engine.verifier is not None:
            call.plain = engine.verifier.before_forward(call, args, kwargs)
        prepared = variant.prepared(ready.planned, Phase.FORWARD, in_flight)
        load_inputs(prepared, variant.graph, detached(inputs))
        ahead, key = ready.planned.backward_nbytes, in_flight.key
        job = Job(replay, weights, check=check, ahead_nbytes=ahead, kept_for=key)
        engine.last_timeline = variant.executor.run(prepared, job)
        joined = joined_outputs(prepared, variant.graph, weights)
        if engine.verifier is not None:
            call.values = {v: tensor.detach() for v, tensor in joined.items()}
        values = attach(joined, inputs, call)
        out = variant.captured.unflatten_output(
            to_device_of((args, kwargs), values), plan.minibatch
        )
        with self.whole.together() as begun:
            engine.dynamic.commit(ready, replay, begun)
            engine.num_steps += 1
        return out

    @alone
    def backward(self, call: ForwardCall, gradients: Gradients) -> Gradients:
        """Run the backward of a forward, from the gradients of its outputs.

        Returns:
            The gradients of its inputs that require one, and of the trained parameters, averaged
            over the processes where there are several.
        """
        with self._together():
            return self._backward(call, gradients)

    def _backward(self, call: ForwardCall, gradients: Gradients) -> Gradients:
        engine = self._engine
        self.whole.check()
        engine.late.flush()
        engine.variants.check_current(call.variant.host.generation)
        variant, host = call.variant, call.variant.host
        engine.variants.activate(variant)
        averages = self._averages_now(call)
        if averages:
            self._announce(BACKWARD, call.step, call.planned)
        given = {v: g for v, g in zip(call.outputs, gradients, strict=True) if g is not None}
        left = variant.executor.left
        finds_kept = left.take(call.in_flight.key)
        try:
            prepared = self._run_backward(call, given, finds_kept)
        finally:
            if finds_kept:  # once; of a backward that fails nothing can be used again
                left.let_go()
        names = frozenset().union(*host.touched.values())
        if engine.peers is not None and averages:
            names = engine.peers.average_of(host)
        assert engine.aliased is not None, "what ran before has made it"
        made = engine.aliased.hand_out(names)
        if engine.verifier is not None:
            engine.verifier.after_backward(call, given, made)
        return [*input_gradients(prepared, call), *(made.get(name) for name in call.params)]

    def _run_backward(
        self, call: ForwardCall, given: Mapping[int, torch.Tensor], finds_kept: bool
    ) -> PreparedSchedule:
        """Run the packs backward, and return what has run.

        Args:
            finds_kept: whether what the forward has left is there; else all is recomputed.
        """
        engine, variant, host = self._engine, call.variant, call.variant.host
        prepared = self._ready_backward(call, given, finds_kept)
        call.read_again.check(parameters_read(prepared.schedule, host.weights.layout))
        if engine.aliased is None:
            engine.aliased = AliasedGradients(host.gradients.arena, host.weights.arena.tensors)
        engine.aliased.take_back()
        job = Job(call.replay, call.weights, check=call.check, finds_kept=finds_kept)
        timeline = variant.executor.run(prepared, job)
        if engine.options.detect_nonfinite:
            recompute = functools.partial(self._ready_backward, call, given, finds_kept=False)
            _check_finite(call, prepared, given, recompute if finds_kept else lambda: prepared)
        variant.checked(call.planned.plan)
        pairs = zip(prepared.needs_nbytes, variant.executor.slots_nbytes(), strict=False)
        call.planned.backward_nbytes[:] = [needed + held for needed, held in pairs]
        engine.last_timeline = timeline
        if engine.verifier is None:
            seconds = timeline.step_s
            minibatch, ran = call.planned.plan.minibatch, prepared.schedule
            name = min(frozenset().union(*host.touched.values()), default=None)
            param = None if name is None else host.params[name]
            step = self._steps.of_backward(param, call.step)
            stats = StepStats(step, None, minibatch, None, seconds, timeline, ran)
            engine.record.stepped(stats)
        return prepared

    def _ready_backward(
        self, call: ForwardCall, given: Mapping[int, torch.Tensor], finds_kept: bool
    ) -> PreparedSchedule:
        """Return the backward from gradients of some outputs, ready to run from these."""
        reached = frozenset(given)
        prepared = call.variant.prepared_backward(
            call.planned, call.in_flight, reached, finds_kept
        )
        load_gradients(prepared, call.variant.graph, given, call.weights)
        return prepared

    def _averages_now(self, call: ForwardCall) -> bool:
        """Whether a backward averages its own gradients.

        Not in `no_sync`; and where parameters still have gradients of such backwards, what they
        have together with these is averaged, once autograd has added them up.
        """
        peers = self._engine.peers
        if peers is None:
            return False
        if call.syncs and not peers.unsynced:
            return True
        if call.syncs:
            average = functools.partial(self._average_sums, call)
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(average)
        peers.unsynced = True
        return False

    @alone
    def _average_sums(self, call: ForwardCall) -> None:
        """Average what parameters have as ``grad``, at the end of a backward."""
        peers = self._engine.peers
        assert peers is not None
        if not peers.unsynced:  # an earlier forward of the same backward has seen to it
            return
        with self._together():
            self._announce(BACKWARD, call.step, call.planned)
            peers.average_gradients().agree()
        peers.unsynced = False

    @alone
    def infer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module forward without gradients."""
        self._engine.late.flush()
        args, kwargs = self._engine.options.precision.cast((args, kwargs))
        return self._or_dynamic(self._infer, args, kwargs)

    def _infer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.whole.check()
        run = functools.partial(self._run_inference, args, kwargs)
        return self._engine.in_room(CallKind.OWN_LOOP, (args, kwargs, None), run)[1]

    def _run_inference(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], ready: ReadyStep
    ) -> Any:
        variant, weights = ready.variant, ready.weights
        prepared = variant.prepared(ready.planned, Phase.INFER)
        load_inputs(prepared, variant.graph, detached(ready.inputs))
        replay = self._engine.replay_state(ready, recomputed=False)
        variant.executor.run(prepared, Job(replay, weights))
        values = joined_outputs(prepared, variant.graph, weights)
        out = variant.captured.unflatten_output(
            to_device_of((args, kwargs), values), ready.planned.plan.minibatch
        )
        with self.whole.together() as begun:
            self._engine.dynamic.commit(ready, replay, begun)
        return out


def _check_finite(
    call: ForwardCall,
    prepared: PreparedSchedule,
    given: Mapping[int, torch.Tensor],
    recompute: Callable[[], PreparedSchedule],
) -> None:
    """Refuse gradients that are not finite before anybody has them; find out where they began.

    Args:
        prepared: the backward that made them.
        recompute: makes one ready that runs the forward again.

    Raises:
        NonFiniteError: naming the operation.
    """
    host = call.variant.host
    touched = frozenset().union(*host.touched.values())
    made = {n: host.gradients.views[n] for n in host.params if n in touched}
    to_inputs = zip(call.inputs, input_gradients(prepared, call), strict=True)
    made |= {f"input {v}": gradient for v, gradient in to_inputs if gradient is not None}
    came = first_not_finite({str(v): gradient.cpu() for v, gradient in given.items()})
    found = first_not_finite(made)
    if came is None and found is None:
        return
    look = FirstBad(call.variant.graph)
    call.variant.executor.run(recompute(), Job(call.replay, call.weights, look=look))
    said = "the gradient of an output" if came is not None else f"the gradient of {found}"
    if came is None or look.in_forward:
        why = look.found() or "it is when the backward is repeated"
    else:
        why = (
            "the outputs are, so it is made outside of the model, where "
            "torch.autograd.set_detect_anomaly(True) finds the operation"
        )
    raise NonFiniteError(
        f"forward {call.step}: {said} is not finite: {why}. No gradient was added to any"
    )
