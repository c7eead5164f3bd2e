"""Hugging Face's Trainer trains a wrapped model as it trains the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import harmony
from tests.integrations.common import NUM_GPUS, digest, language_model, texts, wrapped
from tests.training.conftest import VirtualGPUs


class Seen(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(("step", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(("save", state.global_step))


def trained(model: Any, folder: Path, resume: Path | None = None, **options: Any) -> Any:
    """Train for three steps, and return the parameters' hash, what was logged, and the events."""
    arguments = TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.5,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    seen = Seen()
    data = texts()
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data[:8], callbacks=[seen]
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    names = ("loss", "grad_norm", "eval_loss", "learning_rate")
    logged = [{k: v for k, v in row.items() if k in names} for row in trainer.state.log_history]
    return digest(model.state_dict()), logged, seen.events


@pytest.mark.parametrize("num_gpus", NUM_GPUS)
@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_accumulation_steps": 2}])
def test_the_run_is_the_plain_one(
    vgpus: VirtualGPUs, tmp_path: Path, num_gpus: int, options: dict[str, Any]
) -> None:
    expected = trained(language_model(), tmp_path / "plain", **options)
    model = wrapped(language_model(), num_gpus)
    assert trained(model, tmp_path / "harmony", **options) == expected
    assert model.capture_mode == "trace" and model.num_steps > 0


def test_its_saves_are_the_librarys_and_training_resumes(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    expected = trained(language_model(), tmp_path / "plain")
    trained(wrapped(language_model(), 2), tmp_path / "harmony")
    saved, plain = (tmp_path / name / "checkpoint-2" for name in ("harmony", "plain"))
    assert sorted(f.name for f in saved.iterdir()) == sorted(f.name for f in plain.iterdir())
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (saved / name).read_bytes() == (plain / name).read_bytes()
    found = digest(LlamaForCausalLM.from_pretrained(saved).state_dict())
    assert found == digest(LlamaForCausalLM.from_pretrained(plain).state_dict())
    for folder in (saved, plain):
        model = wrapped(language_model(), 2)
        resumed = trained(model, tmp_path / f"resumed-{folder.parent.name}", resume=folder)
        assert resumed[0] == expected[0]
        assert resumed[2] == [("step", 3), ("save", 3)]


@pytest.mark.parametrize("inside_of_peft", [False, True])
def test_a_resumed_run_draws_the_dropout_of_the_run_that_was_not_interrupted(
    vgpus: VirtualGPUs, tmp_path: Path, inside_of_peft: bool
) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)

    def model(seed: int) -> Any:
        net = language_model()
        net.config.attention_dropout = 0.5
        for layer in net.model.layers:
            layer.self_attn.attention_dropout = 0.5
        made = wrapped(net, 1, seed=seed)
        return get_peft_model(made, lora) if inside_of_peft else made

    options: dict[str, Any] = {"eval_strategy": "no", "gradient_accumulation_steps": 2}
    options["num_train_epochs"] = 2
    expected = trained(model(5), tmp_path / "whole", **options)
    folder = tmp_path / "whole" / "checkpoint-2"
    resumed = trained(model(6), tmp_path / "resumed", resume=folder, **options)
    assert resumed[:2] == expected[:2]


def test_it_says_that_its_parameters_are_on_the_host() -> None:
    model = harmony.Harmony(language_model(), devices=1)
    assert model.hf_device_map == {"": torch.device("cpu")}
    assert not hasattr(model.module, "hf_device_map")
