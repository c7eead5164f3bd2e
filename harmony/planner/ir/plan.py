"""The plan: everything that was decided before training, and what it predicts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from harmony.core.files import DAMAGED, MOST_DIGITS, amount, check_types
from harmony.core.machine import Machine
from harmony.core.units import format_bytes, format_seconds
from harmony.errors import PlanError
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Schedule
from harmony.planner.ir.tasks import Pack, Phase, StepSpec, TaskKind


@dataclass(frozen=True)
class Decision:
    """One aspect of a plan.

    Attributes:
        name: what was decided.
        chosen: what was chosen.
        why: why, in a sentence.
        alternatives: what else there was, best first: the seconds of a step with it, or why it
            is not possible. Seconds that were estimated and not simulated say so in the text.
    """

    name: str
    chosen: str
    why: str
    alternatives: tuple[tuple[str, float | str], ...] = ()


@dataclass(frozen=True)
class Plan:
    """How one minibatch is trained, and what that is predicted to cost.

    Attributes:
        mode: ``"pp"`` (packs wrap around the GPUs), ``"dp"`` (each GPU has a share) or
            ``"dp+pp"`` (packs of each share wrap around some of the GPUs).
        spec: packs, microbatch sizes and shares; its phase is the one that was planned.
        schedules: per phase of a step its schedule; ``schedule`` is that of ``spec.phase``.
        step_s: predicted seconds of the planned phase.
        peak_nbytes: per GPU the most bytes in use, in the planned phase; the others fit too.
        host_nbytes: bytes of host memory: parameters, gradients, optimizer state, stashed values
            and staging buffers.
        traffic: bytes per step over all GPUs, by link and kind, of the planned phase.
        bound: what sets the pace: ``"compute"``, ``"h2d"``, ``"d2h"``, ``"peer"``, ``"update"``
            or ``"host"``.
        advice: what to change to be faster, in a sentence.
        alternatives: the other candidates that were looked at, best first: what they are, and
            the seconds of a step or why they were refused.
        model: fingerprint of the model that it was made for; empty if unknown.
        bound_s: seconds that a step takes at least, whatever the plan; 0 if unknown.
        bound_reason: what takes them, in words.
        decisions: what was chosen automatically, and the alternatives.
    """

    mode: str
    minibatch: int
    spec: StepSpec
    policy: Policy
    machine: Machine
    schedules: Mapping[Phase, Schedule]
    step_s: float
    peak_nbytes: tuple[int, ...]
    host_nbytes: int
    traffic: Mapping[tuple[str, str], int]
    bound: str
    advice: str
    alternatives: tuple[tuple[str, float | str], ...] = field(default=(), repr=False)
    model: str = ""
    bound_s: float = 0.0
    bound_reason: str = ""
    decisions: tuple[Decision, ...] = field(default=(), repr=False)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the planned phase."""
        return self.schedules[self.spec.phase]

    def describe(self) -> list[str]:
        """The plan in a few lines of text, for people."""
        limits = (device.memory_nbytes for device in self.machine.devices)
        peaks = ", ".join(
            f"gpu{i} {format_bytes(peak)} of {format_bytes(limit)}"
            for i, (peak, limit) in enumerate(zip(self.peak_nbytes, limits, strict=False))
        )
        moved = ", ".join(
            f"{link} {kind} {format_bytes(nbytes)}"
            for (link, kind), nbytes in sorted(self.traffic.items())
        )
        host = format_bytes(self.machine.host.memory_nbytes)
        return [
            describe_spec(self.spec, self.policy),
            f"step     {format_seconds(self.step_s)}, bound by {self.bound}. {self.advice}",
            f"memory   {peaks}; host {format_bytes(self.host_nbytes)} of {host}",
            f"traffic  {moved}",
        ]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that ``from_json`` reads back."""
        spec = self.spec
        return {
            "mode": self.mode,
            "minibatch": self.minibatch,
            "spec": {
                "forward_size": spec.forward_size,
                "backward_size": spec.backward_size,
                "forward_packs": _bounds(spec.forward_packs),
                "backward_packs": _bounds(spec.backward_packs),
                "shares": [list(share) for share in spec.shares],
                "phase": spec.phase.value,
                "saved": _bounds(spec.saved),
                "saved_runs": spec.saved_runs,
                "late": _bounds(spec.late),
                "rounds": spec.rounds,
                "products": _bounds(spec.products),
                "products_runs": spec.products_runs,
                "interleaved": spec.interleaved,
            },
            "policy": {
                **asdict(self.policy),
                "offload": _bounds(self.policy.offload),
                "resident": _bounds(self.policy.resident),
            },
            "machine": self.machine.to_json(),
            "schedules": {phase.value: str(s) for phase, s in self.schedules.items()},
            "step_s": self.step_s,
            "peak_nbytes": list(self.peak_nbytes),
            "host_nbytes": self.host_nbytes,
            "traffic": [[link, kind, n] for (link, kind), n in sorted(self.traffic.items())],
            "bound": self.bound,
            "advice": self.advice,
            "alternatives": [list(item) for item in self.alternatives],
            "model": self.model,
            "bound_s": self.bound_s,
            "bound_reason": self.bound_reason,
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """Read what ``to_json`` wrote.

        Raises:
            PlanError: if a part is missing or a schedule cannot be read.
        """
        try:
            plan = _read(data)
            check_types(plan, Plan, trusted=(Schedule,))
            _check(plan)
        except DAMAGED as error:
            raise PlanError(f"not a plan of this version of Harmony: {error!r}") from None
        return plan


def _bounds(packs: Sequence[Pack]) -> list[list[int]]:
    return [[pack.first, pack.last] for pack in packs]


def _packs(bounds: Sequence[Sequence[int]]) -> tuple[Pack, ...]:
    return tuple(Pack(*pair) for pair in bounds)


def _read(data: Mapping[str, Any]) -> Plan:
    spec = data["spec"]
    return Plan(
        mode=data["mode"],
        minibatch=data["minibatch"],
        spec=StepSpec(
            data["minibatch"],
            spec["forward_size"],
            spec["backward_size"],
            _packs(spec["forward_packs"]),
            _packs(spec["backward_packs"]),
            tuple((low, high) for low, high in spec["shares"]),
            Phase(spec["phase"]),
            _packs(spec["saved"]),
            spec.get("saved_runs", 0),
            _packs(spec.get("late", ())),
            spec.get("rounds", 1),
            _packs(spec.get("products", ())),
            spec.get("products_runs", 0),
            spec.get("interleaved", False),
        ),
        policy=Policy(
            **{
                **data["policy"],
                "offload": _packs(data["policy"]["offload"]),
                "resident": _packs(data["policy"]["resident"]),
            }
        ),
        machine=Machine.from_json(data["machine"]),
        schedules={Phase(p): _schedule(text) for p, text in data["schedules"].items()},
        step_s=data["step_s"],
        peak_nbytes=tuple(data["peak_nbytes"]),
        host_nbytes=data["host_nbytes"],
        traffic={(link, kind): nbytes for link, kind, nbytes in data["traffic"]},
        bound=data["bound"],
        advice=data["advice"],
        alternatives=tuple((what, outcome) for what, outcome in data["alternatives"]),
        model=data.get("model", ""),
        bound_s=data.get("bound_s", 0.0),
        bound_reason=data.get("bound_reason", ""),
        decisions=tuple(_decision(item) for item in data.get("decisions", ())),
    )


def _check(plan: Plan) -> None:
    """Refuse what no plan can be, whatever the model; `verify` checks the rest with the model.

    Raises:
        ValueError: saying what.
    """
    spec, num_devices = plan.spec, plan.machine.num_devices
    forward, backward = spec.forward_packs, spec.backward_packs
    amounts = (plan.step_s, plan.host_nbytes, plan.bound_s)
    counts = (spec.saved_runs, spec.products_runs, spec.rounds)
    for value in (*amounts, *counts, *plan.peak_nbytes, *plan.traffic.values()):
        amount(value)
    if spec.phase not in plan.schedules:
        raise ValueError(f"no schedule of {spec.phase.value}")
    if not all(1 <= s.num_devices <= num_devices for s in plan.schedules.values()):
        raise ValueError(f"schedules of more devices than the {num_devices} of the machine")
    used = plan.schedules[spec.phase].num_devices  # few packs leave devices without a program
    if len(plan.peak_nbytes) != used or len(spec.shares) > used:
        raise ValueError(f"{len(spec.shares)} shares and {len(plan.peak_nbytes)} peaks")
    if not spec.shares or not _follow(spec.shares, spec.minibatch):
        raise ValueError(f"shares of {spec.minibatch} samples: {spec.shares}")
    if min(spec.forward_size, spec.backward_size) < 1:
        raise ValueError(f"microbatches of {spec.forward_size} and {spec.backward_size}")
    if type(spec.interleaved) is not bool:
        raise ValueError(f"interleaved: {spec.interleaved}")
    if not 1 <= spec.rounds <= spec.minibatch or (spec.rounds > 1 and len(spec.shares) > 1):
        raise ValueError(f"{spec.rounds} rounds of {spec.minibatch} samples")
    for packs in (forward, backward):
        if not _follow([(p.first, p.last) for p in packs], packs[-1].last if packs else 0):
            raise ValueError(f"packs {_bounds(packs)[:4]}")
    if not backward:
        raise ValueError("no packs")
    if not {*spec.kept, *spec.late, *plan.policy.offload, *plan.policy.resident} <= {*backward}:
        raise ValueError("packs that stay, or are late, are none of the BACKWARD packs")


def _follow(ranges: Sequence[tuple[int, int]], end: int) -> bool:
    """Whether ranges follow one another from 0 to ``end``, none of them empty."""
    at = 0
    for low, high in ranges:
        if low != at or high <= low:
            return False
        at = high
    return at == end


def _schedule(text: str) -> Schedule:
    if re.search(rf"\d{{{MOST_DIGITS + 1}}}", text):
        raise ValueError("a schedule with a number of too many digits")
    return Schedule.parse(text)


def _decision(data: Mapping[str, Any]) -> Decision:
    others = tuple((what, outcome) for what, outcome in data["alternatives"])
    return Decision(data["name"], data["chosen"], data["why"], others)


def describe_spec(spec: StepSpec, policy: Policy) -> str:
    """One line: mode, microbatches, packs, what is kept, policy."""
    replicas = len(spec.shares)
    mode = f"dp over {replicas} replicas" if replicas > 1 else "pp"
    forward = spec.num_microbatches(0, TaskKind.FORWARD)
    sizes = f"{forward} x {spec.forward_size}"
    if spec.backward_size != spec.forward_size:
        backward = spec.num_microbatches(0, TaskKind.BACKWARD)
        sizes += f" forward, {backward} x {spec.backward_size} backward"
    if spec.rounds > 1:
        sizes += f" in {spec.rounds}{' interleaved' if spec.interleaved else ''} rounds"
    packs = f"{len(spec.forward_packs)} FORWARD and {len(spec.backward_packs)} BACKWARD packs"
    return (
        f"{mode}, microbatches {sizes}, {packs}, {_kept(spec, policy)}"
        f"{policy.weight_slots} weight slots,"
        f" {policy.gradient_slots} gradient slots, lookahead {policy.lookahead},"
        f" boundaries {policy.boundary}{', mirrored' if policy.mirror else ''}"
    )


def _kept(spec: StepSpec, policy: Policy) -> str:
    runs = spec.runs_of_round(0)
    some = f" of {spec.saved_runs}/{runs} microbatches" if spec.saved and spec.saved_runs else ""
    few = f" of {spec.products_runs}/{runs} microbatches" if spec.products_runs else ""
    there = {*policy.offload}
    saved, products = there.intersection(spec.saved), there.intersection(spec.products)
    counts = (
        (len(spec.saved) - len(saved), f"keep activations{some}"),
        (len(saved), f"offload activations{some}"),
        (len(spec.products) - len(products), f"keep results of products{few}"),
        (len(products), f"offload results of products{few}"),
        (len(policy.resident), "stay resident"),
        (policy.hold, "a GPU hold weights"),
        (len(spec.late), "updated in the next step"),
    )
    return "".join(f"{count} {what}, " for count, what in counts if count > 0)
