"""The code of the page on other libraries runs, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

import harmony
import harmony.integrations
from tests.integrations.common import language_model, texts
from tests.training.conftest import VirtualGPUs

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
SECTIONS = re.findall(
    r"^## (\w+)\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(("name", "code"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_the_code_of_a_section_runs(
    vgpus: VirtualGPUs, tmp_path: Path, name: str, code: str
) -> None:
    peft = pytest.importorskip("peft") if "peft" in code else None
    data = texts(8)
    names: dict[str, Any] = {
        "accelerate": accelerate,
        "arguments": transformers.TrainingArguments(
            str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        ),
        "dataset": data,
        "folder": tmp_path / "saved",
        "harmony": harmony,
        "ids": torch.stack([row["input_ids"] for row in data]),
        "net": language_model(),
        "peft": peft,
        "torch": torch,
        "transformers": transformers,
    }
    exec(compile(code, f"{PAGE.name}: {name}", "exec"), names)
    assert names["model"].num_steps > 0, "Harmony has run it"


def test_the_sections_with_code_are_found() -> None:
    assert [name for name, _ in SECTIONS] == ["Trainer", "HarmonyTrainer", "PEFT", "accelerate"]
