"""How much each microbatch's loss counts in the loss of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from harmony.capture.graph.layered import LayeredTrace, difference
from harmony.capture.graph.trace import Trace, ValueRef
from harmony.capture.loss.reduction import Kind, Term, UnknownRuleError, find_terms, host_steps
from harmony.capture.replay.captured import Captured
from harmony.capture.replay.replay import Values, run_step

Range = tuple[int, int]
"""The half-open range of samples of a microbatch."""

_SAME = 1e-9


@dataclass(frozen=True)
class LossWeights:
    """The weights of one scalar output.

    Attributes:
        weights: per microbatch, the factor of its scalar in the sum that is the whole batch's.
        doubt: why that sum may not be what plain PyTorch computes from the whole batch; None
            where it is.
        depends_on_batch: whether the doubt is of this batch, and all is known of the loss: that
            of another batch may be put together, and whether it may is known before it runs.
    """

    weights: Mapping[Range, float]
    doubt: str | None = None
    depends_on_batch: bool = False


class UnequalPartsError(UnknownRuleError):
    """Two parts of the loss are known, and weigh the microbatches of this batch differently."""


@dataclass(frozen=True)
class _Reading:
    """The parts of a scalar for one number of samples.

    Attributes:
        inputs: numbers of the model's inputs on the trace, by value.
        repeat: how often the samples are repeated to fit the trace: the trace of one sample may
            have other steps than all others.
    """

    terms: tuple[Term, ...]
    trace: Trace
    inputs: Mapping[int, int]
    repeat: int


def parts_asked_for(doubt: str, minibatch: int, size: int) -> str:
    """Say that the caller's microbatches make another loss than the whole batch would."""
    return (
        f"the loss of {minibatch} samples is not put together from its microbatches of {size}: "
        f"{doubt}. They were asked for with microbatch_size={size}, so each counts by its number "
        "of samples, as where gradients are accumulated"
    )


class LossWeigher:
    """Weighs the microbatches' values of the scalars that a captured model returns."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._traces = captured.traces
        self._template = captured.template
        self._readings: dict[tuple[int, int], _Reading | UnknownRuleError] = {}

    def weigh(self, value: int, inputs: Values, microbatches: Sequence[Range]) -> LossWeights:
        """Return the weights for the microbatches that together are the whole batch.

        A mean over samples weighs by their number, a mean over targets (``cross_entropy`` with
        ``ignore_index`` or class weights) by theirs, a plain sum by 1. Where the scalar is none
        of these, the microbatches are weighed by their samples, with a ``doubt``.

        Args:
            value: id of a scalar output.
            inputs: the whole batch, by value.
        """
        num_samples = sum(high - low for low, high in microbatches)
        by_samples = {(low, high): (high - low) / num_samples for low, high in microbatches}
        if len(microbatches) == 1:
            return LossWeights(by_samples)
        try:
            found = self._weights(value, inputs, by_samples)
        except UnknownRuleError as doubt:
            of_batch = isinstance(doubt, UnequalPartsError)
            return LossWeights(by_samples, str(doubt), depends_on_batch=of_batch)
        if any(map(math.isinf, found.values())):
            return LossWeights(by_samples, "a part of a microbatch is multiplied by 0")
        # Nothing counts in the whole batch: NaN, as in plain PyTorch.
        return LossWeights(found if all(map(math.isfinite, found.values())) else by_samples)

    def _weights(
        self, value: int, inputs: Values, by_samples: Mapping[Range, float]
    ) -> Mapping[Range, float]:
        whole = (min(low for low, _ in by_samples), max(high for _, high in by_samples))
        readings = {s: self._read(value, _size(s), _size(whole)) for s in by_samples}
        terms = next(iter(readings.values())).terms
        if any(len(reading.terms) != len(terms) for reading in readings.values()):
            raise UnknownRuleError("the loss of one microbatch has other parts than another's")
        found: list[tuple[Term, Mapping[Range, float]]] = []
        for position, term in enumerate(terms):
            plain = not (term.over or term.times or term.by_size)
            if term.kind is Kind.SAMPLES and plain:
                found.append((term, by_samples))
            elif term.kind is Kind.SUM and plain:
                found.append((term, dict.fromkeys(by_samples, 1.0)))
            elif term.kind is not Kind.FIXED:
                divisors = {s: self._divisor(r, position, inputs, s) for s, r in readings.items()}
                total = sum(divisors.values())
                if not (term.kind is Kind.TARGETS and plain):
                    reading = self._read(value, _size(whole), _size(next(iter(by_samples))))
                    total = self._divisor(reading, position, inputs, whole)
                weights = {s: d / total if total else math.nan for s, d in divisors.items()}
                found.append((term, weights))
        agreed = _agreed(found) if found else by_samples
        _check_fixed([t for t in terms if t.kind is Kind.FIXED], agreed)
        return agreed

    def _read(self, value: int, num_samples: int, another: int) -> _Reading:
        """Return the parts of a scalar, as a trace of this number of samples shows them.

        Args:
            another: a number of samples that is in use too, to compare the trace with.
        """
        known = self._readings.get((value, num_samples))
        if known is None:
            try:
                known = self._read_anew(value, num_samples, another)
            except UnknownRuleError as error:
                known = error
            self._readings[value, num_samples] = known
        if isinstance(known, UnknownRuleError):
            raise known
        return known

    def _read_anew(self, value: int, num_samples: int, another: int) -> _Reading:
        for repeat in (1, 2):
            size = repeat * num_samples
            candidates = (self._captured.num_samples, another, 2 * another, 2 * size)
            other = next(s for s in candidates if s not in (1, size))
            layered = self._traces.of(size)
            traces = layered.trace, self._traces.of(other).trace
            if difference(*traces, (size, other)) is None:
                return self._read_traces(value, layered, traces, (size, other), repeat)
        raise UnknownRuleError("the forward takes another path for each number of samples")

    def _read_traces(
        self,
        value: int,
        layered: LayeredTrace,
        traces: tuple[Trace, Trace],
        sizes: tuple[int, int],
        repeat: int,
    ) -> _Reading:
        """Read the parts off two traces; modules that make the loss are opened to look inside."""
        outputs = [leaf.id if isinstance(leaf, ValueRef) else -1 for leaf in traces[0].outputs]
        position = outputs.index(layered.crossing[value])
        inputs = _input_numbers(layered)
        opened: set[str] = set()
        while True:
            number = traces[0].outputs[position].id
            try:
                terms = find_terms(*traces, sizes, number, self._template)
            except UnknownRuleError as error:
                if error.inside is None or error.inside in opened:
                    raise
                opened.add(error.inside)
                one, two = sizes
                traces = self._traces.opened(one, opened), self._traces.opened(two, opened)
                if difference(*traces, sizes) is not None:
                    raise
            else:
                return _Reading(terms, traces[0], inputs, repeat)

    def divisor(self, value: int, inputs: Values) -> tuple[tuple[Term, ...], list[float]]:
        """Return the parts of a scalar of a model that was captured for this batch only.

        The second list has what each part divides the sum over its entries by.

        Raises:
            UnknownRuleError: as for `find_terms`.
        """
        layered, size = self._traces.reference, self._captured.num_samples
        trace, number = layered.trace, layered.crossing[value]
        terms = find_terms(trace, trace, (size, size), number, self._template)
        alone = tuple(replace(term, by_size=False) for term in terms)
        reading = _Reading(alone, trace, _input_numbers(layered), 1)
        whole = (0, size)
        return terms, [self._divisor(reading, i, inputs, whole) for i in range(len(terms))]

    def _divisor(self, reading: _Reading, position: int, inputs: Values, samples: Range) -> float:
        """What a part divides the sum over the entries of these samples by."""
        term, found = reading.terms[position], 1.0
        if term.host_values:
            values = self._host_values(reading, term, inputs, samples)
            if term.kind is Kind.TARGETS:
                found = _count(values[term.target], term)
            for number in term.over:
                found *= float(values[number])
            for number in term.times:
                factor = float(values[number])
                found = found / factor if factor else math.inf
        if term.kind is Kind.SAMPLES:
            found *= reading.repeat * _size(samples)
        # A factor that all sizes have in common would only round the ratio of two divisors.
        return found / (term.factor if term.by_size else 1.0) / reading.repeat

    def _host_values(
        self, reading: _Reading, term: Term, inputs: Values, samples: Range
    ) -> Values:
        """Compute what the inputs alone decide, for some samples."""
        steps = host_steps(reading.trace, term.host_values)
        assert steps is not None, "find_terms takes only what the inputs decide"
        mutates = any(step.mutated for step in steps)
        values: Values = {}
        for index, tensor in inputs.items():
            if index < 0:  # no layer reads it
                continue
            dim = self._captured.graph.values[index].batch_dim
            part = tensor if dim is None else tensor.narrow(dim, *_start_and_size(samples))
            if dim is not None and reading.repeat > 1:
                part = torch.cat([part] * reading.repeat, dim)
            values[reading.inputs[index]] = part.clone() if mutates else part
        with torch.no_grad():
            for step in steps:
                run_step(step, values, self._template)
        return values


def _input_numbers(layered: LayeredTrace) -> dict[int, int]:
    numbers = (n for n in layered.trace.inputs if n is not None and n in layered.ids)
    return {layered.ids[number]: number for number in numbers}


class LiveWeights:
    """Weighs microbatches that are captured one by one, each when the later ones are not known.

    The weights that `weigh` gives are right up to one factor, which `scale` gives at the end; it
    is exactly 1 where all microbatches count alike.

    Attributes:
        doubt: why the sum may not be the whole batch's loss; None where it is.
    """

    def __init__(self, minibatch: int) -> None:
        self.doubt: str | None = None
        self._minibatch = minibatch
        self._unit: float | None = None  # targets per share of the batch, where that counts
        self._counted = 0.0
        self._by_targets = False

    def weigh(self, captured: Captured, value: int, inputs: Values) -> float:
        """Return the weight of the next microbatch.

        Args:
            captured: its own capture.
            value: id of a scalar output.
            inputs: of the microbatch, by value.
        """
        share = captured.num_samples / self._minibatch
        if self.doubt is not None or share == 1.0:
            return share
        try:
            return self._weigh(captured, value, inputs, share)
        except UnknownRuleError as doubt:
            self.doubt = str(doubt)
            return share

    @property
    def by_targets(self) -> bool:
        """Whether `scale` may be other than 1."""
        return self._by_targets

    def scale(self) -> float:
        """Return what the sums over all microbatches have still to be multiplied by."""
        if not self._by_targets or self.doubt is not None:
            return 1.0
        if not self._counted or self._unit is None:
            return math.nan  # nothing counts in the whole batch: NaN, as in plain PyTorch
        scale = self._unit / self._counted
        return 1.0 if math.isclose(scale, 1.0, rel_tol=_SAME) else scale

    def _weigh(self, captured: Captured, value: int, inputs: Values, share: float) -> float:
        terms, divisors = LossWeigher(captured).divisor(value, inputs)
        kinds = {term.kind for term in terms} - {Kind.FIXED}
        for term in terms:
            if term.over or term.times or (term.kind is Kind.SUM and term.by_size):
                raise UnknownRuleError(f"what divides {term.where} may be another for each batch")
        if kinds == {Kind.SUM} and len(kinds) == len({term.kind for term in terms}):
            return 1.0
        if Kind.SUM in kinds:
            raise UnknownRuleError("the loss adds a plain sum to what is none")
        if Kind.TARGETS not in kinds:
            return share
        counts = [n for t, n in zip(terms, divisors, strict=True) if t.kind is Kind.TARGETS]
        self._counted += counts[0]
        self._by_targets = True
        if self._unit is None and counts[0]:
            self._unit = counts[0] / share
        weight = counts[0] / self._unit if self._unit else 0.0
        alike = math.isclose(weight, share, rel_tol=_SAME)
        if not alike and (len(kinds) > 1 or len(set(counts)) > 1):
            raise UnknownRuleError("the parts of the loss weigh the microbatches differently")
        return share if alike else weight


def _count(target: torch.Tensor, term: Term) -> float:
    """Targets that are not ignored, or the sum of their classes' weights."""
    counted = target[target != term.ignored]
    if term.class_weights is None:
        return float(counted.numel())
    return float(term.class_weights.to(counted.device)[counted].sum())


def _agreed(found: Sequence[tuple[Term, Mapping[Range, float]]]) -> Mapping[Range, float]:
    """Return the weights of all parts, if they are the same.

    Raises:
        UnequalPartsError: naming two parts that count different things.
    """
    first, weights = found[0]
    for term, others in found[1:]:
        if not all(math.isclose(weights[s], others[s], rel_tol=_SAME) for s in weights):
            raise UnequalPartsError(
                f"the loss is the sum of {first.kind.value} ({first.where}) and "
                f"{term.kind.value} ({term.where}), which weigh this batch's microbatches "
                "differently"
            )
    return weights


def _check_fixed(fixed: Sequence[Term], weights: Mapping[Range, float]) -> None:
    """Refuse a part that every microbatch adds in full, unless the weights add up to 1."""
    total = sum(weights.values())
    if fixed and not math.isclose(total, 1.0, rel_tol=_SAME):
        raise UnknownRuleError(
            f"the loss adds {fixed[0].where}, the same for every microbatch, to a plain sum"
        )


def _size(samples: Range) -> int:
    return samples[1] - samples[0]


def _start_and_size(samples: Range) -> tuple[int, int]:
    return samples[0], samples[1] - samples[0]
