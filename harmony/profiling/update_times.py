"""Measures the optimizer: the seconds of its update, on host and device, its state, its memory.

All of it on small copies with parameters like the model's largest
(`harmony.runtime.update.stand_ins`), so that an optimizer that wants matrices gets them. One that
fails there is not measured at all, nor is one whose step writes to more than its copy has.

What is found decides plans, and through them the last bits of a step. So it is the same whether
the optimizer has taken steps or not: the copies are as new, and take their first steps before they
are measured, since some optimizers do more from a later step on (RAdam from its sixth).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from harmony.capture.trace.isolation import undisturbed
from harmony.core.machine import Machine
from harmony.profiling.server import best_of, out_of_cache, timed
from harmony.runtime import native
from harmony.runtime.device import DeviceContext, streams_restored
from harmony.runtime.host.pinned_memory import Place
from harmony.runtime.update.native_step import own_step
from harmony.runtime.update.optimizer import PackOptimizer
from harmony.runtime.update.part_step import step_part
from harmony.runtime.update.stand_ins import Shape, StandIn, stand_in, usual_choice

_SAMPLES = (1 << 16, 1 << 20)
"""Elements of the parameter that is timed: the larger one only where that takes no time."""

_QUICK_S = 0.005
_STATE_SAMPLE = 1 << 20
_TRIED = 4
"""Parameters that are updated at once on a device, to see whether its temporaries grow."""

_FIRST_STEPS = 8
"""Steps that a copy takes before it is measured, and for which it is compared."""

_GROWS = 1.25
_NARROW, _OTHER_DEVICE = 2e-2, 1e-4
"""What a result may be off by on a real GPU, whose kernels round otherwise, by its dtype."""

_UNKNOWN_SECONDS = 4e-9
_UNKNOWN_STATES = 2.0
"""What is taken of an optimizer that cannot be tried: as much as AdamW takes, unfused."""


def kind_of(dtype: torch.dtype, num_dims: int) -> str:
    """What bytes of state are told apart by: optimizers make it as the parameter is."""
    return f"{dtype}/{num_dims}"


@dataclass(frozen=True)
class UpdateCost:
    """What the optimizer costs.

    Attributes:
        seconds: of one update on the host, per element of a parameter.
        state_nbytes: bytes of its state, per element, by `kind_of` the parameter.
        device_bytes_per_s: bytes of gradients that an update on a device takes in a second; 0
            where it does not work there, or other than on the host.
        temporary_nbytes: bytes that an update on a device takes while it runs, per element of the
            largest parameter.
        alike: whether an update on a device computes the same bits.
    """

    seconds: float
    state_nbytes: Mapping[str, float] = field(default_factory=dict)
    device_bytes_per_s: float = 0.0
    temporary_nbytes: float = 0.0
    alike: bool = False

    def state_of(self, place: Place) -> int:
        """Bytes of the state of a parameter."""
        known = self.state_nbytes.get(kind_of(place.dtype, len(place.shape)))
        if known is None:
            known = max(self.state_nbytes.values(), default=0.0)
        return round(known * _count(place.shape))

    def temporary_of(self, place: Place) -> int:
        """Bytes that an update of a parameter on a device takes while it runs."""
        return math.ceil(self.temporary_nbytes * _count(place.shape))


NO_UPDATE = UpdateCost(0.0)
"""Where the optimizer is the user's."""


def with_device_updates(machine: Machine, cost: UpdateCost) -> Machine:
    """The machine, with the speed of this optimizer on its devices."""
    devices = (
        replace(device, update_bytes_per_s=cost.device_bytes_per_s) for device in machine.devices
    )
    alike = cost.alike or not cost.device_bytes_per_s  # then none is there
    return replace(machine, devices=tuple(devices), updates_alike=alike)


def with_copies(cost: UpdateCost, dtype: torch.dtype | None) -> UpdateCost:
    """The cost where each update is followed by a copy of the fp32 parameter in another type."""
    return cost if dtype is None else replace(cost, seconds=cost.seconds + _copy_seconds(dtype))


@functools.cache
def _copy_seconds(dtype: torch.dtype) -> float:
    """Seconds that a copy of fp32 memory in a type takes, per element."""
    count = _SAMPLES[-1]
    copy, master = torch.empty(count, dtype=dtype), torch.zeros(count)
    return best_of(timed(lambda: copy.copy_(master))) / count


def measure_update(optimizer: PackOptimizer, context: DeviceContext | None = None) -> UpdateCost:
    """Time small copies of an optimizer, and count their state.

    Args:
        context: the device to try it on as well.
    """
    if optimizer.writes_elsewhere:
        return _unknown(optimizer)
    device = torch.device("cpu") if context is None else context.device
    with undisturbed(device), torch.enable_grad():
        copies = _Copies(optimizer)
        cost = _on_the_host(copies, cold=device.type != "cpu" and not native.is_virtual(device))
        if cost is None:
            return _unknown(optimizer)
        if context is None or optimizer.waits is not None:
            return cost
        with streams_restored([context]):
            rate, temporary, alike = _on_a_device(copies, context)
        return replace(cost, device_bytes_per_s=rate, temporary_nbytes=temporary, alike=alike)


class _Copies:
    """Makes small copies of an optimizer, without its state where they can start without one.

    Attributes:
        params: the parameters of the optimizer.
        largest: the largest of them.
    """

    def __init__(self, optimizer: PackOptimizer) -> None:
        self._full = optimizer.full
        self._is_whole = optimizer.together is not None
        self.params = list(optimizer.params())
        self.largest = max(self.params, key=torch.Tensor.numel)
        self._with_state = bool(self._full.state) and not self._starts_without()

    def _starts_without(self) -> bool:
        """Whether the optimizer makes its state in the first step, as most do."""
        self._with_state = False
        try:
            self.step(self.new())
        except Exception:  # a step of the user's own may fail in any way
            return False
        return True

    def new(self, chosen: dict[int, Shape] | None = None) -> StandIn:
        """A copy with gradients.

        Args:
            chosen: see `stand_in`.
        """
        made = stand_in(self._full, chosen, with_state=self._with_state)
        _give_gradients(made)
        return made

    def on_the_host(self, chosen: dict[int, Shape]) -> StandIn:
        """A copy with gradients whose step can be taken on the host, whatever the optimizer is."""
        return self.new({**usual_choice(self._full, 1), **chosen} if self._is_whole else chosen)

    def step(self, made: StandIn) -> None:
        """Take a step of a copy on the host."""
        if self._is_whole:
            own_step(made.optimizer)
        else:
            step_part(made.optimizer, made.params)


def _on_the_host(copies: _Copies, *, cold: bool) -> UpdateCost | None:
    try:
        state = _state(copies)
        seconds = 0.0
        for count in _SAMPLES:
            made = copies.on_the_host({id(copies.largest): _scaled(copies.largest, count)})
            once = timed(partial(copies.step, made))
            for _ in range(_FIRST_STEPS):
                once()
            num_elements = sum(param.numel() for param in made.params)
            seconds = best_of(out_of_cache(once) if cold else once) / max(1, num_elements)
            if seconds * num_elements > _QUICK_S:
                break
    except Exception:  # a step of the user's own may fail in any way on what it does not expect
        return None
    return UpdateCost(seconds, state)


def _state(copies: _Copies) -> dict[str, float]:
    """Bytes of state per element, by kind of parameter, of the largest of each."""
    largest: dict[str, nn.Parameter] = {}
    for param in copies.params:
        kind = kind_of(param.dtype, param.dim())
        if kind not in largest or param.numel() > largest[kind].numel():
            largest[kind] = param
    chosen = {
        id(param): _scaled(param, min(_STATE_SAMPLE, param.numel())) for param in largest.values()
    }
    made = copies.on_the_host(chosen)
    copies.step(made)
    found: dict[str, float] = {}
    for param in sorted(made.params, key=torch.Tensor.numel):  # the largest of a kind last
        held = made.optimizer.state.get(param, {}).values()
        nbytes = sum(v.nbytes for v in held if isinstance(v, torch.Tensor) and v.dim())
        found[kind_of(param.dtype, param.dim())] = nbytes / max(1, param.numel())
    return found


def _on_a_device(copies: _Copies, context: DeviceContext) -> tuple[float, float, bool]:
    """Gradient bytes per second there, and bytes of temporaries per element; 0 if it cannot.

    Also whether it computes the same bits there.
    """
    context.enter()
    context.use("compute")
    try:
        alike = _same_there(copies, context)
        temporary = None if alike is None else _temporary(copies, context)
        if alike is None or temporary is None:
            return 0.0, 0.0, False
        return _rate(copies, context, temporary), temporary, alike
    except Exception:  # an optimizer of the user's may be for the CPU only
        return 0.0, 0.0, False


def _same_there(copies: _Copies, context: DeviceContext) -> bool | None:
    """Whether steps on the device lead to the bits that they lead to on the host.

    None if they lead elsewhere.
    """
    alike = True
    here, there = copies.new(), copies.new()
    exact = native.is_virtual(context.device)
    for step in range(_FIRST_STEPS):
        for made in (here, there):
            _give_gradients(made, step)
        step_part(here.optimizer, here.params)
        on_device = _on_device(there, context)
        step_part(there.optimizer, there.params, on_device)
        context.synchronize()
        for param, moved, stays in zip(here.params, on_device, there.params, strict=True):
            off = _OTHER_DEVICE if param.dtype.itemsize >= 4 else _NARROW
            found = moved.detach().cpu()
            alike = alike and torch.equal(found, param)
            close = torch.allclose(found, param, rtol=off, atol=off, equal_nan=True)
            if not close or (exact and not alike):
                return None
            stays.data.copy_(found)
    return alike


def _temporary(copies: _Copies, context: DeviceContext) -> float | None:
    """Bytes of temporaries per element of the largest parameter; None if they grow with more."""
    largest = copies.largest
    like = [p for p in copies.params if (p.dtype, p.dim()) == (largest.dtype, largest.dim())]
    like = [largest, *(p for p in like if p is not largest)][:_TRIED]
    free = native.memory_info(context.device)[0]
    count = max(1, min(_SAMPLES[0], free // 1024))
    made = copies.new({id(p): _scaled(largest, count) for p in like})
    on_device = _on_device(made, context)
    num_elements = max(param.numel() for param in made.params)

    def peak(number: int) -> int:
        pairs = made.params[:number], on_device[:number]
        for _ in range(_FIRST_STEPS):
            step_part(made.optimizer, *pairs)
        context.synchronize()
        torch.accelerator.reset_peak_memory_stats(context.device)
        before = torch.accelerator.memory_allocated(context.device)
        step_part(made.optimizer, *pairs)
        context.synchronize()
        return torch.accelerator.max_memory_allocated(context.device) - before

    few, many = peak(min(2, len(like))), peak(len(like))
    if many > _GROWS * few + 4096:
        return None
    return max(few, many) / num_elements


def _rate(copies: _Copies, context: DeviceContext, temporary: float) -> float:
    largest = copies.largest
    free = native.memory_info(context.device)[0]
    count = max(1, min(_SAMPLES[-1], int(free / (64 + 2 * temporary))))
    rate = 0.0
    for most in (min(_SAMPLES[0], count), count):
        made = copies.new({id(largest): _scaled(largest, most)})
        on_device = _on_device(made, context)
        once = _timed_there(made, on_device, context)
        for _ in range(_FIRST_STEPS):
            once()
        seconds = best_of(once)
        rate = sum(param.nbytes for param in on_device) / max(seconds, 1e-9)
        if seconds > _QUICK_S:
            break
    return rate


def _timed_there(
    made: StandIn, on_device: Sequence[nn.Parameter], context: DeviceContext
) -> Callable[[], float]:
    stream = context.use("compute")

    def once() -> float:
        begin, end = (context.new_event(timing=True) for _ in range(2))
        stream.record_event(begin)
        step_part(made.optimizer, made.params, on_device)
        stream.record_event(end)
        stream.synchronize()
        return begin.elapsed_time(end) / 1e3

    return once


def _on_device(made: StandIn, context: DeviceContext) -> list[nn.Parameter]:
    """The parameters of a copy on the device, with their gradients."""
    found = []
    for param in made.params:
        copy = nn.Parameter(param.detach().to(context.device))
        assert param.grad is not None
        copy.grad = param.grad.to(context.device)
        found.append(copy)
    return found


def _give_gradients(made: StandIn, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in made.params:
        wide = torch.complex64 if param.is_complex() else torch.float32
        param.grad = torch.randn(param.shape, generator=generator, dtype=wide).to(param.dtype)


def _scaled(param: nn.Parameter, count: int) -> Shape:
    """A shape of as many dimensions as a parameter's and about so many elements."""
    shape = tuple(param.shape)
    factor = (count / max(1, _count(shape))) ** (1 / max(1, len(shape)))
    return tuple(max(1, round(side * factor)) for side in shape)


def _count(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _unknown(optimizer: PackOptimizer) -> UpdateCost:
    kinds = {kind_of(p.dtype, p.dim()): p.dtype.itemsize for p in optimizer.params()}
    state = {kind: _UNKNOWN_STATES * size for kind, size in kinds.items()}
    return UpdateCost(_UNKNOWN_SECONDS, state)
