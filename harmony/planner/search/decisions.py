"""What was chosen automatically, and what the alternatives would have taken.

A decision is one aspect of a candidate: how many replicas, which microbatch size, what is kept.
The search notes the estimate of every candidate that it looks at; the best of those with another
value of an aspect is what choosing that value would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from harmony.core.units import format_seconds
from harmony.planner.ir.plan import Decision
from harmony.planner.ir.tasks import Phase
from harmony.planner.search.candidates import Candidate

MAX_ALTERNATIVES = 6


@dataclass(frozen=True)
class _Best:
    """The fastest candidate with a value of an aspect, and whether it was simulated."""

    seconds: float
    exact: bool
    candidate: Candidate


def aspects(candidate: Candidate) -> dict[str, str]:
    """The value of every aspect of a candidate, in words."""
    return {name: of(candidate) for name, of in _ASPECTS.items()}


def decide(
    chosen: Candidate,
    chosen_s: float,
    estimates: Iterable[tuple[float, Candidate]],
    simulated: Mapping[Candidate, float],
    refused: Iterable[tuple[str, str, str]] = (),
    why_not: Callable[[Candidate], str] = lambda candidate: "",
) -> tuple[Decision, ...]:
    """Say what was decided.

    Args:
        chosen_s: simulated seconds of a step of the chosen candidate.
        estimates: estimated seconds of everything that was looked at.
        simulated: simulated seconds of those that were lowered and fit.
        refused: aspect, value and reason of what no candidate could be found for.
        why_not: why a candidate that seems to be faster was not chosen.
    """
    best: dict[str, dict[str, _Best]] = {name: {} for name in _ASPECTS}
    for seconds, candidate in estimates:
        exact = simulated.get(candidate)
        item = _Best(seconds if exact is None else exact, exact is not None, candidate)
        for name, value in aspects(candidate).items():
            known = best[name].get(value)
            if known is None or item.seconds < known.seconds:
                best[name][value] = item
    missing: dict[str, dict[str, str]] = {name: {} for name in _ASPECTS}
    for name, value, reason in refused:
        if value not in best[name]:
            missing[name][value] = reason
    mine = aspects(chosen)
    return tuple(
        _decision(name, mine[name], chosen_s, best[name], missing[name], why_not)
        for name in _ASPECTS
    )


def without_choice(decisions: Iterable[Decision], why: str) -> tuple[Decision, ...]:
    """Say of decisions that the model left none of, why: a batch that may not be parted."""
    fixed = ("replicas", "microbatch size") if why else ()
    return tuple(
        replace(item, why=f"one microbatch: {why}") if item.name in fixed else item
        for item in decisions
    )


def _decision(
    name: str,
    chosen: str,
    chosen_s: float,
    best: Mapping[str, _Best],
    missing: Mapping[str, str],
    why_not: Callable[[Candidate], str],
) -> Decision:
    others = [(item, value) for value, item in best.items() if value != chosen]
    others.sort(key=lambda other: (other[0].seconds, not other[0].exact, other[1]))
    shown: list[tuple[str, float | str]] = [
        (value if item.exact else f"{value} (estimate)", item.seconds)
        for item, value in others[:MAX_ALTERNATIVES]
    ]
    shown += missing.items()
    if not shown:
        why = "there was no choice"
    elif not others:
        why = "nothing else is possible"
    else:
        item, value = others[0]
        seconds, about = item.seconds, "" if item.exact else "about "
        if seconds >= 1.005 * chosen_s:
            more = f"{100 * (seconds / chosen_s - 1):.0f}% longer"
            why = f"the best with {value} takes {about}{more} ({format_seconds(seconds)})"
        elif seconds >= 0.995 * chosen_s:
            why = f"it is as fast as any; {value} takes {about}{format_seconds(seconds)}"
        else:
            faster = f"{100 * (1 - seconds / chosen_s):.1f} % faster"
            by = "" if item.exact else " by estimate"
            why = f"{value} is {faster}{by} ({format_seconds(seconds)}), not chosen because "
            why += why_not(item.candidate)
    return Decision(name, chosen, why, tuple(shown))


def _replicas(candidate: Candidate) -> str:
    count = len(candidate.spec.shares)
    if candidate.mode == "pp":
        return "one pipeline over all GPUs (pp)"
    each = "a GPU" if candidate.mode == "dp" else "a pipeline"
    return f"{count} replicas, each on {each} ({candidate.mode})"


def _sizes(candidate: Candidate) -> str:
    spec = candidate.spec
    if spec.forward_size == spec.backward_size:
        return f"microbatches of {spec.backward_size}"
    return f"microbatches of {spec.forward_size} forward and {spec.backward_size} backward"


def _rounds(candidate: Candidate) -> str:
    spec = candidate.spec
    if spec.rounds == 1:
        return "one"
    found = f"{spec.rounds} of {spec.runs_of_round(0)} microbatches"
    return f"{found}, interleaved" if spec.interleaved else found


def _packs(candidate: Candidate) -> str:
    spec = candidate.spec
    counts = (len(spec.forward_packs), len(spec.backward_packs))
    return f"{counts[0]} FORWARD and {counts[1]} BACKWARD packs"


def _prefetch(candidate: Candidate) -> str:
    policy = candidate.policy
    ahead = policy.weight_slots - 1
    packs = "no pack" if not ahead else "1 pack" if ahead == 1 else f"{ahead} packs"
    return f"weights {packs} ahead, values {policy.lookahead} tasks ahead"


def _boundary(candidate: Candidate) -> str:
    return {
        "keep": "stay on the GPU until the next pack reads them",
        "swap": "go to the host and back",
        "host": "go over the host",
    }[candidate.policy.boundary]


def _activations(candidate: Candidate) -> str:
    spec, offload = candidate.spec, candidate.policy.offload
    there = len({*spec.saved}.intersection(offload))
    fused = spec.phase is Phase.TRAIN  # the last pack has no forward of its own
    again = len(spec.backward_packs) - fused - len(spec.kept)
    parts = [("kept", len(spec.saved) - there), ("offloaded", there), ("recomputed", again)]
    found = [f"{what} in {count} packs" for what, count in parts if count > 0]
    if spec.saved and spec.saved_runs:
        runs = spec.runs_of_round(0)
        found.append(f"of {spec.saved_runs} of {runs} microbatches")
    if spec.products:
        out = len({*spec.products}.intersection(offload))
        where = "kept" if not out else "offloaded" if out == len(spec.products) else "kept or out"
        found.append(f"results of products {where} in {len(spec.products)} packs")
        if spec.products_runs:
            found.append(f"of {spec.products_runs} of {spec.runs_of_round(0)} microbatches")
    return ", ".join(found) or "used at once"


def _weights(candidate: Candidate) -> str:
    policy, spec = candidate.policy, candidate.spec
    resident = len(policy.resident)
    if resident == len(spec.backward_packs):
        return "stay on the GPUs"
    parts = [f"{resident} packs stay on the GPUs"] if resident else []
    if policy.hold:
        parts.append(f"{policy.hold} packs a GPU stay from FORWARD to BACKWARD")
    return ", ".join([*parts, "the others stream"]) if parts else "stream"


def _updates(candidate: Candidate) -> str:
    resident, packs = len(candidate.policy.resident), len(candidate.spec.backward_packs)
    if not resident:
        return "on the host"
    return "on the GPUs" if resident == packs else f"{resident} of {packs} packs on the GPUs"


def _placement(candidate: Candidate) -> str:
    return "where FORWARD ran" if candidate.policy.mirror else "on the next GPU of the ring"


_ASPECTS: dict[str, Callable[[Candidate], str]] = {
    "replicas": _replicas,
    "microbatch size": _sizes,
    "rounds": _rounds,
    "packs": _packs,
    "prefetch": _prefetch,
    "boundary values": _boundary,
    "activations": _activations,
    "weights": _weights,
    "updates": _updates,
    "BACKWARD runs": _placement,
}
