#!/usr/bin/env python3
"""Trains long, with all that happens in between, beside plain PyTorch; watches what it takes.

    scripts/soak.py [--steps 1000] [--seed 0]

A small GPT with dropout (and a head of its own: the gradient of a weight with two uses is summed
in another order) trains on two virtual GPUs, and its twin by plain PyTorch on the host. At
random a step is preceded by an evaluation, a new learning rate, a block that is frozen or thawed,
a checkpoint that is saved, or one that is loaded: into the same model, or into a new one that
takes its place. Every loss and every evaluation has to be plain PyTorch's, bit for bit, and so
have all parameters and all optimizer state at each save and at the end. The memory of the process,
its threads and its open files may not be more in the last third of the run than before.
Exits 1 if anything differs or grows.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import harmony

SEED, BATCH, MICROBATCH, CONTEXT = 0, 4, 2, 16
EVENTS = ("eval", "lr", "freeze", "save", "load", "renew")
OFTEN = 0.3
"""The part of the steps that something comes before."""

GROWTH = 0.05
"""The part by which the memory of the process may differ, as allocators round."""

CAPTURE_THREADS = 3
"""Threads of one capture: one for each of the two GPUs, and one for updates."""


def main() -> int:
    """Train, disturb, compare and measure."""
    args = parse_arguments()
    torch.set_num_threads(1)
    harmony.virtual_gpus(count=2, memory="4MiB", num_threads=1)
    with tempfile.TemporaryDirectory() as name:
        soak = Soak(Path(name), args.steps, args.seed)
        for number in range(args.steps):
            soak.step()
            if (number + 1) % 100 == 0:
                print(f"{number + 1:6} steps: {soak.use[-1]}, {soak.wrong} differ", flush=True)
        soak.compare("the end")
    print("before them " + ", ".join(f"{n} x {what}" for what, n in sorted(soak.events.items())))
    grown = soak.grown()
    print(f"{args.steps} steps, {soak.compared} comparisons, {soak.wrong} of which differ")
    print(f"at most {soak.most()}: {'; '.join(grown) or 'flat'}")
    return int(bool(soak.wrong or grown))


class Plain:
    """The twin: what plain PyTorch makes of the same microbatches."""

    def __init__(self, net: torch.nn.Module, steps: int) -> None:
        self.net = net
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
        self.scheduler = CosineAnnealingLR(self.optimizer, steps)
        self.num_steps = 0

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, loss_fn: Any) -> torch.Tensor:
        """Accumulate the gradients of the microbatches, and step."""
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for index, at in enumerate(range(0, BATCH, MICROBATCH)):
            harmony.seed_microbatch(self.num_steps, index, seed=SEED)
            x, y = inputs[at : at + MICROBATCH], targets[at : at + MICROBATCH]
            loss = loss_fn(self.net(x), y)
            (loss * (MICROBATCH / BATCH)).backward()
            total += loss.detach() * (MICROBATCH / BATCH)
        self.optimizer.step()
        self.num_steps += 1
        return total


class Soak:
    """Both models, and what is known of them.

    Attributes:
        use: what the process took, now and then.
        events: how often each has come.
        compared, wrong: comparisons, and those that differed.
    """

    def __init__(self, folder: Path, steps: int, seed: int) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
        from pretrain_gpt import VOCABULARY, loss_fn, make_model

        self._make, self._loss_fn = lambda: make_model(32, 3, 2, CONTEXT, tied=False), loss_fn
        self._folder, self._steps, self._vocabulary = folder, steps, VOCABULARY
        self._draw = random.Random(seed)
        self._data = torch.Generator().manual_seed(seed)
        self._plain = Plain(self._make(), steps)
        self._new_model()
        self._snapshot: Plain | None = None
        self.use: list[Use] = []
        self.events: Counter[str] = Counter()
        self.compared = self.wrong = 0

    def step(self) -> None:
        """Do something, perhaps; train a step in both ways; compare the losses."""
        if self._draw.random() < OFTEN:
            event = self._draw.choice(EVENTS)
            self.events[event] += 1
            getattr(self, f"_{event}")()
        inputs, targets = self._batch(), self._batch()
        loss = self._model.train_step(inputs, targets)
        self._scheduler.step()
        expected = self._plain.step(inputs, targets, self._loss_fn)
        self._plain.scheduler.step()
        self._check(f"the loss of step {self._plain.num_steps}", loss, expected)
        if self._draw.random() < 0.1 or not self.use:
            self._model.finish_saving()  # its thread is none that grows
            self.use.append(Use.now())

    def compare(self, when: str) -> None:
        """Compare all parameters and all optimizer state."""
        pairs = zip(self._model.named_parameters(), self._plain.net.parameters(), strict=True)
        for (name, param), twin in pairs:
            self._check(f"{name} at {when}", param.detach(), twin.detach())
            mine = self._model.optimizer.state.get(param, {})
            theirs = self._plain.optimizer.state.get(twin, {})
            if mine.keys() != theirs.keys():
                self._check(f"the state of {name} at {when}", torch.zeros(1), torch.ones(1))
            for key in theirs:
                self._check(f"{key} of {name} at {when}", mine[key].cpu(), theirs[key])

    def grown(self) -> list[str]:
        """What the process takes more of in the last third than it ever took before.

        How much that is goes up and down with the captures that a model has: those of other frozen
        blocks, of training and of evaluation, each with threads of its own; one more is no growth.
        """
        third = len(self.use) // 3
        if third == 0:
            return []
        earlier, last = self.use[: 2 * third], self.use[2 * third :]
        found = []
        rooms = (("rss_nbytes", GROWTH, 0), ("threads", 0.0, CAPTURE_THREADS), ("files", 0.0, 0))
        for name, share, count in rooms:
            before, now = (max(getattr(use, name) for use in uses) for uses in (earlier, last))
            if now > before * (1 + share) + count:
                found.append(f"{name} has grown from {before} to {now}")
        return found

    def most(self) -> str:
        """The most that the process took, in each third of the run."""
        third = max(1, len(self.use) // 3)
        parts = (self.use[:third], self.use[third : 2 * third], self.use[2 * third :])
        return ", then ".join(str(Use.most(part)) for part in parts if part)

    # What comes between two steps

    def _eval(self) -> None:
        inputs = self._batch()
        self._model.eval(), self._plain.net.eval()
        with torch.no_grad():
            parts = [self._plain.net(part) for part in inputs.split(MICROBATCH)]
            self._check("an evaluation", self._model(inputs), torch.cat(parts))
        self._model.train(), self._plain.net.train()

    def _lr(self) -> None:
        rate = self._draw.choice((1e-2, 3e-3, 1e-3))
        for optimizer in (self._model.optimizer, self._plain.optimizer):
            optimizer.param_groups[0]["lr"] = rate

    def _freeze(self) -> None:
        block = self._draw.randrange(3)
        for net in (self._model.module, self._plain.net):
            for param in net.blocks[block].parameters():
                param.requires_grad_(not param.requires_grad)

    def _save(self) -> None:
        self.compare(f"the save of step {self._plain.num_steps}")
        meanwhile = self._draw.random() < 0.5
        self._model.save_checkpoint(
            self._folder, keep=2, async_save=meanwhile, scheduler=self._scheduler
        )
        self._snapshot = copy.deepcopy(self._plain)

    def _load(self) -> None:
        if self._snapshot is None:
            return
        self._plain = copy.deepcopy(self._snapshot)
        newest = self._folder / f"step-{self._plain.num_steps:08}"
        self._model.load_checkpoint(newest, scheduler=self._scheduler)
        self.compare(f"the load of step {self._plain.num_steps}")

    def _renew(self) -> None:
        if self._snapshot is None:
            return
        self._model.finish_saving()
        self._new_model()
        gc.collect()
        self._load()

    def _new_model(self) -> None:
        self._model = harmony.Harmony(
            self._make(),
            optimizer=torch.optim.AdamW,
            optimizer_kwargs={"lr": 1e-2, "fused": True},
            loss_fn=self._loss_fn,
            microbatch_size=MICROBATCH,
            mode="pp",
            seed=SEED,
        )
        self._scheduler = CosineAnnealingLR(self._model.optimizer, self._steps)

    def _batch(self) -> torch.Tensor:
        return torch.randint(self._vocabulary, (BATCH, CONTEXT), generator=self._data)

    def _check(self, what: str, one: torch.Tensor, two: torch.Tensor) -> None:
        self.compared += 1
        if not torch.equal(one, two):
            self.wrong += 1
            if self.wrong <= 10:
                print(f"{what} differs, by {(one - two).abs().max().item():.3g} at most")


class Use:
    """What the process takes."""

    def __init__(self, rss_nbytes: int, threads: int, files: int) -> None:
        self.rss_nbytes, self.threads, self.files = rss_nbytes, threads, files

    @staticmethod
    def now() -> Use:
        """Measure."""
        gc.collect()
        process = psutil.Process()
        return Use(process.memory_info().rss, process.num_threads(), process.num_fds())

    @staticmethod
    def most(uses: list[Use]) -> Use:
        """The largest of each figure."""
        return Use(*(max(getattr(use, name) for use in uses) for name in vars(uses[0])))

    def __str__(self) -> str:
        return f"{self.rss_nbytes / 2**20:.0f} MiB, {self.threads} threads, {self.files} files"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
