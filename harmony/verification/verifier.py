"""Runs one step by Harmony and by plain PyTorch, compares them, and leaves no trace.

Plain PyTorch runs the user's own module, hooks included, on the whole batch, and the optimizer's
own ``step()``. Of Harmony it takes nothing but the number of the step and its seed, and, where the
user has fixed the microbatches, where they begin and end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from harmony.capture import DynamicOnlyError, GuardError
from harmony.capture.graph.structure import flatten
from harmony.capture.state.random_state import GeneratorStates
from harmony.engine.call_key import CallKind
from harmony.engine.engine import Engine
from harmony.engine.own_loop import OwnLoop
from harmony.engine.train_steps import TrainSteps
from harmony.errors import ConfigError
from harmony.planner.ir.tasks import Samples
from harmony.reference.draws import CannotJoinError, DrawPlayer, DrawRecorder
from harmony.reference.outputs import loss_of
from harmony.reference.plain_step import Parts, PlainStep, Result, Tensors, left_on, tensors_of
from harmony.reference.snapshot import Snapshot, same_bits
from harmony.verification.outcome import agree, rows_of, verification_of
from harmony.verification.script import Verifier
from harmony.verification.side import (
    Call,
    Found,
    Reference,
    check_room,
    copied,
    device_factor,
    gradients_of,
    no_gradients,
    own_optimizer,
    parts_of,
    reference_device,
    states_of,
    untouched,
    weights_of,
)
from harmony.verification.verification import (
    SPLIT,
    Difference,
    Verification,
    compare_states,
    compare_updates,
    worst_first,
)


def verify(
    engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any
) -> Verification:
    """Run one step in both ways; nothing of the model, the optimizer or the process changes.

    Raises:
        ConfigError: if there is no loss, or it is scaled.
        DoesNotFitError: if the host has no memory for the second run.
        HarmonyError: whatever Harmony's own step raises.
    """
    if engine.grad_scaler is not None:
        raise ConfigError(
            'verify of a model with an optimizer and precision="fp16": the loss is scaled, which '
            "the reference step does not do. Verify a loop of your own, or with another precision"
        )
    return _Comparison(engine, (args, kwargs, targets)).run()


class _Comparison:
    """One batch, in both ways."""

    def __init__(self, engine: Engine, call: Call) -> None:
        self._engine = engine
        self._call = call
        self._options = engine.options
        self._net = engine.net
        self._steps = self._options.optimizer is not None
        self._step = engine.num_steps
        self._notes: list[str] = []
        self._more: list[Difference] = []

    def run(self) -> Verification:
        """Compare."""
        with untouched(self._engine) as snapshot:
            if any(tensor.is_meta for tensor in self._net.parameters()):
                self._give_values()
                snapshot = Snapshot(self._net)
            check_room(self._engine)
            start = {n: p.detach().clone() for n, p in self._net.named_parameters()}
            buffers = {n: b.detach().clone() for n, b in self._net.named_buffers()}
            no_gradients(self._engine)
            whole = self._plain()
            pairs = self._net.named_parameters()
            moved = {n: p.detach().clone() for n, p in pairs if not same_bits(p, start[n])}
            snapshot.restore()
            no_gradients(self._engine)
            found = self._harmony(snapshot)
            snapshot.restore()
            reference = self._reference(whole, found, snapshot)
            updates = self._updates(found, moved, start, snapshot)
            return verification_of(
                self._engine, found, reference, buffers, updates, self._notes, self._more
            )

    def _give_values(self) -> None:
        """Let parameters on the meta device have their values, which Harmony gives them."""
        kind = CallKind.TRAIN_STEP if self._steps else CallKind.OWN_LOOP
        try:
            self._engine.ready(kind, *self._call)
        except DynamicOnlyError as reason:
            raise ConfigError(
                "verify of a model without values that runs dynamically; give it values first: "
                f"train one batch, or build it without meta_init ({reason})"
            ) from reason

    # Plain PyTorch

    def _plain(
        self,
        parts: Parts = (),
        draws: DrawRecorder | DrawPlayer | None = None,
        weights: Mapping[Samples, float] | None = None,
    ) -> Result:
        options = self._options
        plain = PlainStep(
            self._net,
            options.loss_fn,
            *self._call,
            batch_dims=options.batch_dims,
            step=self._step,
            seed=options.seed,
            parts=parts,
            device=reference_device(self._engine),
            draws=draws,
            weights=weights or {},
            dtype=options.precision.dtype,
        )
        no_gradients(self._engine)
        result = plain.by_steps() if self._steps else plain.by_loop()
        if self._steps and options.max_grad_norm is not None:
            clipped = [torch.nn.Parameter(torch.empty_like(g)) for g in result.gradients.values()]
            for stand_in, gradient in zip(clipped, result.gradients.values(), strict=True):
                stand_in.grad = gradient
            torch.nn.utils.clip_grad_norm_(clipped, options.max_grad_norm)
        return result

    def _held_against(self, result: Result, factor: float, words: str) -> Reference:
        return Reference(result, factor, words, self._options.precision.dtype)

    def _reference(self, whole: Result, found: Found, snapshot: Snapshot) -> Reference:
        """Choose what Harmony's step is held against, and note what cannot be compared."""
        factor, number = device_factor(self._engine), found.num_microbatches
        fixed = self._options.microbatch_size is not None
        if number == 1:
            return self._held_against(whole, factor, "the whole batch")
        if not fixed and not whole.draws:
            return self._held_against(whole, SPLIT * factor, "the whole batch")
        recorder = DrawRecorder(reference_device(self._engine)) if whole.draws else None
        split = self._plain(found.parts, recorder)
        snapshot.restore()
        at_once: Reference | None = self._held_against(whole, SPLIT * factor, "the whole batch")
        if recorder is not None:
            words = "the whole batch, with the microbatches' random numbers"
            redrawn = self._redrawn(recorder, split, snapshot, number)
            at_once = (
                None if redrawn is None else self._held_against(redrawn, SPLIT * factor, words)
            )
        if at_once is not None and not fixed:
            return at_once
        in_parts = self._held_against(split, factor, "the same microbatches")
        if agree(found, in_parts):
            self._say_what_splitting_does(at_once, in_parts, found, snapshot)
            return in_parts
        if at_once is not None and agree(found, at_once):
            return at_once
        weighted = self._weighted(found, snapshot, factor)
        return weighted if weighted is not None and agree(found, weighted) else in_parts

    def _say_what_splitting_does(
        self, whole: Reference | None, parts: Reference, found: Found, snapshot: Snapshot
    ) -> None:
        """Note what the whole batch gives, where that is known and something else."""
        fixed = self._options.microbatch_size is not None
        if whole is None and not fixed:
            rows = self._without_draws(found.parts, {}, snapshot)
            self._more += [row for row in rows if not row.ok]
            if rows and not self._more:
                self._notes.append("in eval mode the microbatches give what the whole batch gives")
        elif whole is not None and not agree(parts.result, whole):
            loss, other = whole.result.loss, parts.result.loss
            assert loss is not None and other is not None
            self._notes.append(
                f"microbatch_size={self._options.microbatch_size} is part of what is computed: "
                f"the whole batch gives loss {float(loss):.6g}, microbatches {float(other):.6g}"
            )

    def _weighted(self, found: Found, snapshot: Snapshot, factor: float) -> Reference | None:
        """The same microbatches with Harmony's weights, where these are shown to be right.

        Weights that count labels rather than samples are checked in eval mode, in which the
        microbatches have to give what the whole batch gives.
        """
        weights = weights_of(self._engine, self._call)
        if not weights:
            return None
        shown = self._without_draws(found.parts, weights, snapshot)
        if not shown or not all(row.ok for row in shown):
            return None
        result = self._plain(found.parts, weights=weights)
        snapshot.restore()
        return self._held_against(
            result, factor, "the same microbatches, weighted by what they count"
        )

    def _without_draws(
        self, parts: Parts, weights: Mapping[Samples, float], snapshot: Snapshot
    ) -> list[Difference]:
        """Compare microbatches with the whole batch in eval mode, both by plain PyTorch."""
        self._net.eval()
        whole = self._plain()
        snapshot.restore()
        self._net.eval()
        split = self._plain(parts, weights=weights)
        snapshot.restore()
        if whole.draws:
            self._notes.append("eval mode draws random numbers too, so it shows nothing")
            return []
        rows = rows_of(split, self._held_against(whole, SPLIT, ""), whole.buffers)
        return [
            replace(row, name=f"in eval mode, microbatches against the whole batch: {row.name}")
            for part in rows
            for row in worst_first(part)[:1]
        ]

    def _redrawn(
        self, recorder: DrawRecorder, split: Result, snapshot: Snapshot, number: int
    ) -> Result | None:
        """The whole batch, with what the microbatches drew."""
        try:
            if split.draws_in_python:
                raise CannotJoinError("Python or NumPy draws them")
            return self._plain((), DrawPlayer(recorder))
        except CannotJoinError as reason:
            self._notes.append(
                f"not compared with the whole batch: the random numbers of {number} microbatches "
                f"cannot be drawn at once ({reason}). Plain PyTorch ran the same microbatches, "
                "each weighted by its samples"
            )
            return None
        finally:
            snapshot.restore()

    # Harmony

    def _harmony(self, snapshot: Snapshot) -> Found:
        args, kwargs, targets = copied(self._call)
        if not self._steps:
            return self._loop(args, kwargs, targets)
        engine, net = self._engine, self._net
        result = TrainSteps(engine).train_step(args, kwargs, targets, recorded=False)
        parts = parts_of(engine, result.num_samples)
        found = Found(
            loss=result.loss,
            gradients=gradients_of(engine),
            inputs={},
            buffers={n: b.detach().clone() for n, b in net.named_buffers()},
            params={n: p.detach().clone() for n, p in net.named_parameters()},
            state=states_of(engine.optimizer, net),
            parts=parts,
            left=left_on(net),
            given=tensors_of((args, kwargs, targets)),
        )
        absent = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
        if absent and self._options.updates == "auto" and not engine.factory.waits():
            snapshot.restore()
            found.gradients.update(self._gradients_on_host(absent))
        return found

    def _gradients_on_host(self, names: list[str]) -> Tensors:
        """Where a GPU has updated a parameter, its gradient has not left it: run up to these."""
        engine = self._engine
        engine.num_steps = self._step
        no_gradients(engine)
        try:
            ready = engine.ready(CallKind.TRAIN_STEP, *copied(self._call))
            TrainSteps(engine).run_step(ready, apply_updates=False)
        except (DynamicOnlyError, GuardError):  # live, every gradient comes to the host
            return {}
        ready.variant.host.publish_all()
        found = gradients_of(engine)
        return {name: found[name] for name in names if name in found}

    def _loop(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any) -> Found:
        engine, net = self._engine, self._net
        engine.verifier = Verifier(engine, None)
        state = GeneratorStates.now()
        try:
            with torch.enable_grad():
                out = OwnLoop(engine).forward(args, kwargs)
                state.restore()
                loss = loss_of(self._options.loss_fn, out, targets)
                torch.autograd.backward(loss)
        finally:
            engine.verifier = None
        leaves = [x for x in flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        given = {f"input {i}": x.grad.cpu() for i, x in enumerate(inputs) if x.grad is not None}
        plan = engine.record.plan
        whole = ((0, 1),)  # a model that runs as it is, without a plan, has one microbatch
        return Found(
            loss=loss.detach().cpu(),
            gradients=gradients_of(engine),
            inputs=given,
            buffers={n: b.detach().clone() for n, b in net.named_buffers()},
            parts=(whole,) if plan is None else parts_of(engine, plan.minibatch),
            left=left_on(net),
            given=tensors_of((args, kwargs, targets)),
        )

    def _updates(
        self, found: Found, moved: Tensors, start: Tensors, snapshot: Snapshot
    ) -> list[Difference]:
        """Take the optimizer's own step, from Harmony's gradients, and compare what it leaves.

        From these, since many an optimizer makes a large difference of the least one in a small
        gradient; that the gradients themselves are right is seen from them.
        """
        if not self._steps:
            self._notes.append("the optimizer's step is not Harmony's here, so it is not compared")
            return []
        params = dict(self._net.named_parameters())
        with torch.no_grad():
            for name, param in params.items():
                if name in moved:
                    param.copy_(moved[name])
                gradient = found.gradients.get(name)
                param.grad = None if gradient is None else gradient.clone()
        optimizer = own_optimizer(self._engine)
        optimizer.step()
        after = {n: p.detach().clone() for n, p in params.items()}
        state = states_of(optimizer, self._net)
        snapshot.restore()
        rows = compare_updates(found.params, after, start, 1.0)
        return [*rows, *compare_states(found.state, state, 1.0)]
