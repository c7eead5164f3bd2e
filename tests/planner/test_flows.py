"""Activities on lanes and shared resources: by hand, against a slow twin, and what holds."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.errors import ScheduleError
from harmony.planner.predict.flows import Activities, Model, Resource, Times

LINKS = ("a", "b", "c", "d")


def test_activities_of_a_lane_run_one_after_the_other() -> None:
    work = Activities()
    first = work.add(("gpu0",), seconds=2.0)
    second = work.add(("gpu0",), seconds=1.0)
    other = work.add(("gpu1",), (first,), seconds=4.0)
    times = work.run({})
    assert (times.starts[second], times.ends[second]) == (2.0, 3.0)
    assert (times.starts[other], times.makespan_s) == (2.0, 6.0)


def test_two_flows_halve_a_link_and_the_longer_one_speeds_up_when_the_other_ends() -> None:
    work = Activities()
    short = work.add(("x",), units=10, resources=("link",))
    long = work.add(("y",), units=30, resources=("link",))
    times = work.run({"link": Resource(10.0)})
    assert times.ends[short] == pytest.approx(2.0)
    assert times.ends[long] == pytest.approx(4.0)


def test_a_flow_that_is_limited_elsewhere_leaves_the_rest_to_the_others() -> None:
    work = Activities()
    slow = work.add(("x",), units=10, resources=("narrow", "switch"))
    fast = work.add(("y",), units=16, resources=("wide", "switch"))
    rates = {"narrow": Resource(2.0), "wide": Resource(100.0), "switch": Resource(10.0)}
    times = work.run(rates)
    assert times.ends[slow] == pytest.approx(5.0)
    assert times.ends[fast] == pytest.approx(2.0)


def test_the_static_model_divides_a_link_even_when_nobody_else_uses_it() -> None:
    work = Activities()
    alone = work.add(("x",), units=10, resources=("link",))
    assert work.run({"link": Resource(10.0, sharers=4)}, "static").ends[alone] == 4.0
    assert work.run({"link": Resource(10.0, sharers=4)}, "fair").ends[alone] == 1.0


def test_seconds_bound_what_a_flow_takes_and_how_much_it_asks_for() -> None:
    work = Activities()
    update = work.add(("host",), seconds=2.0, units=12, resources=("memory",))
    copy = work.add(("x",), units=8, resources=("memory",))
    times = work.run({"memory": Resource(10.0)})
    # 6 + 10 wanted, 5 each; the copy is over after 1.6 s, the rest of the update at 6 a second.
    assert times.ends[copy] == pytest.approx(1.6)
    assert times.ends[update] == pytest.approx(1.6 + (12 - 8) / 6)
    assert work.run({"memory": Resource(inf)}).ends == [2.0, 0.0]


def test_a_rendezvous_stands_in_both_queues() -> None:
    work = Activities()
    work.add(("out",), seconds=3.0)
    meeting = work.add(("out", "in"), seconds=1.0)
    behind = work.add(("in",), seconds=1.0)
    times = work.run({})
    assert times.starts[meeting] == 3.0 and times.starts[behind] == 4.0


def test_an_activity_may_wait_for_one_that_was_added_later() -> None:
    work = Activities()
    early = work.add(("x",), (1,), seconds=1.0)
    late = work.add(("y",), seconds=2.0)
    assert work.run({}).starts[early] == work.run({}).ends[late] == 2.0


@pytest.mark.parametrize("units", [0, 5])
def test_what_can_never_start_is_refused(units: int) -> None:
    rates = {"link": Resource(1.0)}
    for model in ("fair", "static"):
        cycle = Activities()
        cycle.add(("x",), (1,), units=units, resources=("link",))
        cycle.add(("y",), (0,), units=units, resources=("link",))
        with pytest.raises(ScheduleError, match="activity 0 waits for activity 1 waits for"):
            cycle.run(rates, model)
        unknown = Activities()
        unknown.add(("x",), (7,), units=units, resources=("link",))
        unknown.add(("y",), units=units, resources=("link",))
        with pytest.raises(ScheduleError, match="waits for activity 7; there are 2"):
            unknown.run(rates, model)
    with pytest.raises(ScheduleError, match="no such resource"):
        nowhere = Activities()
        nowhere.add(("x",), units=1, resources=("lnik",))
        nowhere.run(rates)
    with pytest.raises(ScheduleError, match=r"link carries 0\.0 units"):
        empty = Activities()
        empty.add(("x",), units=1, resources=("link",))
        empty.run({"link": Resource(0.0)})


@dataclass(frozen=True)
class Item:
    """One activity of a drawn network."""

    lane: int
    after: tuple[int, ...]
    seconds: float
    units: int
    resources: tuple[str, ...]


@st.composite
def items(draw: st.DrawFn, max_after: int = 2) -> list[Item]:
    """A network of up to 14 activities on 4 lanes and 4 resources."""
    found = []
    for number in range(draw(st.integers(1, 14))):
        earlier = st.integers(0, number - 1) if number else st.nothing()
        after = draw(st.lists(earlier, max_size=max_after)) if number else []
        found.append(
            Item(
                draw(st.integers(0, 3)),
                tuple(after),
                draw(st.sampled_from((0.0, 0.0, 0.5, 3.0))),
                draw(st.integers(0, 40)),
                tuple(draw(st.lists(st.sampled_from(LINKS), max_size=3, unique=True))),
            )
        )
    return found


RATES = st.fixed_dictionaries({name: st.integers(1, 20).map(float) for name in LINKS})


def run(
    network: list[Item], rates: dict[str, float], model: Model = "fair", sharers: int = 2
) -> Times:
    work = Activities()
    for item in network:
        work.add(
            (item.lane,),
            item.after,
            seconds=item.seconds,
            units=item.units,
            resources=item.resources,
        )
    return work.run({name: Resource(rate, sharers) for name, rate in rates.items()}, model)


def slowly(network: list[Item], rates: dict[str, float]) -> list[float]:
    """Ends under the fair model, every rate worked out anew at every instant."""
    ends: dict[int, float] = {}
    left: dict[int, float] = {}
    now = 0.0
    while len(ends) < len(network):
        for number, item in enumerate(network):
            before = [n for n in range(number) if network[n].lane == item.lane]
            is_new = number not in ends and number not in left
            if is_new and all(n in ends for n in (*before, *item.after)):
                left[number] = 1.0  # the share of it that is still to do
        speeds = fair_speeds([(n, network[n]) for n in left], rates)
        spans = {n: left[n] / speeds[n] if speeds[n] < inf else 0.0 for n in left}
        wait = min(spans.values())
        now += wait
        for n in list(left):
            if spans[n] <= wait * (1 + 1e-12):
                ends[n] = now
                del left[n]
            else:
                left[n] -= speeds[n] * wait
    return [ends[n] for n in range(len(network))]


def fair_speeds(flows: list[tuple[int, Item]], rates: dict[str, float]) -> dict[int, float]:
    """Per flow the share of it that is done in a second: rates raised together until they stop."""
    free = dict(rates)
    open_flows = {n: item for n, item in flows if item.units and item.resources}
    rate = {n: inf if not item.seconds else item.units / item.seconds for n, item in flows}
    found = {n: inf if not item.seconds else 1 / item.seconds for n, item in flows}
    level = 0.0
    while open_flows:
        counts = {r: sum(r in i.resources for i in open_flows.values()) for r in free}
        steps = [free[r] / count for r, count in counts.items() if count]
        steps += [rate[n] - level for n in open_flows]
        level += min(steps)
        free = {r: free[r] - min(steps) * counts[r] for r in free}
        for n, item in list(open_flows.items()):
            full = any(free[r] <= 1e-9 for r in item.resources)
            if full or rate[n] - level <= 1e-9:
                found[n] = level / item.units
                del open_flows[n]
    return found


@given(items(), RATES)
@settings(max_examples=300)
def test_it_agrees_with_a_simulation_that_recomputes_everything(
    network: list[Item], rates: dict[str, float]
) -> None:
    assert run(network, rates).ends == pytest.approx(slowly(network, rates), abs=1e-6)


@given(items(), RATES)
def test_nothing_is_faster_than_alone_and_lanes_and_resources_do_one_second_a_second(
    network: list[Item], rates: dict[str, float]
) -> None:
    times = run(network, rates)
    moved = dict.fromkeys(LINKS, 0)
    for number, item in enumerate(network):
        alone = min((rates[r] for r in item.resources), default=inf)
        least_s = max(item.seconds, item.units / alone)
        assert times.ends[number] - times.starts[number] >= least_s * (1 - 1e-9)
        before = [n for n in range(number) if network[n].lane == item.lane]
        assert all(times.starts[number] >= times.ends[n] for n in (*before, *item.after))
        for name in item.resources:
            moved[name] += item.units
    for name, nbytes in moved.items():
        assert times.makespan_s >= nbytes / rates[name] * (1 - 1e-9)


@given(items(), RATES, st.sampled_from(LINKS), st.sampled_from((1.5, 2.0, 10.0)))
def test_under_the_static_model_more_bandwidth_is_never_slower(
    network: list[Item], rates: dict[str, float], which: str, factor: float
) -> None:
    slow = run(network, rates, "static")
    fast = run(network, {**rates, which: rates[which] * factor}, "static")
    assert all(a <= b * (1 + 1e-9) for a, b in zip(fast.ends, slow.ends, strict=True))


@given(items(), RATES)
def test_infinite_resources_leave_the_seconds_alone(
    network: list[Item], rates: dict[str, float]
) -> None:
    free = run(network, dict.fromkeys(rates, inf))
    shared = run(network, rates)
    assert all(a <= b * (1 + 1e-9) for a, b in zip(free.ends, shared.ends, strict=True))
    for number, item in enumerate(network):
        assert free.ends[number] - free.starts[number] == pytest.approx(item.seconds)


@given(items(), RATES)
def test_fair_shares_are_never_slower_than_static_ones(
    network: list[Item], rates: dict[str, float]
) -> None:
    """As long as the static model divides a resource among all lanes that there are."""
    fair, static = run(network, rates), run(network, rates, "static", sharers=4)
    assert all(a <= b * (1 + 1e-9) for a, b in zip(fair.ends, static.ends, strict=True))


@given(items(), RATES)
def test_with_as_many_times_the_bandwidth_as_lanes_share_it_nothing_is_slower(
    network: list[Item], rates: dict[str, float]
) -> None:
    slow = run(network, rates)
    fast = run(network, {name: 4 * rate for name, rate in rates.items()})
    assert all(a <= b * (1 + 1e-9) for a, b in zip(fast.ends, slow.ends, strict=True))


def test_under_the_fair_model_more_bandwidth_can_be_slower() -> None:
    """An anomaly of queues, not of the code: what arrives sooner competes with what is urgent."""

    def makespan_s(rate: float) -> float:
        work = Activities()
        before = work.add(("x",), units=10, resources=("first",))
        work.add(("y",), (before,), units=10, resources=("link",))
        urgent = work.add(("z",), units=10, resources=("link",))
        work.add(("gpu",), (urgent,), seconds=30.0)
        return work.run({"first": Resource(rate), "link": Resource(1.0)}).makespan_s

    assert makespan_s(1.0) == 40.0
    assert makespan_s(10.0) == pytest.approx(49.0)
