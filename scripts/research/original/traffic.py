"""What a step of the original moves and holds: bytes per link, and peak bytes of a GPU.

The closed forms of the bytes hold for whatever the machine is; the estimator's events, added up,
say the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from harmony.planner.ir.tasks import Pack, TaskKind
from research.original.four_tuple import FourTuple
from research.original.profile import PaperProfile


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step, summed over all GPUs, in the order of the columns of the original's tables.

    Attributes:
        weights_h2d: weights and buffers in.
        gradients_d2h_sim: gradients out, as the original's estimator charges them (N times in DP).
        values_h2d, values_d2h: activations and their gradients in and out, the data included.
        p2p: between GPUs.
        all_reduce: all-reduce.
        gradients_d2h_runtime: gradients out, as the original's runtime moves them.
    """

    weights_h2d: int
    gradients_d2h_sim: int
    values_h2d: int
    values_d2h: int
    p2p: int
    all_reduce: int
    gradients_d2h_runtime: int


def closed_forms(profile: PaperProfile, plan: FourTuple) -> Traffic:
    """Bytes of a step.

    Raises:
        PlanError: if the plan does not cover the model.
    """
    plan.check(profile.num_layers)
    moved, entered, num_gpus = profile.moved_nbytes, profile.input_nbytes, plan.num_gpus
    weights = moved[-1]
    backward, forward = plan.backward_packs, plan.forward_packs
    last = backward[-1]
    copies = num_gpus if plan.simulates_one else 1
    forward_weights = moved[last.first] if forward else 0
    stash = sum(entered[pack.first] for pack in backward[:-1])
    forwarded = sum(entered[pack.first] for pack in forward[1:])
    forwarded += entered[last.first] if forward else 0
    handed_back = sum(entered[pack.first] for pack in backward[1:])
    data = entered[0]
    if plan.simulates_one:
        aside, p2p = forwarded + handed_back, 0
    else:
        aside = entered[last.first] if plan.converts and forward else 0
        p2p = forwarded + handed_back - aside
    out = stash + aside
    reduced = 2 * (num_gpus - 1) * weights if plan.simulates_one else 0
    samples = plan.minibatch
    return Traffic(
        copies * (weights + forward_weights),
        copies * weights,
        samples * (data + out),
        samples * out,
        samples * p2p,
        reduced,
        weights,
    )


def forward_nbytes(
    profile: PaperProfile, pack: Pack, num_samples: int, stashed_per_sample: int
) -> float:
    """Peak bytes of a FORWARD of a pack by the original's rule: X + C + Y + its stashes."""
    sums = profile.sized(num_samples, backward=False).forward_nbytes
    edges = _edges(profile, pack)
    held = edges[0] + edges[1] + stashed_per_sample
    return num_samples * held + _alone(profile, sums, pack, num_samples)


def backward_nbytes(profile: PaperProfile, pack: Pack, num_samples: int) -> float:
    """Peak bytes of a BACKWARD of a pack by the original's rule: 2 X + dY + C + dX."""
    sums = profile.sized(num_samples).backward_nbytes
    entering, leaving = _edges(profile, pack)
    held = 2 * entering + leaving + (entering if pack.first else 0)
    return num_samples * held + _alone(profile, sums, pack, num_samples)


def peak_nbytes(profile: PaperProfile, plan: FourTuple) -> float:
    """Peak bytes of a GPU: of the task that needs most.

    Raises:
        PlanError: if the plan does not cover the model, or a microbatch size was not measured.
    """
    plan.check(profile.num_layers)
    entered = profile.input_nbytes
    starts = {pack.first for pack in plan.backward_packs[:-1]}
    forward_size = plan.microbatches(TaskKind.FORWARD)[0]
    backward_size = plan.microbatches(TaskKind.BACKWARD)[0]
    found = [backward_nbytes(profile, pack, backward_size) for pack in plan.backward_packs]
    for pack in plan.forward_packs:
        stashed = sum(entered[layer] for layer in pack if layer in starts)
        found.append(forward_nbytes(profile, pack, forward_size, stashed))
    return max(found)


def _edges(profile: PaperProfile, pack: Pack) -> tuple[int, int]:
    """Bytes a sample of what enters and of what leaves a pack."""
    entered = profile.input_nbytes
    return entered[pack.first], entered[pack.last] if pack.last < len(entered) else 0


def _alone(profile: PaperProfile, sums: tuple[float, ...], pack: Pack, num_samples: int) -> float:
    """C: the layers' peaks run alone, less inputs that are the output of the layer before."""
    entered = profile.entered_nbytes
    inner = entered[pack.last] - entered[pack.first + 1]
    return sums[pack.last] - sums[pack.first] - num_samples * inner
