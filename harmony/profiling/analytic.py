"""Costs of layers that nobody has measured: FLOPs and bytes against a GPU of the catalog.

The roofline: matrix products take the longer of their FLOPs at the rate that large products reach
and their bytes at the bandwidth of the GPU's memory; all other kernels take their bytes. Whatever
the GPU, a layer takes at least as long as the host needs to launch its kernels.

    seconds = max(max(FLOPs / achievable, bytes of products / bandwidth)
                  + bytes of the others / bandwidth,  kernels x launch)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harmony.core.files import amount
from harmony.core.layergraph import LayerGraph
from harmony.errors import PlanError
from harmony.planner.predict.cost import CostTable
from harmony.profiling.catalog import LAUNCH_S, MEMORY_SHARE, Gpu

MAX_SIZES = 12
"""Microbatch sizes at which the roofline is evaluated; between them costs are interpolated."""


@dataclass(frozen=True)
class Work:
    """What the kernels of a forward or a backward of one layer do.

    Attributes:
        flops: of matrix products and convolutions, by the type of their inputs (``"fp32"``,
            ``"bf16"``, ``"fp16"``, ``"fp64"``).
        product_nbytes: bytes that those read and write.
        other_nbytes: bytes that all other kernels read and write.
        num_kernels: how many kernels are launched.
    """

    flops: Mapping[str, float] = field(default_factory=dict)
    product_nbytes: float = 0.0
    other_nbytes: float = 0.0
    num_kernels: float = 0.0

    def scaled(self, factor: float) -> Work:
        """So many times the work."""
        return Work(
            {dtype: count * factor for dtype, count in self.flops.items()},
            self.product_nbytes * factor,
            self.other_nbytes * factor,
            self.num_kernels * factor,
        )

    def __add__(self, other: Work) -> Work:
        types = sorted({*self.flops, *other.flops})
        return Work(
            {dtype: self.flops.get(dtype, 0.0) + other.flops.get(dtype, 0.0) for dtype in types},
            self.product_nbytes + other.product_nbytes,
            self.other_nbytes + other.other_nbytes,
            self.num_kernels + other.num_kernels,
        )

    def to_json(self) -> list[Any]:
        """A plain list that ``from_json`` reads back."""
        return [dict(self.flops), self.product_nbytes, self.other_nbytes, self.num_kernels]

    @staticmethod
    def from_json(data: Sequence[Any]) -> Work:
        """Read what ``to_json`` wrote."""
        flops, product, other, kernels = data
        counts = {str(dtype): amount(count) for dtype, count in flops.items()}
        return Work(counts, amount(product), amount(other), amount(kernels))


@dataclass(frozen=True)
class LayerWork:
    """Work of one layer at one microbatch size; of the backward without the recompute."""

    forward: Work
    backward: Work


@dataclass(frozen=True)
class WorkTable:
    """Work of every layer at the microbatch sizes at which it was counted."""

    by_layer: tuple[Mapping[int, LayerWork], ...]

    def layer(self, index: int, num_samples: int) -> LayerWork:
        """Work of a layer for a microbatch, on the line through two sizes that were counted."""
        counted = self.by_layer[index]
        if num_samples in counted:
            return counted[num_samples]
        sizes = sorted(counted)
        if len(sizes) == 1:
            share = num_samples / sizes[0]
            only = counted[sizes[0]]
            return LayerWork(
                replace(only.forward.scaled(share), num_kernels=only.forward.num_kernels),
                replace(only.backward.scaled(share), num_kernels=only.backward.num_kernels),
            )
        at = min(max(sum(size < num_samples for size in sizes), 1), len(sizes) - 1)
        low, high = sizes[at - 1], sizes[at]
        share = (num_samples - low) / (high - low)
        ends = counted[low], counted[high]
        forward = _between(ends[0].forward, ends[1].forward, share)
        return LayerWork(forward, _between(ends[0].backward, ends[1].backward, share))

    def model_flops(self, num_samples: int) -> dict[str, float]:
        """FLOPs of one forward and one backward of all layers, by type: what training takes.

        What a plan recomputes is not counted, as in "model FLOPs utilisation" (PaLM, 2022).
        """
        total = Work()
        for index in range(len(self.by_layer)):
            work = self.layer(index, num_samples)
            total = total + work.forward + work.backward
        return dict(total.flops)

    def to_json(self) -> list[dict[str, Any]]:
        """A plain list that ``from_json`` reads back."""
        return [
            {str(n): [w.forward.to_json(), w.backward.to_json()] for n, w in layer.items()}
            for layer in self.by_layer
        ]

    @staticmethod
    def from_json(data: Sequence[Mapping[str, Any]]) -> WorkTable:
        """Read what ``to_json`` wrote."""

        def read(pair: Sequence[Any]) -> LayerWork:
            return LayerWork(Work.from_json(pair[0]), Work.from_json(pair[1]))

        table = WorkTable(tuple({int(n): read(p) for n, p in layer.items()} for layer in data))
        if not all(layer and min(layer) >= 1 for layer in table.by_layer):
            raise ValueError("work of no samples")
        return table


def _between(low: Work, high: Work, share: float) -> Work:
    mixed = low.scaled(1 - share) + high.scaled(share)
    return Work(
        {dtype: max(0.0, count) for dtype, count in mixed.flops.items()},
        max(0.0, mixed.product_nbytes),
        max(0.0, mixed.other_nbytes),
        max(0.0, mixed.num_kernels),
    )


def work_seconds(work: Work, gpu: Gpu, *, tf32: bool = False) -> float:
    """Seconds that some work takes on a GPU, by the roofline.

    Args:
        tf32: whether products of fp32 run as TF32 (``torch.backends.cuda.matmul.allow_tf32``).
    """
    bandwidth = gpu.memory_bytes_per_s * MEMORY_SHARE
    products = 0.0
    for dtype, count in work.flops.items():
        used = "tf32" if tf32 and dtype == "fp32" else dtype
        # Of fp64 the catalog says nothing: half the rate of fp32 is the best that any of them has.
        factor = 2.0 if dtype == "fp64" else 1.0
        products += factor * count / gpu.achievable(used)
    busy = max(products, work.product_nbytes / bandwidth) + work.other_nbytes / bandwidth
    return max(busy + work.num_kernels * gpu.kernel_s, work.num_kernels * LAUNCH_S)


def analytic_costs(
    graph: LayerGraph,
    work: WorkTable,
    counted: CostTable,
    gpu: Gpu,
    host_bytes_per_s: float,
    minibatch: int,
    *,
    sizes: Sequence[int] = (),
    tf32: bool = False,
) -> CostTable:
    """Return the costs of layers on a GPU that did not run them.

    Args:
        counted: a table whose bytes are right; its seconds are not used.
        host_bytes_per_s: memory bandwidth of the host, which its updates are limited by.
        minibatch: the largest microbatch that may be asked for.
        sizes: microbatch sizes of the table; by default as many as make sense.
    """
    sizes = sizes or sizes_up_to(minibatch)
    known: dict[str, dict[int, tuple[float, float, float]]] = {}
    table = []
    for layer in graph.layers:
        if layer.signature not in known:  # layers of one signature do the same work
            of = (work.layer(layer.index, size) for size in sizes)
            found = [_seconds(one, gpu, tf32) for one in of]
            known[layer.signature] = dict(zip(sizes, found, strict=True))
        moved = update_nbytes(layer.gradient_nbytes, layer.state_nbytes)
        if layer.gradient_nbytes and layer.master_nbytes:  # a copy of the new master follows
            moved += layer.master_nbytes + layer.weight_nbytes
        update_s = moved / host_bytes_per_s
        row = {}
        for size, (forward_s, backward_s, products_s) in known[layer.signature].items():
            bare = counted.layer(layer.index, size)
            row[size] = replace(
                bare,
                forward_s=forward_s,
                backward_s=backward_s,
                update_s=update_s,
                products_s=products_s if bare.products_nbytes else 0.0,
            )
        table.append(row)
    return CostTable(tuple(table))


def _seconds(work: LayerWork, gpu: Gpu, tf32: bool) -> tuple[float, float, float]:
    """Seconds of forward and backward, and of the former's products."""
    forward_s = work_seconds(work.forward, gpu, tf32=tf32)
    # Their kernels are not counted on their own, so the rest is taken to launch as many.
    rest = replace(work.forward, flops={}, product_nbytes=0.0)
    backward_s = work_seconds(work.backward, gpu, tf32=tf32)
    return forward_s, backward_s, forward_s - work_seconds(rest, gpu, tf32=tf32)


def update_nbytes(gradient_nbytes: int, state_nbytes: int) -> int:
    """Bytes that an update reads and writes: gradients once, weights and states there and back."""
    return 3 * gradient_nbytes + 2 * state_nbytes


def scaled_costs(costs: CostTable, of: Gpu, to: Gpu) -> CostTable:
    """Return costs measured on one GPU as another would have them, by the ratio of fp32 rates.

    For profiles without FLOPs; the update on the host stays as it is.

    Raises:
        PlanError: if nothing was measured.
    """
    if not any(costs.by_layer):
        raise PlanError("the profile has no measured costs to scale")
    factor = of.achievable("fp32") / to.achievable("fp32")
    return CostTable(
        tuple(
            {
                size: replace(
                    cost,
                    forward_s=cost.forward_s * factor,
                    backward_s=cost.backward_s * factor,
                    products_s=cost.products_s * factor,
                )
                for size, cost in layer.items()
            }
            for layer in costs.by_layer
        )
    )


def sizes_up_to(minibatch: int) -> list[int]:
    """Microbatch sizes to evaluate: powers of two, and the minibatch itself."""
    powers = [2**k for k in range(minibatch.bit_length()) if 2**k <= minibatch]
    return sorted({*powers[:MAX_SIZES], minibatch})


def step_flops(work: WorkTable, microbatches: Iterable[int]) -> dict[str, float]:
    """Model FLOPs of a step by type: of microbatches of these numbers of samples."""
    total: dict[str, float] = {}
    known: dict[int, dict[str, float]] = {}
    for size in microbatches:
        if size not in known:
            known[size] = work.model_flops(size)
        for dtype, count in known[size].items():
            total[dtype] = total.get(dtype, 0.0) + count
    return total
