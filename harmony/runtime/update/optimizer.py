"""The parameter update, one pack at a time, by any `torch.optim` class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from harmony.core.units import listed
from harmony.errors import ConfigError
from harmony.runtime.changes import note_changes
from harmony.runtime.update.clipping import clip_factor, norm_of_norms, norms_of, total_norm
from harmony.runtime.update.coupling import FAILS, WRITES, closure_wanted, why_coupled
from harmony.runtime.update.loss_scaling import LossScaling
from harmony.runtime.update.native_step import describe
from harmony.runtime.update.part_step import moved, step_part

OptimizerFactory = Callable[..., torch.optim.Optimizer]

Options = Sequence[Mapping[str, Any]]
"""What the groups of an optimizer held at some time, group by group."""

Share = Callable[[torch.Tensor], torch.Tensor]
"""Lets all processes have a few numbers of each: float64, ``(n,)`` to ``(processes, n)``."""

_NONE = -1.0
"""In the place of a norm that a process does not know."""

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups as `torch.optim` takes them: ``{"params": [...], "lr": ..., ...}``."""


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
        raise ConfigError(f"in more than one parameter group, or twice in one: {listed(twice)}")
    trained = [name for name, param in params.items() if param.requires_grad]
    missing = [name for name in trained if name not in set(found)]
    if missing:
        raise ConfigError(
            f"in no parameter group, so they would not be trained: {listed(missing)}. Add them "
            "to a group, or freeze them with requires_grad_(False)"
        )
    return copies


def _check_any(params: Mapping[str, nn.Parameter]) -> None:
    if not any(param.requires_grad for param in params.values()):
        raise ConfigError(
            "the model has no parameter with requires_grad=True to train: all are frozen"
        )


def _name_of(param: Any, names: Mapping[int, str]) -> str:
    """Name of a member of a group: a parameter, or a pair ``(name, parameter)``."""
    if isinstance(param, tuple) and len(param) == 2:
        param = param[1]
    if id(param) not in names:
        what = f"a tensor of shape {tuple(param.shape)}" if hasattr(param, "shape") else param
        raise ConfigError(f"a parameter group holds {what!r}, which is no parameter of the module")
    return names[id(param)]


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
    if optimizer is not None and not callable(optimizer):
        raise ConfigError(
            f"optimizer={optimizer!r}: give the class, as optimizer=torch.optim.AdamW"
        )
    is_number = isinstance(max_norm, (int, float, torch.Tensor))
    if max_norm is not None and not (is_number and max_norm > 0):
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
        looks_first: whether all gradients are to be looked at before any update.
        scaling: of the loss; None where it is not scaled.
        is_shared: whether other processes take the same step, for which all gradients wait.
        is_sharded: whether each of them has the state of some parameters, and updates these.
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
            ConfigError: if the optimizer cannot be built, or needs a closure or sparse gradients,
                or the groups are not those of the trainable parameters.
        """
        self.max_norm = max_norm
        self.last_norm: torch.Tensor | None = None
        self.looks_first = False
        self.is_shared = self.is_sharded = False
        self.scaling: LossScaling | None = None
        self._is_final = False
        self._factory, self._options = factory, options
        self._build(params, groups)

    def check_shardable(self) -> None:
        """Refuse a step of all parameters where each process is to update some of them.

        Raises:
            ConfigError: naming the optimizer, and why its step is one.
        """
        if self.is_sharded and self.together is not None:
            raise ConfigError(
                f"shard_optimizer_state=True with {type(self.full).__name__}, whose step is one "
                f"of all parameters: {self.together}. Each process updates some of them only. "
                "Leave shard_optimizer_state= out. Nothing was changed"
            )

    def forget(self, params: Iterable[nn.Parameter]) -> None:
        """Let go of the state of these parameters, which another process keeps."""
        for param in params:
            self.full.state.pop(param, None)

    def settle(
        self, params: Mapping[str, nn.Parameter], groups: Callable[[], Groups | None]
    ) -> None:
        """Let it be the optimizer of these parameters from now on.

        Until then it is built anew where a layer was replaced, since nobody has seen it.
        """
        if not self._is_final and tuple(map(id, params.values())) != self._built_for:
            self._build(params, groups())
        self._is_final = True

    def check_covers(self, params: Mapping[str, nn.Parameter]) -> None:
        """Refuse to leave parameters untrained that are not frozen, or to train nothing.

        Raises:
            ConfigError: naming those that are in no group.
        """
        _check_any(params)
        held = {id(param) for group in self.full.param_groups for param in group["params"]}
        missing = [n for n, p in params.items() if p.requires_grad and id(p) not in held]
        if missing:
            raise ConfigError(
                f"the optimizer does not have {listed(missing)}, so they would not be trained: "
                "they were added, replaced or unfrozen after it was made. Add them, with "
                'model.optimizer.add_param_group({"params": [...]}), or freeze them'
            )

    def _build(self, params: Mapping[str, nn.Parameter], groups: Groups | None) -> None:
        _check_any(params)
        trainable = [p for p in params.values() if p.requires_grad]
        # Frozen ones may be unfrozen: until then they have no gradient, and are passed over.
        every = list(params.values())
        self._built_for = tuple(map(id, params.values()))
        if groups is not None:
            self.full = self._made(checked_groups(params, groups))
        elif len(trainable) == len(every):
            self.full = self._made(trainable)
        else:
            try:
                self.full = self._made(every)
            except ConfigError:  # a class that is particular, like Muon, cannot have all
                self.full = self._made(trainable)
        _check_steps(self.full)
        self._coupled = why_coupled(self.full)
        if groups is None and (self._coupled or "").startswith(FAILS):
            # It may be one that does not pass over parameters without a gradient.
            self.full = self._made(trainable)
            self._coupled = why_coupled(self.full)
        if hasattr(
            self.full, "_optimizer_state_dict_post_hooks"
        ):  # not where __init__ was its own
            self.full.register_state_dict_post_hook(_on_host)

    def _made(self, given: list[Any]) -> torch.optim.Optimizer:
        factory, options = self._factory, self._options
        try:
            return factory(given, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            name = getattr(factory, "__name__", str(factory))
            shown = dict(options)
            raise ConfigError(f"{name}(parameters, **{shown!r}) failed: {error}") from error

    @property
    def together(self) -> str | None:
        """Why all parameters are updated in one step; None where packs are updated alone.

        Then the step is the one call of ``full.step()`` that a loop of one's own makes, on the
        host, once all gradients are there.
        """
        return self._coupled or _why_watched(self.full)

    @property
    def writes_elsewhere(self) -> bool:
        """Whether a step changes more than the optimizer and its parameters, even of a copy."""
        return self._coupled == WRITES

    @property
    def waits(self) -> str | None:
        """Why no pack can be updated before all gradients are there; None where one can."""
        if self.max_norm is not None:
            return f"max_grad_norm={self.max_norm}"
        if self.scaling is not None:
            return "a scaled loss"
        if self.is_shared:
            return "a process_group, whose processes take each step together or not at all"
        return "detect_nonfinite=True" if self.looks_first else self.together

    @property
    def skips(self) -> bool:
        """Whether no parameter is updated in this step: its gradients were not finite."""
        return self.scaling is not None and self.scaling.skips

    def params(self) -> list[nn.Parameter]:
        """The parameters in its groups."""
        return [param for group in self.full.param_groups for param in group["params"]]

    def describe(self) -> str:
        """Name of the optimizer, what updates on the host, and whether its step is one of all."""
        name = type(self.full).__name__
        if self.together is not None:
            return f"{name}, one step of all: {self.together}"
        fused = any(group.get("fused") for group in self.full.param_groups)
        how = "fused" if fused else describe(self.full)
        return f"{name} ({how})" if how else name

    def measure(
        self,
        params: Iterable[nn.Parameter],
        known: Mapping[int, torch.Tensor] | None = None,
        share: Share | None = None,
    ) -> None:
        """Look at all gradients before the first update.

        What the loss was scaled by is divided out of them. Where they are clipped, their norm is
        kept; each update then scales its own, and both together are
        ``torch.nn.utils.clip_grad_norm_``.

        Args:
            params: all parameters in the order of ``module.parameters()``.
            known: norms of some gradients, by the identity of their parameter.
            share: see `Share`; where each process has the gradients of some parameters only.
        """
        params = list(params)
        if self.scaling is not None:
            self.scaling.unscale(params)
        if self.max_norm is not None:
            float(self.max_norm)  # what is no number fails here, where nothing has changed
        if share is not None:
            self._measure_together(params, known or {}, share)
        elif self.max_norm is not None:
            self.last_norm = total_norm(params, known or {})
        if self.skips:  # what would be clipped by its update
            self._clip(params)

    def _measure_together(
        self, params: list[nn.Parameter], known: Mapping[int, torch.Tensor], share: Share
    ) -> None:
        """Measure gradients of which each process has some; no two have the same one's."""
        scaling = self.scaling
        if scaling is None and self.max_norm is None:
            return
        norms = [None] * len(params) if self.max_norm is None else norms_of(params, known)
        looked = scaling is not None and scaling.has_looked
        said = [float(looked), float(looked and self.skips)]
        said += [_NONE if norm is None else float(norm) for norm in norms]
        found = share(torch.tensor(said, dtype=torch.float64)).amax(0).tolist()
        if scaling is not None:
            scaling.hear(bool(found[0]), bool(found[1]))
        if self.max_norm is not None:
            every = zip(params, found[2:], strict=True)
            kept = [torch.tensor(n, dtype=p.dtype.to_real()) for p, n in every if n != _NONE]
            self.last_norm = norm_of_norms(kept)

    def _factor(self) -> float:
        """What the update multiplies gradients by; 1.0 changes nothing."""
        if self.max_norm is None or self.last_norm is None:
            return 1.0
        return clip_factor(self.max_norm, self.last_norm)

    def _clip(self, params: Iterable[nn.Parameter]) -> None:
        """Scale the gradients of these parameters by the norm of all of them."""
        if self.max_norm is not None and self.last_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(params, self.max_norm, self.last_norm)

    def options(self) -> Options:
        """What the groups say now, and whom they have: before an update that may be other."""
        groups = self.full.param_groups
        return [{key: _as_it_is(held) for key, held in group.items()} for group in groups]

    def update_all(self, params: Iterable[nn.Parameter]) -> None:
        """Take the step for all parameters at once, whose gradients are complete."""
        params = [param for param in params if param.grad is not None]
        if self.together is None:
            self.update(params)
        else:
            self._clip(params)
            self.full.step()
            note_changes(self.params())

    def update(
        self,
        params: list[nn.Parameter],
        working: Mapping[int, torch.Tensor] | None = None,
        options: Options | None = None,
    ) -> set[int]:
        """Take the optimizer's step for these parameters, whose gradients are complete.

        Args:
            working: bf16 copies of parameters, by their identity.
            options: of its groups, where those of now are of a later step.

        Returns:
            The parameters, by identity, whose copy has their new values already.
        """
        # Fused SGD cannot take parameters with momentum and such without in one call.
        known = [p for p in params if self.full.state.get(p)]
        new = [p for p in params if not self.full.state.get(p)]
        parts = filter(None, (known, new))
        return set().union(*(self._update(part, None, working, options) for part in parts))

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
                    moved(self.full.state[param], param.device, group)

    def state_nbytes(self, device: torch.device) -> int:
        """Bytes of the state that lies on a device."""
        tensors = (value for state in self.full.state.values() for value in state.values())
        return sum(t.nbytes for t in tensors if torch.is_tensor(t) and t.device == device)

    def has_stepped(self) -> None:
        """Let LR schedulers know of a step, which their wrapper around `step` does not see."""
        self.full._opt_called = True  # type: ignore[attr-defined]

    def _update(
        self,
        params: list[nn.Parameter],
        copies: list[nn.Parameter] | None = None,
        working: Mapping[int, torch.Tensor] | None = None,
        options: Options | None = None,
    ) -> set[int]:
        # An LR scheduler wraps `step` on the full optimizer; the part's is the class's own.
        copied = step_part(self.full, params, copies, working, options, self._factor(), self._clip)
        self.has_stepped()
        note_changes(params)
        return copied


def _as_it_is(value: Any) -> Any:
    """Return what a group holds so that it stays as it is."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value


def _check_steps(optimizer: Any) -> None:
    """Refuse an optimizer whose step a planned training step cannot call.

    Raises:
        ConfigError: naming the class.
    """
    name = type(optimizer).__name__
    if not callable(getattr(optimizer, "step", None)) or not hasattr(optimizer, "param_groups"):
        raise ConfigError(f"{name} is no optimizer: it has no step() or no param_groups")
    if closure_wanted(optimizer):
        raise ConfigError(
            f"{name} calls the model several times in one step; Harmony runs it once. "
            "Use a first-order optimizer such as torch.optim.AdamW, or call it in a loop of your "
            "own around Harmony(module)"
        )
    check_takes_dense(optimizer)


def check_takes_dense(optimizer: Any) -> None:
    """Refuse an optimizer of sparse gradients.

    Raises:
        ConfigError: naming the class.
    """
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ConfigError(
            f"{type(optimizer).__name__} wants sparse gradients; Harmony's are dense, with the "
            "same sums. Use torch.optim.Adam, or another optimizer"
        )


def _on_host(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Let a saved state be where the parameters are, though some of it is on devices now."""
    state = {
        key: {
            name: value.cpu() if isinstance(value, torch.Tensor) else value
            for name, value in held.items()
        }
        if isinstance(held, dict)
        else held
        for key, held in saved.get("state", {}).items()
    }
    return {**saved, "state": state}


def _why_watched(optimizer: Any) -> str | None:
    """Why each call of ``step`` counts: somebody else than the class has a part in it."""
    places: list[Mapping[int, Any]] = [
        getattr(optimizer, "_optimizer_step_pre_hooks", {}),
        getattr(optimizer, "_optimizer_step_post_hooks", {}),
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    hooks = [hook for place in places for hook in place.values()]
    if any(not getattr(hook, "__module__", "").startswith("harmony.") for hook in hooks):
        return "hooks are called with its step"
    step = optimizer.__dict__.get("step")
    if step is not None and not getattr(step, "_wrapped_by_lr_sched", False):
        return "its step was replaced"
    return None
