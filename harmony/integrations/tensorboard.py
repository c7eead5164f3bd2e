"""What TensorBoard shows of a run: loss, speed, memory and the plan, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from harmony.core.units import format_bytes
from harmony.planner.ir.plan import describe_spec
from harmony.report.session import ModelRecord, Observer, StepStats


class TensorBoardObserver(Observer):
    """Writes every step, or each so many, as scalars: ``model.add_observer(...)``.

    Args:
        writer: a ``SummaryWriter``, or the folder of a new one.
        every: steps from one to the next that is written.
    """

    def __init__(self, writer: Any, every: int = 1) -> None:
        is_folder = isinstance(writer, (str, Path))
        self.writer = SummaryWriter(str(writer)) if is_folder else writer
        self._every = every

    def planned(self, record: ModelRecord) -> None:
        """Write what the plan is, and what it expects, as text."""
        plan = record.plan
        if plan is None:
            return
        peaks = ", ".join(format_bytes(peak) for peak in plan.peak_nbytes)
        text = f"{describe_spec(plan.spec, plan.policy)}  \n{plan.step_s:.4g} s a step expected"
        self.writer.add_text("harmony/plan", f"{text}, peaks {peaks}", record.num_steps)

    def stepped(self, record: ModelRecord, stats: StepStats) -> None:
        """Write the figures of a step."""
        if stats.step % self._every:
            return
        values = {"step_s": stats.step_s}
        if stats.loss is not None:
            values["loss"] = stats.loss
        if stats.step_s:
            values["samples_per_s"] = stats.num_samples / stats.step_s
            if stats.num_tokens:
                values["tokens_per_s"] = stats.num_tokens / stats.step_s
        for gpu, peak in enumerate(stats.timeline.peak_nbytes):
            values[f"gpu{gpu}_peak_GiB"] = peak / 2**30
        for name, value in values.items():
            self.writer.add_scalar(f"harmony/{name}", value, stats.step)
