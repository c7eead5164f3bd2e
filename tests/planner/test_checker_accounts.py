"""What the checker works out by itself agrees with what the planner plans by.

They are two derivations of the same figures that share no code; here they meet.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.core.layergraph import LayerGraph
from harmony.planner.check.kept import left_behind, read_by_backward
from harmony.planner.check.peak import PeakMemory
from harmony.planner.ir.task_graph import build_tasks, kept_values
from harmony.planner.ir.tasks import Phase
from harmony.planner.lower.passes import lower
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.predict.memory import Workspace, device_peak, stash_nbytes
from tests.strategies import layer_graphs, policies, specs
from tests.toys import server


def uneven(data: st.DataObject, graph: LayerGraph) -> tuple[LayerGraph, CostTable]:
    """The model with parameters and updates that take memory, and costs that differ by layer."""
    nbytes = st.integers(0, 5000)
    layers = tuple(
        replace(
            layer,
            params=("w",) * data.draw(st.integers(0, 2)),
            update_nbytes=data.draw(nbytes),
            saved_nbytes_per_sample=data.draw(nbytes),
            products_nbytes_per_sample=data.draw(nbytes),
        )
        for layer in graph.layers
    )
    shared = tuple(replace(s, update_nbytes=data.draw(nbytes)) for s in graph.shared)
    sizes = st.tuples(nbytes, nbytes, nbytes)
    costs = tuple({1: LayerCost(1e-3, 2e-3, 1e-3, *data.draw(sizes))} for _ in layers)
    return replace(graph, layers=layers, shared=shared), CostTable(costs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_both_accounts_of_memory_agree(data: st.DataObject) -> None:
    graph, costs = uneven(data, data.draw(layer_graphs()))
    num_devices = data.draw(st.integers(1, 3))
    replicas = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    spec = data.draw(specs(graph, data.draw(st.sampled_from(replicas))))
    policy = data.draw(policies(graph, spec))
    schedule = lower(build_tasks(graph, spec), server(num_devices), policy)
    for table in (costs, None):
        mine = PeakMemory(schedule, graph, table)
        theirs = Workspace(graph, table)
        for index in range(schedule.num_devices):
            peak = mine.of(index)
            planned = device_peak(schedule, index, graph, theirs)
            assert (peak.nbytes, peak.index) == (planned.nbytes, planned.index)
            parts = (planned.slots, planned.values, planned.workspace)
            assert (peak.fixed, peak.values, peak.workspace) == parts
        assert mine.stash_nbytes() == stash_nbytes(schedule, graph)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_both_rules_of_what_a_step_leaves_agree(data: st.DataObject) -> None:
    graph = data.draw(layer_graphs())
    spec = data.draw(specs(graph))
    assert left_behind(graph, spec) == kept_values(graph, spec)
    if spec.phase is Phase.BACKWARD:
        tasks = build_tasks(graph, spec)
        values = {graph.values[v].id for v in read_by_backward(graph, spec)}
        read = {r.first for refs in tasks.reads.values() for r in refs if r.kind.value == "X"}
        assert values == read
