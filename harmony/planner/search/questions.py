"""Answers what people ask before they buy or train: how small a minibatch, how large a model.

Both look for the turning point of a property that holds on one side, with estimates only, and
plan in full what they found, so that the answer comes with a plan that was verified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from harmony.core.layergraph import Layer, LayerGraph, Value
from harmony.core.machine import Machine
from harmony.core.units import format_bytes
from harmony.errors import ConfigError, DoesNotFitError
from harmony.planner.ir.plan import Plan
from harmony.planner.predict.cost import CostTable
from harmony.planner.predict.memory import arena_nbytes
from harmony.planner.search.candidates import Candidate, Question
from harmony.planner.search.estimate import Estimator
from harmony.planner.search.ranking import Ranking
from harmony.planner.search.search import ask, choose

INFINITE = 1e18
"""Bytes per second of a link that never makes anything wait."""

MAX_REPETITIONS = 4096


@dataclass(frozen=True)
class Answer:
    """The answer to a question, and the plan that shows it.

    Attributes:
        value: samples of the minibatch, or repetitions of the block.
        why: what sets it, in a sentence.
        graph: the model that was planned.
    """

    value: int
    plan: Plan
    why: str
    graph: LayerGraph


@dataclass(frozen=True)
class Block:
    """The part of a model that repeats: layers ``first`` to ``first + length * count - 1``."""

    first: int
    length: int
    count: int


def smallest_minibatch(
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    *,
    mode: str = "auto",
    most: int = 65536,
    hidden: float = 0.95,
) -> Answer:
    """Return the smallest minibatch whose transfers hide behind compute.

    They do where the best plan, on links that take no time, would take at least ``hidden`` of the
    time that it takes: less than 5 % of the step is waiting for copies. Between powers of two the
    answer is exact to an eighth of its size, since not every size divides as well.

    Args:
        most: the largest minibatch to consider.

    Raises:
        DoesNotFitError: if nothing fits, or no minibatch up to ``most`` does.
        ConfigError: if an option makes no sense.
    """
    if most < 1 or not 0 < hidden <= 1:
        raise ConfigError(f"most is at least 1 and hidden in (0, 1], not {most} and {hidden}")

    def is_hidden(minibatch: int) -> bool:
        question = ask(graph, costs, machine, minibatch, mode=mode)
        return hidden_share(question) >= hidden

    size = 1
    while not is_hidden(size):
        if 2 * size > most:
            raise DoesNotFitError(
                f"even with minibatches of {size} samples transfers take more than"
                f" {1 - hidden:.0%} of a step. Use faster links, or more memory"
            )
        size *= 2
    low, step = size // 2, max(1, size // 16)
    while low + step < size:
        middle = low + (size - low) // (2 * step) * step or low + step
        if is_hidden(middle):
            size = middle
        else:
            low = middle
    plan = choose(graph, costs, machine, size, mode=mode)
    why = f"with {low} samples" if low else "any"
    text = f"{why} more than {1 - hidden:.0%} of a step would be waiting for copies"
    return Answer(size, plan, text if low else "even a single sample hides its transfers", graph)


def hidden_share(question: Question) -> float:
    """Share of the best plan's estimated time that it would take on links that take no time.

    0 if nothing fits.
    """
    ranking = Ranking(question)
    ranking.fill()
    if not ranking.estimates():
        return 0.0
    seconds, best = min(ranking.estimates(), key=lambda item: (item[0], item[1].num_runs))
    return _without_links_s(question, best) / seconds


def _without_links_s(question: Question, candidate: Candidate) -> float:
    machine = question.machine
    fast = replace(
        machine,
        devices=tuple(
            replace(
                device,
                h2d_bytes_per_s=INFINITE,
                d2h_bytes_per_s=INFINITE,
                p2p_bytes_per_s=INFINITE,
            )
            for device in machine.devices
        ),
        host=replace(machine.host, memory_bytes_per_s=0.0),
        switches=(),
    )
    return Estimator(replace(question, machine=fast)).step_s(candidate)


def largest_model(
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    minibatch: int,
    *,
    mode: str = "auto",
) -> Answer:
    """Return the most repetitions of the model's repeated block that fit this machine.

    Raises:
        ConfigError: if nothing in the model repeats.
        DoesNotFitError: if not even one repetition fits.
    """
    block = repeated_block(graph)

    def fits(count: int) -> bool:
        larger, longer = repeat(graph, costs, block, count)
        if arena_nbytes(larger) > machine.host.memory_nbytes:
            return False
        ranking = Ranking(ask(larger, longer, machine, minibatch, mode=mode))
        return ranking.any_fits()

    # The estimate of what fits is close, but the plan has the last word.
    count = _largest(fits)
    step = max(1, count // 32)
    while True:
        larger, longer = repeat(graph, costs, block, count)
        try:
            plan = choose(larger, longer, machine, minibatch, mode=mode)
        except DoesNotFitError:
            if count == 1:
                raise
            count, step = max(1, count - step), 2 * step
            continue
        return Answer(count, plan, _limit(graph, block, machine, plan), larger)


def _limit(graph: LayerGraph, block: Block, machine: Machine, plan: Plan) -> str:
    layers = graph.layers[block.first : block.first + block.length]
    each = sum(x.weight_nbytes + x.gradient_nbytes + x.state_nbytes for x in layers)
    each += sum(x.master_nbytes for x in layers)
    left = machine.host.memory_nbytes - plan.host_nbytes
    return (
        f"one more block needs {format_bytes(each)} of host memory for its weights, gradients and"
        f" optimizer state; {format_bytes(max(0, left))} are left"
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number from 1 on that fits; 1 if none does."""
    low, high = 1, 2
    while high < MAX_REPETITIONS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def repeated_block(graph: LayerGraph) -> Block:
    """Return the run of equal blocks that covers the most layers, with the shortest block.

    Blocks are equal if their layers have the same signatures and bytes, and read and make values
    of the same bytes at the same distances.

    Raises:
        ConfigError: if nothing in the model repeats.
    """
    found: tuple[int, int, Block] | None = None
    looks = [_look(graph, layer) for layer in graph.layers]
    for length in range(1, graph.num_layers // 2 + 1):
        equal = 0
        for at in range(length, graph.num_layers + 1):
            if at < graph.num_layers and looks[at] == looks[at - length]:
                equal += 1
                continue
            if equal >= length:
                count = 1 + equal // length
                block = Block(at - equal - length, length, count)
                item = (length * count, -length, block)
                if found is None or item[:2] > found[:2]:
                    found = item
            equal = 0
    if found is None:
        raise ConfigError("no part of this model repeats, so it cannot be made larger")
    return found[2]


def _look(graph: LayerGraph, layer: Layer) -> tuple[object, ...]:
    def distances(values: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
        found = (graph.values[v] for v in values)
        return tuple(
            # What every block reads from the same place far away is as good as equal.
            (
                0 if v.producer < 0 else min(2, layer.index - v.producer),
                v.nbytes_per_sample,
                v.nbytes_fixed,
            )
            for v in found
        )

    return (
        layer.signature,
        layer.weight_nbytes,
        layer.gradient_nbytes,
        layer.state_nbytes,
        layer.shared,
        distances(layer.inputs),
        distances(layer.outputs),
    )


def repeat(
    graph: LayerGraph, costs: CostTable, block: Block, count: int
) -> tuple[LayerGraph, CostTable]:
    """Return the model with another number of repetitions of a block, and its costs.

    The last repetition goes on as the last one did; those before it as the first did.
    """
    first, length = block.first, block.length
    order = [
        *range(first + length),
        *(first + length + at % length for at in range((count - 2) * length)),
        *range(first + length * (block.count - 1), graph.num_layers),
    ]
    if count == 1:
        order = [*range(first + length), *range(first + length * block.count, graph.num_layers)]
    return _reordered(graph, order), CostTable(tuple(costs.by_layer[i] for i in order))


def _reordered(graph: LayerGraph, order: list[int]) -> LayerGraph:
    """The layers of a model in another order, some of them several times.

    A layer reads what is made as many layers before it as in the original, if a layer of the same
    work is there; else the newest copy of the value that it read.
    """
    newest = {v.id: v.id for v in graph.values if v.producer < 0}
    values = {v.id: replace(v, consumers=()) for v in graph.values if v.producer < 0}
    readers: dict[int, list[int]] = {v: [] for v in values}
    layers: list[Layer] = []
    for index, original in enumerate(order):
        layer = graph.layers[original]
        inputs = tuple(sorted(_source(graph, newest, layers, order, v) for v in layer.inputs))
        for v in inputs:
            readers[v].append(index)
        outputs = []
        for v in layer.outputs:
            number = len(values)
            values[number] = replace(graph.values[v], id=number, producer=index, consumers=())
            readers[number] = []
            newest[v] = number
            outputs.append(number)
        layers.append(
            replace(
                layer,
                index=index,
                name=layer.name if order.count(original) == 1 else f"{layer.name}#{index}",
                params=tuple(f"{name}#{index}" for name in layer.params),
                inputs=inputs,
                outputs=tuple(outputs),
            )
        )
    done: list[Value] = [
        replace(value, consumers=tuple(readers[number])) for number, value in values.items()
    ]
    shared = tuple(
        replace(s, layers=tuple(i for i, o in enumerate(order) if o in s.layers))
        for s in graph.shared
    )
    loss = None if graph.loss is None else newest[graph.loss]
    return LayerGraph(tuple(layers), tuple(done), shared, loss)


def _source(
    graph: LayerGraph, newest: dict[int, int], layers: list[Layer], order: list[int], v: int
) -> int:
    """The value that the next layer reads instead of ``v``."""
    layer = graph.layers[order[len(layers)]]
    producer = graph.values[v].producer
    at = len(layers) - (layer.index - producer)
    if producer >= 0 and at >= 0:
        made, here = graph.layers[producer], graph.layers[order[at]]
        if made.signature == here.signature and len(made.outputs) == len(here.outputs):
            # From as many layers before it, whatever that is a copy of.
            return layers[at].outputs[made.outputs.index(v)]
    return newest[v]
