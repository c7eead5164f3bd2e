"""Makes the LayerGraph: which values cross the layers of a trace, and what each layer holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn.modules.batchnorm import _NormBase

from harmony.capture.graph.layer_signature import layer_signature
from harmony.capture.graph.layered import LayeredTrace, difference
from harmony.capture.graph.params import ParamInfo, assign
from harmony.capture.graph.trace import Step, StepKind, Trace, TraceValue
from harmony.capture.replay.shell import ModuleShell
from harmony.core.layergraph import MODEL_INPUT, Layer, LayerGraph, SharedParam, Value
from harmony.errors import CaptureError

_LOGICAL = frozenset({"all", "any", "_is_all_true", "_is_any_true"})
_OF_SIZES = frozenset({"numel", "size", "shape", "nelement", "stride", "nbytes"})


@dataclass(frozen=True)
class Sizes:
    """Two traces of one model, for different numbers of samples.

    Attributes:
        num_samples: of each.
        only: why there is no trace for another number of samples; empty where there may be one.
    """

    trace: Trace
    other: Trace
    num_samples: tuple[int, int]
    only: str = ""

    def batch_dims(self, number: int) -> tuple[int, ...]:
        """Dimensions of a value that depend on the number of samples."""
        shapes = zip(self.trace.values[number].shape, self.other.values[number].shape, strict=True)
        return tuple(dim for dim, (one, two) in enumerate(shapes) if one != two)

    def rows_per_sample(self, number: int, dim: int) -> int | None:
        """How many entries of the dimension each sample has; None if it is not proportional."""
        one, two = (t.values[number].shape[dim] for t in (self.trace, self.other))
        rows, rest = divmod(one, self.num_samples[0])
        return rows if not rest and rows * self.num_samples[1] == two else None

    def is_linear(self, number: int) -> bool:
        """Whether the size of a value is linear in the number of samples."""
        return self._linear(number) is not None

    def inseparable_on(self, trace: Trace) -> frozenset[int]:
        """Values that cannot cross layers: their size depends on more than the number of samples.

        The indices of some tokens, for instance, or a packed sequence.

        Args:
            trace: of any number of samples. The numbers of values on one trace mean nothing on
                another that has taken another path.
        """
        found = _value_dependent(trace)
        if difference(self.trace, trace, self.num_samples) is None:
            made = (n for n in range(len(trace.values)) if trace.producer[n] >= 0)
            found.update(n for n in made if self._linear(n) is None)
        return frozenset(found)

    def nbytes(self, number: int) -> tuple[int, int]:
        """Bytes per sample and fixed bytes of a value.

        Raises:
            CaptureError: if its size is not linear in the number of samples.
        """
        a, b = self.num_samples
        linear = self._linear(number)
        if linear is None:
            value = self.trace.values[number]
            raise CaptureError(
                f"{value.name} makes a tensor of shape {value.shape} for {a} samples and "
                f"{self.other.values[number].shape} for {b}, and it crosses layers: only sizes "
                "linear in the number of samples are supported"
            )
        return linear

    def foresees(self, trace: Trace, num_samples: int) -> bool:
        """Whether a trace for so many samples has these steps, and sizes linear in the samples.

        Otherwise the forward decides by the number of samples, as in ``if len(x) > 16`` and
        ``x[:4]``, or counts with it.
        """
        if difference(self.trace, trace, (self.num_samples[0], num_samples)) is not None:
            return False
        steps = zip(self.trace.steps, self.other.steps, trace.steps, strict=True)
        leaves = (zip(*(step.leaves for step in same), strict=True) for same in steps)
        one, two = self.num_samples
        share = (num_samples - one) / (two - one) if one != two else None
        told = all(_on_a_line(numbers, share) for same in leaves for numbers in same)
        return told and all(
            len({len(shape) for shape in shapes}) == 1
            and all(_on_a_line(sizes, share) for sizes in zip(*shapes, strict=True))
            for number in set(range(len(trace.values))) - _value_dependent(trace)
            for shapes in [[t.values[number].shape for t in (self.trace, self.other, trace)]]
        )

    def _linear(self, number: int) -> tuple[int, int] | None:
        one, two = self.trace.values[number].nbytes, self.other.values[number].nbytes
        a, b = self.num_samples
        per_sample, rest = divmod(one - two, a - b)
        fixed = one - per_sample * a
        if rest or fixed < 0 or len(self.batch_dims(number)) > 1:
            return None
        return per_sample, fixed


def _on_a_line(found: Sequence[object], share: float | None) -> bool:
    """Whether the third is a number that lies between or beyond two others by this share.

    Args:
        share: None where nothing tells how numbers depend on the samples.
    """
    if not all(isinstance(number, (int, float)) for number in found):
        plain = all(isinstance(value, (str, type(None))) for value in found)
        return not plain or found[0] == found[2]
    one, two, three = (float(number) for number in found)  # type: ignore[arg-type]
    return share is None or math.isclose(one + (two - one) * share, three, rel_tol=1e-9)


class OneSize(Sizes):
    """A trace for one number of samples: nothing in it is to be parted along the batch."""

    @staticmethod
    def of(trace: Trace, num_samples: int, only: str = "") -> OneSize:
        """Take a trace alone."""
        return OneSize(trace, trace, (num_samples, num_samples), only)

    def batch_dims(self, number: int) -> tuple[int, ...]:
        """None."""
        return ()

    def rows_per_sample(self, number: int, dim: int) -> int | None:
        """None."""
        return None

    def _linear(self, number: int) -> tuple[int, int] | None:
        return 0, self.trace.values[number].nbytes


@dataclass(frozen=True)
class OtherLength(Sizes):
    """A trace of another length: its values depend on the number of samples as those known do.

    Attributes:
        scaling: per value, the dimensions that depend on it, and whether its size is linear.
    """

    scaling: tuple[tuple[tuple[int, ...], bool], ...] = ()

    @staticmethod
    def of(trace: Trace, num_samples: int, known: Sizes) -> OtherLength | None:
        """Take a trace whose steps are those of a known one; None if they are not."""
        sizes = (num_samples, num_samples)
        if known.only or difference(known.trace, trace, sizes) is not None:
            return None
        if list(map(_form, trace.values)) != list(map(_form, known.trace.values)):
            return None
        scaling = []
        for number, value in enumerate(trace.values):
            dims, linear = known.batch_dims(number), known._linear(number)
            if linear is not None and dims and (linear[1] or value.shape[dims[0]] % num_samples):
                return None  # not so many rows a sample: another trace has to tell
            scaling.append((dims, linear is not None))
        return OtherLength(trace, trace, sizes, "", tuple(scaling))

    def batch_dims(self, number: int) -> tuple[int, ...]:
        """As of the value that is known."""
        return self.scaling[number][0]

    def rows_per_sample(self, number: int, dim: int) -> int | None:
        """As many as there are for these samples."""
        _, linear = self.scaling[number]
        return self.trace.values[number].shape[dim] // self.num_samples[0] if linear else None

    def _linear(self, number: int) -> tuple[int, int] | None:
        dims, linear = self.scaling[number]
        nbytes = self.trace.values[number].nbytes
        if not linear:
            return None
        return (nbytes // self.num_samples[0], 0) if dims else (0, nbytes)


def _form(value: TraceValue) -> object:
    """What a value has in common with that of another length."""
    return len(value.shape), value.dtype, value.requires_grad, value.dense, value.fake


def _value_dependent(trace: Trace) -> set[int]:
    """Values that glue makes with as many rows as some values happen to ask for."""
    found: set[int] = set()
    for step in trace.steps:
        rows = {trace.values[n].shape[:1] for n in found.intersection(step.inputs)}
        fresh = step.kind is StepKind.FUNCTION and step.dynamic
        found.update(n for n in step.made if fresh or trace.values[n].shape[:1] in rows)
    return found


@dataclass(frozen=True)
class BuiltGraph:
    """A LayerGraph, with the parameters in place.

    Attributes:
        params, buffers: in the order of the arena.
    """

    graph: LayerGraph
    params: list[ParamInfo]
    buffers: list[ParamInfo]


def build_graph(
    sizes: Sizes,
    layers: LayeredTrace,
    shell: ModuleShell,
    params: Sequence[ParamInfo],
    buffers: Sequence[ParamInfo],
    has_loss: bool,
) -> BuiltGraph:
    """Make the LayerGraph of the first of two traces, which is cut into layers."""
    mixing = _mixing_layers(sizes, layers, shell, has_loss)
    values = []
    for index, number in enumerate(layers.crossing):
        value, mixes = _make_value(index, number, sizes, layers)
        values.append(value)
        if mixes and value.producer != MODEL_INPUT:
            mixing.add(value.producer)
    placed, placed_buffers, shared = assign(params, buffers, layers.users_of_state())
    made = tuple(
        _make_layer(layer, layers, values, [*placed, *placed_buffers], shared, shell, mixing)
        for layer in range(layers.num_layers)
    )
    loss = None
    if has_loss:
        (output,) = sizes.trace.outputs
        loss = layers.ids[output.id]
    whole = sizes.only or _one_of_a_kind(sizes.trace, shell)
    graph = LayerGraph(made, tuple(values), tuple(shared), loss, whole)
    return BuiltGraph(graph, placed, placed_buffers)


def _make_value(index: int, number: int, sizes: Sizes, layers: LayeredTrace) -> tuple[Value, bool]:
    """Return a value, and whether its samples cannot be told apart."""
    known = sizes.trace.values[number]
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


def _value_name(value: TraceValue, index: int) -> str:
    return value.name or f"value {index}"


def _make_layer(
    layer: int,
    layers: LayeredTrace,
    values: Sequence[Value],
    stored: Sequence[ParamInfo],
    shared: Sequence[SharedParam],
    shell: ModuleShell,
    mixing: set[int],
) -> Layer:
    steps = layers.steps(layer)
    own = [info for info in stored if info.layer == layer]
    return Layer(
        index=layer,
        name=_layer_name(steps, shell),
        signature=layer_signature(steps, layers.trace, shell, layers.crossing),
        params=tuple(info.name for info in own),
        weight_nbytes=sum(info.stored_nbytes for info in own),
        gradient_nbytes=sum(info.gradient_nbytes for info in own),
        master_nbytes=sum(info.master_nbytes for info in own),
        shared=tuple(s.id for s in shared if layer in s.layers),
        inputs=tuple(v.id for v in values if layer in v.consumers),
        outputs=tuple(v.id for v in values if v.producer == layer),
        uses_rng=any(step.random for step in steps),
        mixes_samples=layer in mixing,
        changes_state=any(step.changes or step.counts for step in steps),
        differentiates=any(step.differentiates for step in steps),
    )


def _layer_name(steps: Sequence[Step], shell: ModuleShell) -> str:
    """The module with the most parameters, or the first step."""

    def size(step: Step) -> int:
        return sum(shell.placeholder(name).numel() for name in step.state)

    if not steps:
        return "nothing"
    anchor = max(steps, key=size)
    return anchor.name or type(shell.root).__name__


def _mixing_layers(
    sizes: Sizes, layers: LayeredTrace, shell: ModuleShell, has_loss: bool
) -> set[int]:
    """Layers in which a sample's result depends on the other samples of its microbatch.

    Norms over the batch, and functional code that makes something whose shape does not depend on
    the batch from something that does, the loss at the end excepted.
    """
    trace = sizes.trace
    last = layers.num_layers - 1
    batched = {n for n in range(len(trace.values)) if sizes.batch_dims(n)}
    mixing = set()
    for index, step in enumerate(trace.steps):
        layer = layers.of_step(index)
        if step.kind is StepKind.MODULE:
            assert isinstance(step.target, str)
            if any(map(_is_batch_norm, shell.modules[step.target].modules())):
                mixing.add(layer)
        loss_path = has_loss and layer == last
        if not loss_path and any(_mixes(step, made, trace, batched) for made in step.made):
            mixing.add(layer)
    return mixing


def _mixes(step: Step, made: int, trace: Trace, batched: set[int]) -> bool:
    """Whether a step makes a value without samples from the contents of ones that have some.

    What the trace really computed cannot depend on values that it did not compute: those lent
    their shape or type only.
    """
    if made in batched or step.name.startswith("new_"):
        return False
    real = not trace.values[made].fake
    return any(n in batched and not (real and trace.values[n].fake) for n in step.inputs)


def _one_of_a_kind(trace: Trace, shell: ModuleShell) -> str:
    """Why a batch in parts is not the batch, as far as the steps tell; empty if they do not."""
    if trace.loss_decides:
        return f"the loss goes by what its Python reads of all samples ({trace.loss_decides})"
    for step in trace.steps:
        if step.kind is StepKind.GUARD and not _same_for_parts(step, trace):
            return f"the forward decides by what it computes of all samples ({step.where})"
        if isinstance(step.target, str):
            inside = shell.modules[step.target].named_modules()
            norm = next((n for n, module in inside if _is_batch_norm(module)), None)
            if norm is not None:
                name = ".".join(part for part in (step.name, norm) if part)
                return f"{name} normalises over all samples of a microbatch (as BatchNorm does)"
        if step.changes:
            return f"{step.name} changes {step.changes[0]} once for every microbatch"
    return ""


def _same_for_parts(guard: Step, trace: Trace) -> bool:
    """Whether a decision that comes out the same for all parts does so for the whole."""
    inputs = list(guard.inputs)
    if guard.name in _OF_SIZES and all(not trace.values[n].shape for n in inputs):
        return True  # a scalar is one for every batch
    made_by = [trace.producer[number] for number in inputs]
    return all(i >= 0 and trace.steps[i].name in _LOGICAL for i in made_by)


def _is_batch_norm(module: object) -> bool:
    """Whether a module normalises over the batch (not each sample, as InstanceNorm does)."""
    name = type(module).__name__
    if not isinstance(module, _NormBase) or name.startswith(("InstanceNorm", "LazyInstance")):
        return False
    return module.training or module.running_mean is None
