"""Dynamic capture: the forward of one microbatch runs for real on the device while it is recorded.

For forwards whose path depends on what they compute, on random numbers, or on Python state: the
trace of one run does not stand for the next. Parameters are brought to the device leaf by leaf and
let go of at once, so the forward needs the memory of one leaf and of the values between leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from harmony.capture.eager.lender import Lender
from harmony.capture.graph.assemble import OneSize
from harmony.capture.guards.observe import Observed
from harmony.capture.guards.outside import Outside
from harmony.capture.replay.captured import Captured
from harmony.capture.replay.inputs import Batch
from harmony.capture.replay.replay import FACTORIES
from harmony.capture.replay.same_steps import same_steps
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.trace.kernels import KernelWatch
from harmony.capture.trace.leaves import choose_leaves
from harmony.capture.trace.program import Program
from harmony.capture.trace.record import Recorder
from harmony.capture.trace.refuse import check_module
from harmony.capture.trace.tracer import Tracer


class DynamicTrace:
    """Captures one forward after the other of a module; each for one microbatch only."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        *,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        output_loss: bool = False,
        param_dtype: torch.dtype | None = None,
    ) -> None:
        """Run on ``device``.

        Args:
            loss, output_loss, param_dtype: as for `harmony.capture.capture`.
        """
        check_module(module)
        self._module = module
        self._device = device
        self._param_dtype = param_dtype
        self._program = Program(loss, output_loss)
        self._leaves = choose_leaves(module)
        self._known: Observed | None = None

    def capture(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        targets: Any,
        begin: Callable[[], None],
        num_samples: int | None = None,
    ) -> Captured:
        """Run the forward on a microbatch and return its layers, good for this microbatch.

        Args:
            num_samples: of the microbatch, where it is a part of the caller's batch.
            begin: called where the forward begins, to seed the random generators; what they were
                is restored afterwards.
        """
        template = ModuleShell(self._module, torch.device("cpu"), self._param_dtype)
        batch = Batch.of(args, kwargs, targets, {}, num_samples).detached()
        tracer = _DynamicTracer(self._module, template, self._program, batch, self._leaves)
        tracer.device, tracer.begin = self._device, begin
        if self._known is not None:
            tracer.outside = Outside(self._module, self._program.loss, self._known)
            tracer.outside.arguments = batch.objects()
        try:
            trace = tracer.trace(batch.num_samples)
        finally:
            tracer.outside.restore()
        self._leaves, self._known = tracer.leaves, tracer.outside.observed
        sizes = OneSize.of(trace, batch.num_samples)
        return Captured(tracer, template, batch, sizes, self._program.has_loss)


def same_path(first: Captured, second: Captured) -> bool:
    """Whether two dynamic captures compute the same from their inputs and parameters."""
    one, two = first.trace, second.trace
    return same_steps((one.steps, one.values), (two.steps, two.values))


class _DynamicTracer(Tracer):
    """Traces a real run on a device, with parameters that come when they are needed."""

    begin: Callable[[], None]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._real = True

    def _parameters(self, twin: ModuleShell) -> dict[str, torch.Tensor]:
        self._lender = Lender(self._source, twin)
        return self._lender.fakes

    def _recorder(
        self, twin: ModuleShell, stand_ins: Mapping[int, Any], kernels: KernelWatch
    ) -> Recorder:
        return _DynamicRecorder(self._lender, twin, self.leaves, self.device, stand_ins, kernels)

    def _begin(self) -> None:
        self.begin()


class _DynamicRecorder(Recorder):
    """Records a real run for which parameters are lent step by step."""

    def __init__(self, lender: Lender, twin: ModuleShell, *args: Any) -> None:
        super().__init__(twin, *args)
        self.once = True
        self._lender = lender

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._leaf is None or self._busy:
            return super().__torch_function__(func, types, args, kwargs)
        with self._real_among(args, kwargs or {}) as (args, kwargs, real):
            out = super().__torch_function__(func, types, args, kwargs)
            return self._lender.handed_on(out, real)

    def _call_leaf(
        self, module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        with (
            self._lender.lent(self._lender.names_in(module)) as own,
            self._references.lent(own),
            self._real_among(args, kwargs) as (args, kwargs, given),
        ):
            out = super()._call_leaf(module, name, call, args, kwargs)
            return self._lender.handed_on(out, {**own, **given})

    def _call_function(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        (args, kwargs), _, _ = self._references.stand_in(args, kwargs)
        if name in FACTORIES and "device" not in kwargs:
            kwargs = {**kwargs, "device": self._device}  # as in the replay
        with self._real_among(args, kwargs) as (args, kwargs, real):
            out = super()._call_function(func, name, args, kwargs)
            return self._lender.handed_on(out, real)

    @contextmanager
    def _real_among(
        self, args: Any, kwargs: Any
    ) -> Iterator[tuple[Any, Any, dict[str, torch.Tensor]]]:
        """Lend the parameters among arguments, known for what they are, until the block ends."""
        with (
            self._lender.among(args, kwargs) as (args, kwargs, real),
            self._references.lent(real),
        ):
            yield args, kwargs, real
