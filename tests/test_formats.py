"""Files of every version of each format are read, with the values that were written.

`tests/data/formats/vN` was written by ``python -m tests.test_formats FOLDER`` when version N of a
format was made, and holds the files of those formats that changed. It is never written again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import harmony
from harmony.checkpoint import store
from harmony.core.files import check_types
from harmony.errors import ConfigError
from harmony.planner.check.verify import verify
from harmony.planner.ir import plan_file
from harmony.planner.ir.plan_file import check_plan, load_plan
from harmony.planner.ir.schedule import Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.profiling import model_profile
from harmony.profiling.model_profile import load_profile
from tests.training.conftest import VirtualGPUs, vgpus  # noqa: F401 - a fixture

FORMATS = Path(__file__).parent / "data" / "formats"
DATA = FORMATS / "v1"


class Net(nn.Module):
    """Has a norm, dropout, tied weights, and a counter that the forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(self.first(x))).relu())


def square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def make(own: bool) -> tuple[harmony.Harmony, Any, StepLR]:
    torch.manual_seed(0)
    net = Net()
    if own:
        model = harmony.Harmony(net, devices=1, seed=5)
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    else:
        kwargs = {"lr": 0.1, "fused": False}
        options: dict[str, Any] = {"optimizer": torch.optim.AdamW, "optimizer_kwargs": kwargs}
        model = harmony.Harmony(net, loss_fn=square, devices=1, seed=5, **options)
        optimizer = model.optimizer
    return model, optimizer, StepLR(optimizer, 1, 0.5)


def objects_of(own: bool, optimizer: Any, scheduler: StepLR) -> dict[str, Any]:
    return {"scheduler": scheduler, **({"optimizer": optimizer} if own else {})}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(16.0).reshape(4, 4).sin() + step
    return x, x.flip(0)


def found(model: harmony.Harmony, optimizer: Any, scheduler: StepLR, run: Any) -> dict[str, Any]:
    """All that a checkpoint brings back, as JSON."""
    names = dict(model.module.named_parameters())
    used = model.optimizer is not None  # train_step leaves gradients that it has used
    return {
        "values": {n: v.tolist() for n, v in model.module.state_dict().items()},
        "state": {
            f"{name}.{key}": value.tolist()
            for name, param in names.items()
            for key, value in optimizer.state[param].items()
        },
        "gradients": {
            n: p.grad.tolist() for n, p in names.items() if p.grad is not None and not used
        },
        "rates": [group["lr"] for group in optimizer.param_groups],
        "epoch": scheduler.last_epoch,
        "numbers": [model.num_steps, model.seed, run.num_steps],
        "extra": run.extra,
        "drawn": torch.rand(3).tolist(),
    }


def write(folder: Path) -> None:
    """Write a checkpoint of each form of training, and a plan with its profile."""
    harmony.virtual_gpus(count=1, memory="1MiB")
    expected = {}
    for own in (False, True):
        name = "loop" if own else "step"
        model, optimizer, scheduler = make(own)
        objects = objects_of(own, optimizer, scheduler)
        run = harmony.Run(model, folder / name, every=2, **objects)
        run.extra["best"] = {"loss": 0.25, "at": (1, None)}
        for step in range(2):
            x, y = batch(step)
            if own:
                optimizer.zero_grad()
                square(model(x), y).backward()
                optimizer.step()
            else:
                model.train_step(x, y)
            scheduler.step()
            run.step()
        expected[name] = found(model, optimizer, scheduler, run)
        if not own:
            plan_file.save_plan(model.plan, folder / "plan.json")
            model_profile.save_profile(model.record.profile(), folder / "profile.json")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


@pytest.mark.parametrize("version", store.READS)
@pytest.mark.parametrize("own", [False, True], ids=["step", "loop"])
def test_a_checkpoint_of_each_version_is_read(
    own: bool,
    version: int,
    vgpus: VirtualGPUs,  # noqa: F811
    tmp_path: Path,
) -> None:
    name = "loop" if own else "step"
    data = FORMATS / f"v{version}"
    (manifest,) = (data / name).rglob("manifest.json")
    assert json.loads(manifest.read_text())["version"] == version
    shutil.copytree(data / name, tmp_path / name)
    model, optimizer, scheduler = make(own)
    run = harmony.Run(model, tmp_path / name, **objects_of(own, optimizer, scheduler))
    assert run.resume() == 2
    got = json.loads(json.dumps(found(model, optimizer, scheduler, run)))
    expected = json.loads((data / "expected.json").read_text())[name]
    assert bool(expected["gradients"]) is own
    assert got == expected
    x, y = batch(2)
    loss = square(model(x), y) if own else model.train_step(x, y)
    assert torch.isfinite(loss)
    run.close()


def test_a_plan_and_a_profile_of_version_1_are_read() -> None:
    plan, profile = load_plan(DATA / "plan.json"), load_profile(DATA / "profile.json")
    assert (plan.minibatch, profile.minibatch, profile.num_params) == (4, 4, 28)
    assert profile.machine is not None
    check_types(plan.schedule, Schedule)
    check_plan(plan, profile.graph, profile.machine, profile.phase)
    tasks = build_tasks(profile.graph, plan.spec)
    verify(plan.schedule, profile.graph, profile.costs, profile.phase, tasks)
    assert plan_file.load_plan(DATA / "plan.json").to_json() == plan.to_json()


def test_what_is_written_now_is_of_a_version_that_is_kept_here() -> None:
    """Whoever makes another version keeps files of it too, and goes on reading the older ones."""
    assert (store.VERSION, plan_file.VERSION, model_profile.VERSION) == (2, 1, 1)
    assert tuple(range(1, store.VERSION + 1)) == store.READS
    for path in (DATA / "plan.json", DATA / "profile.json"):
        assert json.loads(path.read_text())["version"] == 1


@pytest.mark.parametrize("version", store.READS)
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_damaged_file_of_each_version_is_refused(
    name: str,
    version: int,
    vgpus: VirtualGPUs,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "step-00000002"
    shutil.copytree(FORMATS / f"v{version}" / "step" / folder.name, folder)
    model, _, scheduler = make(False)
    before = {n: v.clone() for n, v in model.module.state_dict().items()}
    whole = (folder / name).read_bytes()
    for damaged in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:], whole + b"\n"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(ConfigError, match=name):
            model.load_checkpoint(folder, scheduler=scheduler)
        assert all(torch.equal(before[n], v) for n, v in model.module.state_dict().items())
    (folder / name).write_bytes(whole)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
