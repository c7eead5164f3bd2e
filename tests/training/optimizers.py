"""Optimizers that are not `torch.optim`'s: most look at several parameters, or at the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

CALLS: list[int] = []
"""What `NotesCalls` has noted."""


class _Own(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    def trained(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield group, param


class NormSGD(_Own):
    """Divides by the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        norm = torch.stack([p.grad.norm() for _, p in self.trained()]).norm()
        for group, param in self.trained():
            param.sub_(param.grad / norm * group["lr"])


class ClipsLarge(_Own):
    """Clips the norm of all gradients, but only where it is large."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        norm = torch.stack([p.grad.norm() for _, p in self.trained()]).norm()
        factor = min(1.0, 0.05 / float(norm))
        for group, param in self.trained():
            param.sub_(param.grad * factor, alpha=group["lr"])


class CountsOnItself(_Own):
    """A learning rate that falls with the steps, which it counts on itself."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group, param in self.trained():
            param.sub_(param.grad, alpha=group["lr"] / self.count)


class CountsInGroup(_Own):
    """The same, counted in the groups."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        for group, param in self.trained():
            param.sub_(param.grad, alpha=group["lr"] / group["k"])


class SkipsBadSteps(_Own):
    """Leaves a step out whose gradients are not all finite."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if all(bool(p.grad.isfinite().all()) for _, p in self.trained()):
            for group, param in self.trained():
                param.sub_(param.grad, alpha=group["lr"])


class Noisy(_Own):
    """Adds noise, of which the parameters get theirs one after the other."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, param in self.trained():
            param.sub_(param.grad, alpha=group["lr"]).add_(torch.randn_like(param), alpha=1e-3)


class FollowsLast(_Own):
    """Keeps the last parameter beside its groups, and goes by its gradient, where there is one."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        params = list(params)
        super().__init__(params, lr)
        self.last = params[-1]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        factor = 1.0 if self.last.grad is None else float(self.last.grad.norm())
        for group, param in self.trained():
            param.sub_(param.grad, alpha=group["lr"] * factor)


class FirstHoldsAll(_Own):
    """Keeps what belongs to all in the state of the first parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        first = self.param_groups[0]["params"][0]
        shared = self.state[first]
        total = sum(float(p.grad.abs().mean()) for _, p in self.trained())
        shared["mean"] = 0.9 * shared.get("mean", 0.0) + 0.1 * total
        for group, param in self.trained():
            param.sub_(param.grad, alpha=group["lr"] * shared["mean"])


class Distance(_Own):
    """As D-Adaptation and Prodigy: a step size for all, from how far all have gone."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, lr, d=1e-3, numerator=0.0, k=0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        top, bottom = group["numerator"], 0.0
        for _, param in self.trained():
            state = self.state[param]
            if "start" not in state:
                state["start"], state["s"] = param.clone(), torch.zeros_like(param)
            top += group["d"] * float((param.grad * (state["start"] - param)).sum())
            state["s"].add_(param.grad, alpha=group["d"])
            bottom += float(state["s"].abs().sum())
        rate = max(group["d"], abs(top) / max(bottom, 1e-12))
        for each in self.param_groups:
            each.update(numerator=top, d=rate, k=each["k"] + 1)
        for each, param in self.trained():
            param.sub_(param.grad, alpha=each["lr"] * each["d"])


class Lookahead(torch.optim.Optimizer):
    """Wraps another one, and every second step goes half of the way that it went."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        self.inner = torch.optim.AdamW(params, lr=lr)
        super().__init__(self.inner.param_groups, {"lr": lr})
        self.param_groups = self.inner.param_groups
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        self.turn = 0

    def step(self, closure: Any = None) -> None:
        look_ahead(self)


@torch.no_grad()
def look_ahead(outer: Any) -> None:
    outer.inner.step()
    outer.turn += 1
    if outer.turn % 2 == 0:
        fast = [p for g in outer.param_groups for p in g["params"]]
        for slow, param in zip(outer.slow, fast, strict=True):
            slow.add_(param - slow, alpha=0.5)
            param.copy_(slow)


class BareWrapper(torch.optim.Optimizer):
    """As many are written: with all that an optimizer has, but without its ``__init__``."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        self.inner = torch.optim.AdamW(params, lr=lr)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        self.turn = 0

    def step(self, closure: Any = None) -> None:
        look_ahead(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()


class ScheduleFree(_Own):
    """As schedule-free SGD: weights of the mean in the groups."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr, weight_sum=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["weight_sum"] += group["lr"]
        for group, param in self.trained():
            state = self.state[param]
            if "z" not in state:
                state["z"] = param.clone()
            part = group["lr"] / group["weight_sum"]
            state["z"].sub_(param.grad, alpha=group["lr"])
            param.lerp_(state["z"], part)


class NotesCalls(_Own):
    """Notes in a global list that it was called."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        CALLS.append(len(CALLS))
        for group, param in self.trained():
            param.sub_(param.grad, alpha=group["lr"])


class Lion(_Own):
    """One parameter after the other: packs can be updated as soon as their gradients are there."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, param in self.trained():
            state = self.state[param]
            if "mean" not in state:
                state["mean"] = torch.zeros_like(param)
            param.sub_(state["mean"].lerp(param.grad, 0.1).sign_(), alpha=group["lr"] * 0.01)
            state["mean"].lerp_(param.grad, 0.01)


COUPLED: tuple[Callable[..., torch.optim.Optimizer], ...] = (
    NormSGD,
    ClipsLarge,
    CountsOnItself,
    CountsInGroup,
    SkipsBadSteps,
    FollowsLast,
    FirstHoldsAll,
    Distance,
    Lookahead,
    BareWrapper,
    ScheduleFree,
    NotesCalls,
)
