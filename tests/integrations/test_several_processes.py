"""HarmonyTrainer in two processes of torchrun trains what one process trains."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import harmony
from harmony.integrations import HarmonyTrainer
from tests import devices
from tests.integrations.common import language_model, texts
from tests.training.conftest import VirtualGPUs

ROOT = Path(__file__).parents[2]
LIMIT_S = 400
OPTIONS = {"devices": 1}
ACCUMULATED = (1, 2)
STEPS = 5
"""Steps of two processes; in each, 2 samples a batch."""

pytestmark = devices.virtual_only("its processes set them up")


class Events(TrainerCallback):
    """What callbacks of this process hear."""

    def __init__(self) -> None:
        self.saves = self.steps = 0

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saves += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def rows_of(steps: int, accumulated: int) -> list[dict[str, Any]]:
    """Two batches of 2 a step and accumulated batch, with other numbers of targets that count."""
    rows = texts(steps * accumulated * 4)
    for number, row in enumerate(rows):
        row["labels"][: number % 5] = -100
    return rows


def of_two_lengths(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch whose length follows from its first token."""
    batch = default_data_collator(rows)
    length = 12 if batch["input_ids"][0, 0] % 2 else 9
    return {name: value[:, :length] for name, value in batch.items()}


def trained(
    kind: Any,
    folder: Path,
    accumulated: int,
    rows: list[dict[str, Any]],
    resume: str | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """Train clipped steps under a scheduler; what this process finds at the end."""
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulated,
        num_train_epochs=1,
        logging_steps=1,
        save_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=0.5,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    seen = Events()
    net = language_model()
    for layer in net.model.layers:
        layer.self_attn.attention_dropout = dropout
    trainer = kind(model=net, args=arguments, train_dataset=rows, callbacks=[seen], **options)
    trainer.train(resume_from_checkpoint=resume)
    logged = [
        (row["loss"], row["grad_norm"], row["learning_rate"])
        for row in trainer.state.log_history
        if "loss" in row
    ]
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    evaluated = trainer.evaluate(rows[:8])["eval_loss"]
    return {
        "state": state,
        "logged": logged,
        "steps": seen.steps,
        "evaluated": evaluated,
        "class": type(trainer.model_wrapped).__name__,
    }


def _refusals(folder: Path) -> list[str]:
    """What is said of what does not train in several processes."""

    def alone() -> None:
        harmony.Harmony(language_model(), devices=1)

    def sharded() -> None:
        arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], fsdp=True)
        HarmonyTrainer(language_model(), arguments)

    said = []
    for wrong in (alone, sharded):
        try:
            wrong()
        except harmony.ConfigError as error:
            said.append(str(error))
    return said


def _main(folder: Path) -> None:
    """Of each process that torchrun starts."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    devices.provide(count=2, memory="64MiB")
    found: dict[Any, Any] = {}
    for accumulated in ACCUMULATED:
        rows, where = rows_of(STEPS, accumulated), folder / f"two-{accumulated}"
        more = {"harmony_options": OPTIONS}
        found[accumulated] = trained(HarmonyTrainer, where, accumulated, rows, **more)
        found[accumulated]["saved"] = sorted(path.name for path in where.iterdir())
    saved = str(folder / "two-1" / "checkpoint-3")
    rows = rows_of(STEPS, 1)
    found["resumed"] = trained(
        HarmonyTrainer, folder / "again", 1, rows, saved, harmony_options=OPTIONS
    )
    found["dropout"] = trained(
        HarmonyTrainer,
        folder / "drops",
        1,
        rows,
        dropout=0.2,
        harmony_options={**OPTIONS, "seed": 3},
    )
    found["lengths"] = trained(
        HarmonyTrainer,
        folder / "lengths",
        2,
        rows_of(STEPS, 2),
        data_collator=of_two_lengths,
        harmony_options=OPTIONS,
    )
    found["said"] = _refusals(folder)
    (folder / f"found-{rank}").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    """What two processes of torchrun find, which are started once."""
    folder = tmp_path_factory.mktemp("torchrun")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["-m", "tests.integrations.test_several_processes", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = "1"
    ran = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    return folder, [pickle.loads((folder / f"found-{r}").read_bytes()) for r in range(2)]


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def test_two_processes_train_the_bits_of_one_with_the_same_microbatches(
    vgpus: VirtualGPUs, tmp_path: Path, both: Any
) -> None:
    first, second = (found[1] for found in both[1])
    expected = trained(Trainer, tmp_path, 2, rows_of(STEPS, 1))
    assert first["class"] == "Harmony"
    assert furthest(first["state"], second["state"]) == 0
    assert furthest(first["state"], expected["state"]) == 0
    assert first["steps"] == second["steps"] == expected["steps"] == STEPS
    assert torch.allclose(torch.tensor(first["logged"]), torch.tensor(expected["logged"]), 1e-6)
    assert first["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-6)


def test_accumulated_batches_of_two_processes_are_those_of_one(
    vgpus: VirtualGPUs, tmp_path: Path, both: Any
) -> None:
    first, second = (found[2] for found in both[1])
    expected = trained(Trainer, tmp_path, 4, rows_of(STEPS, 2))
    assert furthest(first["state"], second["state"]) == 0
    assert furthest(first["state"], expected["state"]) < 1e-6
    assert first["steps"] == expected["steps"] == STEPS
    assert torch.allclose(torch.tensor(first["logged"]), torch.tensor(expected["logged"]), 1e-5)


def test_batches_of_other_shapes_in_some_processes_are_run_one_by_one_in_all(
    vgpus: VirtualGPUs, tmp_path: Path, both: Any
) -> None:
    first, second = (found["lengths"] for found in both[1])
    rows = rows_of(STEPS, 2)
    expected = trained(Trainer, tmp_path, 4, rows, data_collator=of_two_lengths)
    assert furthest(first["state"], second["state"]) == 0
    assert furthest(first["state"], expected["state"]) < 1e-6
    assert torch.allclose(torch.tensor(first["logged"]), torch.tensor(expected["logged"]), 1e-5)


def test_dropout_follows_the_microbatch_in_all_processes(
    vgpus: VirtualGPUs, tmp_path: Path, both: Any
) -> None:
    options = {**OPTIONS, "seed": 3}
    expected = trained(
        HarmonyTrainer, tmp_path, 2, rows_of(STEPS, 1), dropout=0.2, harmony_options=options
    )
    plain = both[1][0][1]
    for found in both[1]:
        assert furthest(found["dropout"]["state"], expected["state"]) == 0
        assert furthest(found["dropout"]["state"], plain["state"]) > 1e-4


def test_process_0_saves_and_a_resumed_run_is_the_same(both: Any) -> None:
    folder, found = both
    assert found[0][1]["saved"] == ["checkpoint-3", "checkpoint-5"]
    assert LlamaForCausalLM.from_pretrained(folder / "two-1" / "checkpoint-5") is not None
    for one in found:
        assert furthest(one["resumed"]["state"], one[1]["state"]) == 0
        assert one["resumed"]["steps"] == STEPS - 3


def test_a_model_that_does_not_know_of_the_others_is_refused(both: Any) -> None:
    for one in both[1]:
        assert "this model is not told to train with the others" in one["said"][0]
        assert "TrainingArguments(fsdp=...) with HarmonyTrainer" in one["said"][1]


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
