"""The figures of a step, as boards for experiments take them."""

from __future__ import annotations

from harmony.core.units import format_bytes
from harmony.planner.ir.plan import Plan, describe_spec
from harmony.report.session import StepStats


def figures_of(stats: StepStats) -> dict[str, float]:
    """Name to value: seconds of the step, loss, samples and tokens a second, GiB of each GPU."""
    values = {"step_s": stats.step_s}
    if stats.loss is not None:
        values["loss"] = stats.loss
    if stats.step_s:
        values["samples_per_s"] = stats.num_samples / stats.step_s
        if stats.num_tokens:
            values["tokens_per_s"] = stats.num_tokens / stats.step_s
    for gpu, peak in enumerate(stats.timeline.peak_nbytes):
        values[f"gpu{gpu}_peak_GiB"] = peak / 2**30
    return values


def text_of(plan: Plan) -> tuple[str, str]:
    """What the plan is, and what it expects."""
    peaks = ", ".join(format_bytes(peak) for peak in plan.peak_nbytes)
    return (
        describe_spec(plan.spec, plan.policy),
        f"{plan.step_s:.4g} s a step expected, peaks {peaks}",
    )
