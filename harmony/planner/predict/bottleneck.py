"""Says what sets the pace of a step, and what to do about it."""

from __future__ import annotations

from harmony.core.timeline import Timeline
from harmony.planner.ir.schedule import HOST, HOST_STREAM, Schedule
from harmony.planner.ir.tasks import StepSpec, TaskKind
from harmony.planner.predict.stalls import stall_causes

COMPUTE_BOUND = 0.85
"""A GPU that computes this share of the step leaves little to gain elsewhere."""

_LINK_OF = {
    "weights": "h2d",
    "inputs": "h2d",
    "gradients": "d2h",
    "outputs": "d2h",
    "new weights": "d2h",
}


def bottleneck(timeline: Timeline, schedule: Schedule, spec: StepSpec) -> tuple[str, str]:
    """Return what binds (see `Plan.bound`) and advice in a sentence."""
    names = [f"gpu{index}" for index in range(schedule.num_devices)]
    busy = max((timeline.busy_s(f"{name}.compute") for name in names), default=0.0)
    share = busy / timeline.step_s if timeline.step_s else 1.0
    total: dict[str, float] = {}
    for stalls in stall_causes(timeline, schedule):
        for cause, seconds in stalls.items():
            total[cause] = total.get(cause, 0.0) + seconds
    if share >= COMPUTE_BOUND or not total:
        return "compute", f"The GPUs compute {share:.0%} of the step."
    cause = max(sorted(total), key=lambda name: total[name])
    lost = total[cause] / (timeline.step_s * len(names))
    bound = _LINK_OF.get(cause, cause)
    if cause in ("stash", "saved", "activations"):
        bound = max(("h2d", "d2h"), key=lambda link: _busy(timeline, names, link))
    return bound, f"{lost:.0%} of the GPUs' time goes into waiting for {_advice(cause, spec)}"


def _busy(timeline: Timeline, names: list[str], link: str) -> float:
    return sum(timeline.busy_s(f"{name}.{link}") for name in names)


def _advice(cause: str, spec: StepSpec) -> str:
    if cause == "peer":
        if spec.num_microbatches(0, TaskKind.BACKWARD) < 2:
            return "another GPU: use a larger minibatch, or smaller microbatches."
        return "another GPU: a larger minibatch keeps the pipeline full for longer."
    if cause == "update":
        return f"the update on the host ({HOST}.{HOST_STREAM}): a larger minibatch needs fewer."
    if cause == "host":
        return "the host to issue work: larger microbatches need fewer tasks."
    if cause in ("weights", "gradients", "new weights"):
        return f"{cause}: a larger minibatch does more work each time they move."
    return f"{cause}: a faster link, or fewer and larger packs, would help."
