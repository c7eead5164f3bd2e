#!/usr/bin/env python3
"""Kills a training run again and again, half of the times inside a save, and resumes it.

    scripts/kill_and_resume.py [--kills 100] [--seed 0] [--signal KILL] [--async-save]

A small GPT with dropout, clipping and a learning-rate schedule trains in a process of its own on
two virtual GPUs and saves a checkpoint after each step. The process is killed (SIGKILL, or another
signal) at a random moment and started again, until it has been killed so often; then it runs to
its end. Every start has to find a whole checkpoint that is no older than the last one whose save
had returned, and the parameters, the optimizer's state and every loss have to be, bit for bit,
those of a run that nobody has killed. With `--async-save` each checkpoint is written while the
next step runs, and counts as saved once the next one is begun. Exits 1 if anything differs, or a
process hangs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import harmony

STEPS_A_KILL = 2
"""Steps that a process makes at most before it is killed."""

PATIENCE_S = 300


def main() -> int:
    """Run, kill, resume and compare."""
    args = parse_arguments()
    if args.worker is not None:
        return work(args.worker, args.steps, args.async_save)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder, steps = Path(name), STEPS_A_KILL * (args.kills + 1)
        work_on = (steps, args.async_save)
        expected, _ = run(folder / "whole", work_on, None, signal.SIGTERM)
        found, inside, kills, over = Heard(), 0, 0, False
        while kills < args.kills and not over:
            in_save = kills % 2 == 0
            moment = ("saving" if in_save else "step", draw.randrange(STEPS_A_KILL), draw.random())
            heard, over = run(folder / "killed", work_on, moment, args.signal)
            if heard.began < found.saved:
                print(f"resumed at step {heard.began}, but {found.saved} had been saved")
                return 1
            found.add(heard)
            kills, inside = kills + (not over), inside + (in_save and not over)
        found.add(run(folder / "killed", work_on, None, args.signal)[0])
    wrong = [step for step in expected.states if found.states.get(step) != expected.states[step]]
    wrong += [step for step in expected.losses if found.losses.get(step) != expected.losses[step]]
    aimed = f"{kills} kills, {inside} of them aimed at a save"
    print(f"{aimed}; {steps} steps, {len(set(wrong))} of which differ")
    return int(bool(wrong))


@dataclass
class Heard:
    """What a process has said.

    Attributes:
        began: the step that it began with.
        saved: the last step whose save has returned.
        losses: by step, in hexadecimal.
        states: checksums of parameters and optimizer state, by the number of steps made.
    """

    began: int = 0
    saved: int = 0
    losses: dict[int, str] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)

    def add(self, other: Heard) -> None:
        """Take in what the next process has said."""
        self.saved = max(self.saved, other.saved)
        self.losses.update(other.losses)
        self.states.update(other.states)


def run(
    folder: Path,
    work_on: tuple[int, bool],
    moment: tuple[str, int, float] | None,
    how: signal.Signals,
) -> tuple[Heard, bool]:
    """Run a process; kill it at a moment, if there is one.

    Args:
        work_on: to how many steps, and whether it saves meanwhile.
        moment: what it has to have said, how often before, and for how long it then goes on, as
            a part of what a step took.

    Returns:
        What it has said, and whether it came to its end.
    """
    command = [sys.executable, __file__, "--worker", str(folder), "--steps", str(work_on[0])]
    command += ["--async-save"] if work_on[1] else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout is not None
    heard = Heard()
    deadline, seen, before, step_s = time.monotonic() + PATIENCE_S, 0, time.monotonic(), 0.02
    try:
        while True:
            if not select.select([process.stdout], [], [], deadline - time.monotonic())[0]:
                raise TimeoutError(f"nothing was heard for {PATIENCE_S} s")
            line = process.stdout.readline()
            if not line:
                break
            word, number, *rest = line.split()
            step = int(number)
            if word == "begin":
                heard.began = heard.saved = step
            elif word == "saving":
                heard.losses[step] = rest[1]
            elif word == "saved":
                heard.saved = step
            if rest:
                heard.states[step] = rest[0]
            now = time.monotonic()
            step_s, before, deadline = min(now - before, 0.2), now, now + PATIENCE_S
            if moment is not None and word == moment[0]:
                if seen == moment[1]:
                    time.sleep(step_s * moment[2])
                    process.send_signal(how)
                    moment = None
                seen += 1
        code = process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    if code not in (0, -how, 128 + how):
        raise RuntimeError(f"the process ended with {code}")
    return heard, code == 0


def work(folder: Path, steps: int, async_save: bool) -> int:
    """Train to so many steps, from the newest checkpoint if there is one; say what is done."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from pretrain_gpt import batches, loss_fn, make_model

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    torch.set_num_threads(1)
    harmony.virtual_gpus(count=2, memory="4MiB", num_threads=1)
    model = harmony.Harmony(
        make_model(32, 3, 2, 16),
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-2},
        loss_fn=loss_fn,
        max_grad_norm=1.0,
        microbatch_size=2,
        mode="pp",
        seed=0,
    )
    scheduler = CosineAnnealingLR(model.optimizer, steps)
    if folder.exists() and any(folder.glob("step-*")):
        model.load_checkpoint(folder, scheduler=scheduler)
    if model.num_steps:
        say(f"begin {model.num_steps} {checksum(model)}")
    for step, (inputs, targets) in enumerate(batches(steps, 4, 16)):
        if step < model.num_steps:
            continue
        say(f"step {step}")
        loss = model.train_step(inputs, targets)
        scheduler.step()
        say(f"saving {step + 1} {checksum(model)} {loss.item().hex()}")
        before = model.saving
        model.save_checkpoint(folder, keep=2, scheduler=scheduler, async_save=async_save)
        if not async_save:
            say(f"saved {step + 1}")
        elif before is not None:  # which the new one has waited for
            say(f"saved {step}")
    model.finish_saving()
    return 0


def checksum(model: harmony.Harmony) -> str:
    """Of the parameters and the optimizer's state."""
    digest = hashlib.sha256()
    for param in model.parameters():
        for value in (param.detach(), *model.optimizer.state[param].values()):
            digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def say(text: str) -> None:
    """Tell the parent."""
    os.write(1, f"{text}\n".encode())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", type=lambda name: signal.Signals[f"SIG{name}"], default="KILL")
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
