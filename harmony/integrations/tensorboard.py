"""What TensorBoard shows of a run: loss, speed, memory and the plan, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from harmony.integrations.figures import figures_of, text_of
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
        if record.plan is not None:
            text = "  \n".join(text_of(record.plan))
            self.writer.add_text("harmony/plan", text, record.num_steps)

    def stepped(self, record: ModelRecord, stats: StepStats) -> None:
        """Write the figures of a step."""
        if stats.step % self._every:
            return
        for name, value in figures_of(stats).items():
            self.writer.add_scalar(f"harmony/{name}", value, stats.step)
