"""What the model is: its layers, the values that pass between them, its shared parameters.

Data only, no torch. `harmony.capture` makes it; the planner reads nothing else of the model.
A *layer* is the smallest unit that the planner moves; a *value* is a tensor that crosses from one
layer to a later one (or enters or leaves the model). In a plain chain value ``l`` is the input of
layer ``l``; a skip connection is a value with a late last consumer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

MODEL_INPUT = -1
"""The producer of a value that is an input of the model."""


@dataclass(frozen=True)
class Value:
    """A tensor that crosses a layer boundary, per microbatch.

    Attributes:
        id: its index in ``LayerGraph.values``; ascending in the order of production.
        name: where it comes from, for people.
        producer: the layer that makes it, or ``MODEL_INPUT``.
        consumers: the layers that read it, ascending; may be empty for an output.
        nbytes_per_sample: bytes that grow with the number of samples of the microbatch.
        nbytes_fixed: bytes that do not (masks, position ids); one of the two is usually 0.
        batch_dim: the dimension that counts samples; None if it does not depend on the batch.
        requires_grad: whether a gradient flows back through it.
        is_output: whether the model returns it.
        groups: the entries of the batch dimension are so many groups, one after the other, each
            with rows of every sample: 2 for ``cat([x, y])``, the number of time steps for a
            sequence whose samples are along dimension 1 and that was flattened.
    """

    id: int
    name: str
    producer: int
    consumers: tuple[int, ...]
    nbytes_per_sample: int
    nbytes_fixed: int = 0
    batch_dim: int | None = 0
    requires_grad: bool = True
    is_output: bool = False
    groups: int = 1

    def nbytes(self, num_samples: int) -> int:
        """Bytes of this value for a microbatch of ``num_samples`` samples."""
        return self.nbytes_fixed + self.nbytes_per_sample * num_samples


@dataclass(frozen=True)
class SharedParam:
    """A parameter that several layers use (tied weights); stored once, moved on its own.

    Attributes:
        id: its index in ``LayerGraph.shared``.
        name: its first canonical name in the module.
        layers: the layers that use it, ascending; it belongs to the first.
        nbytes: bytes of the parameter.
        gradient_nbytes: bytes of its gradient, 0 if frozen.
        state_nbytes: bytes of its optimizer state.
        update_nbytes: bytes that its update on a device takes while it runs, beyond its state.
        master_nbytes: as of a `Layer`.
    """

    id: int
    name: str
    layers: tuple[int, ...]
    nbytes: int
    gradient_nbytes: int
    state_nbytes: int = 0
    update_nbytes: int = 0
    master_nbytes: int = 0


@dataclass(frozen=True)
class Layer:
    """The smallest unit that the planner places and moves.

    Attributes:
        index: its position in ``LayerGraph.layers``.
        name: the module or operation it comes from, for people.
        signature: equal for layers that do the same work on other weights; a profile measures
            one layer of each signature.
        params: canonical names of the parameters that only this layer uses.
        weight_nbytes: bytes of those parameters and the layer's buffers, as laid out in the
            host arena (each parameter aligned to 64 bytes).
        gradient_nbytes: bytes of their gradients (frozen ones have none), laid out likewise.
        state_nbytes: bytes of their optimizer state on the host.
        shared: ids of the shared parameters it uses.
        inputs: ids of the values it reads, ascending.
        outputs: ids of the values it makes, ascending.
        uses_rng: whether it draws random numbers.
        mixes_samples: whether a sample's result depends on the other samples of its microbatch.
        changes_state: whether its forward changes buffers, so that its microbatches have to run
            one after the other, in order.
        differentiates: whether its forward computes a gradient, so that what it saves cannot be
            kept for its backward: it is recomputed.
        saved_nbytes_per_sample: bytes that its forward saves for a backward, for a sample, beyond
            its weights, inputs and outputs.
        products_nbytes_per_sample: bytes of the results of its forward's products (of matrices,
            convolutions, attention), for a sample.
        update_nbytes: bytes that the update of one of its parameters on a device takes while it
            runs, beyond their state: of the parameter that takes most.
        master_nbytes: bytes of the parameters' masters, which stay on the host, where layers
            compute with copies of another type; else 0.
    """

    index: int
    name: str
    signature: str
    params: tuple[str, ...]
    weight_nbytes: int
    gradient_nbytes: int
    state_nbytes: int = 0
    shared: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    uses_rng: bool = False
    mixes_samples: bool = False
    changes_state: bool = False
    differentiates: bool = False
    saved_nbytes_per_sample: int = 0
    update_nbytes: int = 0
    master_nbytes: int = 0
    products_nbytes_per_sample: int = 0


@dataclass(frozen=True)
class LayerGraph:
    """A model as a list of layers in execution order, with the values between them.

    Attributes:
        loss: id of the value that is the loss, whose gradient the step itself starts from; None
            where the loss is computed outside (then gradients of the outputs come from outside).
        whole_batch: why a minibatch has to be one microbatch of one replica to be the training
            that was written down; empty where it may be parted.
        sizes: the only microbatch sizes that are known to work, where some do not; empty for any.
    """

    layers: tuple[Layer, ...]
    values: tuple[Value, ...]
    shared: tuple[SharedParam, ...] = ()
    loss: int | None = None
    whole_batch: str = ""
    sizes: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self.layers)

    @cached_property
    def fingerprint(self) -> str:
        """Text that is equal for models that the same plans fit, whatever ran or measured them.

        It covers what layers and values there are, their bytes, and what a plan has to respect of
        them; not names, weights, the optimizer, or versions of anything.
        """
        layers = [
            (
                layer.signature.partition(":")[0],
                layer.weight_nbytes,
                layer.gradient_nbytes,
                layer.shared,
                layer.inputs,
                layer.outputs,
                (layer.uses_rng, layer.mixes_samples, layer.changes_state),
            )
            for layer in self.layers
        ]
        values = [
            (v.producer, v.consumers, v.nbytes_per_sample, v.nbytes_fixed, v.requires_grad)
            for v in self.values
        ]
        shared = [(s.layers, s.nbytes, s.gradient_nbytes) for s in self.shared]
        text = repr((layers, values, self.output_ids, shared, self.loss))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def input_ids(self) -> tuple[int, ...]:
        """Values that enter the model."""
        return tuple(v.id for v in self.values if v.producer == MODEL_INPUT)

    @cached_property
    def output_ids(self) -> tuple[int, ...]:
        """Values that the model returns."""
        return tuple(v.id for v in self.values if v.is_output)

    def weight_nbytes(self, layers: Iterable[int] | None = None) -> int:
        """Bytes of parameters and buffers of these layers (default: all), shared ones once."""
        chosen = set(range(self.num_layers) if layers is None else layers)
        own = sum(self.layers[i].weight_nbytes for i in chosen)
        return own + sum(s.nbytes for s in self.shared if chosen.intersection(s.layers))

    def gradient_nbytes(self, layers: Iterable[int] | None = None) -> int:
        """Bytes of gradients of these layers (default: all), shared ones once."""
        chosen = set(range(self.num_layers) if layers is None else layers)
        own = sum(self.layers[i].gradient_nbytes for i in chosen)
        return own + sum(s.gradient_nbytes for s in self.shared if chosen.intersection(s.layers))

    def state_nbytes(self) -> int:
        """Bytes of the optimizer state of all layers."""
        own = sum(layer.state_nbytes for layer in self.layers)
        return own + sum(s.state_nbytes for s in self.shared)

    def master_nbytes(self) -> int:
        """Bytes of the masters of all parameters that are computed with in another type."""
        own = sum(layer.master_nbytes for layer in self.layers)
        return own + sum(s.master_nbytes for s in self.shared)

    def update_nbytes(self, first: int, last: int) -> int:
        """Bytes that an update of layers ``first`` to ``last - 1`` on a device takes meanwhile.

        Parameters are updated one after the other, so it is the most of any.
        """
        tied = (self.shared[index].update_nbytes for index in self.shared_in(first, last))
        own = (layer.update_nbytes for layer in self.layers[first:last])
        return max((*own, *tied), default=0)

    def saved_nbytes(self, first: int, last: int, num_samples: int) -> int:
        """Bytes that a forward of layers ``first`` to ``last - 1`` leaves for their backward.

        What the layers save, the values that they make, and those that enter, whether or not a
        layer needs each of them: the most that it can be.
        """
        layers = self.layers[first:last]
        kept = sum(layer.saved_nbytes_per_sample for layer in layers) * num_samples
        made = [v for layer in layers for v in layer.outputs]
        values = (self.values[v] for v in (*self.pack_inputs(first, last), *made))
        return kept + sum(value.nbytes(num_samples) for value in values)

    def products_nbytes(self, first: int, last: int, num_samples: int) -> int:
        """Bytes of the results of all products of layers ``first`` to ``last - 1``, to be kept."""
        layers = self.layers[first:last] if self.keepable(first, last) else ()
        return sum(layer.products_nbytes_per_sample for layer in layers) * num_samples

    def keepable(self, first: int, last: int) -> bool:
        """Whether what layers ``first`` to ``last - 1`` save can be kept for their backward."""
        return not any(layer.differentiates for layer in self.layers[first:last])

    def pack_inputs(self, first: int, last: int) -> tuple[int, ...]:
        """Values made before layer ``first`` that layers ``first`` to ``last - 1`` read."""
        seen = {v for i in range(first, last) for v in self.layers[i].inputs}
        return tuple(sorted(v for v in seen if self.values[v].producer < first))

    def pack_outputs(self, first: int, last: int) -> tuple[int, ...]:
        """Values made by layers ``first`` to ``last - 1`` that are read later or returned."""
        made = (v for i in range(first, last) for v in self.layers[i].outputs)
        return tuple(sorted(v for v in made if self._leaves(v, last)))

    def shared_in(self, first: int, last: int) -> tuple[int, ...]:
        """Ids of the shared parameters that layers ``first`` to ``last - 1`` use."""
        return tuple(s.id for s in self.shared if any(first <= i < last for i in s.layers))

    def pins_microbatch(self) -> bool:
        """Whether FORWARD and BACKWARD must use the same microbatch size (design: numerics)."""
        return any(
            layer.uses_rng or layer.mixes_samples or layer.changes_state
            for layer in self.layers[:-1]
        )

    def orders_microbatches(self) -> bool:
        """Whether all microbatches must run on one device, in order: some layer changes state."""
        return any(layer.changes_state for layer in self.layers)

    def _leaves(self, value: int, last: int) -> bool:
        v = self.values[value]
        return v.is_output or (bool(v.consumers) and v.consumers[-1] >= last)


def check_graph(graph: LayerGraph) -> None:
    """Refuse a graph whose parts name what is not there.

    Raises:
        ValueError: saying what.
    """
    layers, values, shared = graph.layers, graph.values, graph.shared
    numbered = [*layers], [v.id for v in values], [s.id for s in shared]
    if [layer.index for layer in numbered[0]] != [*range(len(layers))] or not layers:
        raise ValueError("its layers are not numbered from 0 on")
    if numbered[1] != [*range(len(values))] or numbered[2] != [*range(len(shared))]:
        raise ValueError("its values or shared parameters are not numbered from 0 on")
    for layer in layers:
        if not {*layer.inputs, *layer.outputs} <= {*range(len(values))}:
            raise ValueError(f"layer {layer.index} names a value that is not there")
        if any(graph.values[v].producer != layer.index for v in layer.outputs):
            raise ValueError(f"layer {layer.index} makes a value of another layer")
        if any(graph.values[v].producer >= layer.index for v in layer.inputs):
            raise ValueError(f"layer {layer.index} reads a value of a later layer")
        if not {*layer.shared} <= {*range(len(shared))}:
            raise ValueError(f"layer {layer.index} names a parameter that is not there")
    used = [(v.producer, *v.consumers) for v in values] + [s.layers for s in shared]
    if not all(MODEL_INPUT <= at < len(layers) for ats in used for at in ats):
        raise ValueError("a value or a shared parameter names a layer that is not there")
    if not all(s.layers and min(s.layers) >= 0 for s in shared):
        raise ValueError("a shared parameter that no layer uses")
    if graph.loss is not None and not 0 <= graph.loss < len(values):
        raise ValueError(f"its loss is value {graph.loss}")
    for part in (*layers, *values, *shared):
        for name, held in vars(part).items():
            if "nbytes" in name and held < 0:
                raise ValueError(f"{name} is {held}")
