"""The parameter update, one pack at a time, by any `torch.optim` class."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harmony.errors import ConfigError

OptimizerFactory = Callable[..., torch.optim.Optimizer]

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups as `torch.optim` takes them: ``{"params": [...], "lr": ..., ...}``."""


def with_fused_default(factory: OptimizerFactory, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with ``fused=True`` where the class knows it and the user said nothing.

    The update runs on the CPU, where the fused kernels are several times as fast as the loops
    over operators. ``fused=False`` or ``foreach=...`` in the options is left alone.
    """
    chosen = dict(options)
    parameters = inspect.signature(factory).parameters
    if "fused" in parameters and "fused" not in chosen and chosen.get("foreach") is None:
        chosen["fused"] = True
    return chosen


def checked_groups(params: Mapping[str, nn.Parameter], groups: Groups) -> list[dict[str, Any]]:
    """Return a copy of the groups, if they name every trainable parameter exactly once.

    `torch.optim` leaves a parameter that is in no group as it is, without a word; here that is an
    error. Frozen parameters may be left out.

    Raises:
        ConfigError: naming the parameters that are missing, named twice, or of no use.
    """
    names = {id(param): name for name, param in params.items()}
    found: list[str] = []
    copies = []
    for group in groups:
        if not isinstance(group, Mapping) or "params" not in group:
            raise ConfigError(
                f"a parameter group is a dict with 'params', as torch.optim takes; got {group!r}"
            )
        held = group["params"]
        held = [held] if isinstance(held, torch.Tensor) else list(held)
        found += [_name_of(param, names) for param in held]
        copies.append({**group, "params": held})
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ConfigError(f"in more than one parameter group, or twice in one: {_listed(twice)}")
    trained = [name for name, param in params.items() if param.requires_grad]
    missing = [name for name in trained if name not in set(found)]
    if missing:
        raise ConfigError(
            f"in no parameter group, so they would not be trained: {_listed(missing)}. Add them "
            "to a group, or freeze them with requires_grad_(False)"
        )
    return copies


def _name_of(param: Any, names: Mapping[int, str]) -> str:
    """Name of a member of a group: a parameter, or a pair ``(name, parameter)``."""
    if isinstance(param, tuple) and len(param) == 2:
        param = param[1]
    if id(param) not in names:
        what = f"a tensor of shape {tuple(param.shape)}" if hasattr(param, "shape") else param
        raise ConfigError(f"a parameter group holds {what!r}, which is no parameter of the module")
    return names[id(param)]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def check_optimizer_options(
    optimizer: OptimizerFactory | None,
    options: Mapping[str, Any] | None,
    groups: object,
    max_norm: float | None,
) -> None:
    """Refuse options that make no sense, or that make none without an optimizer.

    Raises:
        ConfigError: naming the option.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer is an object; give the class and its options: optimizer="
            f"{type(optimizer).__name__}, optimizer_kwargs={{...}}"
        )
    if max_norm is not None and not max_norm > 0:
        raise ConfigError(f"max_grad_norm={max_norm!r}: a positive number, or None")
    given = {"optimizer_kwargs": options, "param_groups": groups, "max_grad_norm": max_norm}
    without = [name for name, value in given.items() if value]
    if optimizer is None and without:
        raise ConfigError(f"{without[0]} without an optimizer: add optimizer=torch.optim.AdamW")


class PackOptimizer:
    """One `torch.optim` optimizer whose step can be taken for some of its parameters at a time.

    Attributes:
        full: the optimizer over all parameters: what LR schedulers and checkpoints see.
        max_norm: to which norm all gradients together are clipped; None if they are not.
        last_norm: their norm before it was clipped, of the last step.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        factory: OptimizerFactory,
        options: Mapping[str, Any],
        groups: Groups | None = None,
        max_norm: float | None = None,
    ) -> None:
        """Build ``factory(parameters, **options)``, or with ``groups`` of parameters.

        Raises:
            ConfigError: if the optimizer cannot be built, or needs a closure, or the groups are
                not those of the trainable parameters.
        """
        self.max_norm = max_norm
        self.last_norm: torch.Tensor | None = None
        if factory is torch.optim.LBFGS:
            raise ConfigError(
                "LBFGS calls the model several times in one step; Harmony runs it once. "
                "Use a first-order optimizer such as torch.optim.AdamW"
            )
        trainable = [p for p in params.values() if p.requires_grad]
        if not trainable:
            raise ConfigError("the model has no parameter with requires_grad=True to train")
        given: list[Any] = trainable if groups is None else checked_groups(params, groups)
        chosen = with_fused_default(factory, options)
        if any("foreach" in group or "fused" in group for group in groups or ()):
            chosen = dict(options)
        try:
            self.full = factory(given, **chosen)
        except (TypeError, ValueError, RuntimeError) as error:
            name = getattr(factory, "__name__", str(factory))
            shown = dict(options)
            raise ConfigError(f"{name}(parameters, **{shown!r}) failed: {error}") from error

    def describe(self) -> str:
        """Name of the optimizer and whether it is fused, for the report."""
        fused = any(group.get("fused") for group in self.full.param_groups)
        return type(self.full).__name__ + (" (fused)" if fused else "")

    def clip(self, params: Iterable[nn.Parameter]) -> None:
        """Scale all gradients as ``torch.nn.utils.clip_grad_norm_`` does, and keep their norm.

        Args:
            params: all parameters in the order of ``module.parameters()``, which the sum over
                their norms follows.
        """
        assert self.max_norm is not None
        self.last_norm = torch.nn.utils.clip_grad_norm_(list(params), self.max_norm)

    def update(self, params: list[nn.Parameter]) -> None:
        """Take the optimizer's step for these parameters, whose gradients are complete."""
        # Fused SGD cannot take parameters with momentum and such without in one call.
        known = [p for p in params if self.full.state.get(p)]
        new = [p for p in params if not self.full.state.get(p)]
        for part in filter(None, (known, new)):
            self._update(part)

    def update_elsewhere(self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Take the step for copies of parameters on a device, where their state then is, too.

        Args:
            pairs: parameters of the optimizer, and what stands for each on the device, with its
                gradient.
        """
        known = [pair for pair in pairs if self.full.state.get(pair[0])]
        new = [pair for pair in pairs if not self.full.state.get(pair[0])]
        for part in filter(None, (known, new)):
            self._update([param for param, _ in part], [copy for _, copy in part])

    def bring_home(self, params: Iterable[nn.Parameter]) -> None:
        """Let the state of these parameters be on their own device again."""
        wanted = {id(param) for param in params}
        for group in self.full.param_groups:
            for param in group["params"]:
                if id(param) in wanted and self.full.state.get(param):
                    _moved(self.full.state[param], param.device, group)

    def _update(
        self, params: list[nn.Parameter], copies: list[nn.Parameter] | None = None
    ) -> None:
        stand_ins = dict(zip(map(id, params), copies or params, strict=True))
        part = object.__new__(type(self.full))
        part.__dict__.update(self.full.__dict__)
        state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        part.state = state
        part.param_groups = []
        for group in self.full.param_groups:
            chosen = [p for p in group["params"] if id(p) in stand_ins]
            for param in chosen:
                if self.full.state.get(param):
                    stand_in = stand_ins[id(param)]
                    state[stand_in] = _moved(self.full.state[param], stand_in.device, group)
            if chosen:
                given = {**group, "params": [stand_ins[id(p)] for p in chosen]}
                if copies is not None and given.get("foreach", 0) is None:
                    # On a GPU torch would choose other operations than on the host, with other
                    # last bits: results must not depend on where the plan updates.
                    given["foreach"] = False
                part.param_groups.append(given)
        # An LR scheduler wraps `step` on the full optimizer; the part's is the class's own.
        type(self.full).step(part)
        for param in params:
            if stand_ins[id(param)] in state:
                self.full.state[param] = state[stand_ins[id(param)]]
        self.full._opt_called = True  # type: ignore[attr-defined]  # what that wrapper would note


def _moved(
    state: dict[str, Any], device: torch.device, group: Mapping[str, Any]
) -> dict[str, Any]:
    """Move the state of a parameter to a device; scalars as well only where kernels want that."""
    scalars_too = bool(group.get("fused") or group.get("capturable"))
    for key, held in state.items():
        if isinstance(held, torch.Tensor) and (held.dim() or scalars_too):
            state[key] = held if held.device == device else held.to(device)
    return state
