"""What the bytes of a plan are for: on the host, on each GPU at its peak, and over the step."""

from __future__ import annotations

from dataclasses import dataclass

from harmony.core.layergraph import LayerGraph
from harmony.core.timeline import Timeline
from harmony.planner.ir.plan import Plan
from harmony.planner.predict.cost import CostTable
from harmony.planner.predict.memory import (
    Workspace,
    device_peak,
    device_usage,
    inputs_nbytes,
    slots_nbytes,
    stages_nbytes,
)
from harmony.profiling.model_profile import state_nbytes


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one plan by what they are for.

    Attributes:
        host: kind -> bytes: what training keeps, the inputs of the minibatch, gradients that
            wait to be added, and "activations": values that wait for the backward.
        gpus: for each GPU kind -> bytes, when most are in use.
        usage: for each GPU the bytes in use, by position in its program: ``(position, bytes
            then, bytes while it runs)``.
    """

    host: dict[str, int]
    gpus: list[dict[str, int]]
    usage: list[list[tuple[int, int, int]]]

    def over_time(self, gpu: int, timeline: Timeline) -> list[tuple[float, int]]:
        """Bytes in use on a GPU: ``(seconds, bytes from then on)``, by when its Runs were."""
        runs = {span.index: span for span in timeline.on(f"gpu{gpu}.compute")}
        found: list[tuple[float, int]] = []
        now = 0.0
        for at, kept, while_run in self.usage[gpu]:
            span = runs.get(at)
            now = now if span is None else span.start_s
            found.append((now, while_run))
            if span is not None:
                now = span.end_s
                found.append((now, kept))
        return found


def memory_of(plan: Plan, graph: LayerGraph, costs: CostTable) -> MemoryUse:
    """Account for the memory of the planned phase."""
    schedule = plan.schedule
    workspace = Workspace(graph, costs)
    gpus, usage = [], []
    for index in range(schedule.num_devices):
        peak = device_peak(schedule, index, graph, workspace)
        kinds = {
            "weights, gradients, optimizer": peak.slots,
            "activations": peak.values,
            "workspace": peak.workspace,
        }
        gpus.append({kind: nbytes for kind, nbytes in kinds.items() if nbytes})
        slots = slots_nbytes(schedule, index, graph)
        usage.append(
            [
                (at, slots + values, slots + values + extra)
                for at, values, extra in device_usage(schedule, index, graph, workspace)
            ]
        )
    return MemoryUse(host_memory(plan, graph), gpus, usage)


def host_memory(plan: Plan, graph: LayerGraph) -> dict[str, int]:
    """Bytes of the host by what they are for; together `Plan.host_nbytes`."""
    schedule = plan.schedule
    found = state_nbytes(graph) | {
        "inputs": inputs_nbytes(schedule, graph),
        "gradients on their way": stages_nbytes(schedule),
    }
    found["activations"] = plan.host_nbytes - sum(found.values())
    return {kind: nbytes for kind, nbytes in found.items() if nbytes > 0}
