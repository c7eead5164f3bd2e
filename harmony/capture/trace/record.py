"""Records a forward as a trace while it runs.

A ``TorchFunctionMode`` sees every torch function, a patched ``nn.Module.__call__`` every call of a
module, a ``TorchDispatchMode`` every kernel (to know who draws random numbers). Inside a leaf
module nothing is recorded, but tensors that come in or go out by another way than the arguments
and the result are noticed.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harmony.capture.graph.params import version_of
from harmony.capture.graph.structure import flatten
from harmony.capture.graph.trace import (
    Context,
    LeftBehind,
    LossCall,
    StateRef,
    Step,
    StepKind,
    TraceValue,
    ValueRef,
    assign_buffer,
)
from harmony.capture.guards.observe import heard
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.state.python_state import HeldFromOutside
from harmony.capture.state.random_state import PythonState
from harmony.capture.trace.calls import CallHandler
from harmony.capture.trace.isolation import autocast_dtype, held_by_variables, user_frame
from harmony.capture.trace.kernels import KernelWatch, Noticed, changed_by
from harmony.capture.trace.leaf_watch import LeafMustOpenError
from harmony.capture.trace.references import References, with_devices
from harmony.capture.trace.refuse import (
    DynamicOnlyError,
    check_argument,
    check_function,
    check_generator,
    check_transform,
)
from harmony.errors import CaptureError

_VALIDATING = f"{os.sep}torch{os.sep}distributions{os.sep}"

_READS = frozenset({"item", "tolist", "numpy", "is_nonzero", "equal", "allclose"})
_READS |= {"__bool__", "__int__", "__float__", "__index__", "__complex__"}
_READS |= {"__contains__", "__array__"}
_TENSOR: Any = torch.Tensor
_SIZES = frozenset({_TENSOR.shape.__get__, _TENSOR.nbytes.__get__, torch.numel})
_SIZES |= {_TENSOR.size, _TENSOR.numel, _TENSOR.nelement, _TENSOR.stride, _TENSOR.__len__}


class Recorder(CallHandler):
    """Records what runs inside it, on one thread.

    Attributes:
        steps: the calls so far.
        once: whether the trace has to stand for this one run only
            (`harmony.capture.eager.dynamic_trace`).
        attributes: Python attributes that functional code has changed in that run.
        inputs: numbers of the model's inputs.
        loss_call: the call of the loss function, if there was one.
        of_data: tensors that leaf modules have made of the content of others.
        number_of: returns the number of a tensor; None if no step in functional code has made it.
    """

    def __init__(
        self,
        shell: ModuleShell,
        leaves: set[str],
        device: torch.device,
        stand_ins: Mapping[int, Any],
        kernels: KernelWatch,
    ) -> None:
        super().__init__(leaves, References(shell, device, stand_ins), kernels)
        self.steps: list[Step] = []
        self.once = False
        self.attributes: list[tuple[str, str, Any]] = []
        self.inputs: list[int] = []
        self.loss_call: LossCall | None = None
        self._device = device
        self._shell = shell
        self.of_data = self._references.of_data
        self.number_of = self._references.numbers.find
        self._kept: list[tuple[str, str]] = []
        self._sized_by_values: set[int] = set()
        self._python_random = PythonState.now()
        self._held: dict[str, HeldFromOutside] = {}

    @property
    def values(self) -> list[TraceValue]:
        """What is known of each numbered tensor."""
        return self._references.numbers.values

    def add_input(self, tensor: torch.Tensor, name: str) -> int:
        """Number an input of the model."""
        number = self._references.numbers.number(tensor, name)
        self.inputs.append(number)
        return number

    def _is_input(self, tensor: Any) -> bool:
        return self.number_of(tensor) in self.inputs

    def at_loss(
        self, loss: Callable[[Any, Any], torch.Tensor], out: Any, targets: Any
    ) -> torch.Tensor:
        """Call the loss function, and remember what it was called with."""
        leaves, structure = flatten((out, targets))
        with torch._C.DisableTorchFunction():
            given = tuple(self._references.given(leaf) for leaf in leaves)
        self.loss_call = LossCall(loss, given, structure, _context())
        return loss(out, targets)

    def add_output(self, leaf: Any) -> Any:
        """Return the reference to an output; what no step made gets a step that passes it on."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        reference = self._references.of(leaf, "the model's output")
        made = {number for step in self.steps for number in step.made}
        if isinstance(reference, ValueRef) and reference.id in made:
            return reference
        passed_on = self._call_function(torch.Tensor.view_as, "output", (leaf, leaf), {})
        return self._references.of(passed_on, "the model's output")

    def assign(self, name: str, buffer: torch.Tensor, new: torch.Tensor) -> None:
        """Record that functional code put a new tensor in the place of a buffer: a copy, once it
        is made.

        Raises:
            CaptureError: if the new tensor has another form.
        """
        if (new.shape, new.dtype) != (buffer.shape, buffer.dtype):
            raise CaptureError(
                f"the forward replaces the buffer {name} by a tensor of another form: "
                f"{new.dtype} {tuple(new.shape)} instead of {buffer.dtype} {tuple(buffer.shape)}"
            )
        leaves, structure = flatten(((buffer, new), {}))
        references = self._references.of_all(leaves, f"the buffer {name}")
        step = Step(
            StepKind.FUNCTION, "copy_", assign_buffer, references, structure, Context(False)
        )
        step.state = step.changes = (name,)
        step.outputs = (None,)  # the buffer itself
        needed = {leaf.id for leaf in references if isinstance(leaf, ValueRef)}
        before = [
            index
            for index, other in enumerate(self.steps)
            if name in other.state or needed.intersection(other.made)
        ]
        self.steps.insert(max(before, default=-1) + 1, step)

    def check_containers(self) -> None:
        """Refuse layers that add tensors, or other objects, to a container of their own.

        Raises:
            CaptureError: naming the layer and its attribute.
        """
        for name, attribute in self._kept:
            raise DynamicOnlyError(
                f"{name} adds to its attribute {attribute} in the forward", name, eager=True
            )

    def note_uses_by_alias(self) -> None:
        """Let a step that uses a view of a buffer that changes use the buffer."""
        changing = {name for step in self.steps for name in step.changes}
        for step in self.steps if changing else ():
            names = map(self._references.alias_of, (*step.inputs, *step.made))
            by_alias = sorted(changing.intersection(filter(None, names)))
            step.state = tuple(dict.fromkeys((*step.state, *by_alias)))

    def begin(self) -> None:
        """The forward begins now, from the random states and attributes that there are."""
        self._python_random = PythonState.now()
        for name in self._leaves:
            self._held[name] = HeldFromOutside(self._shell.modules[name].modules())

    def check_python_random(self) -> PythonState | None:
        """Refuse randomness of Python or NumPy in functional code: a trace freezes what was drawn.

        Returns:
            For a dynamic run, the states if any was drawn since the last layer.

        Raises:
            DynamicOnlyError: if any was, and the trace has to stand for other runs.
        """
        now, before = PythonState.now(), self._python_random
        self._python_random = now
        if now.same(before):
            return None
        if not self.once:
            raise DynamicOnlyError(
                "the forward draws random numbers of Python or NumPy outside of a layer",
                user_frame(),
            )
        return now

    def _call_function(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        args, kwargs = with_devices(name, args, kwargs)
        (args, kwargs), leaves, structure = self._references.stand_in(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        check_function(name, func, bool(tensors))
        if tensors and (name in _READS or (func in _SIZES and self._any_by_values(tensors))):
            return self._read(func, name, args, kwargs)
        for leaf in leaves:
            check_generator(leaf, name)
        context = _context()
        versions = [version_of(tensor) for tensor in tensors]
        out, noticed = self._opaque(lambda: heard(func, *args, **kwargs))
        changed = changed_by(tensors, versions, noticed)
        made = flatten(out)[0]
        if changed or any(isinstance(leaf, torch.Tensor) for leaf in made):
            for leaf in leaves:
                check_argument(leaf, name)
            references = self._references.of_all(leaves, name)
            step = Step(StepKind.FUNCTION, name, func, references, structure, context)
            self._append(step, tensors, changed, made, noticed)
        return out

    def _any_by_values(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether values decide the size of a tensor: of what a mask picks, for instance."""
        numbers = self._references.numbers
        known = (tensor for tensor in tensors if id(tensor) in numbers)
        return any(numbers.of(tensor) in self._sized_by_values for tensor in known)

    def _read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Record a guard: Python looks at the content of a tensor, or a size that it decides."""
        leaves, structure = flatten((args, kwargs))
        references = self._references.of_all(leaves, name)
        out, _ = self._opaque(lambda: heard(func, *args, **kwargs))
        step = Step(StepKind.GUARD, name, func, references, structure, _context())
        step.expected, step.where = out, user_frame()
        step.in_loss = self.loss_call is not None
        step.validates = _is_validation()
        step.state = tuple(leaf.name for leaf in references if isinstance(leaf, StateRef))
        self.steps.append(step)
        return out

    def _call_leaf(
        self, module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        check_transform(name)
        self._check_held(name)
        (args, kwargs), leaves, structure = self._references.stand_in(args, kwargs)
        for leaf in leaves:
            check_argument(leaf, name)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        references = self._references.of_all(leaves, name)
        versions = [version_of(tensor) for tensor in tensors]
        known = self._references
        watch = known.watch(name, module, tensors)
        moved_on = self.check_python_random()
        self._leaf = watch
        self._kernels.take()
        try:
            with torch._C._EnableTorchFunction():
                out = heard(call, module, *args, **kwargs)
        finally:
            self._leaf = None
        noticed = self._kernels.take()
        before, self._python_random = self._python_random, PythonState.now()
        if not self._python_random.same(before):
            noticed.drawn = noticed.on_host = True
        step = Step(StepKind.MODULE, name, name, references, structure, _context())
        step.state = watch.state()
        step.python_random = moved_on if noticed.on_host else None
        own = [self._shell.tensor(used) for used in step.state]
        changed = [*changed_by(tensors, versions, noticed), *filter(noticed.wrote, own)]
        if watch.needs_graph:
            step.with_graph = tuple(map(_learns, leaves))
            step.differentiates = watch.differentiates
        step.counts = tuple(
            (known.module_names[id(owner)], attribute) for owner, attribute in watch.counted()
        )
        self._kept += [(name, attribute) for attribute in watch.kept()]
        self._append(step, tensors, [*changed, *watch.replaced()], flatten(out)[0], noticed)
        step.left_behind = tuple(
            LeftBehind(
                known.module_names[id(owner)], attribute, known.numbers.number(tensor, name)
            )
            for owner, attribute, tensor in watch.left_behind()
            if id(tensor) not in known.numbers
        )
        self._note_sizes(step)
        self._held[name] = HeldFromOutside(module.modules())
        return out

    def _check_held(self, name: str) -> None:
        """Check that a leaf finds itself as its own last call, or the caller, has left it.

        Raises:
            LeafMustOpenError: if the forward around it has set an attribute: it is to be recorded.
        """
        changed = self._held[name].changed()
        if changed is not None:
            raise LeafMustOpenError([name], f"the forward sets {changed} of {name}")

    def _append(
        self,
        step: Step,
        tensors: Sequence[torch.Tensor],
        changed: Sequence[torch.Tensor],
        made: Sequence[Any],
        noticed: Noticed,
    ) -> None:
        known = self._references
        used = {known.state[id(tensor)] for tensor in tensors if id(tensor) in known.state}
        step.state = tuple(dict.fromkeys((*step.state, *sorted(used))))
        step.random, step.random_on_host = noticed.drawn, noticed.on_host
        picks_one = step.name == "__getitem__" and not step.structure.nested
        step.dynamic = noticed.dynamic or (
            step.kind is StepKind.FUNCTION and noticed.read and not picks_one
        )
        step.where = user_frame()
        names = dict.fromkeys(filter(None, map(known.changed_state, changed)))
        step.changes = tuple(known.check_buffer(name, step) for name in names)
        changed = [tensor for tensor in changed if id(tensor) not in known.state]
        step.mutated = tuple(known.renumber(tensor, step) for tensor in changed)
        step.outputs = tuple(known.number_output(leaf, step.name) for leaf in made)
        known.note_aliases({name: self._shell.tensor(name) for name in step.state}, made)
        self._note_sizes(step)
        if self.loss_call is not None:
            step.in_loss = True
            held = map(known.numbers.find, held_by_variables(Recorder.at_loss.__code__))
            step.held = frozenset(number for number in held if number is not None)
        of_nothing = step.kind is StepKind.FUNCTION and not step.state
        if of_nothing and known.made_of_nothing.issuperset(step.inputs):
            known.made_of_nothing.update(step.made)
        self.steps.append(step)

    def _note_sizes(self, step: Step) -> None:
        if step.dynamic or not self._sized_by_values.isdisjoint(step.inputs):
            self._sized_by_values.update(step.made)


def _context() -> Context:
    return Context(torch.is_grad_enabled(), autocast_dtype())


def _learns(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _is_validation() -> bool:
    """Whether a distribution looks at its arguments: it raises, or goes on as ever."""
    return any(_VALIDATING in frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
