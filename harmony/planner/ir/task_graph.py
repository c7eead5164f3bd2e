"""A model and a four-tuple to the tasks of a step: who reads and writes what, in which order.

The order is the one of plain PyTorch in pack-major form (input-batch grouping): the LATE_UPDATEs
that the step before has left, ascending; FORWARD packs ascending, each with all its microbatches;
BACKWARD packs descending; after each BACKWARD pack the ACCUMULATEs of its gradient parts and its
UPDATE, or NORMS if that is late (just-in-time tasks, PVLDB 15(11), 2022). Of several rounds each
has FORWARD and BACKWARD packs, with its own microbatches, one after the other or the FORWARD packs
of a round between the BACKWARD packs of the round before. Edges are derived from the
reads and writes, nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import networkx as nx

from harmony.core.layergraph import MODEL_INPUT, LayerGraph
from harmony.planner.ir.step_check import check_spec
from harmony.planner.ir.tasks import (
    Pack,
    Phase,
    Samples,
    StepSpec,
    Task,
    TaskGraph,
    TaskKind,
    TensorKind,
    TensorRef,
    shared,
    shared_gradient,
    state,
    value,
    value_gradient,
    weight_gradients,
    weights,
)

T = TypeVar("T")

_OWN_LAYERS = frozenset({TensorKind.WEIGHTS, TensorKind.STATE})


def stages_in_order(spec: StepSpec) -> Iterator[tuple[TaskKind, Pack, int]]:
    """The packs to run, each with its kind and round."""
    forward = () if spec.phase is Phase.BACKWARD else spec.forward_packs
    trains = spec.phase in (Phase.TRAIN, Phase.BACKWARD)
    backward = spec.backward_packs[::-1] if trains else ()
    if not spec.interleaved:
        for number in range(spec.rounds):
            yield from ((TaskKind.FORWARD, pack, number) for pack in forward)
            yield from ((TaskKind.BACKWARD, pack, number) for pack in backward)
        return
    yield from ((TaskKind.FORWARD, pack, 0) for pack in forward)
    for number in range(spec.rounds):
        following = forward if number + 1 < spec.rounds else ()
        for packs, others in interleaved(backward, following):
            yield from ((TaskKind.BACKWARD, pack, number) for pack in packs)
            yield from ((TaskKind.FORWARD, pack, number + 1) for pack in others)


def interleaved(
    backward: Sequence[T], forward: Sequence[T]
) -> Iterator[tuple[Sequence[T], Sequence[T]]]:
    """Spread what is FORWARD of a round over what is BACKWARD of the round before."""
    begun = 0
    for turn, each in enumerate(backward, 1):
        due = (2 * turn * len(forward) + len(backward)) // (2 * len(backward))
        yield (each,), forward[begun:due]
        begun = due


@dataclass(frozen=True)
class BackwardPack:
    """What the BACKWARD of one pack takes and gives, for any microbatch.

    Attributes:
        takes: values whose gradient it reads because it contains their producer.
        adds: values whose gradient it adds to (a later pack, or the caller, made a part).
        makes: values whose gradient it is the first to write.
        own: whether it writes gradients of the pack's own parameters.
        shared: shared parameters whose gradient it writes.
        results: values that it hands to the host because no FORWARD task makes them.
    """

    pack: Pack
    takes: tuple[int, ...] = ()
    adds: tuple[int, ...] = ()
    makes: tuple[int, ...] = ()
    own: bool = False
    shared: tuple[int, ...] = ()
    results: tuple[int, ...] = ()


def build_tasks(graph: LayerGraph, spec: StepSpec) -> TaskGraph:
    """Return the tasks of one step, with the edges that their reads and writes imply.

    Raises:
        PlanError: if the packs, shares or microbatch sizes do not make a step of this model.
    """
    check_spec(graph, spec)
    tasks = TaskGraph(graph, spec)
    backward = backward_packs(graph, spec)
    if spec.phase is Phase.TRAIN and spec.late:
        _add_late_updates(tasks, backward)
    by_pack = {item.pack: item for item in backward}
    needed, parts = _needed_later(graph, spec, backward), _shared_parts(spec, backward)
    for kind, pack, number in stages_in_order(spec):
        if kind is TaskKind.FORWARD:
            _add_forward(tasks, pack, needed, number)
        else:
            _add_backward(tasks, pack, by_pack.get(pack), parts, number)
    tasks.graph = _edges(tasks)
    return tasks


def backward_packs(graph: LayerGraph, spec: StepSpec) -> tuple[BackwardPack, ...]:
    """Return the packs that have a BACKWARD, last layers first.

    A pack has none if no gradient reaches it, or if neither it nor anything before it wants one;
    the last pack of ``Phase.TRAIN`` always has one, since it is also that pack's forward.
    """
    if spec.phase is Phase.INFER:
        return ()
    fused = spec.phase is Phase.TRAIN
    starts = {graph.loss} if fused else set(graph.output_ids)
    made = [v for v in graph.values if v.producer != MODEL_INPUT]
    reached = {v.id for v in made if v.id in starts and v.requires_grad}
    # The step itself starts the gradient of the loss; every other gradient is a tensor.
    implicit = {graph.loss} if fused else set()
    packs = []
    for pack in reversed(spec.backward_packs):
        last = fused and pack.last == graph.num_layers
        wanted = _wanted_inputs(graph, pack, spec.phase)
        found = _backward_pack(graph, pack, wanted, reached, implicit, is_fused=last)
        if found is not None:
            packs.append(found)
            reached.update(found.makes)
    return tuple(packs)


def _wanted_inputs(graph: LayerGraph, pack: Pack, phase: Phase) -> list[int]:
    """Inputs of a pack whose gradient its BACKWARD writes.

    An input of the model gets one in an own loop only: in a whole step nobody takes it.
    """
    inputs = (graph.values[v] for v in graph.pack_inputs(pack.first, pack.last))
    given = phase is not Phase.TRAIN
    return [v.id for v in inputs if v.requires_grad and (given or v.producer != MODEL_INPUT)]


def _backward_pack(
    graph: LayerGraph,
    pack: Pack,
    wanted: Sequence[int],
    reached: set[int],
    implicit: set[int | None],
    *,
    is_fused: bool,
) -> BackwardPack | None:
    outputs = [v for i in pack for v in graph.layers[i].outputs if v in reached]
    results = tuple(v for v in graph.pack_outputs(pack.first, pack.last)) if is_fused else ()
    own = any(graph.layers[i].gradient_nbytes for i in pack)
    used = graph.shared_in(pack.first, pack.last)
    tied = tuple(k for k in used if graph.shared[k].gradient_nbytes)
    if not outputs or not (own or tied or wanted):
        return BackwardPack(pack, results=results) if is_fused else None
    return BackwardPack(
        pack,
        takes=tuple(sorted(v for v in outputs if v not in implicit)),
        adds=tuple(v for v in wanted if v in reached),
        makes=tuple(v for v in wanted if v not in reached),
        own=own,
        shared=tied,
        results=results,
    )


def kept_values(graph: LayerGraph, spec: StepSpec) -> frozenset[int]:
    """Ids of the values that a step must leave on the host when it ends.

    The outputs of the model; in ``Phase.FORWARD`` also what the BACKWARD to come reads.
    """
    if spec.phase is Phase.BACKWARD:
        return frozenset()
    kept = set(graph.output_ids)
    if spec.phase is Phase.FORWARD:
        for item in backward_packs(graph, spec):
            kept.update(graph.pack_inputs(item.pack.first, item.pack.last))
    return frozenset(v for v in kept if graph.values[v].producer >= 0)


def _needed_later(
    graph: LayerGraph, spec: StepSpec, backward: Sequence[BackwardPack]
) -> frozenset[int]:
    """Values that some task other than their FORWARD reads, or that the model returns."""
    packs = [*spec.forward_packs, *(item.pack for item in backward)]
    read = {v for pack in packs for v in graph.pack_inputs(pack.first, pack.last)}
    return frozenset(read.union(graph.output_ids))


def _add_forward(tasks: TaskGraph, pack: Pack, needed: frozenset[int], number: int) -> None:
    """Append F[pack] of all replicas and the microbatches of a round."""
    graph = tasks.layers
    made = [v for i in pack for v in graph.layers[i].outputs if v in needed]
    for task, samples in _microbatches(tasks, TaskKind.FORWARD, pack, number):
        inputs = [value(v, samples) for v in graph.pack_inputs(pack.first, pack.last)]
        outputs = [value(v, samples) for v in sorted(made)]
        kept = tasks.spec.kept_by(pack, tasks.replica_of[task], samples)
        outputs += [] if kept is None else [kept]
        _add(tasks, task, [*_parameters(graph, pack), *inputs], outputs)


def _microbatches(
    tasks: TaskGraph, kind: TaskKind, pack: Pack, number: int
) -> Iterator[tuple[Task, Samples]]:
    spec = tasks.spec
    for replica in range(len(spec.shares)):
        every = spec.microbatches(replica, kind)
        count = len(every) if spec.rounds == 1 else spec.runs_of_round(replica)
        for samples in every[number * count : (number + 1) * count]:
            task = Task(kind, pack, samples)
            tasks.replica_of[task] = replica
            yield task, samples


def _parameters(graph: LayerGraph, pack: Pack) -> list[TensorRef]:
    """Weights of a pack; a pack without any names none."""
    own = weights(pack)
    used = [shared(k) for k in graph.shared_in(pack.first, pack.last)]
    return [own, *used] if own.nbytes(graph) else used


def _add_backward(
    tasks: TaskGraph,
    pack: Pack,
    item: BackwardPack | None,
    parts: dict[tuple[int, int, Pack], int],
    number: int,
) -> None:
    """Append B[pack] of a round; behind that of the last one A and U, or N where U is late."""
    spec = tasks.spec
    if item is not None:
        for task, samples in _microbatches(tasks, TaskKind.BACKWARD, pack, number):
            _add_one_backward(tasks, item, task, samples, parts)
    is_last = number == spec.rounds - 1
    sums = _sums(tasks, pack, item, parts) if is_last else []
    for addends in sums:
        _accumulate(tasks, addends)
    totals = [addends[0] for addends in sums]
    if totals and pack in spec.late:
        _add(tasks, Task(TaskKind.NORMS, pack), totals, [])
    elif totals and spec.phase is Phase.TRAIN:
        _add_update(tasks, Task(TaskKind.UPDATE, pack), totals)


def _add_late_updates(tasks: TaskGraph, backward: Sequence[BackwardPack]) -> None:
    """Append L of every late pack that has something to update."""
    by_pack = {item.pack: item for item in backward}
    parts = _shared_parts(tasks.spec, backward)
    for pack in sorted(tasks.spec.late):
        sums = _sums(tasks, pack, by_pack.get(pack), parts)
        if sums:
            _add_update(tasks, Task(TaskKind.LATE_UPDATE, pack), [addends[0] for addends in sums])


def _shared_parts(
    spec: StepSpec, backward: Sequence[BackwardPack]
) -> dict[tuple[int, int, Pack], int]:
    """Number the parts of each shared gradient: replica by replica, last layers first."""
    numbers: dict[tuple[int, int, Pack], int] = {}
    count: dict[int, int] = defaultdict(int)
    for replica in range(len(spec.shares)):
        for item in backward:
            for k in item.shared:
                numbers[k, replica, item.pack] = count[k]
                count[k] += 1
    return numbers


def _add_one_backward(
    tasks: TaskGraph,
    item: BackwardPack,
    task: Task,
    samples: Samples,
    parts: dict[tuple[int, int, Pack], int],
) -> None:
    graph, pack, replica = tasks.layers, item.pack, tasks.replica_of[task]
    gradients = [weight_gradients(pack, replica)] if item.own else []
    gradients += [shared_gradient(k, parts[k, replica, pack]) for k in item.shared]
    first = tasks.spec.shares[replica][0] == samples[0]
    kept = tasks.spec.kept_by(pack, replica, samples)
    found = [] if kept is None else [kept]
    if kept is None or kept.kind is TensorKind.PRODUCTS:
        found += [value(v, samples) for v in graph.pack_inputs(pack.first, pack.last)]
    reads = [
        *_parameters(graph, pack),
        *found,
        *(value_gradient(v, samples) for v in item.takes),
        *(value_gradient(v, samples) for v in item.adds),
        *([] if first else gradients),
    ]
    writes = [
        *gradients,
        *(value_gradient(v, samples) for v in sorted((*item.adds, *item.makes))),
        *(value(v, samples) for v in item.results),
    ]
    _add(tasks, task, reads, writes)


def _sums(
    tasks: TaskGraph,
    pack: Pack,
    item: BackwardPack | None,
    parts: dict[tuple[int, int, Pack], int],
) -> list[list[TensorRef]]:
    """The gradients that are complete with this pack, each as its parts; the first is the sum."""
    complete = []
    if item is not None and item.own:
        complete.append([weight_gradients(pack, r) for r in range(len(tasks.spec.shares))])
    for param in tasks.layers.shared:
        # A shared parameter belongs to the pack of its first layer, the last one to use it here.
        count = sum(1 for k, _, _ in parts if k == param.id)
        if param.layers[0] in pack and count:
            complete.append([shared_gradient(param.id, part) for part in range(count)])
    return complete


def _accumulate(tasks: TaskGraph, addends: Sequence[TensorRef]) -> None:
    total, *others = addends
    for addend in others:
        task = Task(TaskKind.ACCUMULATE, Pack(addend.first, addend.last), None, addend)
        _add(tasks, task, [addend, total], [total])


def _add_update(tasks: TaskGraph, task: Task, gradients: Sequence[TensorRef]) -> None:
    graph, pack = tasks.layers, task.pack
    changed = [state(pack)]
    if any(ref.kind is TensorKind.WEIGHT_GRADIENTS for ref in gradients):
        changed.append(weights(pack))
    changed += [shared(r.first) for r in gradients if r.kind is TensorKind.SHARED_GRADIENTS]
    changed = [ref for ref in changed if ref.kind is TensorKind.STATE or ref.nbytes(graph)]
    _add(tasks, task, [*gradients, *changed], changed)


def _add(
    tasks: TaskGraph, task: Task, reads: Sequence[TensorRef], writes: Sequence[TensorRef]
) -> None:
    tasks.tasks.append(task)
    tasks.reads[task] = tuple(reads)
    tasks.writes[task] = tuple(writes)


def _edges(tasks: TaskGraph) -> nx.DiGraph[Task]:
    """Read after write, write after read, write after write, in the order of the tasks."""
    graph: nx.DiGraph[Task] = nx.DiGraph()
    graph.add_nodes_from(tasks.tasks)
    writer: dict[Hashable, Task] = {}
    readers: dict[Hashable, list[Task]] = defaultdict(list)
    made: dict[int, dict[TensorRef, None]] = defaultdict(dict)
    edges: set[tuple[Task, Task]] = set()
    for task in tasks.tasks:
        for ref in tasks.reads[task]:
            for cell in _cells(ref, made):
                if cell in writer:
                    edges.add((writer[cell], task))
                readers[cell].append(task)
        for ref in tasks.writes[task]:
            if ref.kind is TensorKind.VALUE:
                made[ref.first][ref] = None
            for cell in _cells(ref, made):
                earlier = [*readers.pop(cell, ()), *([writer[cell]] if cell in writer else [])]
                edges.update((before, task) for before in earlier if before != task)
                writer[cell] = task
    # Sorted, so that nothing downstream depends on the order of a set.
    order = {task: index for index, task in enumerate(tasks.tasks)}
    graph.add_edges_from(sorted(edges, key=lambda edge: (order[edge[0]], order[edge[1]])))
    return graph


def _cells(ref: TensorRef, made: Mapping[int, dict[TensorRef, None]]) -> Iterator[Hashable]:
    """The smallest things that ``ref`` covers, so that overlapping ranges meet."""
    if ref.kind in _OWN_LAYERS:
        yield from ((ref.kind, layer) for layer in range(ref.first, ref.last))
    elif ref.kind is TensorKind.VALUE:
        # F and B may cut the minibatch differently: then B reads a part of what F made.
        whole = made[ref.first]
        yield ref if ref in whole else next((m for m in whole if covers(m, ref)), ref)
    else:
        yield ref


def covers(whole: TensorRef, part: TensorRef) -> bool:
    """Whether ``part`` is the same value or gradient for some of the samples of ``whole``."""
    if whole.samples is None or part.samples is None:
        return whole == part
    return (
        (whole.kind, whole.first) == (part.kind, part.first)
        and whole.samples[0] <= part.samples[0]
        and part.samples[1] <= whole.samples[1]
    )
