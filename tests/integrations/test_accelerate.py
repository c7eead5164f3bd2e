"""accelerate's loop, with an average of the weights beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.integrations.common import NUM_GPUS, classifier, digest, pictures, wrapped
from tests.training.conftest import VirtualGPUs


def trained(model: nn.Module, precision: str, folder: Path) -> list[str]:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=2, cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shuffled = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(
        pictures(), batch_size=8, shuffle=True, generator=shuffled, num_workers=1
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    average = AveragedModel(
        accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(0.9)
    )
    for _ in range(2):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            average.update_parameters(model)
        accelerator.save_state(str(folder))
        accelerator.load_state(str(folder))
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with torch.no_grad():
        outputs = {"average": average(inputs), "model": unwrapped(inputs)}
    return [
        digest(accelerator.get_state_dict(model)),
        digest(average.state_dict()),
        digest(outputs),
    ]


@pytest.mark.parametrize("num_gpus", NUM_GPUS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_run_is_the_plain_one(
    vgpus: VirtualGPUs, tmp_path: Path, num_gpus: int, precision: str
) -> None:
    expected = trained(classifier(), precision, tmp_path / "plain")
    model = wrapped(classifier(), num_gpus)
    assert trained(model, precision, tmp_path / "harmony") == expected
    assert model.num_steps == 8 and model.capture_mode == "trace"
    saved, beside = (tmp_path / name for name in ("harmony", "plain"))
    assert (saved / "model.safetensors").read_bytes() == (
        beside / "model.safetensors"
    ).read_bytes()
