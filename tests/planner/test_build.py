"""The tasks of a step: what they read and write, and the edges that follow."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.errors import PlanError
from harmony.planner.ir.task_graph import build_tasks, kept_values
from harmony.planner.ir.tasks import Phase, TaskGraph, TaskKind
from tests.strategies import layer_graphs, specs
from tests.toys import chain, packs, step


def lines(tasks: TaskGraph) -> list[str]:
    found = []
    for task in tasks.tasks:
        reads = " ".join(map(str, tasks.reads[task]))
        writes = " ".join(map(str, tasks.writes[task]))
        found.append(f"{task} ({reads}) -> {writes}".rstrip())
    return found


def test_a_chain_of_two_packs() -> None:
    tasks = build_tasks(chain(4), step(4, 2, packs(2), packs(2, 4)))
    assert lines(tasks) == [
        "F[0:2]@0:2 (W[0:2] X0@0:2) -> X2@0:2",
        "F[0:2]@2:4 (W[0:2] X0@2:4) -> X2@2:4",
        "B[2:4]@0:2 (W[2:4] X2@0:2) -> dW[2:4]%0 dX2@0:2 X4@0:2",
        "B[2:4]@2:4 (W[2:4] X2@2:4 dW[2:4]%0) -> dW[2:4]%0 dX2@2:4 X4@2:4",
        "U[2:4] (dW[2:4]%0 K[2:4] W[2:4]) -> K[2:4] W[2:4]",
        "B[0:2]@0:2 (W[0:2] X0@0:2 dX2@0:2) -> dW[0:2]%0",
        "B[0:2]@2:4 (W[0:2] X0@2:4 dX2@2:4 dW[0:2]%0) -> dW[0:2]%0",
        "U[0:2] (dW[0:2]%0 K[0:2] W[0:2]) -> K[0:2] W[0:2]",
    ]


def test_a_skip_adds_to_the_gradient_that_a_later_pack_made() -> None:
    tasks = build_tasks(chain(4, skips=((0, 3),)), step(1, 1, packs(1, 2, 3), packs(1, 2, 3, 4)))
    assert [line for line in lines(tasks) if line.startswith("B")] == [
        "B[3:4]@0:1 (W[3:4] X1@0:1 X3@0:1) -> dW[3:4]%0 dX1@0:1 dX3@0:1 X4@0:1",
        "B[2:3]@0:1 (W[2:3] X2@0:1 dX3@0:1) -> dW[2:3]%0 dX2@0:1",
        "B[1:2]@0:1 (W[1:2] X1@0:1 dX2@0:1 dX1@0:1) -> dW[1:2]%0 dX1@0:1",
        "B[0:1]@0:1 (W[0:1] X0@0:1 dX1@0:1) -> dW[0:1]%0",
    ]


def test_forward_packs_keep_what_starts_a_backward_pack_inside_them() -> None:
    tasks = build_tasks(chain(4), step(1, 1, packs(3), packs(1, 2, 3, 4)))
    assert lines(tasks)[0] == "F[0:3]@0:1 (W[0:3] X0@0:1) -> X1@0:1 X2@0:1 X3@0:1"


def test_parts_of_a_tied_gradient_are_numbered_by_replica_and_added_in_order() -> None:
    spec = step(2, 1, packs(2), packs(2, 4), replicas=2)
    tasks = build_tasks(chain(4, tied=True), spec)
    assert [line for line in lines(tasks) if line[0] in "AU"] == [
        "A(dW[2:4]%1) (dW[2:4]%1 dW[2:4]%0) -> dW[2:4]%0",
        "U[2:4] (dW[2:4]%0 K[2:4] W[2:4]) -> K[2:4] W[2:4]",
        "A(dW[0:2]%1) (dW[0:2]%1 dW[0:2]%0) -> dW[0:2]%0",
        "A(dT0%1) (dT0%1 dT0%0) -> dT0%0",
        "A(dT0%2) (dT0%2 dT0%0) -> dT0%0",
        "A(dT0%3) (dT0%3 dT0%0) -> dT0%0",
        "U[0:2] (dW[0:2]%0 dT0%0 K[0:2] W[0:2] T0) -> K[0:2] W[0:2] T0",
    ]
    written = {str(t): " ".join(map(str, tasks.writes[t])) for t in tasks.tasks}
    assert "dT0%0" in written["B[2:4]@0:1"] and "dT0%2" in written["B[2:4]@1:2"]
    assert "dT0%1" in written["B[0:2]@0:1"] and "dT0%3" in written["B[0:2]@1:2"]


def test_frozen_first_layers_have_no_backward_and_no_update() -> None:
    tasks = build_tasks(chain(4, frozen=(0, 1)), step(1, 1, packs(2), packs(2, 4)))
    assert [str(task) for task in tasks.tasks] == ["F[0:2]@0:1", "B[2:4]@0:1", "U[2:4]"]
    # A frozen layer in the middle still passes its gradient on.
    tasks = build_tasks(chain(3, frozen=(1,)), step(1, 1, packs(1, 2), packs(1, 2, 3)))
    assert lines(tasks)[4] == "B[1:2]@0:1 (W[1:2] X1@0:1 dX2@0:1) -> dX1@0:1"


def test_phases_of_the_drop_in_form() -> None:
    def of(phase: Phase) -> list[str]:
        return lines(build_tasks(chain(4), step(1, 1, packs(2, 4), packs(2, 4), phase=phase)))

    assert (
        of(Phase.FORWARD)
        == of(Phase.INFER)
        == [
            "F[0:2]@0:1 (W[0:2] X0@0:1) -> X2@0:1",
            "F[2:4]@0:1 (W[2:4] X2@0:1) -> X4@0:1",
        ]
    )
    assert of(Phase.BACKWARD) == [
        "B[2:4]@0:1 (W[2:4] X2@0:1 dX4@0:1) -> dW[2:4]%0 dX2@0:1",
        "B[0:2]@0:1 (W[0:2] X0@0:1 dX2@0:1) -> dW[0:2]%0",
    ]
    kept = {
        phase: kept_values(chain(4), step(1, 1, packs(2, 4), packs(2, 4), phase=phase))
        for phase in Phase
    }
    assert kept[Phase.FORWARD] == {2, 4}
    assert kept[Phase.INFER] == kept[Phase.TRAIN] == {4}
    assert kept[Phase.BACKWARD] == set()


def test_an_input_that_requires_a_gradient_gets_the_sum_of_all_packs_that_read_it() -> None:
    graph = chain(3, input_gradient=True, frozen=(0,), skips=((-1, 2),))

    def of(phase: Phase) -> list[str]:
        forward = packs(1, 2) if phase is Phase.TRAIN else packs(1, 2, 3)
        return lines(build_tasks(graph, step(1, 1, forward, packs(1, 2, 3), phase=phase)))

    assert of(Phase.BACKWARD) == [
        "B[2:3]@0:1 (W[2:3] X0@0:1 X2@0:1 dX3@0:1) -> dW[2:3]%0 dX0@0:1 dX2@0:1",
        "B[1:2]@0:1 (W[1:2] X1@0:1 dX2@0:1) -> dW[1:2]%0 dX1@0:1",
        "B[0:1]@0:1 (W[0:1] X0@0:1 dX1@0:1 dX0@0:1) -> dX0@0:1",
    ]
    # A whole step has no taker for it.
    assert not any("dX0" in line for line in of(Phase.TRAIN))


def test_an_input_that_is_returned_has_no_gradient_from_outside() -> None:
    graph = chain(2, input_gradient=True)
    values = (replace(graph.values[0], is_output=True), *graph.values[1:])
    spec = step(1, 1, packs(1, 2), packs(1, 2), phase=Phase.BACKWARD)
    assert lines(build_tasks(replace(graph, values=values), spec)) == lines(
        build_tasks(graph, spec)
    )


def test_unequal_microbatches_depend_on_the_forward_that_covers_them() -> None:
    tasks = build_tasks(chain(4), step(4, 4, packs(2), packs(2, 4), backward_size=2))
    edges = {(str(a), str(b)) for a, b in tasks.graph.edges}
    assert ("F[0:2]@0:4", "B[2:4]@0:2") in edges
    assert ("F[0:2]@0:4", "B[2:4]@2:4") in edges


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (step(4, 2, packs(2), packs(2, 5)), "end at 5, they must end at 4"),
        (step(4, 2, packs(1), packs(2, 4)), "FORWARD packs end at 1, they must end at 2"),
        (step(4, 0, packs(2), packs(2, 4)), "microbatch size must be at least 1"),
        (step(6, 3, packs(2), packs(2, 4), backward_size=2), "multiple of 2"),
    ],
)
def test_impossible_four_tuples_are_refused(spec, why) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=why):
        build_tasks(chain(4), spec)


def test_a_layer_that_draws_random_numbers_pins_the_microbatch() -> None:
    spec = step(4, 4, packs(2), packs(2, 4), backward_size=2)
    with pytest.raises(PlanError, match="draws random numbers"):
        build_tasks(chain(4, random_layer=1), spec)


@settings(max_examples=60)
@given(st.data())
def test_the_order_of_plain_pytorch_respects_every_edge(data: st.DataObject) -> None:
    graph = data.draw(layer_graphs())
    tasks = build_tasks(graph, data.draw(specs(graph, data.draw(st.integers(1, 3)))))
    order = {task: index for index, task in enumerate(tasks.tasks)}
    assert len(order) == len(tasks.tasks)
    assert nx.is_directed_acyclic_graph(tasks.graph)
    assert all(order[a] < order[b] for a, b in tasks.graph.edges)
    for task in tasks.tasks:
        if task.kind is TaskKind.UPDATE:
            gradients = {ref for ref in tasks.reads[task] if ref.is_gradient_part}
            assert gradients and all(ref.part == 0 for ref in gradients)
