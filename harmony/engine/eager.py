"""Trains a module as it is: its own Python runs once for each microbatch, on the first GPU.

The last capture_mode of the ladder, for what no recording can stand for: forwards that write
    outside of the model, read what nothing can look at, or carry tensors from one call to the
    next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from harmony.capture import (
    Batch,
    Captured,
    Outside,
    brought_home,
    running_on,
    seed_python,
    undisturbed,
)
from harmony.capture.guards.checkpoints import CheckpointWatch, checkpoints_watched
from harmony.capture.guards.reachable import World
from harmony.capture.loss.weights import LossWeigher, parts_asked_for
from harmony.capture.state.caller_arguments import Lent, place_of
from harmony.capture.trace.program import Program
from harmony.core.units import format_bytes
from harmony.engine.call_key import Call, CallKind
from harmony.engine.options import EngineOptions
from harmony.engine.peers import Peers
from harmony.engine.variants import VariantCache
from harmony.errors import DoesNotFitError
from harmony.runtime.device import DeviceContext
from harmony.runtime.interrupts import held_back
from harmony.runtime.step.randomness import microbatch_seed

Range = tuple[int, int]


class EagerRunner:
    """Runs one model as it is."""

    def __init__(
        self,
        net: nn.Module,
        context: DeviceContext,
        options: EngineOptions,
        variants: VariantCache,
        say: Callable[[str], None],
    ) -> None:
        """Run on one device.

        Args:
            say: warns once.
        """
        self._net = net
        self._context = context
        self._options = options
        self._variants = variants
        self._say = say
        self._outside: dict[CallKind, Outside] = {}
        self.peers: Peers | None = None

    def train(
        self, call: Call, minibatch: int, step: int, captured: Captured | None
    ) -> torch.Tensor:
        """Run forward and backward of every microbatch; return the loss. The update is to follow.

        A step that fails leaves the model, and what its forward can reach, as they were.

        Args:
            captured: a recording of the step, to read off how its loss adds up; None if there
                is none.
        """
        self._variants.activate(None)  # it needs the memory
        loss_fn = self._options.loss_fn
        program = Program(loss_fn, output_loss=loss_fn is None)
        size = min(self._options.microbatch_size or minibatch, minibatch)
        outside = self._of(CallKind.TRAIN_STEP, loss_fn)
        ranges = [(low, min(low + size, minibatch)) for low in range(0, minibatch, size)]
        weights = self._weights(call, ranges, captured)
        try:
            with self._as_before(outside), held_back() as held, held.open():
                return self._gradients(program, call, ranges, weights, step, outside)
        except torch.OutOfMemoryError as error:
            # Smaller microbatches may be other training: only the user can say that they are not.
            raise self._does_not_fit(size, error) from None

    def forward(self, args: Any, kwargs: Any, step: int) -> Any:
        """Run the forward; its outputs are part of autograd's graph as in plain PyTorch."""
        self._variants.activate(None)  # it needs the memory
        device, home = self._context.device, _device_of((args, kwargs))
        outside = self._of(CallKind.OWN_LOOP, None)
        try:
            with undisturbed(device), self._as_before(outside):
                self._seed(step, 0)
                lent = Lent((args, kwargs, None), device)
                args, kwargs, _ = lent.call
                with self._watching(outside), running_on(device), outside.watched():
                    out = self._net(*args, **kwargs)
                    out = brought_home(out, home)
                lent.check(place_of(self._net))
                self._come_home(outside)
            lent.give_back()
        except torch.OutOfMemoryError as error:
            raise self._does_not_fit(None, error) from None
        return out

    def _gradients(
        self,
        program: Program,
        call: Call,
        ranges: list[Range],
        weights: dict[Range, float],
        step: int,
        outside: Outside,
    ) -> torch.Tensor:
        device, total = self._context.device, torch.zeros(())
        for param in self._net.parameters():
            param.grad = None
        changed: list[Lent] = []
        with undisturbed(device):
            for index, samples in enumerate(ranges):
                self._seed(step, index)
                part = call if len(ranges) == 1 else self._part(call, samples)
                lent = Lent(part, device)
                with self._watching(outside), running_on(device):
                    with outside.watched():
                        loss = program(self._net, *lent.call)
                    lent.check(place_of(self._net))
                    weight = weights[samples]
                    with torch.autocast(device.type, enabled=False):  # on for the forward only
                        torch.autograd.backward(loss, torch.full_like(loss, weight))
                total = total + loss.detach().to("cpu").reshape(()) * weight
                dtype = loss.dtype
                if lent.is_changed:
                    changed.append(lent)
                del loss, part, lent
                self._come_home(outside)
        self._options.check_finite(self._net, total, ranges[-1][1])
        for lent in changed:
            lent.give_back()
        return total.to(dtype)

    def _part(self, call: Call, samples: Range) -> Call:
        return Batch.of(*call, self._options.batch_dims).part(*call, *samples)

    def _weights(
        self, call: Call, ranges: list[Range], captured: Captured | None
    ) -> dict[Range, float]:
        """How much the loss of each microbatch counts."""
        minibatch = ranges[-1][1]
        by_samples = {(low, high): (high - low) / minibatch for low, high in ranges}
        if len(ranges) == 1:
            return by_samples
        if captured is None or captured.graph.loss is None:
            doubt: str | None = "no recording shows how the loss puts samples together"
            found = by_samples
        else:
            inputs = captured.flatten_inputs(*call)
            known = LossWeigher(captured).weigh(captured.graph.loss, inputs, ranges)
            found, doubt = dict(known.weights), known.doubt
        if doubt is not None:
            self._say(parts_asked_for(doubt, minibatch, ranges[0][1]))
        return found

    def _seed(self, step: int, index: int) -> None:
        index += 0 if self.peers is None else self.peers.first_microbatch
        seed = microbatch_seed(step, index, self._options.seed)
        torch.default_generator.manual_seed(seed)
        seed_python(seed)
        self._context.set_random_state(self._context.seeded_state(seed))

    @contextmanager
    def _watching(self, outside: Outside) -> Iterator[None]:
        """Let checkpointed functions in the block be refused if they change something."""

        @functools.cache
        def world() -> World:
            return outside.state()

        def changes() -> list[str]:
            return [holder.name for holder in world().holders if not holder.same()]

        with checkpoints_watched(CheckpointWatch(self._net.modules(), changes)):
            yield

    def _of(self, kind: CallKind, loss: Any) -> Outside:
        if kind not in self._outside:
            self._outside[kind] = Outside(self._net, loss)
        return self._outside[kind]

    @contextmanager
    def _as_before(self, outside: Outside) -> Iterator[None]:
        """Put everything back unless the block comes to its end."""
        state = outside.state()
        buffers = [(buffer, buffer.clone()) for buffer in self._net.buffers()]
        modes = [(module, module.training) for module in self._net.modules()]
        try:
            yield
        except BaseException:
            state.restore()
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            raise

    def _come_home(self, outside: Outside) -> None:
        """Let nothing that the forward has left anywhere stay on the device."""
        device = self._context.device
        for module in self._net.modules():
            held = module._buffers
            for name, buffer in held.items():
                if buffer is not None and buffer.device == device:
                    held[name] = buffer.to("cpu")
        outside.bring_home(device)

    def _does_not_fit(self, size: int | None, error: Exception) -> DoesNotFitError:
        limit = format_bytes(self._context.limit_nbytes())
        what = "the batch" if size is None else f"a microbatch of {size} samples"
        return DoesNotFitError(
            f"{what} does not fit {self._context.device} ({limit}), where the model is run as it "
            f"is ({error}). Use smaller batches, say with microbatch_size= that smaller ones are "
            "meant, or let the forward leave nothing behind, so that it can be planned"
        )


def _device_of(call: Any) -> torch.device:
    """Where the outputs of a call belong: beside its first tensor."""
    leaves = torch.utils._pytree.tree_leaves(call)
    first = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
    return torch.device("cpu") if first is None else first.device
