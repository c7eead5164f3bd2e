"""What Weights & Biases shows of a run: loss, speed, memory and the plan, step by step."""

from __future__ import annotations

from typing import Any

from harmony.errors import ConfigError
from harmony.integrations.figures import figures_of, text_of
from harmony.report.session import ModelRecord, Observer, StepStats


class WandbObserver(Observer):
    """Logs every step, or each so many, to a run: ``model.add_observer(...)``.

    Charts have the step of the model as their axis (``harmony/step``). Figures join the row of
    the same step, so that what the script logs by itself is not pushed out, with steps of its own
    or without; where the run is ahead of the model, they join the row that it is at. The run is
    the caller's: it is not finished here.

    Args:
        run: what ``wandb.init`` returns; None: the one that is active.
        every: steps from one to the next that is logged.

    Raises:
        ConfigError: if there is no run, or wandb is not installed.
    """

    def __init__(self, run: Any = None, every: int = 1) -> None:
        self.run = _active() if run is None else run
        self._every = every
        self.run.define_metric("harmony/step")
        self.run.define_metric("harmony/*", step_metric="harmony/step")

    def planned(self, record: ModelRecord) -> None:
        """Keep what the plan is, and what it expects, in the run's configuration."""
        if record.plan is not None:
            kind, expected = text_of(record.plan)
            told = {"harmony/plan": kind, "harmony/expected": expected, **record.facts}
            self.run.config.update(told, allow_val_change=True)

    def stepped(self, record: ModelRecord, stats: StepStats) -> None:
        """Log the figures of a step."""
        if stats.step % self._every:
            return
        values: dict[str, float] = {"harmony/step": stats.step}
        values.update((f"harmony/{name}", value) for name, value in figures_of(stats).items())
        self.run.log(values, step=max(stats.step, self.run.step))


def _active() -> Any:
    try:
        import wandb  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f"WandbObserver needs wandb ({error}): pip install 'harmony-train[wandb]'"
        ) from error
    if wandb.run is None:
        raise ConfigError("WandbObserver: there is no run. Call wandb.init(project=...) before")
    return wandb.run
