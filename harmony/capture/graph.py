"""Makes the LayerGraph: which values cross the layers of a tape, and what each layer holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn.modules.batchnorm import _NormBase

from harmony.capture.params import ParamInfo, assign
from harmony.capture.signature import layer_signature
from harmony.capture.skeleton import Skeleton
from harmony.capture.tape import Step, StepKind, Tape, TapeValue, ValueRef
from harmony.errors import CaptureError
from harmony.layergraph import MODEL_INPUT, Layer, LayerGraph, SharedParam, Value


@dataclass(frozen=True)
class Sizes:
    """Two tapes of one model, for different numbers of samples.

    Attributes:
        num_samples: of each.
    """

    tape: Tape
    other: Tape
    num_samples: tuple[int, int]

    def batch_dims(self, number: int) -> tuple[int, ...]:
        """Dimensions of a value that depend on the number of samples."""
        shapes = zip(self.tape.values[number].shape, self.other.values[number].shape, strict=True)
        return tuple(dim for dim, (one, two) in enumerate(shapes) if one != two)

    def rows_per_sample(self, number: int, dim: int) -> int | None:
        """How many entries of the dimension each sample has; None if it is not proportional."""
        one, two = (t.values[number].shape[dim] for t in (self.tape, self.other))
        rows, rest = divmod(one, self.num_samples[0])
        return rows if not rest and rows * self.num_samples[1] == two else None

    def nbytes(self, number: int) -> tuple[int, int]:
        """Bytes per sample and fixed bytes of a value.

        Raises:
            CaptureError: if its size is not linear in the number of samples.
        """
        one, two = self.tape.values[number].nbytes, self.other.values[number].nbytes
        a, b = self.num_samples
        per_sample, rest = divmod(one - two, a - b)
        fixed = one - per_sample * a
        if rest or fixed < 0 or len(self.batch_dims(number)) > 1:
            value = self.tape.values[number]
            raise CaptureError(
                f"{value.name} makes a tensor of shape {value.shape} for {a} samples and "
                f"{self.other.values[number].shape} for {b}, and it crosses layers: only sizes "
                "linear in the number of samples are supported"
            )
        return per_sample, fixed


@dataclass(frozen=True)
class BuiltGraph:
    """A LayerGraph and how it lies on the tape.

    Attributes:
        numbers: per value of the graph, its number on the tape.
        params, buffers: in the order of the arena.
    """

    graph: LayerGraph
    numbers: tuple[int, ...]
    params: list[ParamInfo]
    buffers: list[ParamInfo]


def build_graph(
    sizes: Sizes,
    starts: Sequence[int],
    skeleton: Skeleton,
    params: Sequence[ParamInfo],
    buffers: Sequence[ParamInfo],
    has_loss: bool,
) -> BuiltGraph:
    """Make the LayerGraph of a tape that is cut into layers at the steps ``starts``."""
    tape = sizes.tape
    layers = _Layers(tape, starts)
    mixing = _mixing_layers(sizes, layers, skeleton, has_loss)
    numbers = layers.crossing
    ids = {number: index for index, number in enumerate(numbers)}
    values = []
    for index, number in enumerate(numbers):
        value, mixes = _make_value(index, number, sizes, layers)
        values.append(value)
        if mixes and value.producer != MODEL_INPUT:
            mixing.add(value.producer)
    placed, placed_buffers, shared = assign(params, buffers, layers.users_of_state())
    made = tuple(
        _make_layer(layer, layers, values, [*placed, *placed_buffers], shared, skeleton, mixing)
        for layer in range(len(starts))
    )
    loss = None
    if has_loss:
        (output,) = tape.outputs
        loss = ids[output.id]
    graph = LayerGraph(made, tuple(values), tuple(shared), loss)
    return BuiltGraph(graph, numbers, placed, placed_buffers)


class _Layers:
    """The layers of a tape: which steps they have, which values cross them.

    Attributes:
        crossing: numbers of the values that cross layers or leave the model, inputs first.
    """

    def __init__(self, tape: Tape, starts: Sequence[int]) -> None:
        self.tape = tape
        self.starts = starts
        self.outputs = {leaf.id for leaf in tape.outputs if isinstance(leaf, ValueRef)}
        self.consumers: dict[int, set[int]] = {}
        for index, step in enumerate(tape.steps):
            for number in step.inputs:
                self.consumers.setdefault(number, set()).add(self.of_step(index))
        self.crossing = self._find_crossing()

    def of_step(self, index: int) -> int:
        return bisect_right(self.starts, index) - 1

    def steps(self, layer: int) -> list[Step]:
        end = self.starts[layer + 1] if layer + 1 < len(self.starts) else len(self.tape.steps)
        return self.tape.steps[self.starts[layer] : end]

    def producer(self, number: int) -> int:
        step = self.tape.producer[number]
        return MODEL_INPUT if step < 0 else self.of_step(step)

    def later_consumers(self, number: int) -> tuple[int, ...]:
        producer = self.producer(number)
        return tuple(sorted(c for c in self.consumers.get(number, ()) if c > producer))

    def _find_crossing(self) -> tuple[int, ...]:
        numbers = range(len(self.tape.values))
        found = [n for n in numbers if n in self.outputs or self.later_consumers(n)]
        return tuple(sorted(found, key=lambda n: (self.producer(n) != MODEL_INPUT, n)))

    def users_of_state(self) -> dict[str, list[int]]:
        """The layers that use each parameter and buffer."""
        users: dict[str, list[int]] = {}
        for index, step in enumerate(self.tape.steps):
            for name in step.state:
                users.setdefault(name, []).append(self.of_step(index))
        return users


def _make_value(index: int, number: int, sizes: Sizes, layers: _Layers) -> tuple[Value, bool]:
    """Return a value, and whether its samples cannot be told apart."""
    known = sizes.tape.values[number]
    if not known.dense:
        raise CaptureError(
            f"{known.name} makes a sparse or nested tensor that crosses layers: not supported. "
            "Keep it inside one module"
        )
    per_sample, fixed = sizes.nbytes(number)
    dims = sizes.batch_dims(number)
    value = Value(
        id=index,
        name=_value_name(known, index),
        producer=layers.producer(number),
        consumers=layers.later_consumers(number),
        nbytes_per_sample=per_sample,
        nbytes_fixed=fixed,
        batch_dim=dims[0] if dims else None,
        requires_grad=known.requires_grad,
        is_output=number in layers.outputs,
    )
    # Several rows a sample may be interleaved with those of other samples.
    return value, bool(dims) and sizes.rows_per_sample(number, dims[0]) != 1


def _value_name(value: TapeValue, index: int) -> str:
    return value.name or f"value {index}"


def _make_layer(
    layer: int,
    layers: _Layers,
    values: Sequence[Value],
    stored: Sequence[ParamInfo],
    shared: Sequence[SharedParam],
    skeleton: Skeleton,
    mixing: set[int],
) -> Layer:
    steps = layers.steps(layer)
    own = [info for info in stored if info.layer == layer]
    return Layer(
        index=layer,
        name=_layer_name(steps, skeleton),
        signature=layer_signature(steps, layers.tape, skeleton, layers.crossing),
        params=tuple(info.name for info in own),
        weight_nbytes=sum(info.stored_nbytes for info in own),
        gradient_nbytes=sum(info.gradient_nbytes for info in own),
        shared=tuple(s.id for s in shared if layer in s.layers),
        inputs=tuple(v.id for v in values if layer in v.consumers),
        outputs=tuple(v.id for v in values if v.producer == layer),
        uses_rng=any(step.random for step in steps),
        mixes_samples=layer in mixing,
    )


def _layer_name(steps: Sequence[Step], skeleton: Skeleton) -> str:
    """The module with the most parameters, or the first step."""

    def size(step: Step) -> int:
        return sum(skeleton.placeholder(name).numel() for name in step.state)

    if not steps:
        return "nothing"
    heart = max(steps, key=size)
    return heart.name or type(skeleton.root).__name__


def _mixing_layers(sizes: Sizes, layers: _Layers, skeleton: Skeleton, has_loss: bool) -> set[int]:
    """Layers in which a sample's result depends on the other samples of its microbatch.

    Norms over the batch, and glue that makes something whose shape does not depend on the batch
    from something that does, the loss at the end excepted.
    """
    tape = sizes.tape
    last = len(layers.starts) - 1
    batched = {n for n in range(len(tape.values)) if sizes.batch_dims(n)}
    mixing = set()
    for index, step in enumerate(tape.steps):
        layer = layers.of_step(index)
        if step.kind is StepKind.MODULE:
            assert isinstance(step.target, str)
            if any(map(_is_batch_norm, skeleton.modules[step.target].modules())):
                mixing.add(layer)
        loss_path = has_loss and layer == last
        if not loss_path and any(_mixes(step, made, tape, batched) for made in step.made):
            mixing.add(layer)
    return mixing


def _mixes(step: Step, made: int, tape: Tape, batched: set[int]) -> bool:
    """Whether a step makes a value without samples from the contents of ones that have some.

    What the trace really computed cannot depend on values that it did not compute: those lent
    their shape or type only.
    """
    if made in batched or step.name.startswith("new_"):
        return False
    real = not tape.values[made].fake
    return any(n in batched and not (real and tape.values[n].fake) for n in step.inputs)


def _is_batch_norm(module: object) -> bool:
    """Whether a module normalises over the batch (not each sample, as InstanceNorm does)."""
    name = type(module).__name__
    if not isinstance(module, _NormBase) or name.startswith(("InstanceNorm", "LazyInstance")):
        return False
    return module.training or module.running_mean is None


def check_same_structure(tape: Tape, other: Tape, num_samples: tuple[int, int]) -> None:
    """Refuse tapes of different sizes that do not have the same steps.

    Raises:
        CaptureError: naming the first step that differs.
    """
    for index in range(max(len(tape.steps), len(other.steps))):
        pair = [t.steps[index] if index < len(t.steps) else None for t in (tape, other)]
        if _outline(pair[0]) != _outline(pair[1]):
            texts = [f"{s.name} at {s.where}" if s else "nothing" for s in pair]
            raise CaptureError(
                f"the forward takes another path for {num_samples[1]} samples than for "
                f"{num_samples[0]}: step {index} is {texts[1]} instead of {texts[0]}"
            )


def _outline(step: Step | None) -> object:
    if step is None:
        return None
    return (
        step.kind,
        step.name,
        tuple(step.inputs),
        tuple(step.made),
        step.state,
        len(step.leaves),
    )
