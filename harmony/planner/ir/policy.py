"""The choices that lowering leaves open: how many buffers, how far ahead, keep or swap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harmony.errors import ConfigError
from harmony.planner.ir.tasks import Pack


@dataclass(frozen=True)
class Policy:
    """How a task graph is lowered to a schedule.

    Attributes:
        weight_slots: packs of weights that a device holds at once; 2 is double buffering: the
            next pack arrives while this one computes. 1 saves memory and overlaps nothing.
        gradient_slots: packs of gradients that a device holds at once; with 2, one leaves while
            the next is made.
        lookahead: how many Runs ahead a value is fetched, and how many Runs a value on its way
            out may take to leave before compute waits for it.
        boundary: a value that the next pack on the same device reads either stays there
            (``"keep"``) or goes to the host and comes back (``"swap"``). With ``"host"`` one that
            the next pack reads on another device goes through the host too: slower than p2p, but
            what is on its way waits in host memory.
        hold: per device, how many of its last FORWARD packs leave their weights there until their
            BACKWARD, in slots beyond ``weight_slots``. Only a pack that is a BACKWARD pack of the
            same device too can be held.
        offload: of the packs in ``StepSpec.kept`` those whose activations wait for the BACKWARD on
            the host; those of the others stay on the device.
        resident: packs whose weights stay on their device between steps. Those that are trained
            keep their optimizer state there too and are updated there; only the new weights go to
            the host, where everybody may read them. Such a pack is FORWARD and BACKWARD pack of
            one device (or the last pack); one share only.
        mirror: with several devices, BACKWARD of pack i runs where FORWARD of pack i ran, instead
            of on the next device of the ring.
    """

    weight_slots: int = 2
    gradient_slots: int = 2
    lookahead: int = 2
    boundary: Literal["keep", "swap", "host"] = "keep"
    hold: int = 0
    offload: tuple[Pack, ...] = ()
    resident: tuple[Pack, ...] = ()
    mirror: bool = False

    def __post_init__(self) -> None:
        for name in ("weight_slots", "gradient_slots", "lookahead"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hold < 0:
            raise ConfigError(f"hold must be at least 0, not {self.hold}")
        if self.boundary not in ("keep", "swap", "host"):
            raise ConfigError(f'boundary is "keep", "swap" or "host", not {self.boundary!r}')


LEAN = Policy(1, 1, 1, "host")
"""The policy that needs the least memory of a device."""
