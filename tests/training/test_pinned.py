"""Plans and profiles that leave a run and come back: pinned, refused, planned elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import harmony
from harmony.cli.save_plans import Keeper
from harmony.core.options import Options
from harmony.errors import CaptureError, ConfigError, PlanError
from harmony.planner.ir.plan_file import load_plan, save_plan
from harmony.planner.search.search import choose
from harmony.profiling.model_profile import load_profile
from harmony.report import session
from harmony.report.plan_view import view_of
from harmony.runtime import native
from tests import devices
from tests.training.models import GPT, token_batch, token_loss

ELSEWHERE = Options(
    plan_only=True, active=True, gpu="RTX 4090", gpus=4, host_memory_nbytes=256 * 2**30
)


def make(net: torch.nn.Module | None = None, **options: Any) -> harmony.Harmony:
    torch.manual_seed(0)
    fields = {"optimizer": torch.optim.AdamW, "loss_fn": token_loss, "devices": 2}
    return harmony.Harmony(net or GPT(), **{**fields, **options})


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    """The plan of a first run with a choice of its own."""
    devices.provide(count=2, memory="64MiB")
    model = make(microbatch_size=1, mode="pp")
    model.train_step(*token_batch(0, 8))
    assert model.plan is not None
    save_plan(model.plan, tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_pinned_plan_is_trained_by(plan_path: Path) -> None:
    for plan in (plan_path, str(plan_path), load_plan(plan_path)):
        model = make(plan=plan)
        model.train_step(*token_batch(0, 8))
        assert model.plan == load_plan(plan_path)


def test_a_plan_that_leaves_devices_idle_comes_back(tmp_path: Path) -> None:
    devices.provide(count=2, memory="64MiB")
    fields = {"loss_fn": torch.nn.functional.mse_loss, "mode": "pp"}
    batch = torch.randn(4, 8), torch.randn(4, 8)
    model = make(torch.nn.Linear(8, 8), **fields)
    model.train_step(*batch)
    assert model.plan is not None and model.plan.schedule.num_devices == 1  # there is one layer
    save_plan(model.plan, tmp_path / "plan.json")
    again = make(torch.nn.Linear(8, 8), plan=tmp_path / "plan.json", **fields)
    again.train_step(*batch)
    assert again.plan == model.plan


def test_the_command_line_comes_before_the_script(plan_path: Path) -> None:
    with session.running(Options(plan=plan_path, active=True)):
        model = make()
        model.train_step(*token_batch(0, 8))
        assert model.plan == load_plan(plan_path)


def test_a_last_batch_that_is_smaller_is_planned_on_its_own(plan_path: Path) -> None:
    model = make(plan=plan_path)
    model.train_step(*token_batch(0, 8))
    model.train_step(*token_batch(0, 3))
    assert model.plan is not None and model.plan.minibatch == 3
    model.train_step(*token_batch(0, 8))
    assert model.plan == load_plan(plan_path)


def test_a_plan_for_another_first_batch_is_refused(plan_path: Path) -> None:
    with pytest.raises(PlanError, match="minibatches of 8 samples, this one has 4"):
        make(plan=plan_path).train_step(*token_batch(0, 4))


def test_a_plan_for_another_model_is_refused(plan_path: Path) -> None:
    data = json.loads(plan_path.read_text())
    plan_path.write_text(json.dumps({**data, "model": "0123456789abcdef"}))
    with pytest.raises(PlanError, match="another model"):
        make(plan=plan_path).train_step(*token_batch(0, 8))


def test_a_plan_for_a_larger_machine_is_refused(plan_path: Path) -> None:
    with pytest.raises(PlanError, match="needs 2 devices, there are 1"):
        make(plan=plan_path, devices=1).train_step(*token_batch(0, 8))
    with pytest.raises(PlanError, match="on gpu0, which has"):
        make(plan=plan_path, device_memory=load_plan(plan_path).peak_nbytes[0] - 1).train_step(
            *token_batch(0, 8)
        )


def test_a_plan_of_whole_steps_is_refused_by_a_loop_of_ones_own(plan_path: Path) -> None:
    model = make(plan=plan_path, optimizer=None, loss_fn=None)
    inputs, _ = token_batch(0, 8)
    with torch.no_grad():
        model(inputs[:2])  # an evaluation before the training is not what the plan is for
    with pytest.raises(PlanError, match="whole steps"):
        model(inputs)


def test_a_file_that_is_not_there_is_refused_when_the_model_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such plan"):
        make(plan=tmp_path / "missing.json")


def test_a_profile_of_a_run_gives_the_plan_of_that_run(tmp_path: Path) -> None:
    devices.provide(count=2, memory="64MiB")
    path, said = tmp_path / "profile.json", list[str]()
    options = Options(active=True, cache=False, save_profile=path)
    with session.running(options):
        session.observe(Keeper(options, said.append))
        model = make()
        model.train_step(*token_batch(0, 8))
    assert said == [f"model profile written to {path}"]
    profile = load_profile(path)
    name = native.product_name(devices.device())
    assert (profile.name, profile.minibatch, profile.device) == ("GPT", 8, name)
    assert profile.machine is not None and profile.work is not None
    assert sum(profile.work.model_flops(8).values()) > 0
    assert model.plan is not None
    # Microbatches and replicas were chosen without what was measured.
    plan = choose(profile.graph, profile.costs, profile.machine, 8, like=model.plan)
    assert (plan.spec, plan.policy, plan.step_s) == (
        model.plan.spec, model.plan.policy, model.plan.step_s,
    )  # fmt: skip


def test_a_machine_that_is_not_there_is_planned_without_running_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices.provide(count=1, memory="1MiB")
    torch.manual_seed(0)
    with torch.device("meta"):
        net = GPT()  # no parameter has a value
    with session.running(ELSEWHERE):
        with pytest.raises(session.PlanOnly) as caught:
            make(net).train_step(*token_batch(0, 8))
        view = view_of(caught.value.record, profiled=True)
    assert view.plan.machine.num_devices == 4
    assert view.plan.machine.devices[0].name == "RTX 4090"
    assert view.costs_from.startswith("analytic: FLOPs and bytes at the rates of a RTX 4090")
    assert view.work is not None


def test_a_forward_that_decides_by_values_is_not_planned_elsewhere() -> None:
    devices.provide(count=1, memory="1MiB")

    class Deciding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.one(x)
            while hidden.abs().max() < 4:  # a guard on what was computed
                hidden = self.two(hidden) * 2 + 1
            return hidden.mean()

    with session.running(ELSEWHERE):
        try:
            harmony.Harmony(Deciding(), optimizer=torch.optim.SGD).train_step(torch.ones(4, 8))
        except (CaptureError, session.PlanOnly) as end:
            assert not isinstance(end, CaptureError) or "without --gpu" in str(end)
        else:
            pytest.fail("the script was not ended")


def test_harmony_run_plans_elsewhere_from_end_to_end(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "pretrain_gpt.py"
    small = ["--width", "64", "--depth", "4", "--heads", "4", "--context", "32"]
    words = [sys.executable, "-m", "harmony", "--plan-only", str(example), *small, "--json"]
    machine = ["--gpu", "RTX 4090", "--gpus", "2", "--host-memory", "64GiB"]
    profile = str(tmp_path / "gpt.json")
    done = subprocess.run(
        [*words, *machine, "--save-profile", profile],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert first["machine"]["devices"][0]["name"] == "RTX 4090"
    assert first["share_of_peak"] > 0
    again = subprocess.run(
        [*words[:3], "plan", "--model-profile", profile, *machine, "--microbatch", "2", "--json"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["step_s"] == first["step_s"]
