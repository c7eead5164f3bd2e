"""Lightning's strategy, which gives Harmony the batches that are accumulated all at once."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import (  # type: ignore[import-not-found, unused-ignore]
    SingleDeviceStrategy,
    StrategyRegistry,
)

from harmony.integrations.joining import joined


class HarmonyStrategy(SingleDeviceStrategy):  # type: ignore[misc, unused-ignore]
    """Trains a `LightningModule` that holds a Harmony model: ``Trainer(strategy="harmony")``.

    The module stays on the host; the GPUs are Harmony's. With ``mean_loss`` the batches of
    ``accumulate_grad_batches`` run as one, so that the weights are streamed once a step and not
    once a batch: `training_step` is called once, with all of them, in the place of the last, and
    for the others the loss is 0 and nothing is logged. Gradients are those of batch after batch
    up to rounding (and to the bit where the sizes are powers of two and Harmony's microbatch is
    the batch). Batches that differ in shape run one by one.

    Args:
        mean_loss: whether what `training_step` returns is the mean over the samples of its batch,
            which only its author knows. Without it nothing is joined.
        options: as for Lightning's `SingleDeviceStrategy`.
    """

    strategy_name = "harmony"

    def __init__(self, *, mean_loss: bool = False, **options: Any) -> None:
        super().__init__("cpu", **options)
        self._mean_loss = mean_loss
        self._waiting: list[tuple[Any, ...]] = []

    def on_train_start(self) -> None:
        """Begin with no batch that waits."""
        self._waiting.clear()
        super().on_train_start()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Keep a batch of a step, or run all of them in the place of the last."""
        module = self.lightning_module
        assert module is not None, "a batch comes with its module"
        trainer = module.trainer
        if not self._mean_loss or trainer.accumulate_grad_batches == 1 or kwargs:
            return super().training_step(*args, **kwargs)
        self._waiting.append(args)
        if trainer.fit_loop._should_accumulate():
            return torch.zeros((), requires_grad=True)
        calls, self._waiting = self._waiting, []
        whole = joined([batch for batch, *_ in calls])
        if whole is None:
            return _summed([super(HarmonyStrategy, self).training_step(*call) for call in calls])
        return _scaled(super().training_step(whole, *args[1:]), len(calls))


def _scaled(output: Any, factor: int) -> Any:
    """Lightning divides each loss by the batches of a step: the loss of all counts as often."""
    if isinstance(output, dict):
        return {**output, "loss": output["loss"] * factor}
    return None if output is None else output * factor


def _summed(outputs: list[Any]) -> Any:
    """One output for several: the sum of their losses, and what else the last has."""
    losses = [out["loss"] if isinstance(out, dict) else out for out in outputs if out is not None]
    if not losses:
        return None
    total = torch.stack(losses).sum()
    return {**outputs[-1], "loss": total} if isinstance(outputs[-1], dict) else total


StrategyRegistry.register(
    HarmonyStrategy.strategy_name, HarmonyStrategy, description="Harmony's", override=True
)
