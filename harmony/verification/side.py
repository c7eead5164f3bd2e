"""What a comparison with plain PyTorch takes of Harmony's side, and how that is left alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from harmony.capture import DynamicOnlyError
from harmony.capture.graph.structure import flatten
from harmony.capture.trace.isolation import undisturbed
from harmony.core.units import format_bytes
from harmony.engine.call_key import CallKind
from harmony.engine.engine import Engine
from harmony.errors import DoesNotFitError
from harmony.planner.ir.tasks import Samples, TaskKind
from harmony.reference.plain_step import Parts, Result, Tensors
from harmony.reference.snapshot import Snapshot
from harmony.runtime import native
from harmony.runtime.host.limits import available_host_nbytes
from harmony.verification.verification import OTHER_DEVICE

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Positional arguments, keyword arguments, targets."""

_COUNTERS = ("num_steps", "last_timeline", "feedback")
_MACHINERY = frozenset(vars(torch.optim.SGD([torch.zeros(1)], 0.1)))


@dataclass
class Found(Result):
    """What Harmony's step has left.

    Attributes:
        params: all parameters after it.
        state: of the optimizer, by what it is of.
        parts: the microbatches that it ran.
    """

    params: Tensors = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    parts: Parts = ()

    @property
    def num_microbatches(self) -> int:
        """Of all replicas."""
        return sum(len(replica) for replica in self.parts)


@dataclass(frozen=True)
class Reference:
    """What Harmony's step is held against.

    Attributes:
        factor: on the tolerance.
        computed: the type that both sides cast parameters and inputs to; None if they do not.
    """

    result: Result
    factor: float
    words: str
    computed: torch.dtype | None = None


def device_factor(engine: Engine) -> float:
    """Return the factor on the tolerance where the two run on other kinds of devices."""
    elsewhere = not native.is_virtual(engine.devices[0])
    return OTHER_DEVICE if elsewhere and reference_device(engine).type == "cpu" else 1.0


def reference_device(engine: Engine) -> torch.device:
    """Where plain PyTorch runs: on the host for virtual GPUs, else on the GPU if it fits.

    A GPU has kernels and random numbers of its own. The parameters stay on the host either way.
    """
    device, cpu = engine.devices[0], torch.device("cpu")
    if native.is_virtual(device):
        return cpu
    free, _ = native.memory_info(device)
    need = 3 * sum(p.nbytes for p in engine.net.parameters())  # with gradients, and activations
    return device if need < free else cpu


def parts_of(engine: Engine, minibatch: int) -> Parts:
    """The microbatches of the step that Harmony has just run."""
    plan = engine.record.plan
    if plan is not None and plan.minibatch == minibatch:
        spec = plan.spec
        every = range(len(spec.shares))
        return tuple(tuple(spec.microbatches(r, TaskKind.BACKWARD)) for r in every)
    size = engine.dynamic_size or minibatch
    lows = range(0, minibatch, size)
    return (tuple((low, min(low + size, minibatch)) for low in lows),)


def weights_of(engine: Engine, call: Call) -> dict[Samples, float]:
    """What the loss of each microbatch counts in Harmony's step; empty where it is not known."""
    args, kwargs, targets = copied(call)
    kind = CallKind.OWN_LOOP if engine.optimizer is None else CallKind.TRAIN_STEP
    try:
        ready = engine.ready(kind, args, kwargs, targets if kind is CallKind.TRAIN_STEP else None)
    except DynamicOnlyError:
        return {}
    loss = ready.variant.graph.loss
    value = next((v for v, _ in ready.weights), None) if loss is None else loss
    return {samples: weight for (v, samples), weight in ready.weights.items() if v == value}


@contextmanager
def untouched(engine: Engine) -> Iterator[Snapshot]:
    """Put everything back afterwards: the model, its optimizer, counters, random states."""
    optimizer = engine._optimizer
    if optimizer is not None:
        optimizer.bring_home(engine.net.parameters())
    counters = {name: engine.__dict__[name] for name in _COUNTERS}
    snapshot = Snapshot(engine.net, engine.options.loss_fn, engine.optimizer, optimizer)
    engine.feedback = None
    with undisturbed(engine.devices[0]):
        try:
            yield snapshot
        finally:
            snapshot.restore()
            engine.__dict__.update(counters)
            engine.whole.is_as_before()


def no_gradients(engine: Engine) -> None:
    """Let no parameter have a gradient."""
    for param in engine.net.parameters():
        param.grad = None


@contextmanager
def hooks_off(net: torch.nn.Module) -> Iterator[None]:
    """Keep hooks on parameters still: autograd calls them itself, for Harmony's gradients too."""
    held = [p._backward_hooks for p in net.parameters() if p._backward_hooks]
    before = [dict(hooks) for hooks in held]
    for hooks in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in zip(held, before, strict=True):
            hooks.update(kept)


def copied(call: Call) -> Call:
    """The caller's inputs, in memory of their own: a forward may change them."""
    leaves, structure = flatten(call)
    copies = {
        id(leaf): leaf.detach().clone().requires_grad_(leaf.requires_grad)
        for leaf in leaves
        if isinstance(leaf, torch.Tensor)
    }
    args, kwargs, targets = structure.unflatten(copies.get(id(leaf), leaf) for leaf in leaves)
    return args, kwargs, targets


def gradients_of(engine: Engine) -> Tensors:
    """Copies of the gradients that there are."""
    pairs = ((n, p.grad) for n, p in engine.net.named_parameters())
    return {name: grad.detach().cpu().clone() for name, grad in pairs if grad is not None}


def states_of(optimizer: torch.optim.Optimizer | None, net: torch.nn.Module) -> dict[str, Any]:
    """What an optimizer keeps for parameters and groups, as copies: tensors and numbers."""
    found: dict[str, Any] = {}
    names = {id(param): name for name, param in net.named_parameters()}
    for param, held in () if optimizer is None else optimizer.state.items():
        for key, value in held.items() if isinstance(held, dict) else ():
            found[f"{key} of {names.get(id(param), param)}"] = value
    for index, group in enumerate(() if optimizer is None else optimizer.param_groups):
        for key, value in group.items():
            found[f"{key} of group {index}"] = value
    return {
        name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        for name, value in found.items()
        if isinstance(value, (torch.Tensor, int, float)) and not isinstance(value, bool)
    }


def own_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Build the user's optimizer in its class' own default form, in the state of Harmony's."""
    full, options = engine.optimizer, engine.options
    assert full is not None and options.optimizer is not None
    asked = {key for group in options.groups_of(engine.net) or () for key in group}
    form = {"fused", "foreach"} - asked  # Harmony's choice, or none
    groups = [
        {key: _copy(value) for key, value in group.items() if key not in {"params", *form}}
        | {"params": list(group["params"])}
        for group in full.param_groups
    ]
    optimizer = options.optimizer(groups, **options.optimizer_kwargs)
    for param, held in full.state.items():
        optimizer.state[param] = _copy(held)
    known = {*vars(optimizer), *vars(torch.optim.Optimizer([torch.zeros(1)], {}))}
    for name, value in vars(full).items():
        if name in known and name not in _MACHINERY and _is_value(value):
            setattr(optimizer, name, _copy(value))
    return optimizer


def _is_value(held: Any) -> bool:
    return isinstance(held, (int, float, torch.Tensor, list, dict, tuple, str, type(None)))


def _copy(held: Any) -> Any:
    if isinstance(held, dict):
        return {key: _copy(value) for key, value in held.items()}
    if isinstance(held, torch.Tensor):
        return held.detach().clone()
    return copy.deepcopy(held)


def check_room(engine: Engine) -> None:
    """Refuse what would need more host memory than there is.

    Raises:
        DoesNotFitError: with the bytes.
    """
    tensors = [*engine.net.parameters(), *engine.net.buffers()]
    params = sum(tensor.nbytes for tensor in tensors)
    trained = sum(p.nbytes for p in engine.net.parameters() if p.requires_grad)
    # Two more copies of the parameters, gradients of both, the optimizer's state twice.
    need = 3 * params + 3 * trained + (4 * trained if engine.optimizer is not None else 0)
    free = available_host_nbytes()
    if need > free:
        raise DoesNotFitError(
            f"verify keeps copies to compare, {format_bytes(need)} of host memory, but only "
            f"{format_bytes(free)} are free. Verify a smaller model of the same kind"
        )
