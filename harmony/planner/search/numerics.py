"""What the bits of a step depend on, of all that a plan decides.

Samples that are computed together, sums over microbatches and shares, and sums over the uses of a
shared parameter round differently where they are grouped differently. Everything else of a plan
(packs, prefetch, what is kept, where values wait) moves data and leaves its bits alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from harmony.core.layergraph import LayerGraph
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import Samples, StepSpec


@dataclass(frozen=True)
class Numerics:
    """What two plans must have in common to compute the same bits.

    Attributes:
        shares: per replica its samples: each sums up the gradients of its own.
        forward_size, backward_size: samples that kernels see at once.
        ties: of each shared parameter, which of the layers that use it are in one BACKWARD pack:
            gradients of those are added use by use, those of packs microbatch by microbatch.
        updated: layers that are updated on a device, where that rounds differently from the host.
    """

    shares: tuple[Samples, ...]
    forward_size: int
    backward_size: int
    ties: tuple[tuple[int, ...], ...]
    updated: tuple[int, ...]


def numerics_of(
    graph: LayerGraph, spec: StepSpec, policy: Policy, *, updates_alike: bool
) -> Numerics:
    """Return what the bits of a plan depend on.

    Args:
        updates_alike: whether the optimizer computes the same on a device as on the host.
    """
    ties = []
    for param in graph.shared:
        packs = [p for layer in param.layers for p in spec.backward_packs if layer in p]
        ties.append(tuple(packs.index(pack) for pack in packs))
    updated = () if updates_alike else tuple(layer for p in policy.resident for layer in p)
    return Numerics(spec.shares, spec.forward_size, spec.backward_size, tuple(ties), updated)
