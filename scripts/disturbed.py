"""A model that faults disturb, and what it would be without: for scripts/inject_faults.py.

Layer and optimizer are of the user's own, with a place inside where they may fail.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harmony

WIDTH = 16


class Layer(nn.Linear):
    """A layer of the user's own."""

    def inside(self) -> None:
        """Where it may fail."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        self.inside()
        return torch.tanh(super().forward(x))


class Own(torch.optim.SGD):
    """An optimizer of the user's own, with state."""

    def inside(self) -> None:
        """Where it may fail."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                self.inside()
                mean = self.state[param].setdefault("mean", torch.zeros_like(param))
                mean.mul_(0.9).add_(param.grad)
                param.add_(mean, alpha=-group["lr"])


class Net(nn.Module):
    """Layers, a BatchNorm, dropout; dynamically if what it computes decides so."""

    def __init__(self, wanders: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(WIDTH, WIDTH) for _ in range(3))
        self.norm, self.drop, self.wanders = nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), wanders

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        x = self.norm(self.layers[0](x))
        if self.wanders and x.sum() > 0:
            x = torch.tanh(x)
        return self.layers[2](self.drop(self.layers[1](x)))


class Subject:
    """A model that is disturbed, and what it would be without."""

    def __init__(self, form: str, folder: str | None = None) -> None:
        self.form = form
        torch.manual_seed(0)
        options: dict[str, Any] = {"devices": 2, "microbatch_size": 4, "mode": "pp", "seed": 0}
        options |= {"device_memory": "16KiB"}
        if form != "dropin":
            options |= {"optimizer": Own, "optimizer_kwargs": {"lr": 0.1}}
            options |= {"loss_fn": nn.functional.mse_loss}
            options |= {"updates": "auto" if form == "device" else "host"}
        if form == "device":
            options["device_memory"] = "1MiB"
        self.model = harmony.Harmony(Net(form == "dynamic"), **options)
        self.own = Own(self.model.parameters(), lr=0.1) if form == "dropin" else None
        self.folder = Path(folder or ".")
        self._saves = folder is not None
        self.held: list[torch.Tensor] = []
        self.may_take, self.taking = False, threading.Lock()
        self.batches = [(torch.randn(8, WIDTH), torch.randn(8, WIDTH)) for _ in range(3)]

    def record(self) -> None:
        """Take all steps, and keep the state behind each."""
        self.train(0)
        if self._saves:
            self.save()
        self.states = [self.state()]
        for step in (1, 2):
            self.train(step)
            self.states.append(self.state())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The model's, or the loop's own."""
        found = self.own or self.model.optimizer
        assert found is not None
        return found

    def train(self, step: int) -> None:
        """Take a step, in the form that it is for."""
        x, y = self.batches[step]
        if self.own is None:
            self.model.train_step(x, y)
            return
        self.own.zero_grad()
        nn.functional.mse_loss(self.model(x), y).backward()
        self.own.step()

    def state(self) -> list[torch.Tensor]:
        """All that has to be of one step."""
        held = [self.optimizer.state.get(p, {}).get("mean") for p in self.model.parameters()]
        tensors = [*self.model.state_dict().values(), *(t for t in held if t is not None)]
        found = [tensor.detach().cpu().clone() for tensor in tensors]  # some may be on a GPU
        return [*found, torch.tensor(self.model.num_steps)]

    def objects(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model."""
        return {} if self.own is None else {"optimizer": self.own}

    def save(self, meanwhile: bool = False) -> Path:
        """Write a checkpoint."""
        return self.model.save_checkpoint(self.folder, async_save=meanwhile, **self.objects())

    def load(self) -> None:
        """Go back to the first checkpoint, and let go of what was taken."""
        self.let_go()
        self.model.load_checkpoint(self.folder / "step-00000001", **self.objects())
        self.model.zero_grad()

    def take_memory(self) -> None:
        """Take nearly all that is free on each device, as a script may, and keep it."""
        with self.taking:
            for device in self.model._engine.devices if self.may_take else ():
                free, _ = torch.accelerator.get_memory_info(device)
                if free > 1024:
                    self.held.append(torch.empty(free - 1024, dtype=torch.uint8, device=device))

    def let_go(self) -> None:
        """Let go of what was taken; a thread that is late takes nothing any more."""
        with self.taking:
            self.may_take = False
            self.held.clear()


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    """Whether two states are equal, bit for bit."""
    return len(one) == len(two) and all(map(torch.equal, one, two))
