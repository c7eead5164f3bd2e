"""The packing table by itself, with windows that a model rarely has, against brute force."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import example, given, target
from hypothesis import strategies as st

from harmony.planner.ir.tasks import Pack
from harmony.planner.search.partition import NEVER, PackingTable, Window


@st.composite
def windows(draw: st.DrawFn, most: int = 6) -> tuple[list[int], list[Window]]:
    """Seconds of layers, and where packs that end behind each may begin."""
    seconds = draw(st.lists(st.integers(1, 20), min_size=2, max_size=most))
    found = [Window(0, ())]
    for end in range(1, len(seconds) + 1):
        always = draw(st.integers(0, end))
        odd = draw(st.sets(st.integers(0, always - 1))) if always else set()
        found.append(Window(always, tuple(sorted(odd, reverse=True))))
    return seconds, found


def every(count: int, allowed: list[Window], num_packs: int) -> list[tuple[Pack, ...]]:
    """All partitions of ``count`` layers whose packs begin where they may."""

    def parts(end: int, left: int) -> list[tuple[Pack, ...]]:
        if left == 0:
            return [()] if end == 0 else []
        window = allowed[end]
        firsts = [first for first in range(end) if first >= window.always or first in window.odd]
        return [
            (*before, Pack(first, end)) for first in firsts for before in parts(first, left - 1)
        ]

    return parts(count, num_packs)


# The only packs that end at 3 begin at 0 (odd) or at 2; with the second the pack before it is the
# slowest, and with the first the last one is: 5 + 1 + 1.
BESIDE = ([5, 1, 1], [Window(0, ()), Window(0, ()), Window(0, ()), Window(2, (0,))])


@given(windows())
@example(BESIDE)
def test_the_slowest_pack_is_as_fast_as_can_be_wherever_packs_may_begin(
    case: tuple[list[int], list[Window]],
) -> None:
    seconds, allowed = case
    count, until = len(seconds), [0, *accumulate(seconds)]
    table = PackingTable(range(count + 1), list(map(float, until)), allowed, lambda pack: 0)
    target(float(sum(len(window.odd) for window in allowed)))

    def slowest(partition: tuple[Pack, ...]) -> int:
        return max(until[pack.last] - until[pack.first] for pack in partition)

    possible = {}
    for number in range(1, count + 1):
        choices = every(count, allowed, number)
        found = table.packs(count, number)
        if not choices:
            assert found is None
            continue
        possible[number] = choices
        assert found in choices
        assert slowest(found) == min(map(slowest, choices)) == table.rows[number][count] < NEVER
    assert table.fewest(count) == min(possible, default=None)
    assert table.most(count) == max(possible, default=None)
    if possible:
        largest = min(
            partition[-1].first for choices in possible.values() for partition in choices
        )
        assert table.largest_last(count) == largest


def test_one_pack_that_begins_at_an_odd_place_takes_as_long_as_its_layers() -> None:
    seconds, allowed = BESIDE
    until = [0.0, *accumulate(map(float, seconds))]
    table = PackingTable(range(4), until, allowed, lambda pack: 0)
    assert table.packs(3, 1) == (Pack(0, 3),)
    assert table.rows[1][3] == 7.0


def test_of_equally_fast_partitions_the_one_is_taken_where_least_crosses_then_the_most_even() -> (
    None
):
    allowed = [Window(0, ())] * 5
    until = [0.0, 2.0, 3.0, 4.0, 6.0]
    even = PackingTable(range(5), until, allowed, lambda pack: 0)
    assert even.packs(4, 2) == (Pack(0, 2), Pack(2, 4))
    until = [0.0, 4.0, 5.0, 6.0]  # 4 + 2 and 5 + 1: the slowest is the first pack, or the sum
    crossing = {1: 8, 2: 3, 0: 0}
    least = PackingTable(range(4), until, [Window(0, ())] * 4, lambda pack: crossing[pack.first])
    found = least.packs(3, 2)
    assert found == (Pack(0, 1), Pack(1, 3))
    assert [b.first for _, b in pairwise(found)] == [1]
