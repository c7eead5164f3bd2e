"""What the server is: its devices, its host memory, its links. Data only, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from harmony.core.files import amount, check_types

_NEVER_ZERO = {
    "memory_nbytes",
    "h2d_bytes_per_s",
    "d2h_bytes_per_s",
    "p2p_bytes_per_s",
    "accumulate_bytes_per_s",
    "num_cores",
}


@dataclass(frozen=True)
class Device:
    """One GPU, real or virtual.

    Attributes:
        name: e.g. ``"vgpu:0"`` or ``"NVIDIA H100"``.
        memory_nbytes: bytes that Harmony may use on it.
        h2d_bytes_per_s: host to device bandwidth of its link.
        d2h_bytes_per_s: device to host bandwidth.
        p2p_bytes_per_s: bandwidth to another device, whichever way (see `Machine.peer_links`).
        task_overhead_s: fixed seconds that one Run costs beyond its layers' work.
        update_bytes_per_s: gradient bytes per second that an update on the device takes in; 0
            where updates run on the host only.
    """

    name: str
    memory_nbytes: int
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    p2p_bytes_per_s: float
    task_overhead_s: float = 0.0
    update_bytes_per_s: float = 0.0


@dataclass(frozen=True)
class Host:
    """The host side of the server.

    Attributes:
        memory_nbytes: bytes of host memory that Harmony may use.
        accumulate_bytes_per_s: gradient bytes per second when one part is added to another.
        num_cores: CPU cores.
        memory_bytes_per_s: bytes per second that the memory carries, reads and writes together:
            every copy from or to a device takes its bytes of it, an accumulation three times
            those of the part, an update ``update_memory_factor`` times those of the gradients.
            0 where it is no limit.
        update_memory_factor: bytes that an update reads and writes per byte of the gradients: 7
            for AdamW in fp32, which reads gradient, weight and two states and writes the latter
            three.
    """

    memory_nbytes: int
    accumulate_bytes_per_s: float = 4e9
    num_cores: int = 1
    memory_bytes_per_s: float = 0.0
    update_memory_factor: float = 7.0


@dataclass(frozen=True)
class Switch:
    """Devices behind one link to the host, which they share; each direction is on its own.

    Attributes:
        devices: indices of the devices.
        h2d_bytes_per_s, d2h_bytes_per_s: what all of them together get from and to the host.
    """

    devices: tuple[int, ...]
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float


@dataclass(frozen=True)
class Machine:
    """A server: devices and the host that feeds them.

    Attributes:
        cpu_share: how much of a host core a device wants while it computes: 0 for real GPUs,
            about 1 for virtual ones, more where busy cores slow each other down (shared caches,
            hyper-threads). Devices that together want more cores than there are run slower.
        switches: links to the host that several devices share; a device may be behind several.
        peer_links: how a copy goes from device to device: over a link of its own (``"direct"``:
            NVLink) or over the sender's link to the host, the receiver's, and the switches that
            they do not share (``"host"``: PCIe).
        updates_alike: whether an update on a device has the same bits as one on the host.
        updates_wait: whether no parameter is updated before all gradients are on the host.
        updates_overlap: whether a step may leave updates to the next one, to be made behind the
            forwards in front of their packs.
    """

    devices: tuple[Device, ...]
    host: Host
    cpu_share: float = 0.0
    switches: tuple[Switch, ...] = ()
    peer_links: Literal["direct", "host"] = "direct"
    updates_alike: bool = True
    updates_wait: bool = False
    updates_overlap: bool = False

    @property
    def num_devices(self) -> int:
        """How many devices the server has."""
        return len(self.devices)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that ``from_json`` reads back."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Machine:
        """Read what ``to_json`` wrote.

        Raises:
            TypeError, ValueError: if something is of another type, or makes no sense.
        """
        switches = (
            Switch(tuple(switch["devices"]), switch["h2d_bytes_per_s"], switch["d2h_bytes_per_s"])
            for switch in data.get("switches", ())
        )
        machine = Machine(
            tuple(Device(**device) for device in data["devices"]),
            Host(**data["host"]),
            data.get("cpu_share", 0.0),
            tuple(switches),
            data.get("peer_links", "direct"),
            data.get("updates_alike", True),
            data.get("updates_wait", False),
            data.get("updates_overlap", False),
        )
        check_types(machine, Machine)
        _check(machine)
        return machine


def _check(machine: Machine) -> None:
    """Refuse what no machine has."""
    if not machine.devices:
        raise ValueError("it has no devices")
    for part in (*machine.devices, machine.host, *machine.switches, machine):
        for name, value in vars(part).items():
            if isinstance(value, (int, float)):
                amount(value + 0, name)
                too_slow = 0 < value < 1 and name.endswith("_per_s")
                if too_slow or (value == 0 and name in _NEVER_ZERO):
                    raise ValueError(f"{name} is {value}")
    for switch in machine.switches:
        if not set(switch.devices) <= set(range(machine.num_devices)):
            raise ValueError(f"a switch of devices {switch.devices} of {machine.num_devices}")
