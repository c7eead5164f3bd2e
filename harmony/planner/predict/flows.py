"""Runs activities on lanes and shared resources: two machine models behind one interface.

An *activity* is a copy, a task or an update. It stands in a queue on each of its *lanes* (a
stream, a thread), in the order in which activities were added, and starts when it is first on all
of them and its predecessors are over. It takes fixed seconds, or moves units (bytes,
core-seconds) through *resources*: links, switches, host memory, cores.

    static   every copy gets 1/n of a resource that n share, all the time, whether or not the
             others use it (the model of PVLDB 15(11), 2022). Durations are fixed.
    fair     the flows that are under way share each resource max-min fairly: no flow can get more
             without another that has no more than it getting less. Each flow's rate changes
             whenever one starts or ends that it competes with.

What cannot be contended is found out beforehand: a resource that carries all lanes that use it at
their full rates never slows anything, and the activities on such resources only have fixed
durations. So independent links cost no more to simulate than fixed times.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from typing import Literal

from harmony.errors import ScheduleError

Model = Literal["fair", "static"]

_SLACK = 1.0 + 1e-9
"""Demands are sums of floats that come and go; one that exceeds a capacity by less than this is
rounding, and would cost a recomputation of all rates for nothing."""


@dataclass(frozen=True)
class Resource:
    """Something that activities share.

    Attributes:
        units_per_s: what it carries: bytes per second of a link, cores of a CPU; ``inf`` for one
            that never limits.
        sharers: how many users the static model divides it among; the fair model ignores it.
    """

    units_per_s: float
    sharers: int = 1


@dataclass(frozen=True)
class Times:
    """When each activity started and ended, in seconds, by its number."""

    starts: list[float]
    ends: list[float]

    @property
    def makespan_s(self) -> float:
        """When the last activity ended; 0 if there is none."""
        return max(self.ends, default=0.0)


class Activities:
    """What is to be run. The number of an activity is its place in the order of `add`."""

    def __init__(self) -> None:
        self.after: list[Sequence[int]] = []
        self.seconds: list[float] = []
        self.units: list[float] = []
        self.resources: list[tuple[str, ...]] = []
        self.lane: list[Hashable] = []
        self._last: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self.after)

    def add(
        self,
        lanes: tuple[Hashable, ...] = (),
        after: Sequence[int] = (),
        *,
        seconds: float = 0.0,
        units: float = 0.0,
        resources: tuple[str, ...] = (),
    ) -> int:
        """Add an activity and return its number.

        Args:
            lanes: queues that it stands in; a rendezvous of two queues names both.
            after: numbers of the activities that must be over; later ones are allowed as long
                as there is no cycle.
            seconds: the least that it takes, however much of the resources it gets.
            units: what it takes of each of its resources; nothing if it has none.
            resources: names of the resources.
        """
        number = len(self.after)
        waits = after
        for lane in lanes:
            before = self._last.get(lane)
            if before is not None:
                waits = (*waits, before)
            self._last[lane] = number
        self.after.append(waits)
        self.seconds.append(seconds)
        self.units.append(units)
        self.resources.append(resources if units else ())
        self.lane.append(lanes[0] if lanes else number)
        return number

    def run(self, resources: Mapping[str, Resource], model: Model = "fair") -> Times:
        """Run all activities under a machine model.

        Raises:
            ScheduleError: if an activity waits for one that does not exist, if some wait for each
                other, or if a resource is unknown or carries nothing.
        """
        if model == "static":
            return _forward(self.after, self._static_seconds(resources))
        rates, shared = self._fair_rates(resources)
        if not any(shared):
            return _forward(self.after, self._seconds_at(rates))
        limits = {name: resource.units_per_s for name, resource in resources.items()}
        return _FairRun(self, rates, shared, limits).run()

    def _static_seconds(self, resources: Mapping[str, Resource]) -> list[float]:
        rate_of: dict[tuple[str, ...], float] = {}
        for names in set(self.resources):
            found = [_known(resources, name) for name in sorted(names)]
            rate_of[names] = min((r.units_per_s / r.sharers for r in found), default=inf)
        return self._seconds_at([rate_of[names] for names in self.resources])

    def _seconds_at(self, rates: Sequence[float]) -> list[float]:
        work = zip(self.seconds, self.units, rates, strict=True)
        return [max(least_s, units / rate) for least_s, units, rate in work]

    def _fair_rates(
        self, resources: Mapping[str, Resource]
    ) -> tuple[list[float], list[tuple[str, ...]]]:
        """Per activity its rate alone, and the resources where others may slow it down."""
        alone: dict[tuple[str, ...], float] = {}
        for names in set(self.resources):
            found = [_known(resources, name).units_per_s for name in sorted(names)]
            alone[names] = min(found, default=inf)
        rates = [alone[names] for names in self.resources]
        fastest: dict[tuple[str, ...], dict[Hashable, float]] = {names: {} for names in alone}
        for number, names in enumerate(self.resources):
            if not names:
                continue
            if self.seconds[number] > 0.0:
                rates[number] = min(rates[number], self.units[number] / self.seconds[number])
            lanes, lane = fastest[names], self.lane[number]
            if rates[number] > lanes.get(lane, 0.0):
                lanes[lane] = rates[number]
        contended = _contended(fastest, resources)
        kept = {names: tuple(n for n in names if n in contended) for names in alone}
        return rates, [kept[names] for names in self.resources]


def _known(resources: Mapping[str, Resource], name: str) -> Resource:
    if name not in resources:
        known = ", ".join(sorted(resources)) or "none"
        raise ScheduleError(f"no such resource: {name!r}. The machine has: {known}")
    if not resources[name].units_per_s > 0.0:
        rate = resources[name].units_per_s
        raise ScheduleError(f"{name} carries {rate} units a second, but something has to use it")
    return resources[name]


def _contended(
    fastest: Mapping[tuple[str, ...], Mapping[Hashable, float]],
    resources: Mapping[str, Resource],
) -> set[str]:
    """Resources that cannot carry all lanes that use them at once, each at its highest rate.

    A lane has one activity under way at most.
    """
    demand: dict[str, dict[Hashable, float]] = {}
    for names, lanes in fastest.items():
        for name in names:
            on = demand.setdefault(name, {})
            for lane, rate in lanes.items():
                on[lane] = max(rate, on.get(lane, 0.0))
    return {
        name
        for name, lanes in demand.items()
        if len(lanes) > 1 and sum(lanes.values()) > resources[name].units_per_s * _SLACK
    }


def _forward(after: Sequence[Sequence[int]], seconds: Sequence[float]) -> Times:
    """Start and end of activities whose durations are fixed."""
    starts, ends = [0.0] * len(after), [0.0] * len(after)
    is_listed = all(0 <= before < number for number, waits in enumerate(after) for before in waits)
    for number in range(len(after)) if is_listed else _order(after):
        at = 0.0
        for before in after[number]:
            if ends[before] > at:
                at = ends[before]
        starts[number] = at
        ends[number] = at + seconds[number]
    return Times(starts, ends)


def _followers(after: Sequence[Sequence[int]]) -> list[list[int]]:
    """Per activity those that wait for it."""
    found: list[list[int]] = [[] for _ in after]
    for number, waits in enumerate(after):
        for before in waits:
            if not 0 <= before < len(after):
                have = f"there are {len(after)}, numbered from 0"
                raise ScheduleError(f"activity {number} waits for activity {before}; {have}")
            found[before].append(number)
    return found


def _order(after: Sequence[Sequence[int]]) -> list[int]:
    """All activities, each after those that it waits for."""
    followers = _followers(after)
    missing = [len(waits) for waits in after]
    order = [number for number, count in enumerate(missing) if not count]
    for number in order:  # grows while it is walked
        for later in followers[number]:
            missing[later] -= 1
            if not missing[later]:
                order.append(later)
    if len(order) < len(after):
        raise _cycle(after, [number for number, count in enumerate(missing) if count])
    return order


def _cycle(after: Sequence[Sequence[int]], stuck: Sequence[int]) -> ScheduleError:
    """An error that names the activities of one cycle."""
    among = set(stuck)
    path = [stuck[0]]
    while True:
        # Each that is stuck waits for another that is.
        path.append(next(before for before in after[path[-1]] if before in among))
        if path[-1] in path[:-1]:
            cycle = path[path.index(path[-1]) :]
            text = " waits for ".join(f"activity {number}" for number in cycle)
            return ScheduleError(f"deadlock: {text}; put them in another order")


class _FairRun:
    """One run under the fair model.

    Starts and ends of activities with fixed durations are worked out as soon as everything that
    they wait for has an end, ahead of the clock; only flows that may compete take part in the
    loop over events. Rates are recomputed once an instant, and only among flows that compete,
    directly or over others, with one that started or ended.
    """

    def __init__(
        self,
        activities: Activities,
        rates: Sequence[float],
        shared: Sequence[tuple[str, ...]],
        limits: Mapping[str, float],
    ) -> None:
        self.after = activities.after
        self.seconds = activities._seconds_at(rates)
        self.highest = rates
        self.shared = shared
        self.limits = limits
        self.followers = _followers(activities.after)
        self.missing = [len(waits) for waits in activities.after]
        self.starts = [0.0] * len(activities)
        self.ends = [0.0] * len(activities)
        self.left = list(activities.units)
        self.rate = [0.0] * len(activities)
        self.since = [0.0] * len(activities)
        self.turn = [0] * len(activities)
        self.events: list[tuple[float, int, int]] = []
        self.flows: dict[str, dict[int, None]] = {name: {} for name in limits}
        self.demand = dict.fromkeys(limits, 0.0)

    def run(self) -> Times:
        """Run to the end."""
        roots = [number for number, count in enumerate(self.missing) if not count]
        num_done = self._begin(roots)
        events, shared, turn = self.events, self.shared, self.turn
        while events:
            now = events[0][0]
            dirty: dict[str, None] = {}
            while events and events[0][0] == now:
                _, number, stamp = heappop(events)
                if stamp < 0:
                    self._enter(number, now, dirty)
                elif stamp == turn[number]:
                    self._leave(number, now, dirty)
                    num_done += 1 + self._begin(self._released(number))
            if dirty:
                self._share(now, dirty)
        if num_done < len(shared):
            raise _cycle(self.after, [n for n, count in enumerate(self.missing) if count])
        return Times(self.starts, self.ends)

    def _released(self, number: int) -> list[int]:
        """Those that waited for this activity as their last."""
        missing, found = self.missing, []
        for later in self.followers[number]:
            missing[later] -= 1
            if not missing[later]:
                found.append(later)
        return found

    def _begin(self, ready: list[int]) -> int:
        """Start activities; return how many, with those that follow, have an end by now."""
        starts, ends, missing, after = self.starts, self.ends, self.missing, self.after
        num_done = 0
        while ready:
            number = ready.pop()
            at = 0.0
            for before in after[number]:
                if ends[before] > at:
                    at = ends[before]
            starts[number] = at
            if self.shared[number] and self.seconds[number] > 0.0:
                heappush(self.events, (at, number, -1))
                continue
            ends[number] = at + self.seconds[number]
            num_done += 1
            for later in self.followers[number]:
                missing[later] -= 1
                if not missing[later]:
                    ready.append(later)
        return num_done

    def _enter(self, number: int, now: float, dirty: dict[str, None]) -> None:
        """A flow starts, at its full rate unless it has to share."""
        rate = self.highest[number]
        self.rate[number], self.since[number] = rate, now
        for name in self.shared[number]:
            self.demand[name] += rate
            self.flows[name][number] = None
            if self.demand[name] > self.limits[name] * _SLACK:
                dirty[name] = None
        heappush(self.events, (now + self.seconds[number], number, self.turn[number]))

    def _leave(self, number: int, now: float, dirty: dict[str, None]) -> None:
        """A flow is over; those that it slowed down may be faster now."""
        self.ends[number] = now
        rate = self.highest[number]
        for name in self.shared[number]:
            if self.demand[name] > self.limits[name] * _SLACK:
                dirty[name] = None
            del self.flows[name][number]
            self.demand[name] = self.demand[name] - rate if self.flows[name] else 0.0

    def _share(self, now: float, dirty: dict[str, None]) -> None:
        """Set the rates of all flows that compete at these resources, or with such flows."""
        names = list(dirty)
        found: dict[int, None] = {}
        for name in names:  # grows while it is walked
            for number in self.flows[name]:
                if number in found:
                    continue
                found[number] = None
                for other in self.shared[number]:
                    if other not in dirty and self.demand[other] > self.limits[other] * _SLACK:
                        dirty[other] = None
                        names.append(other)
        for number, rate in self._fill(list(found), names):
            old = self.rate[number]
            if rate == old:
                continue
            self.left[number] -= old * (now - self.since[number])
            self.rate[number], self.since[number] = rate, now
            self.turn[number] += 1
            end_s = now + max(0.0, self.left[number]) / rate
            heappush(self.events, (end_s, number, self.turn[number]))

    def _fill(self, flows: list[int], names: list[str]) -> list[tuple[int, float]]:
        """Max-min fair rates by progressive filling (Bertsekas, Gallager: Data Networks, 6.5)."""
        highest, shared = self.highest, self.shared
        free = {name: self.limits[name] for name in names}
        users = {name: len(self.flows[name]) for name in names}
        rates: list[tuple[int, float]] = []
        while flows:
            level = min(free[name] / count for name, count in users.items() if count)
            done = [number for number in flows if highest[number] <= level]
            if not done:
                full = {n for n, count in users.items() if count and free[n] / count <= level}
                done = [n for n in flows if not full.isdisjoint(shared[n])]
            for number in done:
                rate = min(level, highest[number])
                rates.append((number, rate))
                for name in shared[number]:
                    if name in free:
                        free[name] -= rate
                        users[name] -= 1
            left = set(done)
            flows = [number for number in flows if number not in left]
        return rates
