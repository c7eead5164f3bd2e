"""A trace that is cut into layers: which steps each has, which values cross them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from harmony.capture.graph.layers import changed_storages
from harmony.capture.graph.trace import Step, Trace, ValueRef
from harmony.core.layergraph import MODEL_INPUT
from harmony.errors import CaptureError


@dataclass(frozen=True)
class LayerChanges:
    """What the forward of a layer leaves changed, beside its outputs.

    Attributes:
        buffers: their names.
        attributes: Python attributes: name of the module, attribute.
        feeds_outputs: whether the outputs may depend on those buffers, so that the recompute has
            to start from what they were. Running statistics of norms feed none in train mode.
    """

    buffers: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()
    feeds_outputs: bool = True


def changes_of(steps: Sequence[Step]) -> LayerChanges:
    """Return what steps change; whether that feeds outputs is for the caller to say."""
    buffers = dict.fromkeys(name for step in steps for name in step.changes)
    attributes = dict.fromkeys(attribute for step in steps for attribute in step.counts)
    return LayerChanges(tuple(buffers), tuple(attributes))


class LayeredTrace:
    """The layers of a trace.

    Attributes:
        ranges: indices of the steps of each layer.
        crossing: numbers of the values that cross layers or leave the model, inputs first: the
            values of the graph in order.
        ids: the inverse of ``crossing``.
        outputs: numbers of the values that the model returns.
        changes: per layer, the storages that it changes in place.
    """

    def __init__(self, trace: Trace, starts: Sequence[int]) -> None:
        self.trace = trace
        self._starts = starts
        ends = [*starts[1:], len(trace.steps)]
        self.ranges = [range(low, high) for low, high in zip(starts, ends, strict=True)]
        self.outputs = {leaf.id for leaf in trace.outputs if isinstance(leaf, ValueRef)}
        self._consumers: dict[int, set[int]] = {}
        for index, step in enumerate(trace.steps):
            for number in step.inputs:
                self._consumers.setdefault(number, set()).add(self.of_step(index))
        self.crossing = self._find_crossing()
        self.ids = {number: index for index, number in enumerate(self.crossing)}
        layers = range(len(starts))
        self.changes = [changed_storages(self.steps(layer), trace) for layer in layers]

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.ranges)

    def of_step(self, index: int) -> int:
        """The layer of a step."""
        return bisect_right(self._starts, index) - 1

    def steps(self, layer: int) -> list[Step]:
        """The steps of a layer."""
        return [self.trace.steps[index] for index in self.ranges[layer]]

    def producer(self, number: int) -> int:
        """The layer that makes a value, or ``MODEL_INPUT``."""
        step = self.trace.producer[number]
        return MODEL_INPUT if step < 0 else self.of_step(step)

    def later_consumers(self, number: int) -> tuple[int, ...]:
        """The layers after its producer that read a value."""
        producer = self.producer(number)
        return tuple(sorted(c for c in self._consumers.get(number, ()) if c > producer))

    def users_of_state(self) -> dict[str, list[int]]:
        """The layers that use each parameter and buffer."""
        users: dict[str, list[int]] = {}
        for index, step in enumerate(self.trace.steps):
            for name in step.state:
                users.setdefault(name, []).append(self.of_step(index))
        return users

    def outline(self) -> object:
        """What the LayerGraph takes from a trace, whatever its number of samples."""
        layers = [
            (
                {name for step in steps for name in step.state},
                any(step.random for step in steps),
                changes_of(steps),
            )
            for steps in map(self.steps, range(self.num_layers))
        ]
        inputs = [self.ids.get(number) for number in self.trace.inputs if number is not None]
        outputs = [
            self.ids[leaf.id] if isinstance(leaf, ValueRef) else None
            for leaf in self.trace.outputs
        ]
        values = [
            (self.producer(n), self.later_consumers(n), value.dtype, value.requires_grad)
            for n, value in ((n, self.trace.values[n]) for n in self.crossing)
        ]
        return layers, inputs, outputs, values, self.trace.output_structure

    def _find_crossing(self) -> tuple[int, ...]:
        numbers = range(len(self.trace.values))
        found = [n for n in numbers if n in self.outputs or self.later_consumers(n)]
        return tuple(sorted(found, key=lambda n: (self.producer(n) != MODEL_INPUT, n)))


def check_same_layers(one: LayeredTrace, two: LayeredTrace, num_samples: tuple[int, int]) -> None:
    """Refuse traces for different numbers of samples whose layers exchange other values.

    Steps inside a layer may differ: ``contiguous`` of one sample, for instance, does nothing.

    Raises:
        CaptureError: naming the first step that differs.
    """
    if one.outline() != two.outline():
        raise CaptureError(difference(one.trace, two.trace, num_samples) or "the outputs differ")


def difference(one: Trace, two: Trace, num_samples: tuple[int, int]) -> str | None:
    """Name the first step in which two traces differ; None if they have the same steps."""
    for index in range(max(len(one.steps), len(two.steps))):
        pair = [t.steps[index] if index < len(t.steps) else None for t in (one, two)]
        if _outline(pair[0]) != _outline(pair[1]):
            texts = [f"{s.name} at {s.where}" if s else "nothing" for s in pair]
            return (
                f"the forward takes another path for {num_samples[1]} samples than for "
                f"{num_samples[0]}: step {index} is {texts[1]} instead of {texts[0]}"
            )
    return None


def _outline(step: Step | None) -> object:
    if step is None:
        return None
    return (
        step.kind,
        step.name,
        tuple(step.inputs),
        tuple(step.made),
        step.state,
        len(step.leaves),
    )
