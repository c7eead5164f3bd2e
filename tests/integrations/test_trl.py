"""TRL's trainers, which put a forward of their own in the place of the model's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.integrations.common import VOCABULARY, digest, saved_language_model, wrapped
from tests.training.conftest import VirtualGPUs

trl = pytest.importorskip("trl", reason="trl is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

SPECIAL = ("<pad>", "<eos>", "<unk>")
WORDS = [f"w{n}" for n in range(VOCABULARY - len(SPECIAL))]


def tokenizer() -> Any:
    known = {word: n for n, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pad, eos, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, eos_token=eos, unk_token=unknown
    )


def rows(kind: str) -> Any:
    drawn = random.Random(0)

    def text(length: int) -> str:
        return " ".join(drawn.choice(WORDS) for _ in range(length))

    if kind == "sft":
        return datasets.Dataset.from_list([{"text": text(6 + n % 5)} for n in range(12)])
    parts = ("prompt", "chosen", "rejected")
    return datasets.Dataset.from_list([{p: f" {text(4)}" for p in parts} for _ in range(12)])


def trained(kind: str, model: Any, folder: Path, with_lora: bool, **options: Any) -> Any:
    trainer, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
    }[kind]
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments = config(
        output_dir=str(folder),
        max_length=16,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    made = trainer(
        model=model,
        args=arguments,
        train_dataset=rows(kind),
        processing_class=tokenizer(),
        peft_config=lora if with_lora else None,
    )
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    return digest(made.model.state_dict()), losses


@pytest.mark.parametrize(
    ("kind", "with_lora", "num_gpus", "options"),
    [
        ("sft", False, 1, {}),
        ("sft", True, 2, {}),
        ("sft", True, 2, {"loss_type": "nll"}),
        ("dpo", False, 2, {}),
        ("dpo", True, 1, {}),
    ],
)
def test_the_run_is_the_plain_one(
    vgpus: VirtualGPUs,
    tmp_path: Path,
    kind: str,
    with_lora: bool,
    num_gpus: int,
    options: dict[str, Any],
) -> None:
    base = tmp_path / "base"
    expected = trained(kind, saved_language_model(base), tmp_path / "plain", with_lora, **options)
    model = wrapped(AutoModelForCausalLM.from_pretrained(base), num_gpus)
    found = trained(kind, model, tmp_path / "harmony", with_lora, **options)
    assert found == expected
    assert model.num_steps >= 3 and model.capture_mode == "trace"
    name = "adapter_model.safetensors" if with_lora else "model.safetensors"
    saved, beside = (tmp_path / n / "checkpoint-3" / name for n in ("harmony", "plain"))
    assert saved.read_bytes() == beside.read_bytes()
