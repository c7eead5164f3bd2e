"""Some samples together and in parts, through every distinct layer of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from harmony.capture import Captured
from harmony.capture.loss.weights import LossWeigher
from harmony.core.layergraph import Layer, LayerGraph
from harmony.engine.splitting.compare import alike, best_groups, tolerance
from harmony.engine.splitting.dataflow import Dataflow
from harmony.engine.splitting.losses import LossTrial, Rule, Split
from harmony.engine.splitting.mixing import mixing_kernel
from harmony.engine.splitting.recording import Recorder
from harmony.engine.splitting.runner import LayerRunner
from harmony.engine.splitting.samples import (
    Dims,
    choose,
    show_nothing,
    taken,
    told_apart,
    unsettled,
    with_other_neighbours,
)
from harmony.errors import CaptureError
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.rows import joined, rows_of
from harmony.runtime.exec.stage import Values
from harmony.runtime.host.arena import ArenaView

FEW = 4
"""How many samples are tried; all of a batch that has hardly more."""

HARDLY_MORE = 6


@dataclass(frozen=True)
class Verdict:
    """What the samples have shown.

    Attributes:
        whole_batch: why a batch in parts is not the batch; empty where it is.
        mixing: layers whose results depend on what other samples there are.
        sizes: the only microbatch sizes that work, where some do not; empty for any.
        groups: of rows, of each value that has several.
        rules: of each scalar that the model returns.
    """

    whole_batch: str = ""
    mixing: frozenset[int] = frozenset()
    sizes: tuple[int, ...] = ()
    groups: Mapping[int, int] = field(default_factory=dict)
    rules: Mapping[int, Rule] = field(default_factory=dict)

    def applied(self, graph: LayerGraph) -> LayerGraph:
        """Return the graph with what the planner and the runtime have to know."""
        layers = tuple(
            replace(layer, mixes_samples=True) if layer.index in self.mixing else layer
            for layer in graph.layers
        )
        values = tuple(
            replace(value, groups=self.groups[value.id]) if value.id in self.groups else value
            for value in graph.values
        )
        whole = graph.whole_batch or self.whole_batch
        return replace(graph, layers=layers, values=values, whole_batch=whole, sizes=self.sizes)


@dataclass(frozen=True)
class Model:
    """What is tried.

    Attributes:
        graph: its layers.
        weights: where the parameters are.
        weigher: reads off the steps how microbatches count.
        loss_name: of the caller's loss function, if there is one.
    """

    captured: Captured
    graph: LayerGraph
    weights: ArenaView
    weigher: LossWeigher
    loss_name: str = ""


def try_splitting(
    model: Model,
    context: DeviceContext,
    inputs: Values,
    num_samples: int,
    asked: int | None = None,
) -> Verdict:
    """Run a few samples together and in parts, and say whether that is the same.

    Args:
        inputs: a batch, by value, on the host.
        num_samples: samples of the batch; at least 2.
        asked: the microbatch size that the caller has chosen. Then the samples may mix, and only
            how outputs are put together is found out.
    """
    most = min(num_samples, 2 * asked) if asked else num_samples
    wanted = most if most <= HARDLY_MORE else FEW
    last: Exception | None = None
    counts = tuple(dict.fromkeys((wanted, min(3, most), 2)))
    few = {wanted, min(2, wanted), num_samples}
    if asked is None and not all(map(model.captured.foreseen, few)):
        counts = (num_samples,)  # few of them do not show what it does with many
    dims = {value.id: value.batch_dim for value in model.graph.values}
    apart = show_nothing(inputs, dims, _read_of_samples(model.graph))
    for count in counts:
        for place in (context, None) if count == 2 else (context,):
            try:
                if apart:
                    with suppress(_FailedError):  # these may be no possible ones
                        others = told_apart(inputs, dims, seed=3)
                        return _tried(model, place, others, num_samples, count, asked)
                return _tried(model, place, inputs, num_samples, count, asked)
            except torch.OutOfMemoryError as error:
                last = error
            except _FailedError as failed:
                # If the whole batch fails too, that is for its measurement to say.
                return Verdict(f"the forward fails for {count} samples of a batch ({failed})")
    return Verdict(f"not even {counts[-1]} samples could be compared ({last})")


def _tried(
    model: Model,
    place: DeviceContext | None,
    inputs: Values,
    num_samples: int,
    count: int,
    asked: int | None,
) -> Verdict:
    with warnings.catch_warnings():  # of what nobody asked for
        warnings.simplefilter("ignore")
        return _Trial(model, place, inputs, num_samples, count, asked).verdict()


def _read_of_samples(graph: LayerGraph) -> set[int]:
    """The inputs of the model that layers read, but for those of the loss alone."""
    scalars = {v for v in graph.output_ids if graph.values[v].batch_dim is None}
    layers = [layer for layer in graph.layers if scalars.isdisjoint(layer.outputs)]
    return {v for layer in layers or graph.layers for v in layer.inputs}.intersection(
        graph.input_ids
    )


class _FailedError(Exception):
    """The samples do not run together."""


@dataclass(eq=False)
class _Run:
    """Some of the samples on their way through the layers."""

    env: Values
    num_samples: int
    failure: str = ""


class _Trial:
    """One try with a number of samples."""

    def __init__(
        self,
        model: Model,
        context: DeviceContext | None,
        inputs: Values,
        num_samples: int,
        count: int,
        asked: int | None,
    ) -> None:
        self._model = model
        self._graph = model.graph
        self._runner = LayerRunner(model.captured, model.graph, model.weights, context)
        self._count = count
        self._asked = asked
        self._dims: Dims = {value.id: value.batch_dim for value in model.graph.values}
        inputs = {v: t for v, t in inputs.items() if v in self._dims}  # others, no layer reads
        chosen = choose(inputs, self._dims, num_samples, count)
        self._inputs = {
            v: unsettled(t) if self._dims[v] is None else t
            for v, t in taken(inputs, self._dims, chosen).items()
        }
        self._kept = max(1, count // 2)
        others = with_other_neighbours(self._inputs, self._dims, self._kept, seed=1)
        self._whole = _Run(dict(self._inputs), count)
        self._others = _Run(others, count)
        self._splits = {split: self._parts(split) for split in _splits(count, asked)}
        self._groups: dict[int, int] = {}
        self._mixing: dict[int, str] = {}
        self._rules: dict[int, Rule] = {}

    def _parts(self, split: Split) -> list[_Run]:
        parts, low = [], 0
        for size in split:
            env = {
                v: t
                if self._dims[v] is None
                else rows_of(t, self._dims[v] or 0, 1, (low, low + size), self._count)
                for v, t in self._inputs.items()
            }
            parts.append(_Run(env, size))
            low += size
        return parts

    def verdict(self) -> Verdict:
        """Try every layer.

        Raises:
            _FailedError: if the samples do not run together.
            torch.OutOfMemoryError: if they do not fit.
        """
        self._trace()
        twins: dict[object, Layer] = {}
        with self._runner.on_device():
            for layer in self._graph.layers:
                twin = twins.setdefault(self._runner.kind_of_work(layer), layer)
                if twin is layer:
                    self._try(layer)
                else:
                    self._stand_in(layer, twin)
                if self._mixing and self._asked is None:
                    break
        return self._conclude()

    def _conclude(self) -> Verdict:
        working = [split for split in self._splits if not self._failure(split)]
        sizes = sorted({size for split in working for size in split})
        why = next(iter(self._mixing.values()), "")
        if not why and not working:
            first = next(iter(self._splits))
            why = f"the forward fails for fewer samples ({self._failure(first)})"
        if self._asked is not None:
            why, sizes, working = "", [], list(self._splits)
        all_work = len(working) == len(self._splits)
        return Verdict(
            why,
            frozenset(self._mixing),
            () if all_work else tuple(sizes),
            {v: groups for v, groups in self._groups.items() if groups > 1},
            self._rules,
        )

    def _failure(self, split: Split) -> str:
        return next((run.failure for run in self._splits[split] if run.failure), "")

    def _trace(self) -> None:
        """Trace the sizes; where one cannot be had, its parts fail."""
        captured = self._model.captured
        try:
            captured.ensure(self._count)
        except CaptureError as error:
            raise _FailedError(str(error)) from error
        for run in self._every_part():
            try:
                captured.ensure(run.num_samples)
            except CaptureError as error:
                run.failure = str(error)

    def _every_part(self) -> list[_Run]:
        return [run for runs in self._splits.values() for run in runs]

    def _try(self, layer: Layer) -> None:
        self._runner.load(layer)
        recorded = self._recorded()
        self._run(layer, self._whole, recorded.get(self._whole))
        if self._whole.failure:
            raise _FailedError(self._whole.failure)
        self._run(layer, self._others)
        for run in self._every_part():
            self._run(layer, run, recorded.get(run))
        scalars = [v for v in layer.outputs if self._is_loss(v)]
        for value in layer.outputs:
            if value not in scalars:
                self._compare(layer, value)
        if scalars and self._asked is None:
            self._try_losses(layer, scalars)
        if recorded and layer.index not in self._mixing:
            self._follow(layer, recorded)

    def _recorded(self) -> dict[_Run, Recorder]:
        """Return what notes the kernels of all samples and of the parts of one split."""
        split = next((split for split in self._splits if not self._failure(split)), None)
        if split is None or self._asked is not None:
            return {}
        return {run: Recorder() for run in (self._whole, *self._splits[split])}

    def _follow(self, layer: Layer, recorded: Mapping[_Run, Recorder]) -> None:
        """Find what mixes samples on the way to a result that does not show it yet."""
        whole, *parts = recorded.values()
        sizes = [run.num_samples for run in recorded][1:]
        flow = Dataflow.of(whole, parts, sizes)
        if flow is None:
            return
        for value in layer.outputs:
            is_loss = self._is_loss(value)
            what = f"the loss ({self._loss_name(value)})" if is_loss else layer.name
            node = mixing_kernel(flow, value, is_loss=is_loss)
            if node is not None:
                why = f"{what} mixes samples, or may do so in a later step: by {node.call}"
                self._mixing.setdefault(layer.index, why)

    def _run(self, layer: Layer, run: _Run, recorder: Recorder | None = None) -> None:
        if run.failure:
            return
        try:
            run.env.update(self._runner.run(layer, run.env, run.num_samples, recorder))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's code raises for so many samples
            run.failure = f"{layer.name}: {type(error).__name__}: {error}"

    def _stand_in(self, layer: Layer, twin: Layer) -> None:
        """Let the results of a layer that does the same work stand for this one's."""
        pairs = list(zip(layer.outputs, twin.outputs, strict=True))
        for run in (self._whole, self._others, *self._every_part()):
            if not run.failure:
                run.env.update({v: run.env[w] for v, w in pairs})
        origins = self._runner.origins
        origins.update({v: origins[w] for v, w in pairs if w in origins})
        self._groups.update({v: self._groups[w] for v, w in pairs if w in self._groups})

    def _is_loss(self, value: int) -> bool:
        known, found = self._graph.values[value], self._whole.env[value]
        return known.is_output and not found.dim() and found.is_floating_point()

    def _loss_name(self, value: int) -> str:
        return self._model.loss_name or self._graph.values[value].name

    def _compare(self, layer: Layer, value: int) -> None:
        """Compare what a layer has made of samples together with what of fewer, and of others."""
        dim = self._graph.values[value].batch_dim
        whole = self._whole.env[value]
        why = f"{layer.name} makes something else of samples together than apart"
        for split, runs in self._splits.items():
            if self._failure(split):
                continue
            parts = [run.env[value] for run in runs]
            if dim is None:
                same = all(alike(part, whole) for part in parts)
            else:
                best = best_groups(parts, whole, dim, self._count)
                same = best is not None and best[1] <= tolerance(whole.dtype)
                if best is not None:
                    self._groups.setdefault(value, best[0])
                    same = same and alike(joined(parts, dim, self._groups[value]), whole)
            if not same and 1 in split and any(1 not in s for s in self._working(split)):
                runs[0].failure = why  # one sample is often a case of its own: it is left out
            elif not same:
                self._mixing.setdefault(layer.index, why)
        if not self._others.failure and not self._kept_rows_alike(value):
            self._mixing.setdefault(
                layer.index, f"{layer.name} makes something else of a sample for other neighbours"
            )

    def _working(self, but: Split) -> list[Split]:
        return [split for split in self._splits if split != but and not self._failure(split)]

    def _kept_rows_alike(self, value: int) -> bool:
        dim, groups = self._graph.values[value].batch_dim, self._groups.get(value, 1)
        one, two = self._whole.env[value], self._others.env[value]
        if one.shape != two.shape:
            return False
        if dim is None:
            return alike(two, one)
        if one.shape[dim] % (groups * self._count):
            return False
        kept = (0, self._kept)
        pair = [rows_of(t, dim, groups, kept, self._count) for t in (two, one)]
        return alike(*pair)

    def _try_losses(self, layer: Layer, scalars: Sequence[int]) -> None:
        trial = LossTrial(self._runner, self._graph, layer, self._groups, self._count)
        splits = [split for split in self._splits if not self._failure(split)]
        splits.sort(key=lambda split: 1 in split)
        rules, failed = trial.rules(
            scalars, self._whole.env, self._inputs, splits, self._model.weigher
        )
        for split, failure in failed.items():
            self._splits[split][0].failure = failure
        for scalar in scalars:
            if rules.get(scalar):
                self._rules[scalar] = rules[scalar][0]
            elif len(failed) < len(splits) or not splits:
                what = self._loss_name(scalar)
                self._mixing.setdefault(
                    layer.index,
                    f"the loss ({what}) mixes samples: that of a batch is not put together from"
                    " those of its parts",
                )


def _splits(count: int, asked: int | None) -> list[Split]:
    """Sizes of the parts to try, in several ways, one of them without a single sample."""
    if asked is not None:
        size = min(asked, count - 1)
        return [(size, count - size)]
    if count < 4:
        return [(1,) * count, (1, count - 1), (count - 1, 1)][: count - 1]
    uneven = (2, count - 2)
    alone = (1, count - 2, 1)
    return [uneven, alone]
