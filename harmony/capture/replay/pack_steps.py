"""What a pack of layers runs for one number of samples: found once, run in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from harmony.capture.graph.layered import LayeredTrace
from harmony.capture.graph.trace import Step, StepKind, Trace
from harmony.capture.loss.call import run_loss
from harmony.capture.replay.replay import Values, run_step
from harmony.capture.replay.shell import ModuleShell
from harmony.core.layergraph import LayerGraph
from harmony.errors import CaptureError


class Look(Protocol):
    """Is shown what the operations of some layers make while they run."""

    def begin(self, values: Values) -> None:
        """What they read, by the numbers of the trace."""

    def after(self, layer: int, step: Step, made: Values) -> None:
        """What one of them has made."""


@dataclass(frozen=True)
class _Layer:
    """The steps of one layer.

    Attributes:
        steps: each with the numbers of the values that nobody reads behind it.
        changed_later: numbers of what it makes, is to be returned, and a later layer changes.
    """

    index: int
    steps: tuple[tuple[Step, tuple[int, ...]], ...]
    changed_later: tuple[int, ...]


@dataclass(frozen=True)
class PackSteps:
    """The steps of a pack, and the values that go in and come out.

    Attributes:
        inputs: of each value that it reads from earlier layers: its id, its number on the trace,
            and whether a layer changes it in place.
        outputs: numbers of the values to return, by their ids.
        forms: shape, type and name of each of these values.
        loss_step: where the loss function is called in the place of its recording, if it can be.
    """

    trace: Trace
    layers: tuple[_Layer, ...]
    inputs: tuple[tuple[int, int, bool], ...]
    outputs: dict[int, int]
    forms: dict[int, tuple[tuple[int, ...], torch.dtype, str]]
    loss_step: Step | None

    @staticmethod
    def of(
        graph: LayerGraph, layered: LayeredTrace, first: int, last: int, wanted: Iterable[int]
    ) -> PackSteps:
        """Find what layers ``first`` to ``last - 1`` run to make the values of ``wanted``."""
        trace = layered.trace
        outputs = {value: layered.crossing[value] for value in wanted}
        keep = set(outputs.values())
        layers = []
        for layer in range(first, last):
            steps = tuple(
                (trace.steps[i], tuple(n for n in trace.dead_after[i] if n not in keep))
                for i in layered.ranges[layer]
            )
            changed = frozenset[int]().union(*layered.changes[layer + 1 : last])
            made = (number for number in keep if layered.producer(number) == layer)
            later = tuple(n for n in made if trace.values[n].storage in changed)
            layers.append(_Layer(layer, steps, later))
        changed = frozenset[int]().union(*layered.changes[first:last])
        read = ((value, layered.crossing[value]) for value in graph.pack_inputs(first, last))
        inputs = tuple((v, n, trace.values[n].storage in changed) for v, n in read)
        made_of = ((value, trace.values[number]) for value, number in outputs.items())
        forms = {v: (held.shape, held.dtype, graph.values[v].name) for v, held in made_of}
        call = trace.loss_call
        loss_step = None if call is None or call.first < 0 else trace.steps[call.first]
        return PackSteps(trace, tuple(layers), inputs, outputs, forms, loss_step)

    def run(
        self,
        shell: ModuleShell,
        env: Values,
        at_layer: Callable[[int], None] | None,
        guarded: bool,
        look: Look | None,
    ) -> Values:
        """Run them, with or without gradients, on any device.

        Interior values are let go at their last use. An input that a layer changes in place is
        cloned first.

        Args:
            shell: has the parameters of these layers bound.
            env: at least the values that these layers read from earlier ones.
            at_layer: called with each layer's index before it runs.
            guarded: whether what the forward's Python read has to come out as recorded, and the
                loss function itself runs; else its recorded steps do.
            look: is shown what each operation makes.
        """
        values = self._read(env)
        if look is not None:
            look.begin(values)
        aside: Values = {}
        for layer in self.layers:
            if at_layer is not None:
                at_layer(layer.index)
            _run_layer(self, layer, shell, values, guarded, look)
            for number in layer.changed_later:
                if number in values:
                    aside[number] = values[number].clone()
        return {value: aside.get(n, values[n]) for value, n in self.outputs.items()}

    def check_forms(self, found: Values) -> None:
        """Check that values have the form that memory and copies are planned for.

        A copy to a buffer of another type would round, where a plan cuts and nowhere else.

        Raises:
            CaptureError: naming the value and both forms.
        """
        for value, tensor in found.items():
            shape, dtype, name = self.forms[value]
            if tensor.dtype != dtype or tensor.shape != shape:
                raise CaptureError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, "
                    f"but was recorded as {dtype} of shape {tuple(shape)}: the forward makes "
                    "something else there than where it was recorded. Give it its type in the "
                    "forward (`.float()`, `.to(dtype)`)"
                )

    def _read(self, env: Values) -> Values:
        """The values that it reads, by their numbers; what it changes in place as a clone."""
        values: Values = {}
        for value, number, in_place in self.inputs:
            if value not in env:
                first, last = self.layers[0].index, self.layers[-1].index + 1
                name = self.trace.values[number].name
                raise CaptureError(
                    f"layers [{first}:{last}] read value {value} ({name}), which was not given"
                )
            values[number] = env[value].clone() if in_place else env[value]
        return values


def _run_layer(
    pack: PackSteps,
    layer: _Layer,
    shell: ModuleShell,
    values: Values,
    guarded: bool,
    look: Look | None,
) -> None:
    call = pack.trace.loss_call if guarded else None
    for step, dead in layer.steps:
        if call is not None and step is pack.loss_step:
            loss = values[call.result] = run_loss(pack.trace, values, shell)
            if look is not None:
                look.after(layer.index, step, {call.result: loss})
            return
        if guarded or step.kind is not StepKind.GUARD:
            run_step(step, values, shell)
        if look is not None:
            look.after(layer.index, step, _made(step, values))
        for number in dead:
            values.pop(number, None)


def _made(step: Step, values: Values) -> dict[int, torch.Tensor]:
    """What a step has made, changed values included."""
    numbers = [*step.outputs, *(after for _, after in step.mutated)]
    return {number: values[number] for number in numbers if number is not None}
