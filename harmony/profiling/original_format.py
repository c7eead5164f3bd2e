"""Profiles of models as the original Harmony measured them, one JSON file a model.

`R` layers; per layer `W` weight, `B` buffer and `K` optimizer-state bytes, `X_per_sample` bytes of
its input for a sample, `upd_cpu_s` seconds of its update; per microbatch size u and layer
`time_s_FWD`, `time_s_BWD` (recompute included), `mem_bytes_FWD`, `mem_bytes_BWD` (peak bytes while
that layer alone runs, its weights and input included). The last layer is the loss.

`to_layers` turns such a profile into our planner's words. The profile does not say what a layer
saves for its backward; what it says bounds that from above. While a layer's backward begins, its
weights, its input X, its output Y and what it saved are alive, so at every measured size::

    saved(u) <= mem_bytes_BWD(u) - W - B - u X - u Y

What a layer saves grows with the samples, so the least of these bounds over u, divided by u, holds
at all sizes: `saved_nbytes_per_sample`. At large u only what the backward itself takes makes it
loose. For a transformer block, 34 s h + 5 a s^2 bytes a sample with 2-byte numbers (Korthikanti et
al., "Reducing Activation Recomputation in Large Transformer Models", 2022) are 66 s h + 9 a s^2
with 4-byte ones and 1-byte masks: 72 MB for BERT-Large, where this gives 122 MB, and 344 MB for
GPT2-XL, where it gives 594 MB; unfused GELU and softmax, which these models had, save more than
the rule counts.
The rest of the measured peak is the backward's workspace, so that a layer that runs alone needs at
least what was measured, and layers that run together at least what they can need.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil
from typing import Any, Literal

from harmony.core.layergraph import MODEL_INPUT, Layer, LayerGraph, Value
from harmony.errors import PlanError
from harmony.planner.predict.cost import CostTable, LayerCost

Column = Literal["time_s_FWD", "time_s_BWD", "mem_bytes_FWD", "mem_bytes_BWD"]
COLUMNS: tuple[Column, ...] = ("time_s_FWD", "time_s_BWD", "mem_bytes_FWD", "mem_bytes_BWD")
_PER_LAYER = ("W", "B", "K", "X_per_sample", "upd_cpu_s")


@dataclass(frozen=True)
class OriginalProfile:
    """One model's profile.

    Attributes:
        model: its name.
        weight_nbytes, buffer_nbytes, state_nbytes: per layer, of parameters, buffers and
            optimizer state.
        input_nbytes: per layer, bytes of its input for one sample.
        update_s: per layer, seconds of its update on the CPU.
        columns: per kind of measurement, microbatch size -> one number a layer.
    """

    model: str
    weight_nbytes: tuple[int, ...]
    buffer_nbytes: tuple[int, ...]
    state_nbytes: tuple[int, ...]
    input_nbytes: tuple[int, ...]
    update_s: tuple[float, ...]
    columns: Mapping[Column, Mapping[int, tuple[float, ...]]]

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self.weight_nbytes)

    @cached_property
    def max_backward_size(self) -> int:
        """The largest microbatch whose forward and backward were measured."""
        return min(max(self.columns[name]) for name in COLUMNS)

    def column(self, name: Column, num_samples: int) -> tuple[float, ...]:
        """One number a layer, interpolated linearly between the sizes that were measured.

        Raises:
            PlanError: for a size outside of those: what lies there is not known.
        """
        measured = self.columns[name]
        if num_samples in measured:
            return measured[num_samples]
        sizes = sorted(measured)
        if not sizes[0] <= num_samples <= sizes[-1]:
            raise PlanError(
                f"{self.model}: {name} was measured for microbatches of {sizes[0]} to"
                f" {sizes[-1]} samples, not of {num_samples}. Use one of those"
            )
        at = bisect_left(sizes, num_samples)
        low, high = sizes[at - 1], sizes[at]
        share = (num_samples - low) / (high - low)
        pairs = zip(measured[low], measured[high], strict=True)
        return tuple(a + (b - a) * share for a, b in pairs)


def parse_profile(data: Any) -> OriginalProfile:
    """Return the profile that decoded JSON describes.

    Raises:
        PlanError: if it lacks a column, or if a column has another number of layers than `R` or a
            number that is negative or not finite.
    """
    if not isinstance(data, dict):
        raise PlanError(f"a profile is a JSON object, not {type(data).__name__}")
    missing = [name for name in ("R", "model", *_PER_LAYER, *COLUMNS) if name not in data]
    if missing:
        raise PlanError(f"the profile lacks {', '.join(missing)}")
    num_layers = data["R"]
    if not isinstance(num_layers, int) or num_layers < 1:
        raise PlanError(f"R is the number of layers, not {num_layers!r}")
    per_layer = {name: _numbers(data[name], num_layers, name) for name in _PER_LAYER}
    columns = {name: _sizes(data[name], num_layers, name) for name in COLUMNS}
    whole = {name: tuple(int(v) for v in per_layer[name]) for name in _PER_LAYER[:-1]}
    return OriginalProfile(
        str(data["model"]),
        whole["W"],
        whole["B"],
        whole["K"],
        whole["X_per_sample"],
        per_layer["upd_cpu_s"],
        columns,
    )


def _sizes(data: Any, num_layers: int, name: str) -> dict[int, tuple[float, ...]]:
    if not isinstance(data, dict) or not data:
        raise PlanError(f"{name} maps microbatch sizes to lists, and needs one size at least")
    found = {}
    for size, numbers in data.items():
        if not size.isdecimal() or int(size) < 1:
            raise PlanError(f"{name}: {size!r} is not a microbatch size")
        found[int(size)] = _numbers(numbers, num_layers, f"{name}[{size}]")
    return found


def _numbers(data: Any, num_layers: int, name: str) -> tuple[float, ...]:
    if not isinstance(data, Sequence) or isinstance(data, str) or len(data) != num_layers:
        raise PlanError(f"{name} is not a list of {num_layers} numbers, one a layer")
    for layer, value in enumerate(data):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise PlanError(f"{name}, layer {layer}: {value!r} is not a number")
        if not 0 <= value < float("inf"):
            raise PlanError(f"{name}, layer {layer}: {value!r} is negative or not finite")
    return tuple(data)


def to_layers(profile: OriginalProfile) -> tuple[LayerGraph, CostTable]:
    """Return the model as a chain of layers for our planner, and what they cost.

    Sizes of microbatches between those measured are interpolated linearly. Beyond them, bytes
    grow by the most that they grew anywhere, times by what they grew in the upper half.
    """
    num_layers, entered = profile.num_layers, profile.input_nbytes
    values = [Value(0, "data", MODEL_INPUT, (0,), entered[0], requires_grad=False)]
    values += [
        Value(index, f"x{index}", index - 1, (index,), entered[index])
        for index in range(1, num_layers)
    ]
    last = num_layers - 1
    values.append(Value(num_layers, "loss", last, (), 0, 4, batch_dim=None, is_output=True))
    costs = [_costs(profile, index) for index in range(num_layers)]
    layers = tuple(
        _layer(profile, index, _saved_per_sample(profile, index)) for index in range(num_layers)
    )
    return LayerGraph(layers, tuple(values), loss=num_layers), CostTable(tuple(costs))


def _layer(profile: OriginalProfile, index: int, saved: int) -> Layer:
    weights, buffers = profile.weight_nbytes[index], profile.buffer_nbytes[index]
    entered, leaves = profile.input_nbytes[index], _left_per_sample(profile, index)
    return Layer(
        index,
        f"layer{index}",
        f"{weights}/{buffers}/{entered}/{leaves}",
        (f"layer{index}.weight",) if weights else (),
        weights + buffers,
        weights,
        profile.state_nbytes[index],
        inputs=(index,),
        outputs=(index + 1,),
        saved_nbytes_per_sample=saved,
    )


def _left_per_sample(profile: OriginalProfile, index: int) -> int:
    """Bytes of a layer's output for a sample; the loss has next to none."""
    following = profile.input_nbytes[index + 1 :]
    return following[0] if following else 0


def _kept_nbytes(profile: OriginalProfile, index: int, size: int) -> float:
    """Bytes of a layer's weights, buffers, input and output."""
    per_sample = profile.input_nbytes[index] + _left_per_sample(profile, index)
    return profile.weight_nbytes[index] + profile.buffer_nbytes[index] + size * per_sample


def _saved_per_sample(profile: OriginalProfile, index: int) -> int:
    """The most bytes that a layer can save for its backward, for a sample."""
    peaks = profile.columns["mem_bytes_BWD"]
    bounds = [
        (nbytes[index] - _kept_nbytes(profile, index, size)) / size
        for size, nbytes in peaks.items()
    ]
    return max(0, ceil(min(bounds)))


def _costs(profile: OriginalProfile, index: int) -> dict[int, LayerCost]:
    """What a layer costs at the sizes measured, and at twice the largest, see `to_layers`."""
    last = profile.max_backward_size
    first = max(min(profile.columns[name]) for name in COLUMNS)
    measured = profile.columns["mem_bytes_BWD"]
    sizes = sorted({first, last} | {size for size in measured if first <= size <= last})
    saved = _saved_per_sample(profile, index)
    found = {size: _cost(profile, index, size, saved) for size in sizes}
    if len(sizes) > 1:
        found[2 * last] = _beyond(found, last)
    return found


def _cost(profile: OriginalProfile, index: int, size: int, saved_per_sample: int) -> LayerCost:
    forward_s, backward_s, forward, backward = (
        profile.column(name, size)[index] for name in COLUMNS
    )
    kept, saved = _kept_nbytes(profile, index, size), size * saved_per_sample
    gradient_of_input = size * profile.input_nbytes[index] if index else 0
    rest = backward - kept - profile.weight_nbytes[index] - saved
    return LayerCost(
        float(forward_s),
        max(0.0, backward_s - forward_s),
        float(profile.update_s[index]),
        max(0, ceil(forward - kept)),
        saved,
        max(gradient_of_input, ceil(rest)),
    )


def _beyond(found: Mapping[int, LayerCost], last: int) -> LayerCost:
    """What a layer costs at twice the largest size ``last``."""
    sizes = sorted(found)
    low = next(size for size in sizes if 2 * size >= last or size == sizes[-2])
    top = found[last]

    def steepest(name: str) -> int:
        at = {size: float(getattr(cost, name)) for size, cost in found.items()}
        slopes = [(at[b] - at[a]) / (b - a) for a, b in pairwise(sizes)]
        return ceil(at[last] + last * max(0.0, *slopes))

    def later_s(at_last: float, at_low: float) -> float:
        return at_last + last * max(0.0, at_last - at_low) / (last - low)

    return LayerCost(
        later_s(top.forward_s, found[low].forward_s),
        later_s(top.backward_s, found[low].backward_s),
        top.update_s,
        steepest("forward_nbytes"),
        steepest("saved_nbytes"),
        steepest("backward_nbytes"),
    )
