"""What a candidate keeps with the memory it leaves: activations, weights, optimizer state.

Per pack one joint decision: its activations are recomputed, kept on the device or offloaded to
the host; its weights stream, stay from FORWARD to BACKWARD, or stay between steps, updated on
the device. Which of these helps depends on what binds: kept activations save computing, kept
weights save transfers. So the room is filled in several orders, activations that found none are
offloaded from some of the packs, and the sketch of each says which is fastest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from harmony.planner.ir.tasks import Pack, Phase, StepSpec, TaskKind
from harmony.planner.lower.resident import can_stay
from harmony.planner.search.candidates import Candidate, Question
from harmony.planner.search.memory_estimate import peaks_nbytes, slots_nbytes
from harmony.planner.search.outline import Outline, StageOutline, outline, with_backward

ORDERS = (
    ("saved", "held"),
    ("held", "saved"),
    ("resident", "saved", "held"),
    ("saved", "resident", "held"),
)
"""What gets the room first."""

SELECTIVE = (
    ("held",),
    ("products", "held"),
    ("saved", "products", "held"),
    ("resident", "products", "held"),
)
"""Likewise, where the results of products of all packs are kept: in less room they save most of a
recompute."""

OFFLOADED = (1.0, 0.5, 0.25)
"""Shares of the packs with no room for their activations whose activations are offloaded."""

FILLED = (1.0, 0.85)
"""Shares of a link's time that results of products fill, where it cannot carry all."""

OF_OUTPUTS = 6
"""So many times the bytes of a loop's outputs are left to the caller's loss: of logits in bf16 an
fp32 copy, its logarithms and their gradient, and the gradient in bf16 take seven."""

FAR = 8
PARTS = (0.75, 0.5, 0.37, 0.25, 0.12)
"""Shares of the microbatches whose activations are offloaded, where a link cannot carry all."""


@dataclass(frozen=True)
class _Room:
    """A candidate that keeps nothing, and the bytes that are left on each device of a ring."""

    question: Question
    base: Candidate
    shape: Outline
    spare: tuple[int, ...]

    def forward(self, seat: int) -> list[StageOutline]:
        """FORWARD stages of a device whose packs are BACKWARD packs, in order."""
        both = {*with_backward(self.question.packer, self.base.spec)}
        return [
            stage
            for stage in self.shape.stages
            if stage.seat == seat and stage.kind is TaskKind.FORWARD and stage.pack in both
        ]

    def saved_nbytes(self, stage: StageOutline) -> int:
        """Bytes that the activations of all microbatches of a pack take."""
        size = min(self.base.spec.forward_size, self.base.spec.shares[0][1])
        return stage.num_runs * self.question.packer.saved_nbytes(stage.pack, size)


def can_keep(question: Question, base: Candidate) -> bool:
    """Whether a candidate may keep anything: in a step with a backward, of equal microbatches."""
    spec = base.spec
    trains = question.phase in (Phase.TRAIN, Phase.BACKWARD)
    return trains and spec.forward_size == spec.backward_size


def filled(
    question: Question, base: Candidate, shape: Outline, memory_nbytes: int
) -> Iterator[Candidate]:
    """Variants of a candidate that keep what ``memory_nbytes`` of each device has room for.

    Args:
        base: keeps nothing, and runs BACKWARD of a pack where its FORWARD ran.
        shape: its outline; in a loop of one's own that of its FORWARDs.
    """
    if not can_keep(question, base):
        return
    peaks = _taken(question, base, shape)
    room = _Room(question, base, shape, tuple(memory_nbytes - peak for peak in peaks))
    seen = {base}
    for order in ORDERS:
        if "resident" in order and not _may_reside(room):
            continue
        found = _fill(room, [w for w in order if w != "saved" or not question.recompute])
        if found not in seen:
            seen.add(found)
            yield found


def _taken(question: Question, base: Candidate, shape: Outline) -> list[int]:
    """Bytes that nothing may be kept in, of each device of a ring.

    Between FORWARDs and BACKWARDs of a loop of one's own the caller's loss may run there.
    """
    packer, spec, policy = question.packer, base.spec, base.policy
    peaks = list(peaks_nbytes(packer, shape, spec, policy))
    if question.phase is not Phase.BACKWARD:
        return peaks
    graph = packer.graph
    outputs = sum(graph.values[v].nbytes(spec.minibatch) for v in graph.output_ids)
    backward = outline(packer, question.machine, spec, policy)
    slots = slots_nbytes(packer, backward, spec, policy)
    least = [nbytes + OF_OUTPUTS * outputs for nbytes in slots]
    return [
        max(of)
        for of in zip(peaks, peaks_nbytes(packer, backward, spec, policy), least, strict=True)
    ]


def knows_products(question: Question) -> bool:
    """Whether it is known of some layer what the results of its products take."""
    known = any(layer.products_nbytes_per_sample for layer in question.packer.graph.layers)
    return known and question.phase is Phase.TRAIN


def offloading(question: Question, found: Candidate, *, few: bool = False) -> Iterator[Candidate]:
    """Variants of a candidate that offload the activations of packs that recompute.

    Args:
        few: whether a few of them are enough, to see whether it is worth looking closer.
    """
    if question.recompute or not can_keep(question, found):
        return
    spec = found.spec
    may = set(with_backward(question.packer, spec)).difference(spec.saved)
    graph = question.packer.graph
    left = [p for p in spec.forward_packs if p in may and graph.keepable(p.first, p.last)]
    for share in OFFLOADED[: 2 if few else None]:
        # Spread evenly, so that what one pack sends out has left before the next one's follows.
        out = [p for i, p in enumerate(left) if int((i + 1) * share) > int(i * share)]
        if out:
            saved = tuple(sorted((*spec.saved, *out)))
            offload = tuple(sorted((*found.policy.offload, *out)))
            yield replace(
                found,
                spec=replace(spec, saved=saved),
                policy=replace(found.policy, offload=offload),
            )
    runs = spec.runs_of_round(0)
    least = min(spec.runs_of_round(r) for r in range(len(spec.shares)))
    if not spec.saved and left:
        parts = PARTS[1::2] if few else PARTS
        for some in sorted({round(part * runs) for part in parts} & set(range(1, least))):
            # One copy needs the time of several Runs.
            for ahead in sorted({FAR} if few else {found.policy.lookahead, FAR}):
                yield replace(
                    found,
                    spec=replace(spec, saved=tuple(left), saved_runs=some),
                    policy=replace(found.policy, offload=tuple(left), lookahead=ahead),
                )


def keeping_products(
    question: Question,
    base: Candidate,
    shape: Outline,
    memory_nbytes: int,
    *,
    few: bool = False,
) -> Iterator[Candidate]:
    """Variants of a candidate that keep the results of the products of all its packs.

    On the devices what there is room for, after what goes first, else on the host.

    Args:
        base, shape: as for `filled`.
        few: whether nothing else is to be kept.
    """
    if question.recompute or not can_keep(question, base) or not knows_products(question):
        return
    graph, spec = question.packer.graph, base.spec
    may = set(spec.backward_packs)
    makes = {
        pack
        for pack in spec.forward_packs
        if pack in may and graph.products_nbytes(pack.first, pack.last, 1)
    }
    peaks = peaks_nbytes(question.packer, shape, spec, base.policy)
    room = _Room(question, base, shape, tuple(memory_nbytes - peak for peak in peaks))
    seen = set()
    for order in SELECTIVE[: 2 if few else None]:
        if "resident" in order and not _may_reside(room):
            continue
        found = _fill(room, order)
        products = tuple(sorted(makes.difference(found.spec.saved)))
        offload = tuple(pack for pack in products if pack not in found.spec.products)
        found = replace(
            found,
            spec=replace(found.spec, products=products),
            policy=replace(found.policy, offload=offload),
        )
        if products and found not in seen:
            seen.add(found)
            yield found


def mixing(question: Question, found: Candidate, shape: Outline) -> Iterator[Candidate]:
    """Variants of a candidate that save everything of some microbatches, or fetch earlier.

    Args:
        shape: its outline.
    """
    spec = found.spec
    runs = spec.runs_of_round(0)
    least = min(spec.runs_of_round(r) for r in range(len(spec.shares)))
    counts: set[int] = set()
    if not spec.saved and not spec.products_runs:
        counts = {round(part * runs) for part in PARTS}
        counts |= {_carried(question, shape, found, share)[0] for share in FILLED}
    for ahead in sorted({found.policy.lookahead, 2 * found.policy.lookahead, FAR}):
        policy = replace(found.policy, lookahead=ahead)
        if ahead != found.policy.lookahead:
            yield replace(found, policy=policy)
        for some in sorted(counts & set(range(1, least))):
            mixed = replace(spec, saved=spec.products, saved_runs=some)
            yield replace(found, spec=mixed, policy=policy)


def thinning(
    question: Question, found: Candidate, shape: Outline, *, few: bool = False
) -> Iterator[Candidate]:
    """Variants of a candidate that keep results of products of as many microbatches as the link
    carries while their FORWARDs run, or of none but those that stay on the device.

    Args:
        shape: its outline.
        few: whether one is enough, to see whether it is worth looking closer.
    """
    spec = found.spec
    out = {*found.policy.offload}
    stay = tuple(pack for pack in spec.products if pack not in out)
    if stay and len(stay) < len(spec.products):
        offload = tuple(pack for pack in found.policy.offload if pack not in spec.products)
        yield replace(
            found,
            spec=replace(spec, products=stay),
            policy=replace(found.policy, offload=offload),
        )
    least = min(spec.runs_of_round(r) for r in range(len(spec.shares)))
    for share in FILLED[:1] if few else FILLED:
        some = _carried(question, shape, found, share)[1]
        for ahead in sorted({FAR} if few else {found.policy.lookahead, FAR}):
            if 0 < some < least and not spec.saved:
                yield replace(
                    found,
                    spec=replace(spec, products_runs=some),
                    policy=replace(found.policy, lookahead=ahead),
                )


def interleaving(
    question: Question, found: Candidate, shape: Outline, *, few: bool = False
) -> Iterator[Candidate]:
    """Variants of a candidate whose rounds are interleaved, so that the link has the time of
    FORWARD and BACKWARD for what leaves: for everything that is saved, of as many microbatches as
    it carries.

    Args:
        found, shape: what offloads results of products, and its outline.
        few: whether some are enough, to see whether it is worth looking closer.
    """
    spec = found.spec
    if not question.interleaves or spec.rounds == 1 or spec.saved or spec.products_runs:
        return
    runs = spec.runs_of_round(0)
    out = tuple(pack for pack in spec.products if pack in found.policy.offload)
    there = tuple(pack for pack in spec.products if pack not in found.policy.offload)
    kept: list[StepSpec] = []
    for share in FILLED[:1] if few else FILLED:
        everything, products = _carried(question, shape, found, share, both=True)
        if everything >= runs:
            kept.append(replace(spec, saved=out))
            kept.append(replace(spec, saved=out, products=there))
        elif everything:
            kept.append(replace(spec, saved=out, saved_runs=everything))
        elif products < runs:
            kept.append(replace(spec, products_runs=max(1, products)))
    kept.append(spec)
    for mixed in dict.fromkeys(kept):
        for ahead in sorted({runs} if few else {max(1, runs - 1), runs}):
            policy = replace(found.policy, lookahead=min(FAR, ahead), hold=0)
            yield replace(found, spec=replace(mixed, interleaved=True), policy=policy)


def _carried(
    question: Question, shape: Outline, found: Candidate, share: float, *, both: bool = False
) -> tuple[int, int]:
    """Of how many microbatches of a round the link to the host carries everything that is saved,
    beside results of products of the others, and of how many it carries those alone.

    Args:
        found, shape: what offloads results of products of all microbatches, and its outline.
        share: of the time of the FORWARDs, or of ``both`` FORWARDs and BACKWARDs, in which the
            link copies.
    """
    seconds = others = products = saved = 0.0
    size, runs = _size(found), 1
    for stage in shape.stages:
        forward = stage.kind is TaskKind.FORWARD
        if (not forward and not both) or not stage.product_runs or stage.products:
            continue
        runs = stage.num_runs
        facts = question.packer.facts(stage.pack, size)
        seconds += stage.run_s * runs
        others += stage.gradients + (stage.outputs * runs if forward else 0)
        if forward:
            others -= facts.products * runs
            products += facts.products * runs
            saved += facts.saved * runs
    if not products or saved <= products:
        return 0, 0
    room = share * seconds * _leaving_bytes_per_s(question) - others
    everything = int(runs * (room - products) / (saved - products))
    return max(0, everything), max(0, int(runs * room / products))


def _size(found: Candidate) -> int:
    low, high = found.spec.shares[0]
    return min(found.spec.forward_size, high - low)


def _leaving_bytes_per_s(question: Question) -> float:
    """What each device can send to the host while all others do."""
    machine = question.machine
    rates = [device.d2h_bytes_per_s for device in machine.devices]
    rates += [switch.d2h_bytes_per_s / len(switch.devices) for switch in machine.switches]
    if machine.host.memory_bytes_per_s and not machine.cpu_share:
        rates.append(machine.host.memory_bytes_per_s / machine.num_devices)
    return min(rates)


def _may_reside(room: _Room) -> bool:
    """Whether weights may stay between steps: one share, and devices that can update."""
    if room.question.phase is not Phase.TRAIN:
        return False
    can_update = all(device.update_bytes_per_s for device in room.question.machine.devices)
    trained = any(stage.gradients for stage in room.shape.stages)
    return len(room.base.spec.shares) == 1 and (can_update or not trained)


def _fill(room: _Room, order: Sequence[str]) -> Candidate:
    saved: list[Pack] = []
    products: list[Pack] = []
    resident: list[Pack] = []
    held: list[int] = []
    for seat in range(room.shape.ring):
        spare = room.spare[seat]
        for what in order:
            if what == "saved":
                spare -= _take_saved(room, seat, spare, saved)
            elif what == "products":
                spare -= _take_products(room, seat, spare, saved, products)
            elif what == "resident":
                spare -= _take_resident(room, seat, spare, resident)
            elif room.question.phase is Phase.TRAIN:
                spare -= _take_held(room, seat, spare, resident, held)
    spec, policy = room.base.spec, room.base.policy
    return replace(
        room.base,
        spec=replace(spec, saved=tuple(sorted(saved)), products=tuple(sorted(products))),
        policy=replace(policy, hold=min(held, default=0), resident=tuple(sorted(resident))),
    )


def _take_saved(room: _Room, seat: int, spare: int, saved: list[Pack]) -> int:
    """Keep activations of packs, most seconds a byte first, late ones first of those equal."""
    priced = []
    for stage in room.forward(seat):
        if not room.question.packer.graph.keepable(stage.pack.first, stage.pack.last):
            continue
        nbytes = room.saved_nbytes(stage)
        seconds = stage.run_s * stage.num_runs
        worth = -round(seconds / max(1, nbytes), 15)
        priced.append((worth, -stage.pack.first, nbytes, stage.pack))
    taken = 0
    for _, _, nbytes, pack in sorted(priced):
        if taken + nbytes <= spare:
            taken += nbytes
            saved.append(pack)
    return taken


def _take_products(
    room: _Room, seat: int, spare: int, saved: Sequence[Pack], products: list[Pack]
) -> int:
    """Keep results of products of packs that save no more, most seconds a byte first."""
    priced = []
    size = min(room.base.spec.forward_size, room.base.spec.shares[0][1])
    for stage in room.forward(seat):
        facts = room.question.packer.facts(stage.pack, size)
        nbytes = facts.products * stage.num_runs
        keepable = room.question.packer.graph.keepable(stage.pack.first, stage.pack.last)
        if nbytes and keepable and stage.pack not in saved:
            worth = -round(facts.products_s * stage.num_runs / nbytes, 15)
            priced.append((worth, -stage.pack.first, nbytes, stage.pack))
    taken = 0
    for _, _, nbytes, pack in sorted(priced):
        if taken + nbytes <= spare:
            taken += nbytes
            products.append(pack)
    return taken


def _take_resident(room: _Room, seat: int, spare: int, resident: list[Pack]) -> int:
    """Let weights stay between steps, from the first pack on: nothing hides its transfers."""
    taken = updating = 0
    there = {stage.pack for stage in room.forward(seat)}
    backward = [s for s in room.shape.stages if s.seat == seat and s.kind is TaskKind.BACKWARD]
    packs = [s.pack for s in backward if s.pack in there or _is_last(room, s.pack)]
    for pack in sorted(packs):
        packer = room.question.packer
        if can_stay(packer.graph, pack) is not None:
            continue
        facts = packer.facts(pack, room.base.spec.backward_size)
        most = max(updating, facts.updating)  # they are updated one after the other
        if taken + facts.resident + most <= spare:
            taken, updating = taken + facts.resident, most
            resident.append(pack)
    return taken + updating


def _is_last(room: _Room, pack: Pack) -> bool:
    return pack.last == room.question.packer.graph.num_layers


def _take_held(
    room: _Room, seat: int, spare: int, resident: Sequence[Pack], held: list[int]
) -> int:
    """Count packs that can leave their weights for their BACKWARD; return the bytes of those.

    All devices hold equally many; one that has no such pack does not limit the others.
    """
    here = [s for s in room.forward(seat) if s.pack not in resident and not s.shares]
    if not here:
        return 0
    slot = max(s.slot for s in room.shape.stages if s.seat == seat)
    number = max(0, min(len(here), spare // max(1, slot)))
    held.append(number)
    return number * slot
