"""Costs between measured sizes, and the workspace of packs worked out by hand."""

from __future__ import annotations

import pytest

from harmony.errors import PlanError
from harmony.planner.predict.cost import (
    CostTable,
    LayerCost,
    backward_s,
    backward_workspace_nbytes,
    forward_s,
    forward_workspace_nbytes,
    update_s,
)
from tests.toys import chain

TABLE = CostTable(
    tuple(
        {
            1: LayerCost(1.0 + i, 2.0, 0.5, 10 + i, 100, 20),
            3: LayerCost(2.0 + i, 4.0, 0.5, 30 + i, 300, 60),
        }
        for i in range(4)
    )
)


def test_sizes_between_and_beyond_the_measured_ones() -> None:
    assert TABLE.layer(0, 2) == LayerCost(1.5, 3.0, 0.5, 20, 200, 40)
    assert TABLE.layer(0, 5) == LayerCost(3.0, 6.0, 0.5, 50, 500, 100)
    one = CostTable(({2: LayerCost(1.0, 2.0, 0.5, 10, 100, 20)},))
    assert one.layer(0, 4) == LayerCost(2.0, 4.0, 0.5, 20, 200, 40)
    with pytest.raises(PlanError, match="layer 0 has no measured cost"):
        CostTable(({},)).layer(0, 1)


def test_seconds_of_packs() -> None:
    assert forward_s(TABLE, range(1, 3), 1) == 2.0 + 3.0
    assert backward_s(TABLE, range(1, 3), 1) == 2.0 + 3.0 + 2 * 2.0
    assert update_s(TABLE, range(1, 3)) == 1.0


def test_costs_are_read_back_from_json() -> None:
    assert CostTable.from_json(TABLE.to_json()) == TABLE


def test_forward_workspace_of_a_chain() -> None:
    graph = chain(4, per_sample=1000)
    # Value 3 leaves; while layer 1 runs, values 1 and 2 are there.
    assert forward_workspace_nbytes(graph, TABLE, range(3), 1, {3}) == 2000 + 11
    # A lone layer keeps nothing inside.
    assert forward_workspace_nbytes(graph, TABLE, range(1), 1, {1}) == 10


def test_forward_workspace_keeps_what_a_skip_needs() -> None:
    graph = chain(4, per_sample=1000, skips=((0, 3),))
    # While layer 2 runs: values 1 (for layer 3), 2 and 3.
    assert forward_workspace_nbytes(graph, TABLE, range(4), 1, {4}) == 3000 + 12


def test_backward_workspace_of_a_chain() -> None:
    graph = chain(4, per_sample=1000)
    # Values 1 to 3 and what three layers saved; then one gradient on its way.
    found = backward_workspace_nbytes(graph, TABLE, range(3), 1, set())
    assert found == 3000 + 300 + 1000 + 20
