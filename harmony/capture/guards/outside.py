"""What a forward reads and writes beside its inputs, parameters and buffers.

While a forward is recorded, the Python that runs is noted, and the objects that it can reach are
compared before and after. From that follows what a recording may stand for: it is good while all
that was read is as it was (`guards`); and if the forward writes where a recording would not, or
reads what cannot be looked at again, the model has to be run as it is (`reason`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from harmony.capture.graph.trace import StepKind
from harmony.capture.guards.loss_reads import LossReads
from harmony.capture.guards.observe import Observed, is_users, observing
from harmony.capture.guards.reachable import Walk, World
from harmony.capture.guards.written import Judge, Judges, SetUp, set_up_by
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.state.python_state import is_plain
from harmony.capture.trace.leaf_watch import by_shape_only
from harmony.capture.trace.record import Recorder
from harmony.capture.trace.refuse import DynamicOnlyError

_MOST_ROUNDS = 8


def hidden_state(name: str) -> str:
    """Say that something has a state that cannot be compared, nor put back."""
    return f"the forward reads {name}, whose state nothing can look at"


class Outside:
    """Watches the traces of one module.

    Attributes:
        reason: why the last trace stands for no other run, if so: what was read or written.
        kept_by_loss: what the loss function has written to, if anything.
        written_by_loss: names of all that it has written to.
        alone: whether each trace is to be undone at once.
        arguments: names and values of the arguments that are objects, which code may read.
        set_up: what the last trace has set up for later forwards, the loss left out.
    """

    def __init__(
        self,
        source: nn.Module,
        loss: Callable[..., Any] | None,
        known: Observed | None = None,
    ) -> None:
        """Watch ``source`` and its loss function.

        Args:
            known: what earlier traces have run.
        """
        self.reason: str | None = None
        self.kept_by_loss: str | None = None
        self.written_by_loss: frozenset[str] = frozenset()
        self.alone = False
        self.arguments: list[tuple[str, Any]] = []
        self.set_up = SetUp()
        self._source = source
        self._loss = loss
        self._forward = _reachable(source, loss) if known is None else known
        self._in_loss = Observed()
        self._traced = known is not None
        self._initial: World | None = None

    def begin(self, twin: ModuleShell) -> None:
        """Remember what a trace on a copy of the module may change."""
        own = [twin.tensor(name) for name in twin.names]
        self._around = self._walk(self.observed, loss=True).world()
        if self._initial is None:
            self._initial = self._around
            forward = self._walk(self._forward, loss=False)
            if forward.hidden:  # a trace would advance it
                name = type(self._source).__name__
                raise DynamicOnlyError(hidden_state(forward.hidden[0]), name, eager=True)
        self._copied = Walk(self.observed, own)
        self._copied.modules(twin.root)

    @property
    def observed(self) -> Observed:
        """What the traces have run."""
        return self._forward.merged(self._in_loss)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what the forward runs inside the block."""
        with observing() as observed:
            yield
        if self._traced:
            observed.codes.update(self._forward.codes)
        self._forward, self._traced = observed, True

    @contextmanager
    def watched_loss(self, made_of_data: Judges) -> Iterator[None]:
        """Note what the loss runs inside the block; the forward is over.

        Args:
            made_of_data: as for `end`.
        """
        with torch._C.DisableTorchFunction():  # the forward is being recorded
            judge = Judge(made_of_data)
            self._by_forward = judge.written(self._around.holders)
            self.set_up = set_up_by(judge, self._around.holders, self._copied)
        with observing() as observed:
            yield
        self._in_loss = observed

    def end(self, made_of_data: Judges) -> None:
        """Compare.

        Args:
            made_of_data: whether a tensor depends on the content of inputs or parameters.
        """
        self.reason = self.kept_by_loss = None
        for why, where in self._forward.unguardable.items():
            self.reason = f"the forward reads {why} at {where}"
        judge = Judge(made_of_data)
        written = judge.written(self._around.holders)
        if self._loss is None:
            self.set_up = set_up_by(judge, self._around.holders, self._copied)
        else:
            written, self.kept_by_loss = self._by_forward, written
            changed = (holder.name for holder in self._around.holders if not holder.same())
            self.written_by_loss = frozenset(changed) if self.kept_by_loss else frozenset()
        written = written or judge.written_by_copy(self._copied)
        if written is not None:
            self.reason = f"the forward changes {written}"

    def changes(self) -> list[str]:
        """Names of what has changed since `begin`, outside of the copy."""
        return [holder.name for holder in self._around.holders if not holder.same()]

    def moved_objects(self) -> list[tuple[str, str]]:
        """Attributes of the copy's modules that hold an object in which something has changed."""
        held = [
            (entry.name, path, name)
            for entry, path, name in self._copied.attributes
            if not is_plain(entry.expected) and not isinstance(entry.expected, torch.Tensor)
        ]
        changed = [h.name for h in self._copied.holders if not h.same()]
        inside = [(f"{about}.", path, name) for about, path, name in held]
        return [
            (path, name)
            for about, path, name in inside
            if any(about in f"{other}." and other != about[:-1] for other in changed)
        ]

    def guards(self, moving: Collection[tuple[str, str]], loss: bool) -> World:
        """Return what has to be as it is now for the recording to stand.

        Args:
            moving: attributes that the forward itself changes, which is replayed.
            loss: whether the recording stands for the loss function too.
        """
        observed = self.observed if loss else self._forward
        return self._walk(observed, loss, moving).world()

    def loss_reads(self) -> LossReads | None:
        """Return what the loss alone reads, as it is now; None without a loss function."""
        if self._loss is None:
            return None
        walk = Walk(self._in_loss, [*self._source.parameters(), *self._source.buffers()])
        walk.code(self._in_loss.codes)
        walk.root("the loss", self._loss)
        return LossReads(walk.world(), self._in_loss, self.written_by_loss)

    def refusal(self, guards: World, loss: bool) -> str | None:
        """Say why no recording stands for the next forward; None if one does.

        Args:
            loss: as for `guards`.
        """
        if self.reason is None and loss and self.kept_by_loss is not None:
            return f"the loss changes {self.kept_by_loss}"
        if self.reason is None and guards.hidden:
            return hidden_state(guards.hidden[0])
        return self.reason

    def tensor(self, name: str) -> torch.Tensor:
        """Return a parameter or buffer of the user's module, as it is now."""
        owner, _, key = name.rpartition(".")
        return cast(torch.Tensor, getattr(self._source.get_submodule(owner), key))

    def state(self) -> World:
        """Return all that the forward and the loss can reach, to put it back."""
        return self._walk(self.observed, loss=True).world()

    def bring_home(self, device: torch.device) -> None:
        """Bring tensors that were left on a device to the host, wherever they were left."""
        home = Home(device)
        for holder in self._walk(self.observed, loss=True).holders:
            holder.replace(home.of)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Undo what a trace in the block has left, if each is to be undone at once."""
        try:
            yield
        finally:
            self._copied = Walk(self.observed, ())  # the copy's buffers may lie on a GPU
            if self.alone:
                self.restore()

    def restore(self) -> None:
        """Undo what traces have left in the user's objects, now and after each later trace."""
        self.alone = True
        if self._initial is not None:
            self._initial.restore()
            self._initial = None

    def _walk(
        self, observed: Observed, loss: bool, moving: Collection[tuple[str, str]] = ()
    ) -> Walk:
        walk = Walk(observed, [*self._source.parameters(), *self._source.buffers()])
        walk.modules(self._source, moving)
        walk.code(observed.codes)
        for name, held in self.arguments:
            walk.root(name, held)
        if loss and self._loss is not None:
            walk.root("the loss", self._loss)
        return walk


class Home:
    """Moves tensors from a device to the host, each once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, held: Any) -> Any:
        """Return a tensor of the device, or a tuple of such, on the host; else what is given."""
        if isinstance(held, tuple) and type(held) is tuple:
            there = tuple(map(self.of, held))
            return there if any(a is not b for a, b in zip(there, held, strict=True)) else held
        if not isinstance(held, torch.Tensor) or held.device != self._device:
            return held
        if id(held) not in self._moved:
            self._moved[id(held)] = (held, held.to("cpu"))
        return self._moved[id(held)][1]


def depends_on_batch(
    recorder: Recorder, parameters: Collection[str]
) -> Callable[[torch.Tensor], bool]:
    """Return what tells whether a tensor depends on the content of inputs or parameters.

    What Python makes once it has looked at such content (at how many tokens an expert gets, for
    instance) may depend on it too.

    Args:
        parameters: their names.
    """
    tainted: set[int] = set(recorder.inputs)
    moving = {name for step in recorder.steps for name in step.changes}
    moving.update(parameters)
    looked = False
    for step in recorder.steps:
        trained = not moving.isdisjoint(step.state)
        of_data = not tainted.isdisjoint(step.inputs) and not by_shape_only(step.name)
        left = {left.value for left in step.left_behind}
        looked |= step.kind is StepKind.GUARD and (of_data or trained)
        if step.random or looked:
            tainted.update(left)
        if of_data or trained or step.random or looked:
            tainted.update(number for number in step.made if number not in left)

    def depends(tensor: torch.Tensor) -> bool:
        number = recorder.number_of(tensor)
        if isinstance(tensor, FakeTensor) or tensor.requires_grad:
            return True
        return id(tensor) in recorder.of_data or number in tainted

    return depends


def _reachable(source: nn.Module, loss: Callable[..., Any] | None) -> Observed:
    """Return the functions of the program that a forward may call, by the names in their code.

    More than will be called; what the first trace may change has to be known before it runs.
    """
    codes: dict[CodeType, dict[str, Any]] = {}
    pending = [function for held in _callables(source, loss) for function in _functions(held)]
    for _ in range(_MOST_ROUNDS):
        fresh = {f.__code__: f.__globals__ for f in pending if f.__code__ not in codes}
        if not any(map(is_users, fresh)):
            break
        for code, names in list(fresh.items()):
            if is_users(code):
                codes.update(dict.fromkeys(_nested(code), names))
        observed = Observed(codes)
        walk = Walk(observed, [*source.parameters(), *source.buffers()])
        walk.modules(source)
        walk.code(codes)
        if loss is not None:
            walk.root("the loss", loss)
        pending = walk.functions
    return Observed(codes)


def _callables(source: nn.Module, loss: Callable[..., Any] | None) -> Iterator[Any]:
    for module in source.modules():
        yield module.forward
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            yield from hooks.values()
    if loss is not None:
        yield loss.forward if isinstance(loss, nn.Module) else loss


def _functions(held: Any) -> Iterator[FunctionType]:
    """The functions that a callable stands for."""
    while isinstance(held, functools.partial):
        held = held.func
    if not isinstance(held, (FunctionType, MethodType, type)):
        held = getattr(type(held), "__call__", None)  # noqa: B004
    held = held.__func__ if isinstance(held, MethodType) else held
    while isinstance(held, FunctionType):
        yield held
        held = getattr(held, "__wrapped__", None)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
