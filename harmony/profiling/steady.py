"""Costs and a machine without anything timed: what decides how microbatches are cut.

What changes the bits of a step (`harmony.planner.search.numerics`) must not follow measured times,
which differ from run to run. It is chosen by what is the same in every run: bytes and FLOPs that
were counted, the GPU's figures in the catalog, totals of memory, settings of virtual GPUs. A
second search, by what was measured, then chooses the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from harmony.capture import Captured
from harmony.capture.cost.work import work_of
from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Device, Host, Machine
from harmony.core.units import format_seconds, parse_rate
from harmony.errors import DoesNotFitError
from harmony.planner.ir.plan import Decision, Plan
from harmony.planner.ir.tasks import Phase
from harmony.planner.predict.cost import CostTable
from harmony.planner.search.candidates import Candidate, Question
from harmony.planner.search.search import ask, choose
from harmony.profiling.analytic import LayerWork, Work, WorkTable, analytic_costs
from harmony.profiling.catalog import (
    FP32_SHARE,
    MEMORY_SHARE,
    UPDATE_TRAFFIC,
    Gpu,
    find_gpu,
    known_gpu,
    machine_of,
    usual_host,
)
from harmony.runtime import native
from harmony.runtime.device import DeviceContext
from harmony.runtime.host.limits import total_host_nbytes

EIGHTHS = 8
"""The choice counts on seven eighths of a real GPU's memory: how much is free differs by what
other programs take, and by what the libraries do."""

UNLISTED = "RTX 3090"
"""The GPU whose rates stand for those of one that is not in the catalog."""

CORE_FLOPS = 40e9
CORE_BYTES_PER_S = 8e9
CORE_COPY_BYTES_PER_S = 5e9
CORE_KERNEL_S = 1e-5
"""What one core of a usual computer does for a virtual GPU: fp32 products, bytes of other kernels,
bytes of copies where links are not throttled, and what a kernel takes beside its work."""

SETTLED = ("replicas", "microbatch size")
"""Names of the decisions that are made first."""


@dataclass(frozen=True)
class Steady:
    """The machine of a model, as it is in every run.

    Attributes:
        gpu: whose rates the layers' costs are computed from.
        machine: devices with their links and the memory that the choice may count on.
        host_bytes_per_s: memory bandwidth of the host, which its updates are limited by.
        core: of a virtual GPU, what it would be without the waiting that is added to its work.
    """

    gpu: Gpu
    machine: Machine
    host_bytes_per_s: float
    core: Gpu | None = None


def steady_of(
    contexts: Sequence[DeviceContext],
    limits: tuple[int | None, int | None],
    num_cores: int,
) -> Steady:
    """Describe a machine without what is timed of it.

    Args:
        limits: bytes to use of each device and of the host; None for what there is.
        num_cores: CPU cores of the host.
    """
    device_nbytes, host_nbytes = limits
    count, host_nbytes = len(contexts), host_nbytes or total_host_nbytes()
    if native.is_virtual(contexts[0].device):
        core, gpu, machine = _virtual(count, host_nbytes)
        host_bytes_per_s = CORE_BYTES_PER_S
    else:
        core = None
        gpu = known_gpu(native.product_name(contexts[0].device)) or find_gpu(UNLISTED)
        kind = usual_host(gpu, count)
        machine = machine_of(gpu, count, host_nbytes, host=kind)
        host_bytes_per_s = kind.bytes_per_s
    devices = tuple(
        replace(device, memory_nbytes=_memory_nbytes(context, device_nbytes))
        for device, context in zip(machine.devices, contexts, strict=True)
    )
    host = replace(machine.host, num_cores=num_cores)
    machine = replace(machine, devices=devices, host=host)
    return Steady(gpu, machine, host_bytes_per_s, core)


def _memory_nbytes(context: DeviceContext, limit: int | None) -> int:
    total = native.memory_info(context.device)[1]
    if limit is not None:
        return min(limit, total)
    return total if native.is_virtual(context.device) else total * (EIGHTHS - 1) // EIGHTHS


def _virtual(count: int, host_nbytes: int) -> tuple[Gpu, Gpu, Machine]:
    """A virtual GPU on a core of a usual computer, without and with the waiting that is set."""
    settings = native.virtual_settings()
    threads = settings["num_threads"]
    core = Gpu(
        "virtual GPU",
        0,
        {"fp32": threads * CORE_FLOPS / FP32_SHARE},
        threads * CORE_BYTES_PER_S / MEMORY_SHARE,
        pcie=0,
        kernel_s=CORE_KERNEL_S,
    )
    slowdown = settings["slowdown"]
    gpu = replace(
        core,
        flops={"fp32": core.flops["fp32"] / slowdown},
        memory_bytes_per_s=core.memory_bytes_per_s / slowdown,
        kernel_s=CORE_KERNEL_S * slowdown + settings["delay_us"] / 1e6,
    )
    link = settings.get("link")
    rates = (settings.get(way) or link for way in ("h2d", "d2h", "p2p"))
    h2d, d2h, p2p = (CORE_COPY_BYTES_PER_S if r is None else parse_rate(r) for r in rates)
    device = Device(gpu.name, 0, h2d, d2h, p2p, 0.0, CORE_BYTES_PER_S / UPDATE_TRAFFIC)
    return core, gpu, Machine((device,) * count, Host(host_nbytes, CORE_BYTES_PER_S / 3))


def count_work(captured: Captured, sizes: Iterable[int]) -> WorkTable:
    """FLOPs, bytes and kernels of every layer at these microbatch sizes."""
    table: list[dict[int, LayerWork]] = [{} for _ in captured.graph.layers]
    for size in sizes:
        for row, counts in zip(table, work_of(captured, size), strict=True):
            row[size] = LayerWork(Work(*counts.forward), Work(*counts.backward))
    return WorkTable(tuple(table))


def choose_steadily(
    steady: Steady,
    captured: Captured,
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    minibatch: int,
    *,
    mode: str,
    microbatch_size: int | str,
    activations: str,
    phase: Phase,
    like: Candidate | None = None,
) -> Plan:
    """Return the fastest plan, by what was measured, of those with the bits that are chosen first.

    Args:
        costs: what was measured; its bytes were counted, and its sizes are those to count at.
        machine: as it was measured.
        like: computes the bits that were chosen in an earlier run.

    Raises:
        DoesNotFitError: if no plan fits.
    """
    asked: dict[str, Any] = {
        "mode": mode,
        "microbatch_size": microbatch_size,
        "activations": activations,
        "phase": phase,
    }
    measured = graph, costs, machine, minibatch
    if like is not None:
        return choose(*measured, **asked, like=like)
    if not _leaves_bits_open(ask(*measured, **asked)):
        return choose(*measured, **asked)
    counted, described = _described(steady, captured, graph, costs, machine, minibatch)
    try:
        first = choose(graph, counted, described, minibatch, **asked)
        return _explained(choose(*measured, **asked, like=first), first)
    except DoesNotFitError:
        # Less is free than there should be: what fits now, still whatever was timed.
        left = _with_memory_of(described, machine)
        if left == described:
            raise
        first = choose(graph, counted, left, minibatch, **asked)
        return _explained(choose(*measured, **asked, like=first), first)


def _leaves_bits_open(question: Question) -> bool:
    """Whether plans that answer a question may differ in what they compute."""
    graph = question.packer.graph
    if len(question.replicas) > 1 or any(len(param.layers) > 1 for param in graph.shared):
        return True
    if question.phase is Phase.TRAIN and not question.machine.updates_alike:
        return True
    share = -(-question.minibatch // question.replicas[0])
    if question.sizes is None:
        return share > 1
    equal = graph.pins_microbatch() or question.phase is not Phase.TRAIN
    return not equal and 2 * question.sizes[0] <= share


def _described(
    steady: Steady,
    captured: Captured,
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    minibatch: int,
) -> tuple[CostTable, Machine]:
    """Costs and a machine like those that were measured, without what was timed of them."""
    sizes = sorted(set().union(*costs.by_layer))
    # FLOPs and bytes are on a line through those of two sizes.
    work = count_work(captured, {sizes[0], sizes[-1]})
    tf32 = steady.core is None and torch.get_float32_matmul_precision() != "highest"

    def costs_on(gpu: Gpu) -> CostTable:
        rate = steady.host_bytes_per_s
        return analytic_costs(graph, work, costs, gpu, rate, minibatch, sizes=sizes, tf32=tf32)

    counted = costs_on(steady.gpu)
    share = 0.0
    if steady.core is not None:
        busy_s, whole_s = (_seconds(table) for table in (costs_on(steady.core), counted))
        share = busy_s / whole_s if whole_s else 1.0
    update_rates = (
        described.update_bytes_per_s if device.update_bytes_per_s else 0.0
        for described, device in zip(steady.machine.devices, machine.devices, strict=True)
    )
    devices = tuple(
        replace(device, update_bytes_per_s=rate)
        for device, rate in zip(steady.machine.devices, update_rates, strict=True)
    )
    return counted, replace(
        steady.machine,
        devices=devices,
        cpu_share=share,
        updates_alike=machine.updates_alike,
        updates_wait=machine.updates_wait,
        updates_overlap=machine.updates_overlap,
    )


def _seconds(costs: CostTable) -> float:
    """Of a forward and a backward of the largest microbatch."""
    largest = (layer[max(layer)] for layer in costs.by_layer)
    return sum(cost.forward_s + cost.backward_s for cost in largest)


def _with_memory_of(machine: Machine, other: Machine) -> Machine:
    """A machine with as much memory as another."""
    devices = tuple(
        replace(device, memory_nbytes=as_large.memory_nbytes)
        for device, as_large in zip(machine.devices, other.devices, strict=True)
    )
    host = replace(machine.host, memory_nbytes=other.host.memory_nbytes)
    return replace(machine, devices=devices, host=host)


def _explained(plan: Plan, first: Plan) -> Plan:
    """A plan with the reasons for what was settled by an earlier search."""
    known = {decision.name: decision for decision in first.decisions}
    scale = plan.step_s / first.step_s if first.step_s else 1.0
    decisions = tuple(
        _by_counted_work(known[decision.name], scale)
        if decision.name in SETTLED and decision.name in known
        else decision
        for decision in plan.decisions
    )
    return replace(plan, decisions=decisions)


def _by_counted_work(decision: Decision, scale: float) -> Decision:
    """A decision with times that compare with those of a plan that took others into account."""
    times = [seconds for _, seconds in decision.alternatives if isinstance(seconds, float)]
    why = decision.why
    if times:
        why = why.replace(format_seconds(times[0]), format_seconds(times[0] * scale))
        why += ", by counted work"
    scaled = tuple(
        (value, what * scale if isinstance(what, float) else what)
        for value, what in decision.alternatives
    )
    return replace(decision, why=why, alternatives=scaled)
