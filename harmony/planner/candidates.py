"""What the search may choose from: microbatch sizes, packings, DP or PP, policies.

A candidate is a four-tuple (U_F, P_F, U_B, P_B) with a policy. Packings are tried at a few
numbers of packs only: the fewest that fit, one more, and multiples of the number of GPUs, since a
wrap-around pipeline is balanced when every GPU has equally many packs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from harmony.machine import Machine
from harmony.planner.packing import Budget, Packer, PackingTable
from harmony.planner.policy import Policy
from harmony.planner.tasks import Pack, Phase, Samples, StepSpec, TaskKind

MAX_SIZES = 7
MAX_RUNS = 4096
POLICIES = (Policy(2, 2, 2), Policy(2, 2, 4), Policy(1, 1, 1))
"""Double buffering, the same for slow links and short tasks, and as little memory as possible."""


@dataclass(frozen=True)
class Candidate:
    """One way to train a minibatch."""

    mode: str
    spec: StepSpec
    policy: Policy


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes:
        modes: ``"pp"``, ``"dp"`` or both.
        sizes: microbatch sizes to try; None for all that make sense.
        num_packs: of BACKWARD packs; None for any.
    """

    packer: Packer
    machine: Machine
    minibatch: int
    phase: Phase
    modes: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    num_packs: int | None = None


def shares_of(question: Question, mode: str) -> tuple[Samples, ...]:
    """Per replica its samples: all of them for PP, equal parts for DP."""
    count = 1
    if mode == "dp":
        count = min(question.machine.num_devices, question.minibatch)
    cuts = [question.minibatch * r // count for r in range(count + 1)]
    return tuple((cuts[r], cuts[r + 1]) for r in range(count))


def microbatch_sizes(question: Question, share: int) -> tuple[int, ...]:
    """Powers of two and divisors of a share, large ones first, at most ``MAX_SIZES`` of them."""
    if question.sizes is not None:
        return tuple(sorted({min(size, share) for size in question.sizes}, reverse=True))
    powers = {2**k for k in range(share.bit_length()) if 2**k <= share}
    divisors = {size for size in range(1, share + 1) if share % size == 0}
    sizes = sorted(powers & divisors or divisors, reverse=True)
    others = sorted((powers | divisors).difference(sizes), reverse=True)
    # Sizes that divide the share leave no small last microbatch; 1 is the last resort.
    chosen = (sizes + others)[: MAX_SIZES - 1]
    return tuple(sorted({*chosen, 1}, reverse=True))


def candidates(question: Question) -> Iterator[Candidate]:
    """All candidates that the packing finds room for, in no particular order."""
    for mode in question.modes:
        shares = shares_of(question, mode)
        share = max(high - low for low, high in shares)
        for size in microbatch_sizes(question, share):
            if share // size * 4 > MAX_RUNS and question.sizes is None:
                continue
            for policy in _policies(question, mode):
                yield from _packed(question, mode, shares, size, policy)


def _policies(question: Question, mode: str) -> Iterator[Policy]:
    """Each policy, keeping boundary values on the devices or not."""
    # With several devices "swap" changes nothing in a pipeline, but "host" does.
    is_ring = mode == "pp" and question.machine.num_devices > 1
    for policy in POLICIES:
        yield policy
        yield replace(policy, boundary="host" if is_ring else "swap")


def _packed(
    question: Question, mode: str, shares: tuple[Samples, ...], size: int, policy: Policy
) -> Iterator[Candidate]:
    budget = _budget(question, shares, size, policy)
    packer, end = question.packer, question.packer.graph.num_layers
    devices = 1 if mode == "dp" else question.machine.num_devices
    most = question.num_packs or 4 * devices + 16
    backward = packer.table(TaskKind.BACKWARD, size, budget, min(most, len(packer.cuts)))
    # The drop-in form and inference run the same packs forward as backward.
    for count in _counts(backward, end, devices, question.num_packs):
        packs = backward.packs(end, count)
        if packs is None:
            continue
        for first in _forward_packs(question, packs, size, budget, devices):
            spec = StepSpec(question.minibatch, size, size, first, packs, shares, question.phase)
            yield Candidate(mode, spec, policy)


def _forward_packs(
    question: Question, packs: tuple[Pack, ...], size: int, budget: Budget, devices: int
) -> Iterator[tuple[Pack, ...]]:
    """FORWARD packs that go with some BACKWARD packs."""
    if question.phase is not Phase.TRAIN:
        yield packs
        return
    end = packs[-1].first
    if end == 0:
        yield ()
        return
    slots = [question.packer.slot_nbytes(pack) for pack in packs]
    shared = replace(
        budget,
        weight_nbytes=max(weights for weights, _ in slots),
        gradient_nbytes=max(gradients for _, gradients in slots),
    )
    most = max(len(packs), 4 * devices)
    table = question.packer.table(TaskKind.FORWARD, size, shared, most)
    seen = {packs[:-1]}
    yield packs[:-1]
    for count in _counts(table, end, devices, None):
        found = table.packs(end, count)
        if found is not None and found not in seen:
            seen.add(found)
            yield found


def _counts(table: PackingTable, end: int, devices: int, wanted: int | None) -> list[int]:
    """Numbers of packs worth trying."""
    fewest = table.fewest(end)
    if fewest is None:
        return []
    if wanted is not None:
        return [wanted] if wanted >= fewest else []
    even = -(-fewest // devices) * devices
    return sorted({fewest, fewest + 1, 2 * fewest, even, even + devices, even + 1})


def _budget(
    question: Question, shares: tuple[Samples, ...], size: int, policy: Policy
) -> Budget:
    share = max(high - low for low, high in shares)
    microbatches = -(-share // size)
    parked = 0
    if policy.boundary == "keep":
        # What a pipeline of N devices has in flight when the first comes round again.
        ring = 1 if len(shares) > 1 else question.machine.num_devices
        parked = max(0, microbatches - ring + 1)
    memory = min(device.memory_nbytes for device in question.machine.devices)
    return Budget(memory, policy, microbatches, parked)


def larger_forward(question: Question, found: Candidate) -> Iterator[Candidate]:
    """The candidate with FORWARD microbatches that are larger than the BACKWARD's (U_F > U_B).

    None where a layer pins the size, since the recompute must see what the forward saw.
    """
    spec = found.spec
    if question.phase is not Phase.TRAIN or question.packer.graph.pins_microbatch():
        return
    share = min(high - low for low, high in spec.shares)
    for factor in (2, 4):
        size = spec.backward_size * factor
        if spec.forward_packs and size <= share:
            yield replace(found, spec=replace(spec, forward_size=size))
