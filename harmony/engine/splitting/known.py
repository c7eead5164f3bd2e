"""What is known of how the batches of one capture may be parted, and how its losses add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from harmony.capture import Captured
from harmony.capture.loss.weights import LossWeigher
from harmony.core.layergraph import LayerGraph
from harmony.engine.splitting.losses import Rule
from harmony.engine.splitting.probe import Model, Verdict, try_splitting
from harmony.planner.ir.tasks import Samples
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.stage import Values
from harmony.runtime.host.arena import ArenaView


class Splitting:
    """Tried with the first batch that has more than one sample.

    And with a larger one of which the forward makes something that the others do not show.
    """

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._weigher = LossWeigher(captured)
        self._rules: Mapping[int, Rule] = {}
        self._foreseen = 0
        self._is_settled = False

    def is_open(self, graph: LayerGraph, minibatch: int) -> bool:
        """Whether a batch of so many samples has something to show that is not known."""
        if self._is_settled or minibatch <= max(self._foreseen, 1):
            return False
        if self._foreseen and self._captured.foreseen(minibatch):
            self._foreseen = minibatch
            return False
        return any(graph.values[v].batch_dim is not None for v in graph.input_ids)

    def found(
        self,
        graph: LayerGraph,
        weights: ArenaView,
        context: DeviceContext,
        inputs: Values,
        minibatch: int,
        asked: int | None,
        loss_name: str,
    ) -> Verdict | None:
        """Return what is found out now; None if nothing is.

        Args:
            graph: of the capture, without what an earlier verdict has added.
            context: of the device that the samples are tried on.
            inputs: a batch, by value.
            asked: the microbatch size that the caller has chosen: then batches are parted, and
                only how outputs with several rows a sample are put together is found out.
            loss_name: of the caller's loss function, for the reason.
        """
        if not self.is_open(graph, minibatch):
            return None
        self._foreseen = minibatch
        self._is_settled = asked is not None
        if not self._is_needed(graph, minibatch, asked):
            return Verdict()
        model = Model(self._captured, graph, weights, self._weigher, loss_name)
        # It runs on memory as it was found: an anomaly there means nothing.
        with torch.autograd.set_detect_anomaly(False):
            verdict = try_splitting(model, context, inputs, minibatch, asked)
        self._rules = verdict.rules
        self._is_settled |= bool(verdict.whole_batch)
        return verdict

    def weigh(
        self, value: int, inputs: Values, microbatches: Sequence[Samples]
    ) -> tuple[Mapping[Samples, float], str | None]:
        """Return what a scalar output of each microbatch counts, and why that may be wrong.

        Args:
            inputs: the whole batch, by value.
        """
        rule = self._rules.get(value, Rule.READ)
        if rule is not Rule.READ:
            return rule.weights(microbatches), None
        found = self._weigher.weigh(value, inputs, microbatches)
        return found.weights, found.doubt

    def _is_needed(self, graph: LayerGraph, minibatch: int, asked: int | None) -> bool:
        if asked is None:
            return not graph.whole_batch
        if asked >= minibatch:
            return False
        outputs = ((v, graph.values[v].batch_dim) for v in graph.output_ids)
        return any(
            dim is not None and self._captured.value_form(v, minibatch)[0][dim] != minibatch
            for v, dim in outputs
        )
