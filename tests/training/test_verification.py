"""Harmony.verify: one step in both ways, and nothing of the model changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from harmony.cli import main as cli
from harmony.engine.train_steps import TrainSteps
from harmony.runtime.exec.stage import Stage
from harmony.verification.verification import Verification
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch

MODES = [("pp", 1), ("pp", 2), ("dp", 2)]


class Normed(nn.Module):
    """Linear layers with a batch norm, whose statistics change, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.norm = nn.BatchNorm1d(24)
        self.second = nn.Linear(24, 24)
        self.third = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        y = self.third(torch.relu(self.second(self.norm(self.first(x)))))
        return y if labels is None else {"loss": F.cross_entropy(y, labels), "logits": y}


def everything(model: harmony.Harmony) -> list[Any]:
    """All that verify must leave alone."""
    net = model.module
    state = {} if model.optimizer is None else model.optimizer.state_dict()["state"]
    tensors = [t for held in state.values() for t in held.values()]
    return [
        *(p.detach().clone() for p in net.parameters()),
        *(None if p.grad is None else p.grad.clone() for p in net.parameters()),
        *(b.clone() for b in net.buffers()),
        *(t.cpu().clone() if isinstance(t, torch.Tensor) else t for t in tensors),
        model.num_steps,
        torch.get_rng_state(),
        random.getstate(),
    ]


def same(one: list[Any], two: list[Any]) -> bool:
    pairs = zip(one, two, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def untouched_by_rounding(found: Verification) -> bool:
    """Whether all but the update, which may run by other kernels, is bit for bit the same."""
    return all(d.absolute == 0.0 for d in (*found.gradients, *found.others))


def step_form(net: nn.Module, loss_fn: Any, mode: str, num_devices: int) -> harmony.Harmony:
    return harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-2},
        loss_fn=loss_fn,
        mode=mode,
        microbatch_size=2,
        devices=num_devices,
        device_memory="300KiB",
    )


@pytest.mark.parametrize(("mode", "num_devices"), MODES)
def test_the_step_form_is_identical_and_nothing_changes(
    vgpus: VirtualGPUs, mode: str, num_devices: int
) -> None:
    torch.manual_seed(0)
    model = step_form(GPT(dropout=0.1), token_loss, mode, num_devices)
    first = model.verify(*token_batch(0))  # before any step, and after one
    assert first.ok and untouched_by_rounding(first), first.summary()
    model.train_step(*token_batch(0))
    before = everything(model)
    found = model.verify(*token_batch(1))
    assert found.ok and untouched_by_rounding(found), found.summary()
    assert found.loss == found.plain_loss
    assert found.num_microbatches == 4
    assert len(found.gradients) == len(list(model.parameters()))
    assert {d.name for d in found.updates} >= {"head.weight after the step"}
    assert "exp_avg of head.weight" in {d.name for d in found.updates}
    assert same(before, everything(model))


@pytest.mark.parametrize("loss_inside", [False, True])
@pytest.mark.parametrize(("mode", "num_devices"), MODES)
def test_the_drop_in_form_is_identical_and_nothing_changes(
    vgpus: VirtualGPUs, mode: str, num_devices: int, loss_inside: bool
) -> None:
    torch.manual_seed(0)
    net = Normed()
    model = harmony.Harmony(
        net,
        loss_fn=None if loss_inside else square_loss,
        mode="pp",
        microbatch_size=4,
        devices=num_devices,
        device_memory="64KiB",
    )
    inputs, targets = vector_batch(0)
    batch: Any = inputs
    if loss_inside:
        labels = torch.arange(8) % 24
        labels[:3] = -100
        batch, targets = {"x": inputs, "labels": labels}, None
    out = model(**batch)["loss"] if loss_inside else square_loss(model(batch), targets)
    out.backward()
    before = everything(model)
    found = model.verify(batch, targets)
    assert found.ok, found.summary()
    assert same(before, everything(model))
    assert {"buffer norm.running_mean", "buffer norm.running_var"} <= {
        difference.name for difference in found.others
    }
    assert model.last_timeline is not None
    assert model.record.num_steps == 1
    model(inputs).sum().backward()  # nothing is left of the verification


def test_unequal_counts_of_targets_are_verified_with_their_weights(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    inputs, _ = vector_batch(0)
    targets = torch.arange(8)
    targets[:3] = -100
    found = step_form(SkipMLP(), F.cross_entropy, "pp", 2).verify(inputs, targets)
    assert found.ok, found.summary()
    assert found.loss == pytest.approx(found.plain_loss, rel=1e-6)


def test_a_difference_is_found_and_named(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = step_form(net, square_loss, "pp", 1)
    run_step = TrainSteps.run_step

    def wrong(steps: TrainSteps, *args: Any, **kwargs: Any) -> Any:
        step = run_step(steps, *args, **kwargs)
        (variant,) = model._engine.variants
        variant.host.gradients.views["layers.2.weight"][0, 0] += 1.0
        return step

    monkeypatch.setattr(TrainSteps, "run_step", wrong)
    found = model.verify(*vector_batch(0))
    assert not found.ok
    assert not found.identical
    assert found.gradients[0].name == "layers.2.weight"
    assert found.gradients[0].absolute == pytest.approx(1.0, rel=1e-3)
    assert "DIFFERENT: largest relative difference" in found.summary()
    assert all(difference.ok for difference in found.gradients[1:])
    assert not all(difference.ok for difference in found.updates)  # made from other gradients


def test_without_a_loss_there_is_nothing_to_verify(vgpus: VirtualGPUs) -> None:
    model = harmony.Harmony(SkipMLP(), microbatch_size=2, devices=1)
    with pytest.raises(harmony.ConfigError, match="verify needs a loss"):
        model.verify(vector_batch(0)[0])
    model(vector_batch(0)[0]).sum().backward()


def test_the_table_shows_the_worst_and_counts_the_rest(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    found = step_form(GPT(depth=4), token_loss, "pp", 1).verify(*token_batch(0))
    table = found.table()
    # The loss; gradients, and what is not shown of them; the same of parameters and states.
    assert table.row_count == 1 + 20 + 1 + 20 + 1
    cells = list(table.columns[0].cells)
    assert cells[21] == f"{len(found.gradients) - 20} more"
    assert cells[-1] == f"{len(found.updates) - 20} more"


SCRIPT = """
import torch, harmony
from tests.training.models import SkipMLP, square_loss, vector_batch
torch.manual_seed(0)
net = SkipMLP()
try:
    {body}
except Exception:
    pass
print("went on")
"""

STEP = """model = harmony.Harmony(net, optimizer=torch.optim.SGD, loss_fn=square_loss,
        microbatch_size=2, devices=2, device_memory="24KiB")
    model.train_step(*vector_batch(0))"""

DROP_IN = """model = harmony.Harmony(net, microbatch_size=2, devices=2, device_memory="24KiB")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = vector_batch(0)
    with torch.no_grad():
        model(inputs)
    square_loss(model(inputs), targets).backward()"""

WRONG = """from harmony.runtime.exec.stage import Stage
    backward, saved = Stage.backward, Stage.backward_saved
    def twice(*args):
        made, gradients = backward(*args)
        return made, {v: 2 * g for v, g in gradients.items()}
    def saved_twice(*args):
        return {v: 2 * g for v, g in saved(*args).items()}
    Stage.backward, Stage.backward_saved = twice, saved_twice
    """


@pytest.mark.parametrize("body", [STEP, DROP_IN], ids=["step", "drop-in"])
@pytest.mark.parametrize("wrong", [False, True])
def test_harmony_run_verify(
    vgpus: VirtualGPUs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    body: str,
    wrong: bool,
) -> None:
    monkeypatch.setattr(cli, "_set_up_gpus", lambda options, progress: None)
    monkeypatch.syspath_prepend("replaced")
    for name in ("backward", "backward_saved"):
        monkeypatch.setattr(Stage, name, getattr(Stage, name))
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(body=WRONG + body if wrong else body))
    code = cli.main([str(script), "--verify"])
    out, err = capsys.readouterr()
    assert code == (1 if wrong else 0), err
    assert "went on" not in out
    assert "layers.0.weight" in out
    assert ("DIFFERENT" in out) is wrong
    assert "4 microbatches" in out
    assert "stopped before training" in err


class Books:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[int] = []
        self.count = 0


CALLED = [0]
TOTAL = torch.zeros(())
BOOKS = Books()
turns = 0


def keep_books(number: int) -> None:
    """What a forward reaches only through a function that it calls."""
    global turns
    turns += 1
    BOOKS.lines.append(number)
    BOOKS.count += 1


class Writing(nn.Module):
    """Its forward writes to globals, to its class, and through a function and a property."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 5)

    @property
    def turn(self) -> int:
        CALLED.append(len(CALLED))
        return CALLED[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLED[0] += 1
        Writing.calls += 1
        TOTAL.add_(1)
        keep_books(len(x) + self.turn)
        out: torch.Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("steps", [True, False])
def test_what_the_forward_writes_outside_is_put_back(steps: bool, vgpus: VirtualGPUs) -> None:
    """Globals, attributes of classes, and what functions reach that the forward calls."""

    def written() -> list[Any]:
        return [list(CALLED), Writing.calls, float(TOTAL), turns, list(BOOKS.lines), BOOKS.count]

    options: dict[str, Any] = {"optimizer": torch.optim.SGD} if steps else {}
    model = harmony.Harmony(Writing(), loss_fn=F.cross_entropy, devices=1, **options)
    before = written()
    found = model.verify(torch.randn(4, 8), torch.randint(0, 5, (4,)))
    assert found.ok, found.summary()
    assert written() == before
