"""How the scalars of microbatches make that of the batch: the rule that values confirm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch

from harmony.capture.loss.weights import LossWeigher
from harmony.core.layergraph import MODEL_INPUT, Layer, LayerGraph
from harmony.engine.splitting.compare import difference, tolerance
from harmony.engine.splitting.runner import LayerRunner, Leaf, Scalars
from harmony.engine.splitting.samples import Dims, perturbed
from harmony.planner.ir.tasks import Samples
from harmony.runtime.exec.rows import rows_of
from harmony.runtime.exec.stage import Values


class Rule(Enum):
    """How much the scalar of a microbatch counts in that of the batch."""

    READ = "as its steps say"
    SAMPLES = "by its number of samples"
    SUM = "in full"

    def weights(self, microbatches: Sequence[Samples]) -> dict[Samples, float]:
        """The weights by ``SAMPLES`` or ``SUM``, of microbatches that are the whole batch."""
        if self is Rule.SUM:
            return dict.fromkeys(microbatches, 1.0)
        total = sum(high - low for low, high in microbatches)
        return {(low, high): (high - low) / total for low, high in microbatches}


Split = tuple[int, ...]
"""Sizes of the parts of some samples."""

_SCALES = (1.0, 1e-3, None, 0.0, 1.0)
"""By what the inputs are scaled in each try; None: random numbers instead of them.

Hinges and margins are flat for outputs that are far apart, or close together.
"""


@dataclass(frozen=True)
class _Try:
    """Some inputs of a layer, and the inputs of the model that they belong to."""

    inputs: Values
    of_model: Values


class LossTrial:
    """Compares the scalars of one layer, of samples together and in parts."""

    def __init__(
        self,
        runner: LayerRunner,
        graph: LayerGraph,
        layer: Layer,
        groups: Mapping[int, int],
        num_samples: int,
    ) -> None:
        """Try ``layer`` on this many samples.

        Args:
            groups: of rows, of each value where there are several.
        """
        self._runner = runner
        self._graph = graph
        self._layer = layer
        self._groups = groups
        self._num_samples = num_samples
        self._dims: Dims = {v.id: v.batch_dim for v in graph.values}

    def rules(
        self,
        scalars: Sequence[int],
        env: Values,
        of_model: Values,
        splits: Sequence[Split],
        weigher: LossWeigher,
    ) -> tuple[dict[int, list[Rule]], dict[Split, str]]:
        """Return the rules that hold for each scalar in all splits, and the splits that fail.

        A scalar of which nothing could be told has no rules.

        Args:
            splits: those with single samples last.
            env: the layer's inputs for all samples.
            of_model: the model's inputs for them.
        """
        tries = list(self._possible(env, of_model, scalars))
        told = [s for s in scalars if any(_tells(whole, s) for _, whole in tries)]
        rules = {scalar: list(Rule) for scalar in told}
        failed: dict[Split, str] = {}
        compared: set[tuple[int, Rule]] = set()
        for index, split in enumerate(splits):
            kept = {scalar: list(known) for scalar, known in rules.items()}
            try:
                for trial, whole in tries:
                    compared |= self._sift(kept, trial, whole, split, weigher)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever the user's code raises for so many samples
                failed[split] = f"{type(error).__name__}: {error}"
                continue
            if index and 1 in split and not all(kept.values()):
                failed[split] = "the loss of one sample is no part of that of several"
                continue
            rules = kept
            if not any(rules.values()):
                break
        found = {
            s: [rule for rule in known if (s, rule) in compared] for s, known in rules.items()
        }
        return found, failed

    def _possible(
        self, env: Values, of_model: Values, scalars: Sequence[int]
    ) -> Iterator[tuple[_Try, Scalars]]:
        """Yield what can be tried, with what it makes of all samples."""
        for alternatives in self._tries(env, of_model):
            for trial in alternatives:
                whole = self._whole(trial, scalars)
                if whole is not None:
                    yield trial, whole
                    break

    def _sift(
        self,
        kept: dict[int, list[Rule]],
        trial: _Try,
        whole: Scalars,
        split: Split,
        weigher: LossWeigher,
    ) -> set[tuple[int, Rule]]:
        """Leave of the rules of each scalar those that hold for a split; return the compared."""
        ranges = _ranges(split)
        parts = [self._part(trial, list(kept), samples) for samples in ranges]
        compared = set()
        for scalar, rules in kept.items():
            for rule in list(rules):
                weights = _weights(rule, weigher, scalar, trial.of_model, ranges)
                if weights is None:
                    rules.remove(rule)
                elif weights:
                    compared.add((scalar, rule))
                    weighted = list(zip(ranges, parts, weights, strict=True))
                    if not self._same(scalar, whole, weighted):
                        rules.remove(rule)
        return compared

    def _whole(self, trial: _Try, scalars: Sequence[int]) -> Scalars | None:
        """The scalars of all samples; None if there are none to compare with."""
        try:
            whole = self._part(trial, scalars, (0, self._num_samples))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # these inputs are not possible ones
            return None
        return whole if all(bool(t.isfinite()) for t in whole.values.values()) else None

    def _part(self, trial: _Try, scalars: Sequence[int], samples: Samples) -> Scalars:
        inputs = dict(trial.inputs)
        for v, tensor in trial.inputs.items():
            dim, groups = self._dims[v], self._groups.get(v, 1)
            if dim is not None:
                inputs[v] = rows_of(tensor, dim, groups, samples, self._num_samples)
        size = samples[1] - samples[0]
        return self._runner.run_scalars(self._layer, inputs, size, scalars)

    def _tries(self, env: Values, of_model: Values) -> Iterator[Iterator[_Try]]:
        """Yield what to try, each with what to try instead where that is not possible."""
        values = self._graph.values
        given = {v: env[v] for v in self._layer.inputs}
        targets = [
            v
            for v in given
            if values[v].producer == MODEL_INPUT
            and not values[v].requires_grad
            and self._dims[v] is not None
        ]

        def alternatives(number: int, scale: float | None) -> Iterator[_Try]:
            inputs = {
                v: _scaled(t, scale, number) if values[v].requires_grad else t
                for v, t in given.items()
            }
            may_ignore = number != 2 and self._runner.may_ignore
            for ignored in (True, False) if number and may_ignore else (False,):
                others = {
                    v: perturbed(given[v], _dim(self._dims[v]), 7 * number + v, ignored=ignored)
                    for v in (targets if number else ())
                }
                yield _Try(inputs | others, of_model | others)

        yield from (alternatives(*numbered) for numbered in enumerate(_SCALES))

    def _same(
        self,
        scalar: int,
        whole: Scalars,
        parts: Sequence[tuple[Samples, Scalars, float]],
    ) -> bool:
        """Whether the parts, weighted, are the whole: the scalar and each of its gradients."""
        value = whole.values[scalar].double()
        terms = [part.values[scalar].double() * w for _, part, w in parts if w != 0.0]
        total = sum(terms, torch.zeros((), dtype=torch.float64))
        scale = float(value.abs()) + sum(float(term.abs()) for term in terms)
        limit = tolerance(whole.values[scalar].dtype)
        if not float((total - value).abs()) <= limit * scale:
            return False
        leaves = {leaf for _, part, w in parts if w != 0.0 for leaf in part.gradients[scalar]}
        return all(
            self._same_gradient(scalar, leaf, whole, parts)
            for leaf in leaves.union(whole.gradients[scalar])
        )

    def _same_gradient(
        self,
        scalar: int,
        leaf: Leaf,
        whole: Scalars,
        parts: Sequence[tuple[Samples, Scalars, float]],
    ) -> bool:
        expected = whole.gradients[scalar].get(leaf)
        found = [
            (samples, None if w == 0.0 or given is None else given * w)
            for samples, part, w in parts
            for given in [part.gradients[scalar].get(leaf)]
        ]
        if expected is None:
            return not any(gradient is not None and bool(gradient.any()) for _, gradient in found)
        dim = self._dims[leaf] if isinstance(leaf, int) else None
        if dim is None or not isinstance(leaf, int):
            total = sum((g for _, g in found if g is not None), torch.zeros_like(expected))
            return difference(total, expected) <= tolerance(expected.dtype)
        groups, limit = self._groups.get(leaf, 1), tolerance(expected.dtype)
        largest = float(expected.abs().max()) or 1.0
        for samples, gradient in found:
            rows = rows_of(expected, dim, groups, samples, self._num_samples)
            gap = rows if gradient is None else rows - gradient
            if not float(gap.abs().max()) <= limit * largest:
                return False
        return True


def _weights(
    rule: Rule,
    weigher: LossWeigher,
    scalar: int,
    of_model: Values,
    ranges: Sequence[Samples],
) -> list[float] | None:
    """What a rule gives for each part; None if it gives nothing.

    An empty list is for a batch of which the rule itself says that its parts do not make it, as
    it will say again of such a batch.
    """
    if rule is not Rule.READ:
        known = rule.weights(ranges)
        return [known[samples] for samples in ranges]
    try:
        found = weigher.weigh(scalar, of_model, ranges)
    except Exception:  # the steps of some size cannot be had, or read on these values
        return None
    if found.depends_on_batch:
        return []
    return None if found.doubt is not None else [found.weights[samples] for samples in ranges]


def _scaled(tensor: torch.Tensor, scale: float | None, seed: int) -> torch.Tensor:
    if not tensor.is_floating_point() or scale == 1.0:
        return tensor
    if scale is not None:
        return tensor * scale
    generator = torch.Generator().manual_seed(seed)
    spread = tensor.float().std(correction=0).nan_to_num().clamp(min=0.1)
    return (torch.randn(tensor.shape, generator=generator) * 3 * spread).to(tensor)


def _tells(whole: Scalars, scalar: int) -> bool:
    """Whether a wrong gradient would show: some of it is not 0."""
    gradients = whole.gradients[scalar]
    return not gradients or any(bool(g.any()) for g in gradients.values())


def _ranges(split: Split) -> list[Samples]:
    bounds = [sum(split[:index]) for index in range(len(split) + 1)]
    return list(pairwise(bounds))


def _dim(dim: int | None) -> int:
    assert dim is not None, "only what has samples is perturbed"
    return dim
