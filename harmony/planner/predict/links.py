"""What the activities of a machine share, by name: links, switches, host memory, cores.

gpu0.h2d  gpu0.d2h  gpu0.p2p     the links of a device
switch0.h2d  switch0.d2h         a link to the host that several devices share
memory                           host memory: copies, updates and accumulations
cores                            cores of the host, where devices are virtual
"""

from __future__ import annotations

from functools import cached_property

from harmony.core.machine import Machine
from harmony.planner.ir.schedule import Op
from harmony.planner.predict.flows import Resource

Path = tuple[str, ...]

_ACCUMULATE_FACTOR = 3
"""Bytes that the host moves per byte that it adds: two reads and a write."""


class Links:
    """Names and rates of what a machine's activities share.

    Attributes:
        num_devices: how many of the machine's devices are in use, from the first on; the static
            model divides a switch among those of its devices that are.
        resources: every resource by name.
    """

    def __init__(self, machine: Machine, num_devices: int | None = None) -> None:
        self.machine = machine
        self.num_devices = machine.num_devices if num_devices is None else num_devices
        self.resources = self._resources()
        self._known: dict[tuple[Op, int, int | None], Path] = {}

    def path(self, op: Op, device: int, peer: int | None = None) -> Path:
        """What a SwapIn or SwapOut of a device, or its Send to a peer, goes through."""
        key = (op, device, peer)
        if key not in self._known:
            if op is Op.SEND:
                self._known[key] = self._to_peer(device, device if peer is None else peer)
            else:
                way = "h2d" if op is Op.SWAP_IN else "d2h"
                names = [f"gpu{device}.{way}"]
                names += [f"switch{index}.{way}" for index in self._switches[device]]
                self._known[key] = (*names, *self._memory)
        return self._known[key]

    def update_units(self, seconds: float, gradient_nbytes: int) -> tuple[float, Path]:
        """Units and resources of an update on the host that takes ``seconds`` alone."""
        if self.machine.cpu_share:
            return seconds, ("cores",)
        return gradient_nbytes * self.machine.host.update_memory_factor, self._memory

    def accumulate_units(self, seconds: float, nbytes: int) -> tuple[float, Path]:
        """Units and resources of adding ``nbytes`` of gradients on the host."""
        if self.machine.cpu_share:
            return seconds, ("cores",)
        return nbytes * _ACCUMULATE_FACTOR, self._memory

    def compute_units(self, seconds: float) -> tuple[float, Path]:
        """Units and resources of a Run of a device."""
        # What virtual GPUs take of the cores says what they take of the memory as well
        # (`Machine.cpu_share`), so a machine has one of the two resources only.
        if self.machine.cpu_share:
            return seconds * self.machine.cpu_share, ("cores",)
        return 0.0, ()

    @cached_property
    def _memory(self) -> Path:
        is_limit = self.machine.host.memory_bytes_per_s > 0 and not self.machine.cpu_share
        return ("memory",) if is_limit else ()

    @cached_property
    def _switches(self) -> tuple[tuple[int, ...], ...]:
        """Per device the switches that it is behind."""
        switches = self.machine.switches
        return tuple(
            tuple(index for index, switch in enumerate(switches) if device in switch.devices)
            for device in range(self.machine.num_devices)
        )

    def _to_peer(self, device: int, peer: int) -> Path:
        own: Path = (f"gpu{device}.p2p",)
        if self.machine.peer_links == "direct":
            return own
        here, there = self._switches[device], self._switches[peer]
        up = [f"switch{index}.d2h" for index in here if index not in there]
        down = [f"switch{index}.h2d" for index in there if index not in here]
        return (*own, f"gpu{device}.d2h", *up, *down, f"gpu{peer}.h2d")

    def _resources(self) -> dict[str, Resource]:
        machine, found = self.machine, {}
        for index, device in enumerate(machine.devices):
            found[f"gpu{index}.h2d"] = Resource(device.h2d_bytes_per_s)
            found[f"gpu{index}.d2h"] = Resource(device.d2h_bytes_per_s)
            found[f"gpu{index}.p2p"] = Resource(device.p2p_bytes_per_s)
        for index, switch in enumerate(machine.switches):
            used = max(1, sum(device < self.num_devices for device in switch.devices))
            found[f"switch{index}.h2d"] = Resource(switch.h2d_bytes_per_s, used)
            found[f"switch{index}.d2h"] = Resource(switch.d2h_bytes_per_s, used)
        if self._memory:
            found["memory"] = Resource(machine.host.memory_bytes_per_s)
        if machine.cpu_share:
            found["cores"] = Resource(float(max(1, machine.host.num_cores)))
        return found
