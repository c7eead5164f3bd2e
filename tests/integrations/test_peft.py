"""PEFT's adapters in a wrapped model, and around one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.integrations.common import NUM_GPUS, digest, saved_language_model, texts, wrapped
from tests.training.conftest import VirtualGPUs

peft = pytest.importorskip("peft", reason="peft is not installed")

ORDERS: dict[str, Callable[[Any, int, Any], Any]] = {
    "inside": lambda net, gpus, lora: peft.get_peft_model(wrapped(net, gpus), lora),
    "outside": lambda net, gpus, lora: wrapped(peft.get_peft_model(net, lora), gpus),
}


def lora() -> Any:
    torch.manual_seed(1)
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )


def trained(model: Any, folder: Path) -> str:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_steps=2,
    )
    Trainer(model=model, args=arguments, train_dataset=texts()).train()
    return digest(model.state_dict())


@pytest.mark.parametrize("num_gpus", NUM_GPUS)
@pytest.mark.parametrize("order", ORDERS)
def test_an_adapter_trains_as_in_the_plain_model(
    vgpus: VirtualGPUs, tmp_path: Path, order: str, num_gpus: int
) -> None:
    base = tmp_path / "base"
    plain = peft.get_peft_model(saved_language_model(base), lora())
    expected = trained(plain, tmp_path / "plain")
    model = ORDERS[order](saved_language_model(base), num_gpus, lora())
    assert isinstance(model, peft.PeftModel)
    assert trained(model, tmp_path / "harmony") == expected
    trainer = model if order == "outside" else model.base_model.model
    assert trainer.num_steps == 3 and trainer.capture_mode == "trace"

    saved, beside = (tmp_path / name / "checkpoint-3" for name in ("harmony", "plain"))
    assert {f.name for f in saved.iterdir()} == {f.name for f in beside.iterdir()}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (saved / name).read_bytes() == (beside / name).read_bytes()
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved)
    assert digest(again.state_dict()) == expected

    ids = torch.arange(2, 8)[None]
    options = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.eval().generate(**options), again.eval().generate(**options))
    merged = model.merge_and_unload().state_dict()
    assert digest(merged) == digest(again.merge_and_unload().state_dict())


def test_an_adapter_of_plain_pytorch_goes_on_here_and_the_other_way_round(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    """Only the adapter is in the files; the base comes from where it was."""
    base = tmp_path / "base"
    first = {
        "plain": peft.get_peft_model(saved_language_model(base), lora()),
        "harmony": ORDERS["outside"](saved_language_model(base), 2, lora()),
    }
    for side, model in first.items():
        trained(model, tmp_path / side)
        model.save_pretrained(tmp_path / f"{side} adapter")

    def going_on(side: str, saved_by: str) -> str:
        net = AutoModelForCausalLM.from_pretrained(base)
        folder = tmp_path / f"{saved_by} adapter"
        model = peft.PeftModel.from_pretrained(net, folder, is_trainable=True)
        model = model if side == "plain" else wrapped(model, 2)
        return trained(model, tmp_path / f"{saved_by} {side}")

    expected = going_on("plain", "plain")
    assert going_on("harmony", "plain") == expected
    assert going_on("plain", "harmony") == expected
