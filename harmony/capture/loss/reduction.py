"""How the loss puts samples together: means, sums and counts, read off the trace.

Walks back from the loss through additions and constant factors to the steps that reduce samples.
What cannot be read (samples compared with each other, products of two losses) is named.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from harmony.capture.graph.trace import Constant, StateRef, Step, StepKind, Trace, ValueRef
from harmony.capture.replay.shell import ModuleShell

_OWN_COUNT = frozenset({"cross_entropy", "nll_loss", "linear_cross_entropy"})
_SUMS = {"add", "radd", "iadd", "sub", "rsub", "isub", "subtract"}
_PRODUCTS = {"mul", "rmul", "imul", "multiply"}
_QUOTIENTS = {"div", "truediv", "itruediv", "divide", "true_divide"}
_PASSED_ON = {"float", "double", "half", "bfloat16", "to", "type", "type_as", "clone", "neg"}
_PASSED_ON |= {"view", "view_as", "reshape", "squeeze", "unsqueeze", "flatten", "contiguous"}
_PASSED_ON |= {"mean", "sum", "stack", "cat", "hstack", "getitem", "detach", "negative", "pos"}
_BY_CONTENT = {"masked_select", "nonzero", "unique", "argwhere"}


class UnknownRuleError(Exception):
    """The loss puts samples together in a way that cannot be read; says where.

    Attributes:
        inside: the leaf module that would have to be opened to see more, if one is in the way.
    """

    def __init__(self, why: str, inside: str | None = None) -> None:
        super().__init__(why)
        self.inside = inside


class Kind(Enum):
    """What a part of the loss is: the value is its description."""

    SAMPLES = "a mean over the samples"
    TARGETS = "a mean over the targets that count"
    SUM = "a plain sum"
    FIXED = "the same for every batch"


@dataclass(frozen=True)
class Term:
    """A part of the loss, up to the step that puts samples together.

    Attributes:
        where: that step, with file and line.
        factor: the numbers that it is multiplied by, of those that another number of samples
            may make others.
        by_size: whether there are any.
        times, over: numbers of scalars, decided by the inputs, that multiply or divide it.
        target, class_weights: of ``Kind.TARGETS``: the argument's number on the trace, and the
            weight of each class.
        ignored: the target that does not count.
    """

    kind: Kind
    where: str
    factor: float = 1.0
    by_size: bool = False
    times: tuple[int, ...] = ()
    over: tuple[int, ...] = ()
    target: int = -1
    class_weights: torch.Tensor | None = None
    ignored: int = -100

    @property
    def host_values(self) -> tuple[int, ...]:
        """Numbers of the values that have to be computed from the inputs."""
        target = (self.target,) if self.kind is Kind.TARGETS else ()
        return (*target, *self.times, *self.over)


def find_terms(
    trace: Trace, other: Trace, num_samples: tuple[int, int], loss: int, shell: ModuleShell
) -> tuple[Term, ...]:
    """Return the parts that the loss is the sum of.

    Args:
        other: a trace of the same steps for another number of samples: what differs in shape
            depends on the batch. The same trace where there is one for this batch only: then less
            can be told, and is refused.
        num_samples: of both traces.
        loss: number of the scalar on the trace.

    Raises:
        UnknownRuleError: naming the step that is none of a mean, a sum or a constant factor.
    """
    return tuple(_Walk(trace, other, num_samples, shell).terms(loss, Term(Kind.FIXED, "")))


def host_steps(trace: Trace, numbers: Iterable[int]) -> list[Step] | None:
    """Return the steps that compute values from the inputs alone; None if they need more."""
    wanted, chosen = list(numbers), set()
    while wanted:
        index = trace.producer[wanted.pop()]
        if index < 0 or index in chosen:
            continue
        step = trace.steps[index]
        if step.kind is not StepKind.FUNCTION or step.random or step.state:
            return None
        chosen.add(index)
        wanted += step.inputs
    return [trace.steps[index] for index in sorted(chosen)]


class _Walk:
    """The way back from the loss over one trace."""

    def __init__(
        self, trace: Trace, other: Trace, num_samples: tuple[int, int], shell: ModuleShell
    ) -> None:
        self._trace = trace
        self._other = other
        self._num_samples = num_samples
        self._shell = shell
        self._one_size = other is trace
        inputs = [number for number in trace.inputs if number is not None]
        self._of_batch = _reached(trace, {n for n in inputs if self._dims(n)}, state=False)
        self._learned = _reached(trace, set(), state=True)
        drawn = {made for step in trace.steps if step.random for made in step.made}
        self._drawn = _reached(trace, drawn, state=False)

    def terms(self, number: int, so_far: Term) -> Iterator[Term]:
        """Yield the parts of a value that does not grow with the batch."""
        if number not in self._of_batch:
            yield replace(so_far, kind=Kind.FIXED, where=self._trace.values[number].name)
            return
        index = self._trace.producer[number]
        if index < 0:
            raise UnknownRuleError(f"the loss is the input {self._trace.values[number].name}")
        step = self._trace.steps[index]
        if any(self._dims(n) for n in step.inputs if n in self._of_batch):
            yield self._reduction(step, so_far)
        else:
            yield from self._linear(step, so_far)

    # Above the reductions: sums and constant factors

    def _linear(self, step: Step, so_far: Term) -> Iterator[Term]:
        args, kwargs = step.structure.unflatten(step.leaves)
        name = _plain_name(step)
        if name in _SUMS:
            for leaf in _operands(args, kwargs):
                if isinstance(leaf, ValueRef):
                    yield from self.terms(leaf.id, so_far)
                elif leaf != 0:  # sum([...]) begins with a 0
                    yield replace(so_far, kind=Kind.FIXED, where=f"{step.name} at {step.where}")
        elif name in _PRODUCTS | _QUOTIENTS:
            yield from self._scaled(step, _operands(args, kwargs), so_far)
        elif name in _PASSED_ON or self._is_identity(step):
            for number in step.inputs:
                yield from self.terms(number, so_far)
        else:
            inside = step.target if isinstance(step.target, str) else None
            raise UnknownRuleError(
                f"{_named(step)} is neither a sum nor a constant factor of it", inside
            )

    def _scaled(self, step: Step, operands: list[Any], so_far: Term) -> Iterator[Term]:
        divides = _plain_name(step) in _QUOTIENTS
        of_batch = [n for n in step.inputs if n in self._of_batch]
        if len(of_batch) == 2:  # one of them may be a count: the inputs alone decide it
            of_batch = [n for n in of_batch if host_steps(self._trace, [n]) is None]
        first = operands[0]
        is_first = isinstance(first, ValueRef) and of_batch == [first.id]
        if len(of_batch) != 1 or len(operands) != 2 or (divides and not is_first):
            raise UnknownRuleError(f"{_named(step)} combines two values that depend on the batch")
        factor = operands[1] if is_first else first
        if isinstance(factor, ValueRef):
            if self._varies(factor.id):
                more = (*(so_far.over if divides else so_far.times), factor.id)
                so_far = replace(so_far, over=more) if divides else replace(so_far, times=more)
        elif isinstance(factor, (int, float)):
            scale = float(factor)
            if divides:
                scale = 1.0 / scale if scale else math.inf
            if scale == 0.0:
                return  # a part that counts nothing
            if self._one_size or not self._same_numbers(step):
                so_far = replace(so_far, factor=so_far.factor * scale, by_size=True)
        yield from self.terms(of_batch[0], so_far)

    def _varies(self, number: int) -> bool:
        """Whether a factor that the inputs decide may be another for another microbatch."""
        if number in self._drawn:
            name = self._trace.values[number].name
            raise UnknownRuleError(f"{name}, a factor of it, depends on random numbers")
        steps = host_steps(self._trace, [number])
        if steps is None:
            return False  # made of parameters: every microbatch has the same
        return number in self._of_batch or not all(map(self._same_numbers, steps))

    def _same_numbers(self, step: Step) -> bool:
        """Whether a step has the same plain arguments for the other number of samples."""
        twin = self._other.steps[self._trace.steps.index(step)]
        pairs = zip(step.leaves, twin.leaves, strict=True)
        plain = (bool, int, float, str)
        return all(a == b for a, b in pairs if isinstance(a, plain) or isinstance(b, plain))

    def _is_identity(self, step: Step) -> bool:
        return isinstance(step.target, str) and isinstance(
            self._shell.modules[step.target], nn.Identity
        )

    # Reductions

    def _reduction(self, step: Step, so_far: Term) -> Term:
        name, arguments = self._loss_call(step)
        term = replace(so_far, where=f"{step.name} at {step.where}")
        if name == "mean":
            term = replace(term, kind=Kind.SAMPLES)
        elif name in ("sum", "dot"):
            term = replace(term, kind=Kind.SUM)
        elif "reduction" in arguments:
            term = self._loss_term(step, name, arguments, term)
        else:
            raise UnknownRuleError(f"{_named(step)} puts samples together")
        self._check_separable(step, by_content=term.kind is Kind.SAMPLES)
        return term

    def _loss_call(self, step: Step) -> tuple[str, dict[str, Any]]:
        """Name of a loss function and its arguments, for modules of torch.nn too."""
        args, kwargs = step.structure.unflatten(step.leaves)
        if not isinstance(step.target, str):
            return _plain_name(step), _bound(step.name, args, kwargs)
        module = self._shell.modules[step.target]
        if type(module).__module__ != nn.CrossEntropyLoss.__module__:
            kind = type(module).__name__
            raise UnknownRuleError(
                f"the module {step.name} ({kind}) computes it, called at {step.where}",
                inside=step.target,
            )
        if isinstance(module, nn.NLLLoss):
            function = "nll_loss"
        else:
            function = "cross_entropy" if isinstance(module, nn.CrossEntropyLoss) else step.name
        held = ("reduction", "ignore_index", "weight")
        settings = {n: getattr(module, n) for n in held if hasattr(module, n)}
        return function, {**_bound(function, args, kwargs), **settings}

    def _loss_term(self, step: Step, name: str, given: dict[str, Any], term: Term) -> Term:
        if given.get("size_average") is not None or given.get("reduce") is not None:
            given = {**given, "reduction": _legacy(given)}
        if given["reduction"] in ("sum", 2):
            return replace(term, kind=Kind.SUM)
        if given["reduction"] not in ("mean", "batchmean", 1):
            raise UnknownRuleError(f"{_named(step)} has reduction={given['reduction']!r}")
        target = given.get("target")
        is_target = name in _OWN_COUNT and isinstance(target, ValueRef)
        if is_target and not self._trace.values[given["target"].id].dtype.is_floating_point:
            return self._target_term(step, given, term)
        if name in ("mse_loss", "l1_loss", "huber_loss") and given.get("weight") is not None:
            raise UnknownRuleError(f"{_named(step)} divides by the sum of its weights")
        return replace(term, kind=Kind.SAMPLES)

    def _target_term(self, step: Step, given: dict[str, Any], term: Term) -> Term:
        target, weight = given["target"].id, given.get("weight")
        if host_steps(self._trace, [target]) is None:
            raise UnknownRuleError(f"{_named(step)} has targets that the model computes")
        if isinstance(weight, Constant):
            weight = weight.tensor
        elif isinstance(weight, StateRef):
            weight = self._shell.placeholder(weight.name)
        if weight is not None and (
            not isinstance(weight, torch.Tensor) or weight.device.type == "meta"
        ):
            raise UnknownRuleError(f"{_named(step)} has class weights that the model computes")
        return replace(
            term,
            kind=Kind.TARGETS,
            target=target,
            class_weights=weight,
            ignored=given.get("ignore_index", -100),
        )

    # Below the reductions: does each entry depend on one sample only?

    def _check_separable(self, step: Step, *, by_content: bool) -> None:
        """Refuse a reduction whose entries compare samples, as far back as the last modules.

        Args:
            by_content: refuse entries that were picked by content as well: their number is
                another in each microbatch.
        """
        pending, seen = [n for n in step.inputs if n in self._learned], set[int]()
        while pending:
            number = pending.pop()
            index = self._trace.producer[number]
            if number in seen or number not in self._of_batch:
                continue
            seen.add(number)
            made_by = self._trace.steps[index] if index >= 0 else step
            self._check_value(number, made_by, by_content)
            if index >= 0 and made_by.kind is StepKind.FUNCTION:
                if by_content and self._picks(made_by):
                    raise UnknownRuleError(f"{_named(made_by)} picks entries by their content")
                pending += [n for n in made_by.inputs if n in self._learned]

    def _check_value(self, number: int, made_by: Step, by_content: bool) -> None:
        dims = self._dims(number)
        if self._one_size:
            if all(size % self._num_samples[0] for size in self._trace.values[number].shape):
                raise UnknownRuleError(f"{_named(made_by)} may put samples together")
            return
        if len(dims) > 1:
            raise UnknownRuleError(f"{_named(made_by)} compares samples with each other")
        if not dims:
            raise UnknownRuleError(f"{_named(made_by)} puts samples together before the loss does")
        if by_content:
            one, two = (t.values[number].shape[dims[0]] for t in (self._trace, self._other))
            if one * self._num_samples[1] != two * self._num_samples[0]:
                raise UnknownRuleError(
                    f"{_named(made_by)} makes {one} entries of {self._num_samples[0]} samples and "
                    f"{two} of {self._num_samples[1]}"
                )

    def _picks(self, step: Step) -> bool:
        by_mask = _plain_name(step) == "getitem" and any(
            self._trace.values[n].dtype is torch.bool for n in step.inputs
        )
        return by_mask or _plain_name(step) in _BY_CONTENT

    def _dims(self, number: int) -> tuple[int, ...]:
        """Dimensions of a value that depend on the number of samples."""
        one, two = self._trace.values[number].shape, self._other.values[number].shape
        if self._one_size:
            return tuple(range(len(one))) if self._may_be_batched(number) else ()
        if len(one) != len(two):
            return tuple(range(len(one)))
        return tuple(d for d, sizes in enumerate(zip(one, two, strict=True)) if len({*sizes}) > 1)

    def _may_be_batched(self, number: int) -> bool:
        """Whether a value that no second size tells about is more than scalars put together."""
        index, shape = self._trace.producer[number], self._trace.values[number].shape
        if not shape or index < 0:
            return bool(shape)
        step = self._trace.steps[index]
        return step.kind is StepKind.MODULE or any(map(self._may_be_batched, step.inputs))


def _reached(trace: Trace, start: set[int], *, state: bool) -> set[int]:
    """Values that depend on those of ``start``, and on modules and their state if asked for."""
    reached = set(start)
    for step in trace.steps:
        learned = state and (step.kind is StepKind.MODULE or bool(step.state))
        if learned or not reached.isdisjoint(step.inputs):
            reached.update(step.made)
    return reached


def _plain_name(step: Step) -> str:
    return step.name.strip("_")


def _named(step: Step) -> str:
    return f"{step.name} at {step.where}"


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    named = [kwargs[name] for name in ("input", "other") if name in kwargs]
    return [*args, *named]


def _bound(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, of a loss function of torch.nn.functional; of others those that are."""
    function = getattr(F, name, None)
    if function is None or not inspect.isfunction(function):
        return dict(kwargs)
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return dict(kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _legacy(given: dict[str, Any]) -> str:
    """The reduction that the old arguments ``size_average`` and ``reduce`` stand for."""
    if given.get("reduce") is False:
        return "none"
    return "sum" if given.get("size_average") is False else "mean"
