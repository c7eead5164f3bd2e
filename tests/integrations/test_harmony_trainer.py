"""HarmonyTrainer accumulates gradients as Trainer does, in one run of the model a step."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import harmony
from harmony.integrations import HarmonyTrainer
from harmony.integrations.joining import joined
from tests.integrations.common import NUM_GPUS, digest, language_model, texts
from tests.training.conftest import VirtualGPUs


class Seen(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.events.append("part")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.events.append("step")


def trained(
    kind: Any, folder: Path, resume: Path | None = None, *, bf16: bool = False, **options: Any
) -> Any:
    """Train for three steps of two batches, with other numbers of targets that count."""
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        logging_steps=1,
        save_steps=2,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=bf16,
    )
    rows = texts()
    for number, row in enumerate(rows):
        row["labels"][: number % 5] = -100
    seen = Seen()
    trainer = kind(
        model=language_model(), args=arguments, train_dataset=rows, callbacks=[seen], **options
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    logged = [
        (row["loss"], row["grad_norm"], row["learning_rate"])
        for row in trainer.state.log_history
        if "loss" in row
    ]
    return trainer.model, digest(trainer.model.state_dict()), logged, seen.events


@pytest.mark.parametrize("num_gpus", NUM_GPUS)
def test_a_step_runs_the_model_once_and_is_the_plain_one(
    vgpus: VirtualGPUs, tmp_path: Path, num_gpus: int
) -> None:
    _, state, logged, events = trained(Trainer, tmp_path / "plain")
    options = {"devices": num_gpus, "mode": "pp"}
    found = trained(HarmonyTrainer, tmp_path / "harmony", harmony_options=options)
    assert found[1] == state
    assert torch.allclose(torch.tensor(found[2]), torch.tensor(logged), rtol=1e-6)
    assert found[3] == events == ["part", "step"] * 3
    assert isinstance(found[0], harmony.Harmony)
    assert found[0].num_steps == 3, "the weights are streamed once a step"
    assert found[0].plan is not None and found[0].plan.minibatch == 8

    saved = tmp_path / "harmony" / "checkpoint-2"
    assert LlamaForCausalLM.from_pretrained(saved) is not None
    again = trained(HarmonyTrainer, tmp_path / "again", saved, harmony_options=options)
    assert again[1] == state and again[3] == ["part", "step"]


def test_the_flag_bf16_is_the_precision_of_the_model(vgpus: VirtualGPUs, tmp_path: Path) -> None:
    options = {"devices": 1}
    asked = {**options, "precision": "bf16"}
    expected = trained(HarmonyTrainer, tmp_path / "asked", harmony_options=asked)
    found = trained(HarmonyTrainer, tmp_path / "flag", bf16=True, harmony_options=options)
    assert found[1:] == expected[1:]
    assert found[0].record.facts["precision"].startswith("bfloat16 with fp32 masters")
    model = harmony.Harmony(language_model(), devices=1)
    arguments = TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to=[])
    assert HarmonyTrainer(model, arguments).accelerator.mixed_precision == "bf16"


def test_batches_that_are_not_alike_are_not_joined() -> None:
    batch = {"ids": torch.zeros(2, 3), "labels": torch.ones(2)}
    whole = joined([batch, batch])
    assert whole is not None and whole["ids"].shape == (4, 3) and whole["labels"].shape == (4,)
    longer = {"ids": torch.zeros(2, 4), "labels": torch.ones(2)}
    pair = joined([(torch.zeros(2), [torch.ones(2, 3)])] * 2)
    assert isinstance(pair, tuple) and pair[1][0].shape == (4, 3)
    others: list[Any] = [longer, {"ids": torch.zeros(2, 3)}, {**batch, "labels": [1, 2]}, ()]
    others += [{**batch, "labels": torch.ones(3)}, {**batch, "labels": torch.tensor(1.0)}]
    assert joined([others[-2]] * 2) is None and joined([torch.zeros(2), [torch.zeros(2)]]) is None
    for other in others:
        assert joined([batch, other]) is None
    assert joined([batch]) is None
    uneven = {"ids": torch.zeros(2, 3), "labels": torch.ones(1)}
    assert joined([uneven, uneven]) is None


def test_the_extra_is_named_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "harmony.integrations.trainer")
    imported = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(harmony.ConfigError, match=r"pip install 'harmony-train\[hf\]'"):
        _ = harmony.integrations.HarmonyTrainer
