"""Runs the forward once on a throwaway copy of the module and returns its trace.

The parameters of the copy are fake tensors: no weight memory, no compute; the inputs are real, so
that masks and position tables come out as they will in training. Where the forward looks at
values that fake tensors do not have, the trace is repeated with the real parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from harmony.capture.graph.structure import flatten
from harmony.capture.graph.trace import StepKind, Trace, without_dead_steps
from harmony.capture.guards.checkpoints import CheckpointWatch, checkpoints_watched
from harmony.capture.guards.module_hooks import hooks_of
from harmony.capture.guards.outside import Outside, depends_on_batch
from harmony.capture.replay.inputs import Batch, to_call
from harmony.capture.replay.same_steps import Recorded, same_steps
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.state.caller_arguments import Containers, place_of
from harmony.capture.state.python_state import PlainState
from harmony.capture.trace.fake_kernels import refusals_unlogged
from harmony.capture.trace.intercept import recording
from harmony.capture.trace.isolation import (
    autocast_dtype,
    no_cast_cache,
    undisturbed,
    user_frame_of,
)
from harmony.capture.trace.kernels import KernelWatch
from harmony.capture.trace.leaf_watch import LeafMustOpenError
from harmony.capture.trace.leaves import open_leaf
from harmony.capture.trace.program import CallLoss, Loss, Program
from harmony.capture.trace.reach import check_reach
from harmony.capture.trace.record import Recorder
from harmony.capture.trace.refuse import (
    DynamicOnlyError,
    UnrecordableError,
    check_buffers,
    check_outputs,
    hides_tensors,
)
from harmony.core.warn import warn
from harmony.errors import CaptureError

NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
_MOST_OPENED = 100


_HOST = torch.device("cpu")


class Tracer:
    """Traces one module for any number of samples.

    Attributes:
        leaves: names of the leaf modules; fewer after a trace had to open some.
        device: where traces run.
        outside: what the forward reads and writes beside its inputs and parameters.
    """

    def __init__(
        self,
        source: nn.Module,
        template: ModuleShell,
        program: Program,
        batch: Batch,
        leaves: set[str],
        target: torch.device = _HOST,
    ) -> None:
        self.leaves = leaves
        self.device = _trace_device(batch, target)
        self.outside = Outside(source, program.loss)
        self.outside.arguments = batch.objects()
        self._source = source
        self._template = template
        self._program = program
        self._batch = batch
        self._real = False
        self._settled: list[tuple[str, str]] = []
        self._set_up = False
        self._before: Recorded | None = None
        self._first_time: DynamicOnlyError | None = None
        self._closed: dict[str, str] = {}

    @property
    def name(self) -> str:
        """Class of the module."""
        return type(self._source).__name__

    def trace(self, num_samples: int, first: int = 0) -> Trace:
        """Record the forward on ``num_samples`` samples of the batch, beginning with ``first``.

        Raises:
            CaptureError: naming what cannot be recorded, with file and line.
        """
        if self._first_time is not None:
            raise self._first_time.again()
        for _ in range(_MOST_OPENED):
            try:
                with ExitStack() as stack:
                    stack.enter_context(undisturbed(self.device))
                    stack.enter_context(no_cast_cache())
                    stack.enter_context(self.outside.undone())
                    stack.enter_context(refusals_unlogged())
                    return without_dead_steps(self._attempt(num_samples, first))
            except LeafMustOpenError as request:
                self._open(request)
            except UnrecordableError as error:
                if error.inside is None:
                    raise
                self._close(error.inside, str(error))
            except _AttributesMovedError as moved:
                self._settle(moved)
            except _ObjectsMovedError:
                pass
            except NEEDS_VALUES as error:
                self._use_real_parameters(error)
            except RuntimeError as error:
                # Some fake kernels refuse what real ones do; if not, the error comes again.
                if self._real or self._on_meta():
                    raise
                self._use_real_parameters(error)
        raise CaptureError(f"gave up after opening {_MOST_OPENED} modules; {self.leaves} are left")

    @property
    def state(self) -> tuple[set[str], bool, dict[str, str]]:
        """What the traces so far have found out: leaves, whether values count, why some are."""
        return self.leaves, self._real, dict(self._closed)

    @state.setter
    def state(self, state: tuple[set[str], bool, dict[str, str]]) -> None:
        self.leaves, self._real, self._closed = state

    def _attempt(self, num_samples: int, first: int) -> Trace:
        twin = ModuleShell(self._template.root, self.device)
        twin.bind(self._parameters(twin))
        twin.bind({name: b.to(self.device) for name, b in twin.root.named_buffers()})
        stand_ins = _stand_ins(self._source, twin)
        kernels = KernelWatch(fake=not self._real)
        recorder = self._recorder(twin, stand_ins, kernels)
        taken = self._batch.leaves_of(num_samples, self.device, first)
        args, kwargs, targets = to_call(self._batch.structure, taken)
        inputs = tuple(
            recorder.add_input(leaf, name) if isinstance(leaf, torch.Tensor) else None
            for name, leaf in zip(self._batch.names, taken, strict=True)
        )
        opened = OpenedModules(twin, self.leaves)
        self.outside.begin(twin)
        containers = Containers((args, kwargs, targets))
        watch = CheckpointWatch(twin.modules.values(), self.outside.changes)
        self._begin()
        recorder.begin()
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if autocast_dtype() is not None:  # possibly of a device that the trace is not on
                stack.enter_context(torch.autocast(self.device.type, dtype=autocast_dtype()))
            if self._real:
                stack.enter_context(_nothing_saved())
            stack.enter_context(kernels)
            stack.enter_context(checkpoints_watched(watch))
            stack.enter_context(recording(recorder))
            with self.outside.watched():
                out = self._program(
                    twin.root, args, kwargs, targets, self._calls_loss(recorder, twin)
                )
        recorder.check_python_random()
        containers.check(place_of(self._source))
        _check_inputs(recorder)
        self.outside.end(self._judges(recorder, twin))
        self._settle_objects(twin, recorder)
        recorder.check_containers()
        opened.record_changes(recorder)
        self._check_same(recorder)
        recorder.note_uses_by_alias()
        leaves, structure = flatten(out)
        check_outputs(leaves, self.name)
        outputs = tuple(recorder.add_output(leaf) for leaf in leaves)
        _check_guards(recorder)
        check_buffers(recorder.steps, self._template)
        trace = Trace(
            recorder.steps,
            recorder.values,
            inputs,
            outputs,
            structure,
            self.device,
            real=self._real,
            attributes=tuple(recorder.attributes),
            loss_call=recorder.loss_call,
            set_up=self.outside.set_up,
        )
        self._check_reach(trace, leaves, twin)
        return trace

    def _check_reach(self, trace: Trace, leaves: Sequence[Any], twin: ModuleShell) -> None:
        trained = {name: p for name, p in twin.root.named_parameters() if p.requires_grad}
        names = {id(param): name for name, param in trained.items()}
        check_reach(trace, leaves, names, trained)

    def _calls_loss(self, recorder: Recorder, twin: ModuleShell) -> CallLoss:
        def call(loss: Loss, out: Any, targets: Any) -> torch.Tensor:
            with self.outside.watched_loss(self._judges(recorder, twin)):
                return recorder.at_loss(loss, out, targets)

        return call

    def _judges(self, recorder: Recorder, twin: ModuleShell) -> Callable[[torch.Tensor], bool]:
        parameters = [name for name, _ in twin.root.named_parameters()]
        return depends_on_batch(recorder, parameters)

    def _recorder(
        self, twin: ModuleShell, stand_ins: Mapping[int, Any], kernels: KernelWatch
    ) -> Recorder:
        return Recorder(twin, self.leaves, self.device, stand_ins, kernels)

    def _begin(self) -> None:
        """Synchronise state before the forward is traced."""

    def _parameters(self, twin: ModuleShell) -> dict[str, torch.Tensor]:
        if not self._real:
            return fake_parameters(twin, self.device)
        return {
            name: nn.Parameter(
                param.detach().to(twin.placeholder(name).dtype), requires_grad=param.requires_grad
            )
            for name, param in self._source.named_parameters()
        }

    def _open(self, request: LeafMustOpenError) -> None:
        opened = False
        for name in request.names:
            closed = name in self._closed or name not in self.leaves
            inner = None if closed else open_leaf(self._template.root, name)
            if inner is not None:
                self.leaves = (self.leaves - {name}) | inner
                opened = True
        if opened:
            return
        if request.inside is None:
            raise CaptureError(f"{request}: pass it as an argument or return it")
        self._close(request.inside, str(request))

    def _close(self, name: str, reason: str) -> None:
        """Let a module be one leaf: its Python runs as it is, whatever it does."""
        self._closed[name] = reason
        self.leaves = {leaf for leaf in self.leaves if not _is_in(leaf, name)} | {name}

    def warn_of_closed(self) -> None:
        """Say which modules became one layer each, and why."""
        for name, reason in self._closed.items():
            module = self._template.modules[name]
            warn(
                f"{name or 'the model'} ({type(module).__name__}) is one layer, which has to fit "
                f"on a GPU as a whole: {reason}",
            )

    def _settle(self, moved: _AttributesMovedError) -> None:
        """Start from what the forward left on opened modules; once, as it may be set up lazily.

        Where it computes something else then, it runs as it is this time (see `_check_same`).

        Raises:
            DynamicOnlyError: if the forward changes the attributes each time.
        """
        if self._settled:
            names = ", ".join(f"{m}.{a}".lstrip(".") for m, a, _ in moved.attributes)
            raise DynamicOnlyError(
                f"the forward changes Python attributes outside of a layer ({names})",
                type(self._template.root).__name__,
            )
        self._before = moved.recorded
        for name, attribute, held in moved.attributes:
            self._settled.append((name, attribute))
            setattr(self._template.modules[name], attribute, held)
        for name, module in moved.modules.items():  # what was set up lazily may be hooks
            settled = self._template.modules[name]
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
                settled.__dict__[hooks].update(module.__dict__[hooks])
            settled._forward_pre_hooks_with_kwargs.update(module._forward_pre_hooks_with_kwargs)

    def leave_settled(self) -> None:
        """Let the user's modules have the attributes that the forward leaves there."""
        modules = dict(self._source.named_modules())
        for name, attribute in self._settled:
            held = self._template.modules[name].__dict__.get(attribute)
            setattr(modules[name], attribute, copy.deepcopy(held))

    def _check_same(self, recorder: Recorder) -> None:
        """Check that the forward does what it did before something had been set up.

        Raises:
            DynamicOnlyError: if not: it sets up more than attributes, the first time.
        """
        before, self._before = self._before, None
        if before is not None and not same_steps(before, (recorder.steps, recorder.values)):
            self._first_time = DynamicOnlyError(
                "the forward computes something else before it has set up attributes",
                type(self._source).__name__,
                eager=True,
                passing=True,
            )
            raise self._first_time.again()

    def _settle_objects(self, twin: ModuleShell, recorder: Recorder) -> None:
        """Start anew from objects on modules as the forward has set them up; once."""
        moved = [] if self._set_up or self.outside.reason is None else self.outside.moved_objects()
        self._set_up |= bool(moved)
        for path, name in moved:
            old = self._template.modules[path].__dict__.get(name)
            new = twin.modules[path].__dict__[name]
            for module in () if hides_tensors(new) else self._template.modules.values():
                module.__dict__.update({k: new for k, v in module.__dict__.items() if v is old})
        if moved:
            self._before = (recorder.steps, recorder.values)
            raise _ObjectsMovedError

    def _on_meta(self) -> bool:
        return any(param.device.type == "meta" for param in self._source.parameters())

    def _use_real_parameters(self, error: Exception) -> None:
        where = user_frame_of(error)
        if self._real:
            raise CaptureError(f"the forward cannot be recorded at {where}: {error}") from error
        if self._on_meta():
            raise CaptureError(
                f"the forward depends on values at {where} ({error}), which takes a run with real "
                "parameters, but some are on the meta device: materialise them first"
            ) from error
        self._real = True
        self.device = _HOST  # where the parameters are; a GPU may not hold all of them


def fake_parameters(shell: ModuleShell, device: torch.device) -> dict[str, torch.Tensor]:
    """Return fake tensors for all parameters of a shell: shapes without memory."""
    fake: dict[str, torch.Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, param in shell.root.named_parameters():
            empty = torch.empty_strided(
                param.shape, param.stride(), dtype=param.dtype, device=device
            )
            fake[name] = nn.Parameter(empty, requires_grad=param.requires_grad)
    return fake


def _trace_device(batch: Batch, target: torch.device) -> torch.device:
    """Where to trace: on the device that runs it if fake tensors can stand for its kernels.

    What a forward makes depends on it: autocast has other lists for CUDA than for the CPU.
    """
    devices = [leaf.device for leaf in batch.leaves if isinstance(leaf, torch.Tensor)]
    return next((device for device in (target, *devices) if device.type == "cuda"), _HOST)


def _stand_ins(source: nn.Module, twin: ModuleShell) -> Mapping[int, Any]:
    """Map the user's own modules, parameters and buffers to the twin's, by id."""
    stand_ins: dict[int, Any] = {}
    for name, module in source.named_modules():
        stand_ins[id(module)] = twin.modules[name]
    for name, tensor in (*source.named_parameters(), *source.named_buffers()):
        stand_ins[id(tensor)] = twin.tensor(name)
    return stand_ins


def _nothing_saved() -> Any:
    """Keep nothing for a backward: a real trace needs the graph, not the activations."""

    def unpack(_: Any) -> torch.Tensor:
        raise CaptureError("backward inside the forward, outside of a layer, is not supported")

    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, unpack)


def _is_in(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(outer + ".")


class _ObjectsMovedError(Exception):
    """The forward has set up something in objects that modules hold."""


class _AttributesMovedError(Exception):
    """The forward has changed Python attributes of opened modules.

    Attributes:
        attributes: name of the module, attribute, new value.
        modules: all modules by name, as they are now.
        recorded: the forward that has changed them.
    """

    def __init__(
        self,
        attributes: list[tuple[str, str, Any]],
        modules: Mapping[str, nn.Module],
        recorded: Recorded,
    ) -> None:
        super().__init__("attributes have changed")
        self.recorded = recorded
        self.attributes = attributes
        self.modules = modules


class OpenedModules:
    """What the forward may change on modules and a trace does not do again.

    That is what the Python of opened modules changes, on themselves or on leaf modules.
    """

    def __init__(self, twin: ModuleShell, leaves: AbstractSet[str]) -> None:
        inside = {id(m) for name in leaves for m in twin.modules[name].modules()}
        opened = {name: m for name, m in twin.modules.items() if id(m) not in inside}
        self._twin = twin
        self._names = {id(module): name for name, module in twin.modules.items()}
        self._buffers = {
            (module, key): buffer
            for module in opened.values()
            for key, buffer in module._buffers.items()
            if buffer is not None
        }
        self._plain = PlainState(twin.modules.values())
        self._hooks = hooks_of(twin.modules.values())

    def record_changes(self, recorder: Recorder) -> None:
        """Record buffers that were replaced; plain attributes must be as before.

        Raises:
            _AttributesMovedError: if they are not.
        """
        names = {id(self._twin.tensor(name)): name for name in self._twin.names}
        for (module, key), buffer in self._buffers.items():
            new = module._buffers.get(key)
            if new is not None and new is not buffer:
                recorder.assign(names[id(buffer)], buffer, new)
        by_leaves = {counted for step in recorder.steps for counted in step.counts}
        moved = [
            (self._names[id(module)], attribute, module.__dict__.get(attribute))
            for module, attribute in self._plain.changes()
            if (self._names[id(module)], attribute) not in by_leaves
        ]
        if moved and not recorder.once:
            recorded = (recorder.steps, recorder.values)
            raise _AttributesMovedError(moved, self._twin.modules, recorded)
        if (
            hooks_of(self._twin.modules.values()) != self._hooks
        ):  # on the copy: it is for the module's own run to do
            name = type(self._twin.root).__name__
            raise DynamicOnlyError(
                "the forward registers or removes hooks", name, eager=True, passing=True
            )
        recorder.attributes = moved


def _check_inputs(recorder: Recorder) -> None:
    """Let a module run as it is if its forward changes inputs, which are the caller's tensors.

    Raises:
        DynamicOnlyError: naming the line.
    """
    values = recorder.values
    given = {values[number].storage for number in recorder.inputs}
    for step in recorder.steps:
        if any(values[before].storage in given for before, _ in step.mutated):
            name = f"{step.name} changes an input in place"
            raise DynamicOnlyError(name, step.where, eager=True)


def _check_guards(recorder: Recorder) -> None:
    """Refuse Python decisions that depend on random numbers, or on buffers that change.

    Raises:
        DynamicOnlyError: naming the line.
    """
    if recorder.once:
        return
    changing = {name for step in recorder.steps for name in step.changes}
    drawn: set[int] = set()
    for step in recorder.steps:
        draws = step.random and step.kind is StepKind.FUNCTION
        tainted = draws or not drawn.isdisjoint(step.inputs)
        if step.kind is StepKind.GUARD and tainted:
            raise DynamicOnlyError(f"{step.name} decides by a random number", step.where)
        if step.kind is StepKind.GUARD and not changing.isdisjoint(step.state):
            raise DynamicOnlyError(f"{step.name} decides by a buffer that changes", step.where)
        if tainted:
            drawn.update(step.made)
