"""The trace: a model's forward as a flat list of steps over numbered values. Data only.

A call of a *leaf module* is one opaque step, whose Python runs again at replay; every torch
function called outside of the leaves (*functional code*) is one step. An operation that changes a
tensor in place gives it a new number, so that a number stands for one content.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch

from harmony.capture.graph.structure import Structure
from harmony.capture.guards.written import SetUp
from harmony.capture.state.random_state import PythonState


@dataclass(frozen=True)
class ValueRef:
    """A tensor that a step made, or an input of the model."""

    id: int


@dataclass(frozen=True)
class StateRef:
    """A parameter or buffer, by its canonical name."""

    name: str


@dataclass(frozen=True)
class ModuleRef:
    """A module that is passed as an argument, by its name."""

    name: str


class _ReplayDevice(Enum):
    DEVICE = "device"


DEVICE = _ReplayDevice.DEVICE
"""Stands for the device of the inputs in arguments: becomes the device of the replay."""


class _Unknown(Enum):
    UNKNOWN = "unknown"


UNKNOWN = _Unknown.UNKNOWN
"""Stands for a tensor that the loss function is given and does not use."""


class Constant:
    """A tensor of unknown origin that the forward reads; kept by value, copied once per device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._copies: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """The tensor on ``device``."""
        copy = self._copies.get(device)
        if copy is None:
            copy = self._copies[device] = self.tensor.to(device)
        return copy


class StepKind(Enum):
    """What a step calls."""

    MODULE = "module"
    FUNCTION = "function"
    GUARD = "guard"


@dataclass(frozen=True)
class Context:
    """What surrounds a step: whether gradients are recorded, and to which type autocast casts."""

    grad_enabled: bool = True
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class LeftBehind:
    """A tensor that a leaf module leaves on an attribute of a module.

    Attributes:
        module: name of the module.
        attribute: name of the attribute.
        value: the number of the tensor.
    """

    module: str
    attribute: str
    value: int


@dataclass
class Step:
    """One call.

    Attributes:
        name: the module's name, or the function's.
        target: the function to call; for a module step, its name in the shell.
        leaves: the flattened ``(args, kwargs)``, tensors as references.
        structure: how to build ``(args, kwargs)`` from the leaves.
        outputs: per flattened output, the number of the tensor that it makes, if any.
        mutated: pairs (number before, number after) of tensors that it changes in place.
        left_behind: tensors that it leaves on attributes.
        state: names of the parameters and buffers that it uses.
        changes: names of the buffers that it changes.
        counts: Python attributes that it changes: name of the module, attribute.
        random: whether it draws random numbers.
        random_on_host: whether it may draw them from generators that all threads share.
        python_random: in a dynamic run, the states that it starts from because functional code has
            drawn before.
        dynamic: whether the shape of something that it computes depends on values.
        with_graph: per leaf of the arguments, whether it required a gradient, where the call is
            possible only while gradients are recorded.
        differentiates: whether it computes a gradient itself.
        expected: what a guard's read gave.
        where: file and line of the call in the user's code.
        in_loss: whether the loss function makes the call.
        validates: whether nothing but an error can follow from what a guard reads.
        held: in the loss function, the numbers of the tensors that its variables hold meanwhile.
    """

    kind: StepKind
    name: str
    target: Callable[..., Any] | str
    leaves: tuple[Any, ...]
    structure: Structure
    context: Context
    outputs: tuple[int | None, ...] = ()
    mutated: tuple[tuple[int, int], ...] = ()
    left_behind: tuple[LeftBehind, ...] = ()
    state: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    counts: tuple[tuple[str, str], ...] = ()
    random: bool = False
    random_on_host: bool = False
    python_random: PythonState | None = None
    dynamic: bool = False
    with_graph: tuple[bool, ...] = ()
    differentiates: bool = False
    expected: Any = None
    where: str = "?"
    in_loss: bool = False
    validates: bool = False
    held: frozenset[int] = frozenset()

    @property
    def inputs(self) -> Iterator[int]:
        """Numbers of the values that it reads, with repetition."""
        return (leaf.id for leaf in self.leaves if isinstance(leaf, ValueRef))

    @property
    def made(self) -> Iterator[int]:
        """Numbers of the values that it makes, changed ones included."""
        yield from (number for number in self.outputs if number is not None)
        yield from (after for _, after in self.mutated)
        yield from (left.value for left in self.left_behind)


def assign_buffer(buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Functional code puts a tensor in the place of a buffer; who saved the old one keeps it."""
    return buffer.copy_(new)


@dataclass(frozen=True)
class LossCall:
    """The call of the loss function, which runs as it is in every step.

    Attributes:
        loss: maps ``(output, targets)`` to the scalar loss.
        leaves: the flattened ``(output, targets)``, tensors as references.
        structure: how to build ``(output, targets)`` from the leaves.
        first: the step that its recording begins with.
        result: the number of the loss.
    """

    loss: Callable[[Any, Any], torch.Tensor]
    leaves: tuple[Any, ...]
    structure: Structure
    context: Context
    first: int = -1
    result: int = -1


@dataclass
class TraceValue:
    """What is known of a numbered tensor.

    Attributes:
        storage: values of the same number share memory.
        dense: whether it is an ordinary strided tensor.
        fake: whether the trace computed only its shape: it depends on parameters.
        name: where it comes from.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    storage: int
    dense: bool
    fake: bool
    name: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, laid out densely."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Trace:
    """One forward, for one number of samples.

    Attributes:
        inputs: per flattened input of the model, the number of the tensor, if it is one.
        outputs: the flattened outputs, tensors as ``ValueRef``.
        output_structure: how to build the model's output.
        device: where it was recorded.
        host_program: the steps that decide the guards which depend on the inputs alone.
        real: whether it was recorded from a real run rather than with fake parameters.
        attributes: Python attributes that functional code changed: module, attribute, new value.
        loss_call: the call of the loss function, where that can stand for its recorded steps.
        loss_decides: where its Python reads what the inputs decide; empty if nowhere.
        set_up: what the forward sets up for later ones.
    """

    steps: list[Step]
    values: list[TraceValue]
    inputs: tuple[int | None, ...]
    outputs: tuple[Any, ...]
    output_structure: Structure
    device: torch.device
    host_program: tuple[Step, ...] = ()
    real: bool = False
    attributes: tuple[tuple[str, str, Any], ...] = ()
    loss_call: LossCall | None = None
    loss_decides: str = ""
    set_up: SetUp = field(default_factory=SetUp)
    last_use: list[int] = field(default_factory=list)
    producer: list[int] = field(default_factory=list)
    dead_after: list[tuple[int, ...]] = field(default_factory=list)

    def analyse(self) -> None:
        """Compute producers, last uses and what may be freed after each step."""
        end = len(self.steps)
        self.producer = [-1] * len(self.values)
        self.last_use = [-1] * len(self.values)
        for index, step in enumerate(self.steps):
            for number in step.made:
                self.producer[number] = self.last_use[number] = index
            for number in step.inputs:
                self.last_use[number] = index
        for leaf in self.outputs:
            if isinstance(leaf, ValueRef):
                self.last_use[leaf.id] = end
        dead: list[list[int]] = [[] for _ in range(end)]
        for number, last in enumerate(self._last_alive()):
            if 0 <= last < end:
                dead[last].append(number)
        self.dead_after = [tuple(numbers) for numbers in dead]

    def _last_alive(self) -> list[int]:
        """Per value, the step after which it may be freed: as when the loss itself runs."""
        call, last_alive = self.loss_call, list(self.last_use)
        if call is None:
            return last_alive
        for index in range(call.first, len(self.steps)):
            for number in self.steps[index].held:
                last_alive[number] = max(last_alive[number], index)
        for leaf in call.leaves:
            if isinstance(leaf, ValueRef):
                last_alive[leaf.id] = len(self.steps)
        return last_alive


def without_dead_steps(trace: Trace) -> Trace:
    """Return the trace without guards that the inputs decide, and what only those needed.

    Module steps, random steps and steps that change a tensor always stay.
    """
    recorded, on_host = trace.steps, _decided_by_inputs(trace)
    host_program = _slice(recorded, [i for i in on_host if _is_guard(recorded[i])])
    needed = {leaf.id for leaf in trace.outputs if isinstance(leaf, ValueRef)}
    kept: list[Step] = []
    for index in reversed(range(len(trace.steps))):
        step = trace.steps[index]
        decided = _is_guard(step) and index in on_host
        if not decided and (not _is_pure(step) or needed.intersection(step.made)):
            kept.append(step)
            needed.update(step.inputs)
    given = set(trace.inputs)
    trace = _renumbered(replace(trace, steps=kept[::-1], host_program=host_program))
    trace.loss_call = _standing_alone(trace)
    if trace.loss_call is not None:  # its decisions are its own, in every step
        guards = [i for i in on_host if _is_guard(recorded[i])]
        trace.host_program = _slice(recorded, [i for i in guards if not recorded[i].in_loss])
        for index in (i for i in guards if recorded[i].in_loss and not recorded[i].validates):
            if any(given.intersection(step.inputs) for step in _slice(recorded, [index])):
                trace.loss_decides = recorded[index].where
    trace.analyse()
    return trace


def _standing_alone(trace: Trace) -> LossCall | None:
    """Return the call of the loss if it can take the place of the steps that it was recorded as.

    They have to be the last ones, use no parameter, change nothing that the forward has made, and
    get all that they use of the forward as arguments.
    """
    call, flags = trace.loss_call, [step.in_loss for step in trace.steps]
    (result, *others) = trace.outputs
    if call is None or True not in flags or others or not isinstance(result, ValueRef):
        return None
    first = flags.index(True)
    steps = trace.steps[first:]
    made = {number for step in steps for number in step.made}
    used = {number for step in steps for number in step.inputs} - made
    given = {leaf.id for leaf in call.leaves if isinstance(leaf, ValueRef)}
    changed = {before for step in steps for before, _ in step.mutated}
    alone = all(flags[first:]) and result.id in made and made.issuperset(changed)
    if not alone or any(step.state or isinstance(step.target, str) for step in steps):
        return None
    if not given.issuperset(used) or any(type(leaf) is StateRef for leaf in call.leaves):
        return None
    leaves = tuple(
        UNKNOWN if isinstance(leaf, ValueRef) and leaf.id not in used else leaf
        for leaf in call.leaves
    )
    return replace(call, leaves=leaves, first=first, result=result.id)


def _renumbered(trace: Trace) -> Trace:
    """Return the trace with its values numbered without gaps: the inputs first, as before.

    Traces that differ only in steps that are gone have the same numbers then. The host program
    keeps the old ones: it has only the inputs in common with the steps.
    """
    inputs = (number for number in trace.inputs if number is not None)
    made = (number for step in trace.steps for number in step.made)
    new = {old: index for index, old in enumerate(dict.fromkeys((*inputs, *made)))}

    def leaf(old: Any) -> Any:
        return ValueRef(new[old.id]) if isinstance(old, ValueRef) else old

    steps = [
        replace(
            step,
            leaves=tuple(map(leaf, step.leaves)),
            outputs=tuple(None if number is None else new[number] for number in step.outputs),
            mutated=tuple((new[before], new[after]) for before, after in step.mutated),
            left_behind=tuple(replace(left, value=new[left.value]) for left in step.left_behind),
            held=frozenset(new[number] for number in step.held if number in new),
        )
        for step in trace.steps
    ]
    values = [trace.values[old] for old in new]
    call = trace.loss_call
    if call is not None:
        kept = (UNKNOWN if _is_gone(given, new) else leaf(given) for given in call.leaves)
        call = replace(call, leaves=tuple(kept))
    outputs = tuple(map(leaf, trace.outputs))
    return replace(trace, steps=steps, values=values, outputs=outputs, loss_call=call)


def _is_gone(leaf: Any, kept: Container[int]) -> bool:
    return isinstance(leaf, ValueRef) and leaf.id not in kept


def _is_guard(step: Step) -> bool:
    return step.kind is StepKind.GUARD


def _is_pure(step: Step) -> bool:
    changes = step.mutated or step.changes
    return step.kind is StepKind.FUNCTION and not step.random and not changes


def _decided_by_inputs(trace: Trace) -> set[int]:
    """Functional steps that need the inputs, and buffers that do not change, alone."""
    known = {number for number in trace.inputs if number is not None}
    changing = {name for step in trace.steps for name in step.changes}
    chosen = set()
    for index, step in enumerate(trace.steps):
        functional = step.kind is not StepKind.MODULE and not step.random
        if functional and changing.isdisjoint(step.state) and known.issuperset(step.inputs):
            chosen.add(index)
            known.update(step.made)
    return chosen


def _slice(steps: list[Step], wanted: list[int]) -> tuple[Step, ...]:
    """Return the steps that the wanted ones need, in order."""
    chosen = set(wanted)
    needed = {number for index in wanted for number in steps[index].inputs}
    for index in reversed(range(len(steps))):
        if needed.intersection(steps[index].made):
            chosen.add(index)
            needed.update(steps[index].inputs)
    return tuple(steps[index] for index in sorted(chosen))
