"""Where memory is short: what the smallest packs have room for is never refused."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from harmony.core.layergraph import MODEL_INPUT, Layer, LayerGraph, Value
from harmony.core.machine import Device, Host, Machine
from harmony.engine.inflight import backward_schedule
from harmony.errors import DoesNotFitError
from harmony.planner.check.verify import verify
from harmony.planner.ir.policy import LEAN
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Pack, Phase, StepSpec
from harmony.planner.lower.passes import lower
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.predict.memory import Workspace, device_peak
from harmony.planner.search.search import choose
from harmony.planner.search.trial import inference_schedule
from tests.toys import MIB, chain, server, uniform_costs

GPUS = (1, 2, 4)


def drawn(random: Random, num_layers: int) -> tuple[LayerGraph, CostTable]:
    """A chain of layers that are alike, have heavy ends, alternate, or differ wildly.

    What is large of one layer (weights, boundary values, what is saved) is small of another.
    """
    kind = random.choice(("alike", "ends", "alternating", "wild"))
    wild = kind == "wild"
    weights = [64 * MIB] * num_layers
    if kind == "ends":
        weights[0], weights[-1] = random.choice((128, 600)) * MIB, random.choice((64, 300)) * MIB
    if kind == "alternating":
        weights = [(16, 128)[i % 2] * MIB for i in range(num_layers)]
    if wild:
        weights = [int(2 ** random.uniform(0, 8)) * MIB for _ in range(num_layers)]
    crossing = [int(2 ** random.uniform(0, 5)) if wild else 6 for _ in range(num_layers)]
    saved = [(20, 60)[i % 2] for i in range(num_layers)]
    if wild:
        saved = [int(2 ** random.uniform(0, 8)) for _ in range(num_layers)]
    values = [Value(0, "x0", MODEL_INPUT, (0,), 8192)]
    for v in range(1, num_layers):
        values.append(Value(v, f"x{v}", v - 1, (v,), crossing[v] * MIB, requires_grad=True))
    loss = Value(num_layers, "loss", num_layers - 1, (), 4, requires_grad=True, is_output=True)
    layers = tuple(
        Layer(
            i,
            f"layer{i}",
            f"kind{i}",
            (f"w{i}",),
            weights[i],
            weights[i],
            2 * weights[i],
            inputs=(i,),
            outputs=(i + 1,),
            saved_nbytes_per_sample=saved[i] * MIB,
        )
        for i in range(num_layers)
    )
    costs = tuple(
        {
            size: LayerCost(
                1e-3 * (1 + size), 2e-3 * (1 + size), 0.04, 8 * MIB * size, s * MIB * size, MIB
            )
            for size in (1, 8)
        }
        for s in saved
    )
    return LayerGraph(layers, (*values, loss), (), loss=num_layers), CostTable(costs)


def machine(num_gpus: int, memory: int) -> Machine:
    device = Device("gpu", memory, 12e9, 12e9, 10e9, 5e-5)
    return Machine((device,) * num_gpus, Host(10**15))


def least_nbytes(graph: LayerGraph, costs: CostTable, spec: StepSpec, num_gpus: int) -> int:
    """What the smallest packs need of the fullest GPU, with nothing prefetched."""
    schedule = lower(build_tasks(graph, spec), machine(num_gpus, 10**15), LEAN)
    verify(schedule, graph, costs, spec.phase, build_tasks(graph, spec))
    workspace = Workspace(graph, costs)
    devices = range(schedule.num_devices)
    return max(device_peak(schedule, d, graph, workspace).nbytes for d in devices)


@pytest.mark.parametrize("seed", range(40))
def test_what_the_smallest_packs_have_room_for_is_not_refused(seed: int) -> None:
    random = Random(seed)
    graph, costs = drawn(random, random.choice((3, 6, 12)))
    num_gpus = random.choice(GPUS)
    minibatch = random.choice((4, 8)) * num_gpus
    packs = tuple(Pack(i, i + 1) for i in range(graph.num_layers))
    train = StepSpec(minibatch, 1, 1, packs[:-1], packs, ((0, minibatch),))
    for phases in ((Phase.TRAIN,), (Phase.FORWARD, Phase.BACKWARD)):
        least = 0
        for phase in phases:
            first = packs[:-1] if phase is Phase.TRAIN else packs
            spec = replace(train, forward_packs=first, phase=phase)
            least = max(least, least_nbytes(graph, costs, spec, num_gpus))
        for room in (1.0, 1.3):
            limit = machine(num_gpus, int(least * room))
            plan = choose(graph, costs, limit, minibatch, phase=phases[-1])
            assert max(plan.peak_nbytes) <= least * room
            inference_schedule(graph, costs, limit, plan.spec, plan.policy)
            if plan.spec.phase is Phase.BACKWARD:  # from some outputs, with nothing kept
                again = backward_schedule(plan, graph, costs, frozenset({graph.loss}), False)
                peaks = [
                    device_peak(again, d, graph, Workspace(graph, costs)).nbytes
                    for d in range(again.num_devices)
                ]
                assert max(peaks) <= least * room


def test_less_memory_than_any_layer_takes_is_refused() -> None:
    graph, costs = drawn(Random(0), 6)
    with pytest.raises(DoesNotFitError):
        choose(graph, costs, machine(2, 64 * MIB), 8)


def wide(num_layers: int) -> tuple[LayerGraph, CostTable]:
    """Layers whose every sample takes a MiB or more of a GPU."""
    graph = chain(num_layers, weight=MIB, per_sample=MIB // 4)
    layers = tuple(replace(layer, saved_nbytes_per_sample=MIB) for layer in graph.layers)
    graph = replace(graph, layers=layers)
    return graph, uniform_costs(graph)


@pytest.mark.parametrize("minibatch", [2048, 2039])
def test_large_minibatches_train_in_microbatches_that_fit(minibatch: int) -> None:
    graph, costs = wide(4)
    plan = choose(graph, costs, server(1, memory=24 * MIB), minibatch)
    assert plan.spec.backward_size < 16
    assert max(plan.peak_nbytes) <= 24 * MIB


def test_minibatches_too_large_for_the_host_are_refused_before_anything_is_lowered() -> None:
    graph, costs = wide(4)
    with pytest.raises(DoesNotFitError, match=r"needs about .* host memory.* smaller minibatch"):
        choose(graph, costs, server(1, memory=24 * MIB), 2**18)
