#!/usr/bin/env python3
"""Every kind of run, saved in the middle and resumed: the same bits as the run that went on.

    scripts/resume_matrix.py [--only TEXT ...] [--list]

A small GPT with dropout and tied weights trains some steps with a learning-rate schedule, is
saved after half of them (waited for, or while it trains on), and trains on. Another model, with
other weights and random states, loads the checkpoint and trains the second half: with the same
plan, with other memory (other packs, other residency), or on another number of GPUs. Its losses,
parameters, optimizer state, learning rates and random states have to be those of the run that
went on, bit for bit, and those of one that never saved, on one GPU. The matrix is {train_step,
with updates that run into the next step, a loop of one's own} x {fp32, bf16} x {clipping or not}
x {1, 2, 4 GPUs} x {same, other plan} x {both ways of saving}; data-parallel runs go on as they
are on the same number of GPUs, and have to say that the last bits may differ on another. Where
updates may run into the next step, all of them do, whatever is predicted to be faster: predictions
for models as small as these decide nothing. Exits 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import Batch, batches, loss_fn, make_model

import harmony
from harmony.planner.search import overlap
from harmony.planner.search.trial import Fitting

STEPS, SAVED_AFTER = 6, 3
BATCH, MICROBATCH, CONTEXT = 8, 2, 16
SMALL, LARGE = {"fp32": "300KiB", "bf16": "220KiB"}, "8MiB"
NORM = 0.5
SAID = "the last bits may differ"

Left = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A run, and how it goes on."""

    form: str
    precision: str
    clips: bool
    gpus: int
    plan: str
    save: str
    mode: str = "pp"

    def __str__(self) -> str:
        clips = "clipped" if self.clips else "not clipped"
        words = [self.form, self.precision, clips, f"{self.gpus} GPU", self.mode]
        return ", ".join([*words, f"{self.plan} plan", f"saved {self.save}"])

    def resumed(self) -> tuple[int, str]:
        """GPUs, and memory of each, of the model that goes on."""
        gpus = {1: 2, 2: 4, 4: 1}[self.gpus] if self.plan == "other GPUs" else self.gpus
        return gpus, LARGE if self.plan == "other memory" else SMALL[self.precision]

    @property
    def is_exact(self) -> bool:
        """Whether the sum's order is the same, so that the bits have to be."""
        return self.mode == "pp" or self.plan != "other GPUs"


FORMS = ("train_step", "overlapped", "own loop")
PLANS = ("same", "other memory", "other GPUs")
SAVES = ("waited for", "meanwhile")


def cases() -> Iterator[Case]:
    """The whole matrix."""
    every = itertools.product(FORMS, ("fp32", "bf16"), (False, True), (1, 2, 4), PLANS, SAVES)
    for case in every:
        yield Case(*case)
    for form, gpus, plan in itertools.product(("train_step", "own loop"), (2, 4), PLANS):
        yield Case(form, "fp32", True, gpus, plan, "waited for", "dp")


class Trainee:
    """A model with all that trains it."""

    def __init__(self, case: Case, gpus: int, memory: str, seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        options: dict[str, Any] = {"devices": gpus, "device_memory": memory, "mode": case.mode}
        options |= {"microbatch_size": MICROBATCH, "precision": case.precision, "seed": seed}
        self.own: torch.optim.Optimizer | None = None
        net = make_model(32, 3, 2, CONTEXT, seed=seed)
        if case.form == "own loop":
            self.model = harmony.Harmony(net, **options)
            self.own = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        else:
            options |= {"optimizer": torch.optim.AdamW, "optimizer_kwargs": {"lr": 1e-2}}
            options |= {"max_grad_norm": NORM if case.clips else None, "loss_fn": loss_fn}
            options |= {"overlap_updates": case.form == "overlapped"}
            self.model = harmony.Harmony(net, **options)
        self._clips = case.clips
        self.scheduler = CosineAnnealingLR(self.optimizer, STEPS)
        self.objects: dict[str, Any] = {"scheduler": self.scheduler}
        if self.own is not None:
            self.objects["optimizer"] = self.own

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The model's, or the loop's own."""
        found = self.own or self.model.optimizer
        assert found is not None
        return found

    def train(self, data: list[Batch]) -> Left:
        """Train on some batches, whose inputs are changed at random; return the losses."""
        losses = []
        for inputs, targets in data:
            inputs = inputs.clone()
            inputs[:, random.randrange(CONTEXT)] = int(np.random.randint(200))
            inputs[torch.rand(inputs.shape) < 0.05] = 7
            losses.append(self._step(inputs, targets))
            self.scheduler.step()
        return losses

    def _step(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.own is None:
            return self.model.train_step(inputs, targets)
        self.own.zero_grad()
        loss = loss_fn(self.model(inputs), targets)
        loss.backward()
        if self._clips:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), NORM)
        self.own.step()
        return loss.detach()

    def left(self) -> Left:
        """All that has to be the same at the end."""
        self.model.synchronize()
        found = [t.detach().cpu().clone() for t in self.model.state_dict().values()]
        for param in self.model.parameters():
            held = self.optimizer.state[param]
            found += [held[key].cpu().clone() for key in sorted(held)]
        found.append(torch.tensor(self.scheduler.get_last_lr()))
        found += [torch.rand(3), torch.tensor(random.random()), torch.tensor(np.random.rand())]
        return found


def same(one: Left, two: Left) -> bool:
    """Whether all is equal, bit for bit."""
    return len(one) == len(two) and all(map(torch.equal, one, two))


@contextmanager
def all_left() -> Iterator[None]:
    """Have plans leave to the next step all updates that they can."""
    chosen = overlap.chosen

    def most(best: Fitting, found: list[Fitting], _: bool) -> Fitting:
        return found[-1] if found else best

    overlap.chosen = most
    try:
        yield
    finally:
        overlap.chosen = chosen


class Matrix:
    """Runs cases, and keeps what a run without a checkpoint comes to, by kind of training."""

    def __init__(self) -> None:
        self._data = list(batches(STEPS, BATCH, CONTEXT))
        self._known: dict[tuple[str, str, bool], Left] = {}

    def _never_saved(self, case: Case) -> Left:
        form = "own loop" if case.form == "own loop" else "train_step"
        kind = form, case.precision, case.clips
        if kind not in self._known:
            alone = Trainee(Case(*kind, 1, "same", SAVES[0]), 1, SMALL[case.precision], 0)
            self._known[kind] = [*alone.train(self._data), *alone.left()]
            alone.model.close()
        return self._known[kind]

    def run(self, case: Case, folder: Path) -> str | None:
        """Return what does not hold of a case; None if it holds."""
        with all_left():
            return self._run(case, folder)

    def _run(self, case: Case, folder: Path) -> str | None:
        first = Trainee(case, case.gpus, SMALL[case.precision], 0)
        losses = first.train(self._data[:SAVED_AFTER])
        if case.form == "overlapped" and not first.model._engine.late.num_steps:
            return f"no update ran into the next step: {first.model._engine.late.why_not}"
        first.model.save_checkpoint(folder, async_save=case.save == "meanwhile", **first.objects)
        rest = first.train(self._data[SAVED_AFTER:])
        first.model.finish_saving()
        expected = [*rest, *first.left()]
        before = _way(first)
        first.model.close()
        if case.mode == "pp" and not same([*losses, *expected], self._never_saved(case)):
            return "the run that was saved is not the one that never was"
        second = Trainee(case, *case.resumed(), 9)
        second.model.load_checkpoint(folder, **second.objects)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = [*second.train(self._data[SAVED_AFTER:]), *second.left()]
        said = any(SAID in str(warning.message) for warning in heard)
        now = _way(second)
        second.model.close()
        if case.plan != "same" and before == now:
            return "the plan is the same, which shows nothing"
        if not case.is_exact:
            return None if said else "nothing says that the last bits may differ"
        if said:
            return "a warning that the last bits may differ"
        return None if same(found, expected) else "the resumed run differs"


def _way(trainee: Trainee) -> tuple[Any, ...]:
    plan = trainee.model.plan
    assert plan is not None
    return plan.spec, plan.policy, plan.schedule.num_devices


def main() -> int:
    """Run the cases; the exit code says whether all hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="texts that a case has to contain")
    parser.add_argument("--list", action="store_true", help="name the cases only")
    args = parser.parse_args()
    chosen = [case for case in cases() if all(text in str(case) for text in args.only)]
    if args.list:
        print("\n".join(map(str, chosen)))
        return 0
    torch.set_num_threads(1)
    harmony.virtual_gpus(count=4, memory="64MiB", num_threads=1)
    matrix, failed, started = Matrix(), 0, time.monotonic()
    for case in chosen:
        with tempfile.TemporaryDirectory() as name:
            why = matrix.run(case, Path(name))
        if why is not None:
            failed += 1
            print(f"{case}: {why}", flush=True)
    exact = sum(case.is_exact for case in chosen)
    print(
        f"{len(chosen)} cases in {time.monotonic() - started:.0f} s, {failed} of which do not "
        f"hold; {exact} bit for bit, {len(chosen) - exact} say that they may differ"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
