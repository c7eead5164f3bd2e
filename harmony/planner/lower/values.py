"""Writes the instructions that bring values to the devices, send them on and drop them."""

from __future__ import annotations

from collections import defaultdict

from harmony.planner.ir.tasks import TensorRef
from harmony.planner.lower.stays import Origin, Stay
from harmony.planner.lower.steps import StepList


class ValueWriter:
    """Follows every stay from its first copy to its Drop.

    Attributes:
        done: per device the number of Runs written.
        arrivals: per device the stays that begin with a copy not yet written, by first use.
        users: per device and position the stays that the Run there uses.
        uses: per stay the Runs and copies that are still to come.
        due: per stay the position after which its Drop makes nobody wait.
        drops: per device and position the stays to drop after the Run there.
        alive: what is on each device.
        previous: per stay the one before of the same value on the same device.
        copied: stays whose first copy, or its Alloc, is written.
        expecting: per stay those that have memory and wait for what it will hold.
        unread: per device what is there when the step begins and nothing reads.
    """

    def __init__(
        self, steps: StepList, stays: list[Stay], num_devices: int, lookahead: int
    ) -> None:
        self.steps = steps
        self.lookahead = lookahead
        self.done = [0] * num_devices
        self.arrivals: list[list[Stay]] = [[] for _ in range(num_devices)]
        self.users: dict[tuple[int, int], list[Stay]] = defaultdict(list)
        self.uses: dict[Stay, int] = {}
        self.due: dict[Stay, int] = {}
        self.drops: dict[tuple[int, int], list[Stay]] = defaultdict(list)
        self.alive: dict[tuple[int, TensorRef], Stay] = {}
        self.copied: set[Stay] = set()
        self.expecting: dict[Stay, list[Stay]] = defaultdict(list)
        self.previous: dict[Stay, Stay] = {}
        self.unread: list[list[Stay]] = [[] for _ in range(num_devices)]
        latest: dict[tuple[int, TensorRef], Stay] = {}
        for stay in stays:
            if (stay.device, stay.ref) in latest:
                self.previous[stay] = latest[stay.device, stay.ref]
            latest[stay.device, stay.ref] = stay
            self.uses[stay] = len(stay.runs) + stay.leaves + len(stay.targets) + stay.lasts
            self.due[stay] = stay.runs[-1] if stay.runs else -1
            for position in stay.runs:
                self.users[stay.device, position].append(stay)
            if stay.origin is Origin.FOUND:
                self.alive[stay.device, stay.ref] = stay
                if not stay.runs:
                    self.unread[stay.device].append(stay)
            elif stay.origin is not Origin.MADE:
                self.arrivals[stay.device].append(stay)
        for waiting in self.arrivals:
            waiting.sort(key=lambda stay: stay.runs[0])

    def before(self, device: int) -> None:
        """Write the copies that are due before the next Run of a device.

        A copy whose source does not exist yet waits for a later Run; before the Run that needs
        it the source does exist, since Runs are written in a topological order.
        """
        while self.unread[device]:
            self._drop(self.unread[device].pop())
        position, left = self.done[device], []
        for at, stay in enumerate(self.arrivals[device]):
            if stay.runs[0] - self.lookahead > position:
                left += self.arrivals[device][at:]
                break
            if stay in self.copied:
                continue
            if stay.runs[0] == position or self._is_possible(stay):
                self._arrive(stay)
            else:
                left.append(stay)
        self.arrivals[device] = left

    def after(self, device: int) -> None:
        """Write what follows the Run that was just written on a device."""
        position = self.done[device]
        self.done[device] += 1
        users = self.users.pop((device, position), [])
        for stay in users:
            if stay.origin is Origin.MADE and stay.runs[0] == position:
                self.alive[device, stay.ref] = stay
            if stay.written == position:
                self._send_off(stay)
        for stay in users:
            self._used(stay)
        for stay in self.drops.pop((device, position), []):
            self._drop(stay)

    def finish(self, device: int) -> None:
        """Drop what is still on a device and is not to stay there."""
        for stay in [stay for (at, _), stay in self.alive.items() if at == device]:
            if not stay.lasts:
                self._drop(stay)

    def _is_possible(self, stay: Stay) -> bool:
        """Whether the copy can be written now without hurrying anything else."""
        if stay in self.previous and self.uses[self.previous[stay]]:
            return False
        if stay.origin is Origin.PEER or stay.sender is None:
            return True
        return self._is_written(stay.sender)

    def _is_written(self, stay: Stay) -> bool:
        return stay.written < self.done[stay.device]

    def _arrive(self, stay: Stay) -> None:
        self._make_room(stay)
        self.copied.add(stay)
        self.alive[stay.device, stay.ref] = stay
        self.steps.alloc(stay.device, stay.ref)
        if stay.origin is Origin.HOST:
            self.steps.swap_in(stay.device, stay.ref, stay.source or stay.ref)
            return
        assert stay.sender is not None
        if self._is_written(stay.sender):
            self._send(stay)
        else:
            self.expecting[stay.sender].append(stay)

    def _make_room(self, stay: Stay) -> None:
        """End an earlier stay of the same value, which two at once would be confused with."""
        earlier = self.alive.get((stay.device, stay.ref))
        if earlier is not None:
            for target in earlier.targets:
                if target not in self.copied:
                    self._arrive(target)
            self._drop(earlier)

    def _send_off(self, stay: Stay) -> None:
        """Write the copies of a value that has just got its last change here."""
        if stay.leaves:
            self.steps.swap_out(stay.device, stay.ref)
            self._copied_out(stay)
        for target in self.expecting.pop(stay, []):
            self._send(target)

    def _send(self, target: Stay) -> None:
        assert target.sender is not None
        self.steps.send(target.sender.device, target.ref, target.device)
        self._copied_out(target.sender)

    def _copied_out(self, stay: Stay) -> None:
        # Dropping at once would make compute wait for the copy.
        self.due[stay] = max(self.due[stay], self.done[stay.device] - 1 + self.lookahead)
        self._used(stay)

    def _used(self, stay: Stay) -> None:
        self.uses[stay] -= 1
        if not self.uses[stay]:
            self.drops[stay.device, max(self.due[stay], self.done[stay.device] - 1)].append(stay)

    def _drop(self, stay: Stay) -> None:
        if self.alive.get((stay.device, stay.ref)) is stay:
            del self.alive[stay.device, stay.ref]
            self.steps.drop(stay.device, stay.ref)
