"""What a step of another system takes, to compare a plan with: its seconds, bound and bytes.

    swapping   memory virtualisation of each GPU alone, under data parallelism and in a pipeline
    zero3      every GPU gathers every layer for every microbatch

They run on the same activities and links as Harmony's schedules (`harmony.planner.predict.flows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from harmony.errors import ConfigError, DoesNotFitError
from harmony.planner.ir.tasks import TaskKind
from harmony.planner.predict.flows import Activities
from harmony.planner.predict.links import Links

SWAPS = ("h2d", "d2h")


@dataclass(frozen=True)
class Outcome:
    """A step of a baseline.

    Attributes:
        step_s: seconds of the step.
        bound_s: seconds that it would take at least if every copy were perfectly hidden: the most
            that a GPU computes, or a link carries.
        traffic: bytes by link and kind, over all GPUs.
        microbatch_size: samples of a microbatch.
    """

    step_s: float
    bound_s: float
    traffic: Mapping[tuple[str, str], int]
    microbatch_size: int

    @property
    def swap_nbytes(self) -> int:
        """Bytes between the host and the GPUs."""
        return sum(n for (link, _), n in self.traffic.items() if link in SWAPS)

    def nbytes(self, *kinds: str) -> int:
        """Bytes of some kinds between the host and the GPUs."""
        found = self.traffic.items()
        return sum(n for (link, kind), n in found if link in SWAPS and kind in kinds)


def fastest(outcome_of: Callable[[int], Outcome], sizes: Sequence[int]) -> Outcome:
    """The outcome of the microbatch size whose step is shortest.

    Raises:
        DoesNotFitError: if no size fits.
    """
    found: list[Outcome] = []
    refused = DoesNotFitError("there is no microbatch size to try")
    for size in sizes:
        try:
            found.append(outcome_of(size))
        except DoesNotFitError as error:
            refused = error
    if not found:
        raise refused
    return min(found, key=lambda outcome: outcome.step_s)


def outcome_of(
    activities: Activities,
    links: Links,
    first: int,
    traffic: Mapping[tuple[str, str], int],
    size: int,
) -> Outcome:
    """Run the activities and describe those from number ``first`` on, a whole step."""
    times = activities.run(links.resources)
    began_s = max(times.ends[:first], default=0.0)
    busy: dict[object, float] = {}
    for number in range(first, len(activities)):
        lane = activities.lane[number]
        busy[lane] = busy.get(lane, 0.0) + activities.seconds[number]
        for name in activities.resources[number]:
            seconds = activities.units[number] / links.resources[name].units_per_s
            busy[name] = busy.get(name, 0.0) + seconds
    bound_s = max(busy.values(), default=0.0)
    return Outcome(times.makespan_s - began_s, bound_s, traffic, size)


def one_forward_one_backward(
    stage: int, num_stages: int, num_microbatches: int
) -> Iterator[tuple[TaskKind, int]]:
    """Forwards and backwards of a stage in the 1F1B order, with the number of the microbatch."""
    ahead = min(num_stages - 1 - stage, num_microbatches)
    for index in range(ahead):
        yield TaskKind.FORWARD, index
    for index in range(num_microbatches):
        if index + ahead < num_microbatches:
            yield TaskKind.FORWARD, index + ahead
        yield TaskKind.BACKWARD, index


def balanced_stages(seconds: Sequence[float], num_stages: int) -> list[range]:
    """Cut layers into consecutive stages so that the slowest is as fast as can be."""
    count = len(seconds)
    num_stages = min(num_stages, count)
    best: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(float("inf"), 0)] * count]
    for _ in range(num_stages):
        row = [(float("inf"), 0)] * (count + 1)
        for end in range(1, count + 1):
            load = 0.0
            for begin in range(end - 1, -1, -1):
                load += seconds[begin]
                row[end] = min(row[end], (max(load, best[-1][begin][0]), begin))
        best.append(row)
    stages, end = [], count
    for row in reversed(best[1:]):
        stages.append(range(row[end][1], end))
        end = row[end][1]
    return stages[::-1]


def num_microbatches(minibatch: int, shares: int, size: int) -> int:
    """How many microbatches of ``size`` each of the equal shares of a minibatch has.

    Raises:
        ConfigError: if they are not equal.
    """
    if minibatch % (shares * size):
        raise ConfigError(
            f"a minibatch of {minibatch} is not {shares} equal shares of microbatches of {size}"
        )
    return minibatch // shares // size
