"""Steps of `train_step`: planned as a whole, or traced as they run, with their updates."""

from __future__ import annotations

import functools
import time
from contextlib import nullcontext, suppress
from typing import Any

import torch

from harmony.capture import DynamicOnlyError, GuardError
from harmony.core.timeline import Timeline
from harmony.engine.call_key import Call, CallKind
from harmony.engine.engine import Engine
from harmony.engine.hooked import hooked_step
from harmony.engine.minibatch import load_inputs, weighted_sum
from harmony.engine.peers import TRAIN_STEP
from harmony.engine.step_result import RanStep, ReadyStep, StepResult, count_tokens
from harmony.engine.wholeness import alone
from harmony.errors import NonFiniteError, text_of
from harmony.planner.ir.tasks import Phase, TaskKind
from harmony.report.session import StepStats
from harmony.runtime.exec.executor import Job
from harmony.runtime.step.finite import FirstBad, check_finite


class TrainSteps:
    """The training steps of one model, whose state its engine has."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.whole, self.lock, self.devices = engine.whole, engine.lock, engine.devices

    @alone
    def train_step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any, recorded: bool = True
    ) -> StepResult:
        """Run one training step.

        Args:
            recorded: whether it is one for the report, and for observers.
        """
        engine, peers = self._engine, self._engine.peers
        started = time.perf_counter()
        with nullcontext() if peers is None else peers.step(engine.num_steps):
            self.whole.check()
            args, kwargs = engine.options.precision.cast((args, kwargs))
            with engine.late.step():
                done = self._train_step((args, kwargs, targets))
        if recorded and done.timeline is not None:  # else there is no plan to report on
            loss, seconds = float(done.loss), time.perf_counter() - started
            engine.record.stepped(
                StepStats(
                    engine.num_steps - 1,
                    loss,
                    done.num_samples,
                    count_tokens((args, kwargs)),
                    seconds,
                    done.timeline,
                )
            )
        return done

    def _train_step(self, call: Call) -> StepResult:
        engine = self._engine
        ready: ReadyStep | None = None
        timeline: Timeline | None
        with self.whole.together() as begun:
            try:
                run = functools.partial(self._planned, call, begun)
                ready, step = engine.in_room(CallKind.TRAIN_STEP, call, run, begun)
                minibatch = ready.planned.plan.minibatch
                engine.dynamic.commit(ready, step.replay, begun)
                loss, timeline = step.returned, step.timeline
            except (DynamicOnlyError, GuardError) as reason:
                minibatch = engine.variants.paths(CallKind.TRAIN_STEP, call)[1].num_samples
                self._announce(minibatch, self._parts(minibatch))
                loss, timeline = self._train_dynamic(call, minibatch, reason)
                engine.dynamic.update(begun)
            if engine.scaling is not None:
                engine.scaling.update()
            engine.num_steps += 1
            engine.last_timeline = timeline
        if ready is not None and timeline is not None:
            ready.variant.captured.bring_home(self.devices)
            if engine.feedback is not None and step.excess is not None:
                engine.feedback.stepped(ready.variant, ready.planned, timeline, step.excess)
        return StepResult(loss, minibatch, timeline)

    def _train_dynamic(
        self, call: Call, minibatch: int, reason: DynamicOnlyError | GuardError
    ) -> tuple[torch.Tensor, Timeline | None]:
        """Run what no trace stands for up to its gradients: recorded on its way, or as it is."""
        engine = self._engine
        engine.late.flush()
        reason = engine.goes_dynamic(CallKind.TRAIN_STEP, call, reason)
        if not reason.eager:
            try:
                step = engine.dynamic.train(call, minibatch, engine.num_steps, self.run_gradients)
            except DynamicOnlyError as found:
                if not found.eager:
                    raise
                reason = engine.goes_dynamic(CallKind.TRAIN_STEP, call, found)
            else:
                return step.returned, step.timeline
        engine.factory.cover()
        captured = engine.variants.recorded(CallKind.TRAIN_STEP, call)
        loss = engine.eager.train(call, minibatch, engine.num_steps, captured)
        engine.dynamic.notice(reason)
        return loss, None

    def _planned(self, call: Call, begun: list[str], ready: ReadyStep) -> RanStep:
        """Run a planned step, with its updates; gradients go through hooks where there are any."""
        plan = ready.planned.plan
        parts = len(ready.planned.in_order[TaskKind.BACKWARD])
        if self._announce(plan.minibatch, parts):
            ready = self._engine.ready(CallKind.TRAIN_STEP, *call)
        if not self._engine.factory.hooked():
            try:
                return self.run_step(ready)
            except NonFiniteError as error:
                said = text_of(error)
            raise self._blamed(ready, said)
        ran = hooked_step(self._engine, call, ready, self.run_gradients)
        self._engine.dynamic.update(begun)
        return ran

    def _announce(self, samples: int, microbatches: int) -> bool:
        """Agree with other processes, where there are some, that the step is run.

        Returns:
            Whether parameters or buffers have other values now.
        """
        peers, number = self._engine.peers, self._engine.num_steps
        return peers is not None and peers.announce(TRAIN_STEP, number, samples, microbatches)

    def _parts(self, minibatch: int) -> int:
        """Microbatches of a step that no schedule runs as a whole."""
        return -(-minibatch // min(self._engine.options.microbatch_size or minibatch, minibatch))

    def _blamed(self, ready: ReadyStep, said: str) -> NonFiniteError:
        """Repeat a step that has changed nothing, and say what was not finite first."""
        look = FirstBad(ready.variant.graph)
        with suppress(NonFiniteError):
            # With other processes nothing may be updated, as the value may be one of theirs.
            self.run_step(ready, apply_updates=self._engine.peers is None, look=look)
        engine = self._engine
        before = [n for n, p in engine.net.named_parameters() if not bool(p.isfinite().all())]
        if before:
            said += f"; {before[0]} itself is not finite, before the step"
        unseen = "it is when the step is repeated"
        if engine.peers is not None:
            unseen = "nothing of this process's part is, so it comes from another process"
        return NonFiniteError(
            f"step {engine.num_steps}: {said}: {look.found() or unseen}. Nothing was updated"
        )

    def run_gradients(self, ready: ReadyStep) -> RanStep:
        """Run a step up to its gradients, and leave them as ``grad``."""
        ran = self.run_step(ready, apply_updates=False)
        ready.variant.host.publish_all()
        return ran

    def run_step(
        self, ready: ReadyStep, *, apply_updates: bool = True, look: FirstBad | None = None
    ) -> RanStep:
        """Run the schedule of a training step, with its updates or up to the gradients.

        Args:
            look: is shown all that is computed.

        Raises:
            NonFiniteError: if that is looked for, and found.
        """
        engine = self._engine
        variant = ready.variant
        prepared = variant.prepared(ready.planned, Phase.TRAIN)
        load_inputs(prepared, variant.graph, ready.inputs)
        packs = prepared.host_program.late if apply_updates else ()
        late = engine.late.take(variant.host, packs)
        if late is None:  # else its gradients are those of the step before, and nobody has them
            if engine.aliased is not None:
                engine.aliased.take_back()
            variant.host.forget_gradients()
        replay = engine.replay_state(ready)
        loss = variant.graph.loss
        assert loss is not None
        chunks = prepared.outputs[loss].chunks()
        job = Job(replay, ready.weights, apply_updates, late, look=look, begun=self.whole.begun)
        job.limit_nbytes = engine.options.device_memory_nbytes
        if engine.peers is not None and apply_updates:
            job.exchange = engine.peers.exchange
        scaling = engine.scaling
        if scaling is not None:
            job.loss_scale = scaling.scale()
        if engine.options.detect_nonfinite:
            counted = [(s, chunk) for s, chunk in chunks if ready.weights.get((loss, s), 1.0)]
            job.approve = functools.partial(check_finite, counted, variant.host.params)
        timeline = variant.executor.run(prepared, job)
        engine.late.leave(variant.host, () if scaling is not None and scaling.skips else packs)
        # Added up in fp32, though the losses may be narrower.
        total = weighted_sum(chunks, loss, ready.weights, torch.zeros(()))
        return RanStep(total, chunks[0][1].dtype, timeline, replay, prepared.excess)
