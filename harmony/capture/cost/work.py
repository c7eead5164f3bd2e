"""Counts the FLOPs, bytes and kernels of captured layers, on tensors without memory.

FLOPs as PyTorch's own counter (`torch.utils.flop_counter`) has them: of matrix products,
convolutions and attention. Bytes are those of every tensor that a kernel reads or writes, as if
nothing stayed in a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from harmony.capture.cost.costs import on_stand_ins
from harmony.capture.cost.footprint import RunLayer, Values
from harmony.capture.replay.replay import GuardError
from harmony.capture.trace.tracer import NEEDS_VALUES

if TYPE_CHECKING:
    from harmony.capture.replay.captured import Captured

_aten = torch.ops.aten
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPE_NAMES[torch.float64] = "fp64"

_LOOKUPS = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather}
"""Kernels that read of their first argument only what they return."""

_NO_KERNEL = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.detach}
_NO_KERNEL |= {_aten.new_empty_strided, _aten._unsafe_view, _aten.lift_fresh}


class Counts(NamedTuple):
    """What the kernels did; ``flops`` by type of the inputs."""

    flops: dict[str, float]
    product_nbytes: float
    other_nbytes: float
    num_kernels: float


class LayerCounts(NamedTuple):
    """Counts of a forward and of a backward without its recompute."""

    forward: Counts
    backward: Counts


def work_of(captured: Captured, num_samples: int) -> list[LayerCounts]:
    """Return the counts of every layer for a microbatch; equal layers are counted once."""
    known: dict[str, LayerCounts] = {}
    for layer in captured.graph.layers:
        if layer.signature not in known:
            known[layer.signature] = _of_layer(captured, layer.index, num_samples)
    return [known[layer.signature] for layer in captured.graph.layers]


def _of_layer(captured: Captured, layer: int, num_samples: int) -> LayerCounts:
    real = captured.trace_for(num_samples).real
    try:
        return on_stand_ins(captured, layer, num_samples, real, count)
    except GuardError:
        return _unknown(captured, layer, num_samples)
    except (*NEEDS_VALUES, RuntimeError):
        try:
            return on_stand_ins(captured, layer, num_samples, True, count)
        except (GuardError, RuntimeError):
            return _unknown(captured, layer, num_samples)


def _unknown(captured: Captured, layer: int, num_samples: int) -> LayerCounts:
    """Of a layer that does not run on zeros: the bytes of its values, as far as the trace has
    them.

    Its products are not seen, so this is less than it does.
    """
    values = captured.trace_for(num_samples).values
    steps = captured.steps_of(layer, num_samples)
    nbytes = sum(values[number].nbytes for step in steps for number in step.made)
    once = Counts({}, 0.0, 2.0 * nbytes, float(len(steps)))
    return LayerCounts(once, Counts({}, 0.0, 4.0 * nbytes, 2.0 * len(steps)))


def count(
    run: RunLayer, inputs: Values, params: dict[str, torch.Tensor], seeds: frozenset[int]
) -> LayerCounts:
    """Run a layer forward without gradients, then forward and backward; count both.

    Args:
        run, inputs, params, seeds: as `harmony.capture.cost.footprint.measure` has them.
    """
    with _Counter() as forward, torch.no_grad():
        run(dict(inputs))
    with torch.enable_grad():
        outputs = run(dict(inputs))
    roots = [t for v, t in outputs.items() if v in seeds and t.requires_grad]
    if not roots:
        return LayerCounts(forward.counts(), Counts({}, 0.0, 0.0, 0.0))
    gradients = [torch.empty_like(root) for root in roots]
    with _Counter() as backward:
        torch.autograd.backward(roots, gradients)
    return LayerCounts(forward.counts(), backward.counts())


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what every kernel called inside it does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, float] = {}
        self.product_nbytes = 0.0
        self.other_nbytes = 0.0
        self.num_kernels = 0

    def counts(self) -> Counts:
        """What was counted so far."""
        return Counts(self.flops, self.product_nbytes, self.other_nbytes, float(self.num_kernels))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        out = func(*args, **named)
        packet = func._overloadpacket
        if func.namespace == "prim" or func.is_view or packet in _NO_KERNEL:
            return out
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        read = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, torch.Tensor)]
        if not made:
            return out
        self.num_kernels += 1
        if packet in _LOOKUPS:
            read = [*read[1:], *made]
        nbytes = float(sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made)))
        formula = _FORMULAS.get(packet)
        if formula is None:
            self.other_nbytes += nbytes
        else:
            kind = TYPE_NAMES.get(made[0].dtype, "fp32")
            found = float(formula(*args, **named, out_val=out))
            self.flops[kind] = self.flops.get(kind, 0.0) + found
            self.product_nbytes += nbytes
        return out


_ATTENTION: Callable[..., Any] = sdpa_flop_count
_ATTENTION_BACKWARD: Callable[..., Any] = sdpa_backward_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, out_val: Any, **__: Any) -> int:
    return int(_ATTENTION(query.shape, key.shape, value.shape))


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, out_val: Any, **__: Any
) -> int:
    return int(_ATTENTION_BACKWARD(grad.shape, query.shape, key.shape, value.shape))


_FORMULAS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    # What CPU tensors, and so the virtual GPU, take for attention; PyTorch's table lacks it.
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
