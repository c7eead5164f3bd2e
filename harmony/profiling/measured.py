"""What is measured once for all captures of a model: the machine, the optimizer, its layers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

from torch import nn

from harmony.core.machine import Machine
from harmony.profiling.cache import MeasureCache, open_cache
from harmony.profiling.layer_times import KnownTimes
from harmony.profiling.server import measure_machine
from harmony.profiling.steady import Steady, steady_of
from harmony.profiling.update_times import UpdateCost, measure_update
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.out_of_memory import with_room
from harmony.runtime.update.optimizer import PackOptimizer


class Measurements:
    """Measures at first use, or takes what an earlier run has measured.

    Args:
        net: the model, by whose code the seconds of its layers are kept.
        contexts: the devices; none where no layer is to run.
        limits: bytes to use of each device and of the host; None for what is free.
        warn: hears of measurements of earlier runs that cannot be used.
    """

    def __init__(
        self,
        net: nn.Module,
        contexts: Sequence[DeviceContext],
        limits: tuple[int | None, int | None],
        warn: Callable[[str], None],
    ) -> None:
        self._net = net
        self._contexts = contexts
        self._limits = limits
        self._warn = warn
        self._cache: MeasureCache | None = None
        self._is_open = False
        self._machine: Machine | None = None
        self._updates: dict[bool, UpdateCost] = {}
        self._steady: Steady | None = None
        self._update: UpdateCost | None = None
        self._times: KnownTimes | None = None
        self._num_kept = 0

    def machine(self) -> Machine:
        """Links and memory of the devices and the host."""
        if self._machine is None:
            gc.collect()  # nobody holds it any more: such memory is free
            devices = [context.device for context in self._contexts]
            self._machine = with_room("the measurement of the links", devices, self._measured)
        return self._machine

    def _measured(self) -> Machine:
        cache, limits = self._opened(), self._limits
        if cache is None:
            return measure_machine(self._contexts, *limits)
        return cache.machine(
            self._contexts, *limits, lambda: measure_machine(self._contexts, *limits)
        )

    def steady(self) -> Steady:
        """The machine without what was timed of it."""
        if self._steady is None:
            cores = self.machine().host.num_cores
            self._steady = steady_of(self._contexts, self._limits, cores)
        return self._steady

    def update(self, optimizer: PackOptimizer) -> UpdateCost:
        """What the optimizer costs; measured again where its updates wait, or no longer do."""
        waits = optimizer.waits is not None
        if waits not in self._updates:
            cache = self._opened()
            context = self._contexts[0] if self._contexts else None
            if cache is None:
                self._updates[waits] = measure_update(optimizer, context)
            else:
                self._updates[waits] = cache.update(
                    optimizer, lambda: measure_update(optimizer, context)
                )
        self._update = self._updates[waits]
        return self._update

    @property
    def known_update(self) -> UpdateCost | None:
        """What the optimizer costs, if that has been asked for."""
        return self._update

    def times(self) -> KnownTimes:
        """Seconds of layers; who measures others adds them and calls `keep`."""
        if self._times is None:
            cache = self._opened()
            self._times = KnownTimes() if cache is None else cache.times(self._net)
            self._num_kept = len(self._times.seconds)
        return self._times

    def keep(self) -> None:
        """Keep the seconds of layers for the next run, if there are new ones."""
        times = self.times()
        if self._cache is not None and len(times.seconds) > self._num_kept:
            self._cache.keep_times(self._net, times)
            self._num_kept = len(times.seconds)

    def _opened(self) -> MeasureCache | None:
        """What earlier runs measured; None where nothing is kept."""
        if not self._is_open:
            self._is_open = True
            self._cache = open_cache(self._contexts, self._warn) if self._contexts else None
        return self._cache
