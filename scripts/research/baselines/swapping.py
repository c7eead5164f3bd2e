"""Swapping for each GPU alone, under data parallelism and in a 1F1B pipeline.

    DP   every GPU runs the whole model on its share, forward and backward of one microbatch after
         the other; gradients are summed in a ring of peer copies after the last backward
    PP   each GPU has consecutive layers; microbatches follow the 1F1B order (PipeDream-flush,
         MLSys 2021)

Every GPU has virtual memory of its own (`research.baselines.paging`) and updates what it has. What
a step takes is that of the second of two: what stays on a GPU from one step to the next, if all of
it fits, is not moved again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from harmony.core.layergraph import MODEL_INPUT, LayerGraph
from harmony.core.machine import Machine
from harmony.errors import ConfigError
from harmony.planner.ir.schedule import Op
from harmony.planner.ir.tasks import TaskKind
from harmony.planner.predict.cost import CostTable
from harmony.planner.predict.flows import Activities
from harmony.planner.predict.links import Links
from research.baselines.baselines import (
    Outcome,
    balanced_stages,
    num_microbatches,
    one_forward_one_backward,
    outcome_of,
)
from research.baselines.paging import Pager, Tensor


def swap_step(
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    minibatch: int,
    size: int,
    mode: Literal["dp", "pp"],
    *,
    recompute: bool,
    always_writes: bool = False,
) -> Outcome:
    """A step with memory virtualisation on each GPU.

    Args:
        size: samples of a microbatch; divides the minibatch, or each GPU's share of it.
        recompute: keep only the inputs of the layers, and run each forward again.
        always_writes: see `Pager`.

    Raises:
        DoesNotFitError: if one layer alone does not fit.
        ConfigError: if the minibatch cannot be divided, updates on the GPU have no speed, or a
            pipeline is to have a value that several layers read.
    """
    if mode == "pp" and any(len(v.consumers) > 1 for v in graph.values):
        raise ConfigError("the pipeline of the baselines is for chains of layers")
    shares = machine.num_devices if mode == "dp" else 1
    count = num_microbatches(minibatch, shares, size)
    if not all(device.update_bytes_per_s for device in machine.devices):
        raise ConfigError("swapping updates on the GPU: give its devices update_bytes_per_s")
    swap = _Swap(graph, costs, machine, size, count, recompute, always_writes)
    step = swap.replicate if mode == "dp" else swap.pipeline
    step(0)
    before, traffic = len(swap.activities), swap.traffic()
    step(count)
    after = {key: n - traffic.get(key, 0) for key, n in swap.traffic().items()}
    return outcome_of(swap.activities, swap.links, before, after, size)


class _Swap:
    """Tasks of all GPUs, each over a pager of its own."""

    def __init__(
        self,
        graph: LayerGraph,
        costs: CostTable,
        machine: Machine,
        size: int,
        num_microbatches: int,
        recompute: bool,
        always_writes: bool,
    ) -> None:
        self.graph = graph
        self.size = size
        self.num_microbatches = num_microbatches
        self.recompute = recompute
        self.costs = [costs.layer(i, size) for i in range(graph.num_layers)]
        self.machine = machine
        self.links = Links(machine)
        self.activities = Activities()
        parameters = [("weights", i, -1) for i in range(graph.num_layers)]
        parameters += [("shared", s.id, -1) for s in graph.shared]
        states = [("state", i, -1) for i in range(graph.num_layers)]
        # Two steps' worth: the minibatches are on the host from the start.
        inputs = [
            ("activations", v, i) for v in graph.input_ids for i in range(2 * num_microbatches)
        ]
        self.pagers = [
            Pager(
                self.activities,
                self.links,
                device,
                [*parameters, *states, *inputs],
                always_writes=always_writes,
            )
            for device in range(machine.num_devices)
        ]
        self.sent: dict[Tensor, int] = {}
        self.peer_nbytes = 0

    def traffic(self) -> dict[tuple[str, str], int]:
        """Bytes so far, by link and kind."""
        total = {("p2p", "activations and gradients"): self.peer_nbytes}
        for pager in self.pagers:
            for key, nbytes in pager.moved.items():
                total[key] = total.get(key, 0) + nbytes
        return total

    def replicate(self, begin: int) -> None:
        """A step of data parallelism: all GPUs do the same, on microbatches of their own.

        Args:
            begin: the number of the first microbatch.
        """
        layers = range(self.graph.num_layers)
        devices = range(len(self.pagers))
        end = begin + self.num_microbatches
        for index in range(begin, end):
            for layer in layers:
                for device in devices:
                    self.forward(device, layer, index)
            for layer in reversed(layers):
                ends = [self.backward(device, layer, index) for device in devices]
                if index == end - 1:
                    self._all_reduce(layer, ends)
        for layer in layers:
            for device in devices:
                self.update(device, layer)

    def pipeline(self, begin: int) -> None:
        """A step of the pipeline: every stage goes on as far as what it needs has been sent."""
        seconds = [cost.forward_s + cost.backward_s for cost in self.costs]
        stages = balanced_stages(seconds, len(self.pagers))
        orders = [
            list(one_forward_one_backward(s, len(stages), self.num_microbatches))
            for s in range(len(stages))
        ]
        at = [0] * len(stages)
        while any(at[s] < len(order) for s, order in enumerate(orders)):
            for stage, order in enumerate(orders):
                while at[stage] < len(order):
                    kind, index = order[at[stage]][0], begin + order[at[stage]][1]
                    if not self._is_sent(stages[stage], kind, index):
                        break
                    self._run_stage(stage, stages, kind, index)
                    at[stage] += 1
        for stage, layers in enumerate(stages):
            for layer in layers:
                self.update(stage, layer)

    def forward(self, device: int, layer: int, index: int) -> int:
        """Run a layer's forward; what its backward reads stays behind, as far as it can."""
        cost, made = self.costs[layer], self.graph.layers[layer]
        reads = [*self._parameters(layer), *self._values("activations", made.inputs, index)]
        writes = self._values("activations", made.outputs, index)
        if not self.recompute:
            writes += [(("saved", layer, index), cost.saved_nbytes)]
        return self.pagers[device].run(
            reads, writes, cost.forward_nbytes, cost.forward_s, self._arrivals(reads)
        )

    def backward(self, device: int, layer: int, index: int) -> int:
        """Run a layer's backward, its forward again in front of it where nothing was saved."""
        cost, made, pager = self.costs[layer], self.graph.layers[layer], self.pagers[device]
        inputs = [v for v in made.inputs if self.graph.values[v].requires_grad]
        outputs = [v for v in made.outputs if self._has_gradient(v)]
        reads = [
            *self._parameters(layer),
            *self._values("activations", made.inputs, index),
            *self._values("gradients of activations", outputs, index),
        ]
        seconds, workspace = cost.backward_s, cost.backward_nbytes
        if self.recompute:
            seconds += cost.forward_s
            workspace = cost.saved_nbytes + max(workspace, cost.forward_nbytes)
        else:
            reads += [(("saved", layer, index), cost.saved_nbytes)]
        coming = self._values("gradients of activations", inputs, index)
        workspace -= min(workspace, sum(nbytes for _, nbytes in coming))
        writes = [*self._gradients(layer), *coming]
        done = pager.run(reads, writes, workspace, seconds, self._arrivals(reads))
        over = [v for v in made.inputs if self.graph.values[v].consumers[0] == layer]
        pager.drop(tensor for tensor, _ in self._values("activations", over, index))
        pager.drop(t for t, _ in self._values("gradients of activations", outputs, index))
        pager.drop([("saved", layer, index)])
        return done

    def update(self, device: int, layer: int) -> None:
        """Update the parameters of a layer on its GPU, and shared ones that it is the first of."""
        found = self.graph.layers[layer]
        owned = [s for s in self.graph.shared if s.layers[0] == layer]
        names = {("shared gradients", s.id, -1) for s in owned} | {("gradients", layer, -1)}
        gradients = [pair for pair in self._gradients(layer) if pair[0] in names]
        nbytes = sum(n for _, n in gradients)
        if not nbytes:
            return
        state_nbytes = found.state_nbytes + sum(s.state_nbytes for s in owned)
        changed = [*self._parameters(layer), (("state", layer, -1), state_nbytes)]
        seconds = nbytes / self.machine.devices[device].update_bytes_per_s
        pager = self.pagers[device]
        pager.run([*gradients, *changed], changed, 0, seconds)
        pager.drop(tensor for tensor, _ in gradients)

    def _all_reduce(self, layer: int, ends: Sequence[int]) -> None:
        """Sum the gradients of a layer over all GPUs, in a ring of peer copies."""
        count = len(self.pagers)
        nbytes = sum(n for _, n in self._gradients(layer))
        if count == 1 or not nbytes:
            return
        each = 2 * nbytes * (count - 1) // count
        self.peer_nbytes += each * count
        lanes = tuple((device, "p2p") for device in range(count))
        path = tuple(f"gpu{device}.p2p" for device in range(count))
        self.activities.add(lanes, ends, units=each, resources=path)

    def _is_sent(self, layers: range, kind: TaskKind, index: int) -> bool:
        """Whether another stage has sent what a stage needs to start on a microbatch."""
        first, last = layers[0], layers[-1]
        wanted: list[Tensor] = []
        if kind is TaskKind.FORWARD and first:
            inputs = self.graph.pack_inputs(first, last + 1)
            made = [v for v in inputs if self.graph.values[v].producer != MODEL_INPUT]
            wanted = [("activations", v, index) for v in made]
        elif kind is TaskKind.BACKWARD and last + 1 < self.graph.num_layers:
            outputs = self.graph.pack_outputs(first, last + 1)
            kept = [v for v in outputs if self._has_gradient(v)]
            wanted = [("gradients of activations", v, index) for v in kept]
        return all(tensor in self.sent for tensor in wanted)

    def _run_stage(self, stage: int, stages: Sequence[range], kind: TaskKind, index: int) -> None:
        layers = stages[stage]
        order = layers if kind is TaskKind.FORWARD else layers[::-1]
        run = self.forward if kind is TaskKind.FORWARD else self.backward
        done = [run(stage, layer, index) for layer in order][-1]
        if kind is TaskKind.FORWARD and stage + 1 < len(stages):
            leaving = self.graph.pack_outputs(layers[0], layers[-1] + 1)
            self._send(stage, stage + 1, "activations", leaving, index, done)
        elif kind is TaskKind.BACKWARD and stage:
            entering = self.graph.pack_inputs(layers[0], layers[-1] + 1)
            grads = [v for v in entering if self._has_gradient(v)]
            self._send(stage, stage - 1, "gradients of activations", grads, index, done)

    def _send(
        self, device: int, peer: int, kind: str, values: Sequence[int], index: int, done: int
    ) -> None:
        """Send values on; the sender needs them no more."""
        lane, path = ((device, "p2p"),), self.links.path(Op.SEND, device, peer)
        for tensor, nbytes in self._values(kind, values, index):
            copy = self.activities.add(lane, (done,), units=nbytes, resources=path)
            self.sent[tensor] = copy
            self.peer_nbytes += nbytes
            self.pagers[device].drop([tensor])

    def _arrivals(self, reads: Sequence[tuple[Tensor, int]]) -> list[int]:
        return [self.sent[tensor] for tensor, _ in reads if tensor in self.sent]

    def _has_gradient(self, value: int) -> bool:
        found = self.graph.values[value]
        return found.requires_grad and found.producer != MODEL_INPUT and bool(found.consumers)

    def _parameters(self, layer: int) -> list[tuple[Tensor, int]]:
        found = self.graph.layers[layer]
        shared = [self.graph.shared[i] for i in found.shared]
        return [
            (("weights", layer, -1), found.weight_nbytes),
            *((("shared", s.id, -1), s.nbytes) for s in shared),
        ]

    def _gradients(self, layer: int) -> list[tuple[Tensor, int]]:
        found = self.graph.layers[layer]
        shared = [self.graph.shared[i] for i in found.shared]
        return [
            (("gradients", layer, -1), found.gradient_nbytes),
            *((("shared gradients", s.id, -1), s.gradient_nbytes) for s in shared),
        ]

    def _values(self, kind: str, values: Sequence[int], index: int) -> list[tuple[Tensor, int]]:
        return [((kind, v, index), self.graph.values[v].nbytes(self.size)) for v in values]
