"""The traces of a model, one for each number of samples, all with the same layers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress

import torch

from harmony.capture.graph.assemble import OneSize, OtherLength, Sizes
from harmony.capture.graph.layered import LayeredTrace, check_same_layers, difference
from harmony.capture.graph.layers import cut_layers
from harmony.capture.graph.trace import StepKind, Trace, ValueRef
from harmony.capture.guards.written import SetUp
from harmony.capture.trace.isolation import user_frame_of
from harmony.capture.trace.refuse import DynamicOnlyError
from harmony.capture.trace.tracer import Tracer
from harmony.errors import CaptureError, HarmonyError

_MOST_TRIED = 8
"""Choices of samples that are tried until one takes the path that was recorded."""


class TraceSet:
    """Traces numbers of samples as they are asked for, on any thread.

    Attributes:
        reference: the trace that the layers were found on; all others have the same.
    """

    def __init__(
        self,
        tracer: Tracer,
        sizes: Sizes,
        param_nbytes: Mapping[str, int],
        num_samples: int,
    ) -> None:
        """Cut the first trace into layers.

        Args:
            sizes: the first traces.
            param_nbytes: bytes of the parameters by name.
            num_samples: samples of the batch that is traced.
        """
        self._tracer = tracer
        self._param_nbytes = dict(param_nbytes)
        self._sizes = sizes
        self._num_samples = num_samples
        self._only = sizes.only
        self._traced_for = sizes.num_samples[0]
        self.reference = self._cut(sizes.trace)
        self._traces = {self._traced_for: self.reference}
        self._other_ways: dict[int, DynamicOnlyError] = {}
        self._lock = threading.Lock()

    def of(self, num_samples: int) -> LayeredTrace:
        """Return the trace for microbatches of this size; traces it the first time.

        Raises:
            DynamicOnlyError: if the layers exchange other values for this size.
            CaptureError: if the forward fails for so many samples.
        """
        known = self._traces.get(num_samples)
        if known is not None:
            return known
        with self._lock:
            if num_samples in self._other_ways:
                raise self._other_ways[num_samples].again()
            if num_samples not in self._traces:
                self._traces[num_samples] = self._trace(num_samples)
            return self._traces[num_samples]

    def opened(self, num_samples: int, modules: AbstractSet[str]) -> Trace:
        """Return a trace on which these modules are not opaque. Only to be read, never run."""
        tracer = self._tracer
        with self._lock:
            leaves = tracer.leaves
            tracer.leaves = leaves - modules
            try:
                return tracer.trace(num_samples)
            finally:
                tracer.leaves = leaves

    def foreseen(self, num_samples: int) -> bool:
        """Whether so many samples take the path of the first ones, as `Sizes.foresees` has it.

        Raises:
            CaptureError: as `of`.
        """
        return num_samples == 1 or self._sizes.foresees(self.of(num_samples).trace, num_samples)

    def other_length(self, tracer: Tracer, num_samples: int) -> OtherLength | None:
        """Trace a batch of another length for one number of samples, where that is enough.

        What depends on the number of samples is known if the steps are the same as here.

        Returns:
            None if they are not; then nothing is left of the try.
        """
        before, tracer.state = tracer.state, self._tracer.state
        size, found = _at_least_two(num_samples), None
        with suppress(CaptureError):  # whoever traces two sizes meets it again
            found = OtherLength.of(trace_other(tracer, size), size, self._sizes)
        if found is None:
            tracer.state = before
        return found

    def set_up(self, num_samples: int) -> SetUp:
        """Return what the forward sets up for later ones, with so many samples."""
        known = (self._sizes.other, *(layered.trace for layered in self._traces.values()))
        if not any(trace.set_up for trace in known):
            return SetUp()
        return self.of(num_samples).trace.set_up

    def first_guard(self) -> str:
        """File and line of the first decision that the forward takes by looking at values."""
        trace = self.reference.trace
        steps = (*trace.host_program, *trace.steps)  # what the inputs decide comes first
        return next((s.where for s in steps if s.kind is StepKind.GUARD), "?")

    def _trace(self, num_samples: int) -> LayeredTrace:
        """Trace another number of samples, of those that take the same path."""
        if self._only:
            raise CaptureError(
                f"{num_samples} samples, where only {self._traced_for} are possible: {self._only}"
            )
        where = (self._traced_for, num_samples)
        for first in range(min(self._num_samples, _MOST_TRIED)):
            layered = self._cut(self._recorded(num_samples, first))
            try:
                self._check_steps(layered, where)
                check_same_layers(self.reference, layered, where)
                self._check_sizes(layered, num_samples)
            except CaptureError as error:
                failure = error
            else:
                return layered
        found = DynamicOnlyError(str(failure), self.first_guard())
        self._other_ways[num_samples] = found
        raise found.again()

    def _recorded(self, num_samples: int, first: int) -> Trace:
        sizes = self._sizes
        if (num_samples, first) == (sizes.num_samples[1], 0):
            return sizes.other
        return trace_other(self._tracer, num_samples, first)

    def _check_steps(self, layered: LayeredTrace, num_samples: tuple[int, int]) -> None:
        """Refuse another path for another number of samples, as `first_traces` does.

        One sample may have other steps: ``contiguous`` does nothing, for instance.

        Raises:
            CaptureError: naming the first step that differs.
        """
        if not isinstance(self._sizes, OtherLength) or min(num_samples) == 1:
            return
        one, size = self.reference.trace, self._traced_for
        found = difference(one, layered.trace, num_samples)
        if found is None:
            return
        if difference(one, trace_other(self._tracer, 2 * size), (size, 2 * size)) is not None:
            raise CaptureError(found)

    def _check_sizes(self, layered: LayeredTrace, num_samples: int) -> None:
        """Refuse a trace on which what crosses the layers is larger or smaller than planned for.

        Raises:
            CaptureError: naming the value.
        """
        for planned, number in zip(self.reference.crossing, layered.crossing, strict=True):
            per_sample, fixed = self._sizes.nbytes(planned)
            expected, value = per_sample * num_samples + fixed, layered.trace.values[number]
            if value.nbytes != expected:
                raise CaptureError(
                    f"{value.name} makes {value.nbytes} bytes for {num_samples} samples, where "
                    f"{self._traced_for} samples made one expect {expected}"
                )

    def _cut(self, trace: Trace) -> LayeredTrace:
        inseparable = self._sizes.inseparable_on(trace)
        return LayeredTrace(trace, cut_layers(trace, self._param_nbytes, inseparable))


def first_traces(tracer: Tracer, num_samples: int) -> Sizes:
    """Trace two sizes that take the same path, to see what depends on the number of samples.

    One sample would not do: sizes of one broadcast, and count as contiguous. Where the forward
    runs for the batch as it is but for no other number of samples, that is the only size.

    Raises:
        DynamicOnlyError: if every two sizes take different paths.
    """
    size = _at_least_two(num_samples)
    others = [size // 2, 2 * size] if size >= 4 else [2 * size]
    found: str | None = None
    failure = ""
    for other in others:
        before = tracer.state
        try:
            traces = _trace_both(tracer, size, other)
        except DynamicOnlyError:
            raise
        except CaptureError as error:
            failure = failure or str(error)
            tracer.state = before  # what that try has found out may be of its size only
            continue
        found = difference(*traces, (size, other))
        if found is None:
            sizes = Sizes(*traces, (size, other))
            failure = _output_of_all(sizes)
            if not failure:
                return sizes
            break
    if failure:
        return OneSize.of(tracer.trace(num_samples), num_samples, failure)
    raise DynamicOnlyError(str(found), tracer.name)


def _at_least_two(num_samples: int) -> int:
    return max(num_samples, 2)


def _output_of_all(sizes: Sizes) -> str:
    """Name an output that is not made of parts: similarities of all pairs, for instance."""
    for leaf in sizes.trace.outputs:
        if isinstance(leaf, ValueRef) and not sizes.is_linear(leaf.id):
            shapes = [tuple(trace.values[leaf.id].shape) for trace in (sizes.trace, sizes.other)]
            return (
                f"an output ({sizes.trace.values[leaf.id].name}) has the shapes {shapes[0]} and "
                f"{shapes[1]} for {sizes.num_samples[0]} and {sizes.num_samples[1]} samples"
            )
    return ""


def _trace_both(tracer: Tracer, one: int, two: int) -> tuple[Trace, Trace]:
    """Record two sizes with the same leaves: either may have to open some."""
    while True:
        leaves = tracer.leaves
        traces = trace_other(tracer, one), trace_other(tracer, two)
        if tracer.leaves == leaves:
            return traces


def trace_other(tracer: Tracer, num_samples: int, first: int = 0) -> Trace:
    """Record the forward on a number of samples that the caller did not choose.

    Raises:
        CaptureError: if it fails for so many, whatever it is that it raises.
    """
    try:
        return tracer.trace(num_samples, first)
    except (HarmonyError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CaptureError(
            f"the forward fails for {num_samples} samples of this batch "
            f"({type(error).__name__}: {error}, at {user_frame_of(error)})"
        ) from error
