"""Dynamic mode: control flow depends on data, so each microbatch is traced as it runs.

A dynamic microbatch costs one forward more than a planned one: first the forward runs for real, to
see which path it takes, then the layers of that path run as any other, planned and verified.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from harmony.capture import (
    Batch,
    DynamicOnlyError,
    DynamicTrace,
    or_eager,
    plain_attributes,
    same_path,
    seed_python,
)
from harmony.capture.loss.weights import LiveWeights, parts_asked_for
from harmony.core.warn import warn
from harmony.engine.call_key import Call, CallKind
from harmony.engine.minibatch import detached
from harmony.engine.options import EngineOptions
from harmony.engine.paths import Paths, PathsKey, use_last
from harmony.engine.peers import Peers
from harmony.engine.planned import Measured, Planned
from harmony.engine.step_result import RanStep, ReadyStep
from harmony.engine.variant import Variant
from harmony.engine.variant_factory import VariantFactory
from harmony.engine.variants import VariantCache
from harmony.errors import ConfigError, DoesNotFitError
from harmony.planner.search.candidates import REMEDY
from harmony.report.session import ModelRecord
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.out_of_memory import with_room
from harmony.runtime.interrupts import held_back
from harmony.runtime.step.randomness import microbatch_seed
from harmony.runtime.step.recompute import ReplayState
from harmony.runtime.unsaved import about_to_change
from harmony.runtime.update.optimizer import PackOptimizer
from harmony.runtime.update.param_hooks import GradientSums, call_hooks


class DynamicRunner:
    """The dynamic runs of one model.

    Attributes:
        size: samples of a microbatch of a step; None before there was one.
    """

    def __init__(
        self,
        net: nn.Module,
        context: DeviceContext,
        options: EngineOptions,
        factory: VariantFactory,
        variants: VariantCache,
        optimizer: PackOptimizer | None,
        record: ModelRecord,
    ) -> None:
        self._net = net
        self._context = context
        self._options = options
        self._factory = factory
        self._variants = variants
        self._optimizer = optimizer
        self._record = record
        self._captures: dict[CallKind, DynamicTrace] = {}
        self._known: dict[PathsKey, Paths] = {}
        self.size: int | None = None
        self.peers: Peers | None = None
        self._generation = 0
        self._noticed: set[str] = set()

    def notice(self, reason: DynamicOnlyError) -> None:
        """Warn once that the model runs dynamically, and why."""
        if reason.eager:
            self.say(
                f"{reason.reason} ({reason.where}), so no recorded forward stands for the next: "
                "the model is run as it is, on one GPU, its parameters streamed and all that its "
                f"backward needs kept on the host. To be planned, and to run on all GPUs, "
                f"{reason.remedy}"
            )
            return
        self.say(
            f"{reason.reason} ({reason.where}), so no recorded forward stands for the next: each "
            "microbatch is recorded on its way, which takes one forward more, and microbatches "
            "run one after the other. To be planned as a whole, let the decision be made inside "
            "of a layer (a module that is one block), or outside of the model"
        )

    def say(self, text: str) -> None:
        """Warn once."""
        if text not in self._noticed:
            self._noticed.add(text)
            self._record.warn(text)
            warn(text)

    def forget(self) -> None:
        """Forget all captures."""
        self._captures.clear()
        self._known.clear()

    def ready(
        self, kind: CallKind, call: Call, step: int, index: int, num_samples: int | None = None
    ) -> ReadyStep:
        """Capture one microbatch, number ``index`` of the step, and plan for it.

        Args:
            num_samples: of the microbatch, where it is a part of the batch.
        """
        args, kwargs, targets = call
        first_index = index
        self._options.precision.check(self._net)
        self._variants.activate(None)  # the forward needs the memory
        if self._generation != self._factory.generation:  # the model is another
            self.forget()
            self._generation = self._factory.generation
        # Whatever is captured holds on to `begin`, so that must not hold on to the model.
        index += 0 if self.peers is None else self.peers.first_microbatch
        seed, context = microbatch_seed(step, index, self._options.seed), self._context

        def begin() -> None:
            torch.default_generator.manual_seed(seed)
            seed_python(seed)
            context.set_random_state(context.seeded_state(seed))

        run = self._capture_of(kind).capture
        capture = partial(run, args, kwargs, targets, begin, num_samples)
        with or_eager(self._net):
            captured = with_room("the forward of a microbatch", [context.device], capture)
        if captured.eager is not None:
            raise DynamicOnlyError(captured.eager, type(self._net).__name__, eager=True)
        key, batch, _ = self._variants.key(kind, call)
        paths = use_last(self._known, key)
        standing = (b for b in paths.variants if b.captured.guards.same())
        same = (b for b in standing if same_path(b.captured, captured))
        variant = next(same, None) or self._factory.bind(captured, kind)
        paths.use(variant)
        size = captured.num_samples  # its trace is good for no other
        inputs = captured.inputs_of(batch)
        self._variants.activate(variant)
        measure = partial(self._variants.measured, variant, kind, size, inputs, [size])
        measured = with_room("measuring the layers", [context.device], measure)
        planned = self._plan(variant, size, measured)
        weights, _ = variant.weights(inputs, planned)
        moved, set_up = captured.moved, captured.trace.set_up
        return ReadyStep(variant, planned, inputs, weights, first_index, moved, set_up)

    def train(
        self, call: Call, minibatch: int, step: int, run: Callable[[ReadyStep], RanStep]
    ) -> RanStep:
        """Run forward and backward of every microbatch; `update` is to follow.

        A step that fails leaves buffers and Python attributes as they were; so does Ctrl-C, which
        is heard in it.

        Args:
            run: runs a microbatch and leaves its gradients as ``grad``.
        """
        asked = self._options.microbatch_size
        size = min(asked or minibatch, minibatch)
        before = ModuleState(self._net)
        try:
            with held_back() as held, held.open():
                done = self._train(call, minibatch, size, step, run)
        except BaseException as error:
            before.restore()
            if not isinstance(error, DoesNotFitError) or asked is not None:
                raise
            raise DoesNotFitError(
                f"{error}. The {minibatch} samples are one microbatch, since what the forward does"
                f" is known only as it runs. {REMEDY}"
            ) from error
        self.size = size
        return done

    def _train(
        self,
        call: Call,
        minibatch: int,
        size: int,
        step: int,
        run: Callable[[ReadyStep], RanStep],
    ) -> RanStep:
        batch = Batch.of(*call, self._options.batch_dims)
        weights = LiveWeights(minibatch)
        fixed = self._options.microbatch_size is not None
        sums = GradientSums(dict(self._net.named_parameters()), hooks_each=fixed)
        total = torch.zeros(())
        for index, low in enumerate(range(0, minibatch, size)):
            high = min(low + size, minibatch)
            part = batch.part(*call, low, high)
            ready = self.ready(CallKind.TRAIN_STEP, part, step, index, high - low)
            captured, loss = ready.variant.captured, ready.variant.graph.loss
            assert loss is not None
            weight = weights.weigh(captured, loss, detached(ready.inputs))
            ran = run(replace(ready, weights=dict.fromkeys(ready.weights, weight)))
            total = total + ran.loss
            self.commit(ready, ran.replay, [])
            if sums.hooked and high < minibatch:
                self._check_hooks(weights)
            sums.add()
        if weights.doubt is not None:
            self._record.warn(parts_asked_for(weights.doubt, minibatch, size))
        scale = weights.scale()
        if scale != 1.0:
            total = total * scale
            for gradient in sums.sums.values():
                gradient.mul_(scale)
        assert self._factory.arenas is not None
        sums.publish(self._factory.arenas[1].own)
        if not fixed:
            call_hooks(self._net.parameters())
        self._options.check_finite(self._net, total, minibatch)
        return replace(ran, loss=total)

    def _check_hooks(self, weights: LiveWeights) -> None:
        """Refuse hooks on gradients of microbatches whose weights only the last one tells.

        Raises:
            ConfigError: with the remedy.
        """
        if weights.by_targets:
            raise ConfigError(
                "a parameter has a hook, and the forward is run dynamically: what each "
                "microbatch's "
                "gradient counts is known only after the last, since the loss is a mean over the "
                "targets that count. Leave microbatch_size= out, or put the hook's work into a "
                "step_pre_hook of the optimizer"
            )

    def update(self, begun: list[str]) -> None:
        """Update all parameters from the gradients that `train` has left.

        Args:
            begun: hears when the first parameter is about to change.
        """
        optimizer, params = self._optimizer, list(self._net.parameters())
        assert optimizer is not None, "only train_step trains here"
        exchange = None if self.peers is None else self.peers.average_gradients()
        optimizer.measure(params, share=None if exchange is None else exchange.share)
        if exchange is not None:
            exchange.agree()
        if optimizer.skips:
            return
        about_to_change(params)
        begun.append("all packs")
        if exchange is not None:
            exchange.begin_updates()
        optimizer.update_all(params)
        if exchange is not None:
            exchange.finish()
            optimizer.has_stepped()  # where other processes update all

    def commit(self, ready: ReadyStep, replay: ReplayState, begun: list[str]) -> None:
        """Let the model have what a forward has changed.

        Args:
            begun: hears when the first change is about to be made.
        """
        replay.states.commit(begun)
        ready.set_up.leave()
        if not ready.moved:
            return
        begun.append("what the forward changes")
        modules = dict(self._net.named_modules())
        for module, attribute, held in ready.moved:
            modules[module].__dict__[attribute] = held

    def _plan(self, variant: Variant, size: int, measured: Measured) -> Planned:
        planned = variant.plan(size, measured, ("pp", size, "recompute"))
        self._record.planned(planned.plan, planned.predicted)
        return planned

    def _capture_of(self, kind: CallKind) -> DynamicTrace:
        if kind not in self._captures:
            loss = self._options.loss_fn if kind is CallKind.TRAIN_STEP else None
            self._captures[kind] = DynamicTrace(
                self._net,
                self._context.device,
                loss=loss,
                output_loss=kind is CallKind.TRAIN_STEP and loss is None,
                param_dtype=self._options.precision.dtype,
            )
        return self._captures[kind]


class ModuleState:
    """Buffers and plain attributes of a module tree, to go back to."""

    def __init__(self, net: nn.Module) -> None:
        self._buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
        self._attributes = [
            (module, copy.deepcopy(dict(plain_attributes(module)))) for module in net.modules()
        ]

    def restore(self) -> None:
        """Go back."""
        for buffer, before in self._buffers:
            buffer.copy_(before)
        for module, attributes in self._attributes:
            for name in dict(plain_attributes(module)):
                if name not in attributes:
                    del module.__dict__[name]
            module.__dict__.update(attributes)
