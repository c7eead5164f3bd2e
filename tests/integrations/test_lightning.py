"""Lightning trains a module that holds a wrapped one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from tests.integrations.common import NUM_GPUS, classifier, digest, pictures, wrapped
from tests.training.conftest import VirtualGPUs

lightning = pytest.importorskip("lightning", reason="lightning is not installed")


def task(net: nn.Module) -> Any:
    class Task(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("seen", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Task()


def trained(
    net: nn.Module,
    folder: Path,
    precision: str,
    resume: Path | None = None,
    strategy: Any = "auto",
    num_samples: int = 32,
) -> Any:
    events: list[str] = []

    class Seen(lightning.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_end(self, *_: Any) -> None:
            events.append("batch")

        def on_fit_end(self, *_: Any) -> None:
            events.append("end")

    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        precision=precision,
        callbacks=[Seen(), saving],
    )
    generator = torch.Generator().manual_seed(3)
    data = torch.utils.data.DataLoader(pictures(num_samples), 8, shuffle=True, generator=generator)
    module = task(net)
    trainer.fit(module, data, data, ckpt_path=None if resume is None else str(resume))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return digest(module.state_dict()), metrics, events


@pytest.mark.parametrize("num_gpus", NUM_GPUS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_run_is_the_plain_one_and_resumes(
    vgpus: VirtualGPUs, tmp_path: Path, num_gpus: int, precision: str
) -> None:
    expected = trained(classifier(), tmp_path / "plain", precision)
    model = wrapped(classifier(), num_gpus)
    assert trained(model, tmp_path / "harmony", precision) == expected
    assert model.num_steps == 8 and model.capture_mode == "trace"
    saved = tmp_path / "harmony" / "epoch=0.ckpt"
    sides = [(saved, classifier()), (saved, wrapped(classifier(), num_gpus))]
    sides.append((tmp_path / "plain" / "epoch=0.ckpt", wrapped(classifier(), num_gpus)))
    found = [
        trained(net, tmp_path / f"resumed-{n}", precision, file)
        for n, (file, net) in enumerate(sides)
    ]
    assert found[0] == found[1] == found[2] and found[0][2] == ["batch"] * 4 + ["end"]


@pytest.mark.parametrize("num_gpus", NUM_GPUS)
def test_a_strategy_streams_the_weights_once_for_all_batches_of_a_step(
    vgpus: VirtualGPUs, tmp_path: Path, num_gpus: int
) -> None:
    from harmony.integrations import HarmonyStrategy

    state, metrics, events = trained(classifier(), tmp_path / "plain", "32-true")
    model = harmony.Harmony(classifier(), devices=num_gpus, microbatch_size=8, mode="pp")
    strategy = HarmonyStrategy(mean_loss=True)
    found = trained(model, tmp_path / "joined", "32-true", strategy=strategy)
    assert (found[0], found[2]) == (state, events), "all sizes are powers of two"
    assert found[1]["seen"] == metrics["seen"]
    assert model.num_steps == 4, "two batches of a step are one"
    saved = tmp_path / "joined" / "epoch=0.ckpt"
    again = harmony.Harmony(classifier(), devices=num_gpus, microbatch_size=8, mode="pp")
    strategy = HarmonyStrategy(mean_loss=True)
    resumed = trained(again, tmp_path / "resumed", "32-true", saved, strategy)
    assert resumed[0] == trained(classifier(), tmp_path / "again", "32-true", saved)[0]


def test_batches_that_differ_and_losses_that_nobody_vouches_for_run_one_by_one(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    from harmony.integrations import HarmonyStrategy

    for number, options in enumerate(({}, {"mean_loss": True})):
        expected = trained(classifier(), tmp_path / f"p{number}", "32-true", num_samples=28)
        model = wrapped(classifier(), 1)
        strategy = HarmonyStrategy(**options)
        found = trained(model, tmp_path / f"h{number}", "32-true", None, strategy, 28)
        assert found[2] == expected[2]
        if number == 0:
            assert found == expected and model.num_steps == 8
        else:
            assert model.num_steps == 6, "the last batch of an epoch is smaller"


def test_the_strategy_has_a_name(vgpus: VirtualGPUs) -> None:
    from harmony.integrations import HarmonyStrategy

    trainer = lightning.Trainer(strategy="harmony", accelerator="cpu", logger=False)
    assert isinstance(trainer.strategy, HarmonyStrategy)
