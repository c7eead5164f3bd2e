"""`Harmony`: an `nn.Module` around yours whose training does not need to fit in GPU memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harmony import session
from harmony.engine import Engine, EngineOptions
from harmony.errors import ConfigError, HarmonyError
from harmony.hardware import Devices, choose_devices, memory_limit
from harmony.planner.plan import Plan
from harmony.report import print_report
from harmony.runtime.optimizer import OptimizerFactory
from harmony.session import ModelRecord, StepStats
from harmony.timeline import Timeline

MODES = ("auto", "pp", "dp")


class Harmony(nn.Module):
    """Trains a module whose weights, gradients and optimizer state exceed the GPUs' memory.

    Step form: everything planned, parameters updated while the backward goes on::

        model = Harmony(net, optimizer=torch.optim.AdamW, optimizer_kwargs={"lr": 1e-4},
                        loss_fn=torch.nn.functional.cross_entropy)
        for inputs, targets in batches:
            loss = model.train_step(inputs, targets)

    Drop-in form: the loop stays yours::

        model = Harmony(net)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()

    Parameters stay on the host and keep their identity: an optimizer, a scheduler or a reference
    made before keeps working. What is computed is what plain PyTorch computes when it accumulates
    the gradients of the same microbatches (see `harmony.microbatch_seed` for random numbers).

    Args:
        module: the module, on the CPU (or on the meta device's way there); it is not copied.
        optimizer: a `torch.optim` class (or a function of the parameters) for the step form.
        optimizer_kwargs: its options. ``fused=True`` is added where the class knows it.
        loss_fn: ``loss_fn(output, targets)``, a mean over the samples; None if the module returns
            its own loss.
        mode: ``"pp"`` (packs of layers wrap around the GPUs), ``"dp"`` (each GPU runs all packs
            on its share of the batch), or ``"auto"``: whichever is predicted to be faster.
        microbatch_size: samples of a microbatch, or ``"auto"``.
        devices: how many GPUs, or which; default: all. Without a GPU, virtual ones are made.
        device_memory: bytes to use of each GPU, e.g. ``"8GiB"``; default: all that is free.
        plan: a `Plan` to use instead of searching for one.
        seed: the run's seed, for `harmony.microbatch_seed`.

    Raises:
        ConfigError: for an option that makes no sense.
    """

    _net: nn.Module
    _engine: Engine

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: OptimizerFactory | None = None,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        mode: str = "auto",
        microbatch_size: int | str = "auto",
        devices: Devices = None,
        device_memory: str | int | None = None,
        plan: Plan | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_options(module, mode, microbatch_size, optimizer, optimizer_kwargs)
        options = session.options()
        chosen = choose_devices(devices, device_memory)
        engine = Engine(
            module,
            chosen,
            EngineOptions(
                optimizer=optimizer,
                optimizer_kwargs=dict(optimizer_kwargs or {}),
                loss_fn=loss_fn,
                mode=mode if options.mode == "auto" else options.mode,
                microbatch_size=None if isinstance(microbatch_size, str) else microbatch_size,
                device_memory_nbytes=memory_limit(device_memory),
                host_memory_nbytes=options.host_memory_nbytes,
                plan=plan,
                seed=seed,
            ),
        )
        # Not registered as a child: names of parameters are the module's own, without a prefix.
        self.__dict__["_net"] = module
        self.__dict__["_engine"] = engine
        self.training = module.training

    # Training

    def train_step(self, inputs: Any, targets: Any = None) -> torch.Tensor:
        """Train on one minibatch: forward, loss, backward and update, planned as a whole.

        Args:
            inputs: what the module takes: a tensor, a tuple of positional arguments, or a
                dictionary of keyword arguments; samples along dimension 0.
            targets: what ``loss_fn`` takes beside the output; None if the module returns its loss.

        Returns:
            The loss, a scalar on the CPU: the mean over the microbatches, weighted by their size.

        Raises:
            ConfigError: without an optimizer, or if the batch makes no sense.
            ExecutionError: if a task fails; says which, and what became of the parameters.
        """
        engine = self._engine
        if engine.options.optimizer is None:
            raise ConfigError(
                "train_step needs an optimizer: Harmony(module, optimizer=torch.optim.AdamW). "
                "To keep your own loop, call the model, loss.backward() and your optimizer"
            )
        if not self.training:
            raise ConfigError("train_step on a model in eval mode; call model.train() first")
        args, kwargs = _arguments(inputs)
        started = time.perf_counter()
        result = engine.train_step(args, kwargs, targets)
        loss = result.loss
        self.record.stepped(
            StepStats(
                engine.num_steps - 1,
                float(loss),
                result.num_samples,
                result.num_tokens,
                time.perf_counter() - started,
                result.timeline,
            )
        )
        return loss

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module: its outputs for the whole batch, with gradients where enabled."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._net.parameters()):
            return self._engine.forward(args, kwargs)
        return self._engine.infer(args, kwargs)

    # What is to be seen of it

    @property
    def module(self) -> nn.Module:
        """The module itself; its parameters live in the host arena once training has begun."""
        return self._net

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the step form, for LR schedulers and checkpoints."""
        return self._engine.optimizer

    @property
    def num_steps(self) -> int:
        """Steps trained so far; set it when resuming, since random numbers depend on it."""
        return self._engine.num_steps

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        self._engine.num_steps = value

    @property
    def plan(self) -> Plan | None:
        """The plan in use; None before the first batch."""
        return self.record.plan

    @property
    def record(self) -> ModelRecord:
        """What the report is made of."""
        return self._engine.record

    @property
    def last_timeline(self) -> Timeline | None:
        """What ran when in the last step."""
        return self._engine.last_timeline

    def report(self) -> None:
        """Print the profiler report of the training so far."""
        print_report([self.record])

    # The module's own names, without a prefix

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the modules of the wrapped one."""
        yield from self._net.named_modules(memo, prefix, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the children of the wrapped module."""
        return self._net.named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the wrapped module's state, as plain PyTorch names it."""
        return self._net.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state of the wrapped module; values are copied, whatever ``assign`` says."""
        result = self._net.load_state_dict(state_dict, strict=strict, assign=False)
        self._engine.restored()
        return result

    def train(self, mode: bool = True) -> Harmony:
        """Set training or evaluation mode, here and in the wrapped module."""
        self.training = mode
        self._net.train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Harmony:
        """Freeze or unfreeze all parameters; possible until the first batch."""
        self._engine.check_not_started("requires_grad_")
        self._net.requires_grad_(requires_grad)
        return self

    def __getattr__(self, name: str) -> Any:
        net = self.__dict__.get("_net")
        if net is None:
            raise AttributeError(name)
        return getattr(net, name)

    def extra_repr(self) -> str:
        """Show the wrapped module's class."""
        return type(self._net).__name__

    def __repr__(self) -> str:
        return f"Harmony({self._net!r})"

    def __deepcopy__(self, memo: Any) -> Any:
        raise HarmonyError(
            "a Harmony model owns threads and GPU memory and cannot be copied. Copy its "
            "state_dict(), or deepcopy the module before you wrap it"
        )

    def __getstate__(self) -> Any:
        raise HarmonyError(
            "a Harmony model cannot be pickled. Save model.state_dict() with torch.save"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Harmony:
        """Keep the parameters on the host: Harmony moves them by itself."""
        probe = fn(torch.empty(0))
        if probe.device.type != "cpu":
            warnings.warn(
                "parameters of a Harmony model stay on the host; "
                f".to({probe.device}) does nothing",
                stacklevel=3,
            )
            return self
        self._engine.check_not_started("a change of dtype")
        self._net._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(inputs), {}
    return (inputs,), {}


def _check_options(
    module: nn.Module,
    mode: str,
    microbatch_size: int | str,
    optimizer: OptimizerFactory | None,
    optimizer_kwargs: Mapping[str, Any] | None,
) -> None:
    if not isinstance(module, nn.Module):
        raise ConfigError(f"Harmony wraps an nn.Module, not {type(module).__name__}")
    if isinstance(module, Harmony):
        raise ConfigError("the module is a Harmony model already")
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    if microbatch_size != "auto" and (
        not isinstance(microbatch_size, int) or microbatch_size < 1
    ):
        raise ConfigError(f"microbatch_size={microbatch_size!r}: a positive number or 'auto'")
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer is an object; give the class and its options: optimizer="
            f"{type(optimizer).__name__}, optimizer_kwargs={{...}}"
        )
    if optimizer is None and optimizer_kwargs:
        raise ConfigError("optimizer_kwargs without an optimizer")
