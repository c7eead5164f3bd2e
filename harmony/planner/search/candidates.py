"""What the search may choose from: replicas, microbatch sizes, packings, policies.

A candidate is a four-tuple (U_F, P_F, U_B, P_B) with a policy. With N GPUs there are R replicas,
R a divisor of N: 1 is Harmony-PP, N is Harmony-DP, between them each replica has a ring of N / R
GPUs. Packings are tried at a few numbers of packs only: the fewest that fit, one more, and
multiples of the ring, since a wrap-around pipeline is balanced when every GPU has equally many.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.planner.ir.policy import LEAN, Policy
from harmony.planner.ir.tasks import Pack, Phase, Samples, StepSpec, TaskKind
from harmony.planner.search.memory_estimate import parked
from harmony.planner.search.numerics import Numerics, numerics_of
from harmony.planner.search.packing import Budget, Packer
from harmony.planner.search.partition import PackingTable

MAX_SIZES = 7
"""How many microbatch sizes are tried for a number of replicas."""

MAX_RUNS = 4096
"""Sizes with more Runs of a layer than this, about, are only tried if none with fewer fits."""

MAX_FINER = 16
"""How many times more packs than the fewest that fit are tried, to leave room on the devices."""

POLICIES = (Policy(2, 2, 2), Policy(2, 2, 4), Policy(1, 1, 1))
"""Double buffering, the same for slow links and short tasks, and as little memory as possible."""

MANY = 128
"""More packs than this are only tried where fewer than half as many do not fit."""

REMEDY = (
    "If smaller microbatches are meant, each as a batch of its own, say so with microbatch_size=; "
    "if an input has its samples along another dimension than 0, or has none, with batch_dims="
)
"""What to do where a batch may not be parted."""


@dataclass(frozen=True)
class Candidate:
    """One way to train a minibatch."""

    mode: str
    spec: StepSpec
    policy: Policy

    @cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.policy))

    def __hash__(self) -> int:
        # A search looks candidates up again and again, and each has hundreds of packs.
        return self._hash

    @cached_property
    def num_runs(self) -> int:
        """FORWARD and BACKWARD tasks of all replicas; what lowering takes grows with it."""
        spec = self.spec
        kinds = (
            (TaskKind.FORWARD, spec.forward_packs),
            (TaskKind.BACKWARD, spec.backward_packs),
        )
        each = sum(len(packs) * spec.num_microbatches(0, kind) for kind, packs in kinds)
        return each * len(spec.shares)


@dataclass(frozen=True)
class Layout:
    """Who does what share of the minibatch.

    Attributes:
        shares: per replica its samples.
        ring: how many devices a replica wraps around.
    """

    shares: tuple[Samples, ...]
    ring: int

    @property
    def mode(self) -> str:
        """``"pp"``, ``"dp"`` or ``"dp+pp"``."""
        if len(self.shares) == 1:
            return "pp"
        return "dp" if self.ring == 1 else "dp+pp"

    @property
    def share(self) -> int:
        """Samples of the largest share."""
        return max(high - low for low, high in self.shares)


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes:
        replicas: how many replicas there may be.
        sizes: microbatch sizes to try; None for all that make sense.
        num_packs: of BACKWARD packs; None for any.
        recompute: whether all activations are recomputed, none kept or offloaded.
        like: compute the bits that this candidate computes; None for any.
        interleaves: whether rounds may be interleaved.
    """

    packer: Packer
    machine: Machine
    minibatch: int
    phase: Phase
    replicas: tuple[int, ...]
    sizes: tuple[int, ...] | None = None
    num_packs: int | None = None
    recompute: bool = False
    like: Candidate | None = None
    interleaves: bool = True

    @property
    def memory_nbytes(self) -> int:
        """Bytes of the smallest device."""
        return min(device.memory_nbytes for device in self.machine.devices)

    def admits(self, candidate: Candidate) -> bool:
        """Whether a candidate computes the bits that are asked for."""
        return self.like is None or self._bits(candidate) == self._bits(self.like)

    def _bits(self, candidate: Candidate) -> Numerics:
        graph, alike = self.packer.graph, self.machine.updates_alike
        return numerics_of(graph, candidate.spec, candidate.policy, updates_alike=alike)


def replicas_of(mode: str, num_devices: int, minibatch: int, *, ordered: bool) -> tuple[int, ...]:
    """Numbers of replicas that a mode may have: one share is the same step in all of them.

    Args:
        ordered: whether microbatches have to run one after the other, on one device each.
    """
    most = min(num_devices, minibatch)
    if ordered or most == 1 or mode == "pp":
        return (1,)
    if mode == "dp":
        return (most,)
    return tuple(r for r in range(1, most + 1) if num_devices % r == 0 or r == most)


def sizes_that_work(graph: LayerGraph, minibatch: int) -> tuple[int, ...]:
    """Microbatch sizes of a model whose batches cannot be parted anyhow; the whole is one."""
    known = () if graph.whole_batch else graph.sizes
    fine = {size for size in known if size < minibatch and minibatch % size in (0, *known)}
    return tuple(sorted({*fine, minibatch}))


def one_replica(graph: LayerGraph, minibatch: int, mode: str) -> str:
    """Say why a batch cannot be parted between replicas, and the remedy."""
    why = graph.whole_batch or f"only microbatches of {list(graph.sizes)} samples work"
    return (
        f"mode={mode!r} parts the {minibatch} samples of a batch between GPUs, but {why}. "
        f"{REMEDY}, or use mode='pp' or 'auto'"
    )


def layout(question: Question, replicas: int) -> Layout:
    """The shares of a number of replicas: as equal as can be."""
    cuts = [question.minibatch * r // replicas for r in range(replicas + 1)]
    shares = tuple((cuts[r], cuts[r + 1]) for r in range(replicas))
    return Layout(shares, question.machine.num_devices // replicas)


def microbatch_sizes(
    question: Question, share: int, fits: Callable[[int], bool]
) -> tuple[int, ...]:
    """Powers of two and divisors of a share, large ones first, at most ``MAX_SIZES`` of them.

    Args:
        fits: whether a microbatch size seems to fit a device with the smallest packs and all
            recomputed; where one does, smaller ones do.
    """
    if question.sizes is not None:
        return tuple(sorted({min(size, share) for size in question.sizes}, reverse=True))
    powers = {2**k for k in range(share.bit_length()) if 2**k <= share}
    small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    divisors = {*small, *(share // size for size in small)}
    every = sorted(powers | divisors)
    most = share  # where not even one sample fits: the answer says what is lacking
    if fits(1):
        most = every[bisect_left(every, True, key=lambda size: not fits(size)) - 1]
    # Sizes that divide the share leave no small last microbatch; 1 is the last resort.
    dividing = (powers & divisors) if len(powers & divisors) > 1 else divisors
    sizes = sorted((size for size in every if size <= most), reverse=True)
    sizes.sort(key=lambda size: size not in dividing)
    found = sorted({*sizes[: MAX_SIZES - 1], 1}, reverse=True)
    few = tuple(size for size in found if share // size * 4 <= MAX_RUNS)
    return few or tuple(found[:1])


def policies(question: Question, ring: int, *, few: bool = False) -> Iterator[Policy]:
    """Each policy, keeping boundary values on the devices or not."""
    # With several devices "swap" changes nothing in a pipeline, but "host" does.
    elsewhere = replace(Policy(), boundary="host" if ring > 1 else "swap").boundary
    for policy in (POLICIES[0], POLICIES[-1]) if few else POLICIES:
        yield policy
        yield replace(policy, boundary=elsewhere)


def finest(question: Question, where: Layout, size: int) -> Candidate:
    """What takes the least memory of a device: the smallest packs, nothing kept or prefetched."""
    packs = question.packer.finest
    first = packs[:-1] if question.phase is Phase.TRAIN else packs
    return Candidate(where.mode, _spec(question, where, size, first, packs), LEAN)


def packed(
    question: Question, where: Layout, size: int, policy: Policy, *, few: bool = False
) -> Iterator[Candidate]:
    """Candidates of one layout, microbatch size and policy, for any packing worth trying."""
    budget = _budget(question, where, size, policy)
    backward = question.packer.table(TaskKind.BACKWARD, size, budget)
    # Own loops and inference run the same packs forward as backward.
    for packs in _backward_packs(question, backward, where.ring, few=few):
        for first in _forward_packs(question, packs, size, budget, where.ring, few=few):
            yield Candidate(where.mode, _spec(question, where, size, first, packs), policy)


def _backward_packs(
    question: Question, table: PackingTable, ring: int, *, few: bool
) -> Iterator[tuple[Pack, ...]]:
    """BACKWARD packs: balanced, and behind the largest last pack that fits.

    The forward of the last pack is not repeated, so the larger it is, the less is computed; in a
    ring balance is worth more.
    """
    end = question.packer.graph.num_layers
    counts = _counts(table, end, ring, question.num_packs, few=few)
    for count in counts:
        packs = table.packs(end, count)
        if packs is not None:
            yield packs
    if question.like is not None:
        yield question.like.spec.backward_packs
    last = table.largest_last(end)
    if question.phase is not Phase.TRAIN or ring > 1 or not last:
        return
    for count in counts:
        head = table.packs(last, count - 1) if count > 1 else None
        if head is not None:
            yield (*head, Pack(last, end))


def coinciding(
    question: Question,
    where: Layout,
    size: int,
    policy: Policy,
    counts: Iterable[int] | None = None,
) -> Iterator[Candidate]:
    """Candidates whose FORWARD packs are BACKWARD packs and leave room for what is kept.

    Mirrored, so that what a FORWARD leaves on its device is where the BACKWARD runs.

    Args:
        counts: numbers of packs to try; None for a ladder of them.
    """
    end, ring = question.packer.graph.num_layers, where.ring
    mirrored = replace(policy, mirror=ring > 1)
    budget = _budget(question, where, size, mirrored)
    table = question.packer.table(TaskKind.BACKWARD, size, budget)
    fewest, most = table.fewest(end), table.most(end)
    if fewest is None or most is None:
        return
    if question.num_packs is not None:
        counts = (question.num_packs,)
    for count in sorted({*(_ladder(fewest, ring, most) if counts is None else counts)}):
        if not fewest <= count <= most:
            continue
        packs = table.packs(end, count)
        if packs is not None:
            spec = _spec(question, where, size, _forward_of(question, packs), packs)
            yield Candidate(where.mode, spec, mirrored)
    if question.like is not None:
        packs = question.like.spec.backward_packs
        spec = _spec(question, where, size, _forward_of(question, packs), packs)
        yield Candidate(where.mode, spec, mirrored)


def _forward_of(question: Question, packs: tuple[Pack, ...]) -> tuple[Pack, ...]:
    """The FORWARD packs of some BACKWARD packs: the last one's is part of its BACKWARD."""
    return packs[:-1] if question.phase is Phase.TRAIN else packs


def in_rounds(question: Question, base: Candidate, runs: Iterable[int]) -> Iterator[Candidate]:
    """Yield a candidate in rounds of about so many microbatches, where it may have several.

    What waits on the host in one round can lie where that of the round before lay if no other
    device may still read it, so a candidate has the only device.
    """
    spec, graph = base.spec, question.packer.graph
    alone = question.machine.num_devices == 1 and question.phase is Phase.TRAIN
    if not alone or not spec.forward_packs or graph.orders_microbatches():
        return
    count = spec.num_microbatches(0, TaskKind.FORWARD)
    for rounds in sorted({-(-count // each) for each in runs if each < count}):
        yield replace(base, spec=replace(spec, rounds=rounds))


def _ladder(fewest: int, ring: int, most: int) -> Iterator[int]:
    """Numbers of packs: the same whatever the memory, as long as they fit, and the fewest."""
    even = -(-fewest // ring) * ring
    yield from (fewest, even)
    count = ring
    while count < min(most, MAX_FINER * even):
        if even < count <= max(MANY, 2 * even):
            yield count
        count *= 2
    if most <= MANY:
        yield most


def _spec(
    question: Question,
    where: Layout,
    size: int,
    forward: tuple[Pack, ...],
    backward: tuple[Pack, ...],
) -> StepSpec:
    larger = _forward_size(question, size)
    return StepSpec(
        question.minibatch, larger, size, forward, backward, where.shares, question.phase
    )


def _forward_size(question: Question, size: int) -> int:
    """Samples of a FORWARD microbatch: as many as of a BACKWARD's, unless that is settled."""
    return size if question.like is None else question.like.spec.forward_size


def _forward_packs(
    question: Question,
    packs: tuple[Pack, ...],
    size: int,
    budget: Budget,
    ring: int,
    *,
    few: bool,
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
    table = question.packer.table(TaskKind.FORWARD, _forward_size(question, size), shared)
    seen = {packs[:-1]}
    yield packs[:-1]
    for count in _counts(table, end, ring, None, few=few):
        found = table.packs(end, count)
        if found is not None and found not in seen:
            seen.add(found)
            yield found


def _counts(
    table: PackingTable, end: int, ring: int, wanted: int | None, *, few: bool
) -> list[int]:
    """Numbers of packs worth trying."""
    fewest = table.fewest(end)
    if fewest is None:
        return []
    if wanted is not None:
        return [wanted] if wanted >= fewest else []
    even = -(-fewest // ring) * ring
    if few:
        return sorted({fewest, even})
    return sorted({fewest, fewest + 1, 2 * fewest, even, even + ring, even + 1})


def _budget(question: Question, where: Layout, size: int, policy: Policy) -> Budget:
    microbatches = -(-where.share // size)
    waiting = parked(policy, where.ring, microbatches)
    return Budget(question.memory_nbytes, policy, microbatches, waiting)


def larger_forward(question: Question, found: Candidate) -> Iterator[Candidate]:
    """The candidate with FORWARD microbatches that are larger than the BACKWARD's (U_F > U_B).

    None where a layer pins the size, since the recompute must see what the forward saw, or where
    nothing is recomputed.
    """
    spec = found.spec
    graph = question.packer.graph
    pinned = graph.pins_microbatch() or bool(graph.sizes) or question.like is not None
    if question.phase is not Phase.TRAIN or pinned or spec.kept:
        return
    share = min(high - low for low, high in spec.shares)
    for factor in (2, 4):
        size = spec.backward_size * factor
        if spec.forward_packs and size <= share:
            yield replace(found, spec=replace(spec, forward_size=size))
