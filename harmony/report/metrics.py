"""The figures of the report: computed once, printed as text or written as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.core.timeline import Timeline
from harmony.core.units import format_bytes
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import HOST, HOST_STREAM, Instruction, Op
from harmony.planner.ir.tasks import Pack, Phase, TaskKind
from harmony.planner.predict.bottleneck import bottleneck
from harmony.planner.predict.cost import CostTable
from harmony.planner.predict.simulate import simulate, stall_causes
from harmony.report.memory import host_memory
from harmony.report.session import ModelRecord, PlanRun

LINKS = ("h2d", "d2h", "p2p")
"""Streams that carry bytes: host to device, device to host, device to device."""

KINDS = ("weights", "gradients", "stash", "saved", "activations", "inputs", "outputs")
"""What transfers carry, in the order of the report."""

BOTTLENECKS = {
    "compute": "GPU compute",
    "h2d": "the links from the host to the GPUs",
    "d2h": "the links from the GPUs to the host",
    "peer": "waiting for another GPU",
    "update": "the update on the host",
    "host": "issuing work from the host",
}


MODE_NAMES = {
    "pp": "Harmony-PP (pipeline)",
    "dp": "Harmony-DP (data parallel)",
    "dp+pp": "Harmony-DP over Harmony-PP (replicas, a pipeline each)",
}

LINK_NAMES = {"h2d": "host to GPU", "d2h": "GPU to host", "p2p": "GPU to GPU"}

STALL_NAMES = {
    "weights": "weights coming in",
    "gradients": "gradients going out",
    "new weights": "new weights going out",
    "saved": "offloaded activations",
    "peer": "another GPU",
    "update": "the update on the host",
    "host": "the host issuing work",
}
"""What a GPU waited for, where the name of the bytes alone does not say it."""


@dataclass(frozen=True)
class GpuMetrics:
    """One GPU in one step.

    Attributes:
        busy_s: seconds that its compute stream worked.
        stalls_s: seconds that it did not, by cause.
        link_busy_s: seconds that each of its links was in use.
        traffic_nbytes: link -> kind -> bytes.
        packs: its tasks in order, e.g. ``"F[0:3] F[6:9] | B[9:12] B[3:6]"``.
    """

    name: str
    busy_s: float
    stalls_s: dict[str, float]
    peak_nbytes: int
    limit_nbytes: int
    link_busy_s: dict[str, float]
    traffic_nbytes: dict[str, dict[str, int]]
    packs: str


@dataclass(frozen=True)
class Metrics:
    """All that the report says about one model.

    Attributes:
        measured: whether the GPU figures were measured; else no step ran and they are expected.
        step_s: median seconds of a step as the script saw it, None if none ran.
        keeps: in words what stays on the GPUs, or waits on the host, instead of being recomputed
            or fetched again; empty if nothing does.
        host_parts: what the host's bytes are for, as predicted; none where no layers are known.
        shared_cores: CPU cores, if there are more virtual GPUs than that; else 0.
        timeline_s: seconds of the step that the GPU figures are of.
        bound: what sets the pace of that step, a key of `BOTTLENECKS`.
        advice: what would help, in a sentence.
        error_percent: predicted against measured step time, positive if the step took longer.
    """

    name: str
    facts: dict[str, str]
    warnings: list[str]
    mode: str
    minibatch: int
    microbatches: str
    keeps: str
    num_plans: int
    num_steps: int
    num_batches: int
    measured: bool
    first_loss: float | None
    last_loss: float | None
    step_s: float | None
    predicted_step_s: float
    error_percent: float | None
    shared_cores: int
    samples_per_s: float | None
    tokens_per_s: float | None
    timeline_s: float
    gpus: list[GpuMetrics]
    host_update_s: float
    host_nbytes: int
    host_parts: dict[str, int]
    host_limit_nbytes: int
    bound: str
    advice: str

    def in_words(self) -> dict[str, str]:
        """What the plan does, label to text: how it trains, what it keeps, who runs what."""
        gpus = "1 GPU" if len(self.gpus) == 1 else f"{len(self.gpus)} GPUs"
        mode = MODE_NAMES.get(self.mode, self.mode)
        words = {"plan": f"{mode} on {gpus}, minibatch {self.minibatch} = {self.microbatches}"}
        if self.keeps:
            words["kept"] = self.keeps
        if len({gpu.packs for gpu in self.gpus}) == 1:
            return {**words, "packs": self.gpus[0].packs}
        packs = {f"packs of gpu{index}": gpu.packs for index, gpu in enumerate(self.gpus)}
        return {**words, **packs}

    def traffic_nbytes(self) -> dict[str, dict[str, int]]:
        """Link -> kind -> bytes, over all GPUs."""
        total: dict[str, dict[str, int]] = {}
        for gpu in self.gpus:
            for link, kinds in gpu.traffic_nbytes.items():
                row = total.setdefault(link, {})
                for kind, nbytes in kinds.items():
                    row[kind] = row.get(kind, 0) + nbytes
        return total

    def to_json(self) -> dict[str, Any]:
        """All figures as plain data."""
        return {**asdict(self), "traffic_nbytes": self.traffic_nbytes()}


def metrics_of(record: ModelRecord) -> Metrics:
    """Compute the figures of a model from the plan that ran most.

    Raises:
        ValueError: if it has no plan yet.
    """
    run = record.run
    if run is None:
        raise ValueError(f"{record.name} has no plan yet: there is nothing to report")
    plan = run.plan
    timeline = run.last or run.predicted
    step_s = run.median_s()
    gpus = _gpus(run, timeline)
    bound, advice = bottleneck(timeline, run.ran or plan.schedule, plan.spec)
    return Metrics(
        name=record.name,
        facts=dict(record.facts),
        warnings=list(record.warnings),
        mode=plan.mode,
        minibatch=plan.minibatch,
        microbatches=_microbatches(run),
        keeps=_keeps(plan),
        num_plans=len(record.runs),
        num_steps=record.num_steps,
        num_batches=record.num_batches,
        measured=run.last is not None,
        first_loss=record.first_loss,
        last_loss=record.last_loss,
        step_s=step_s,
        predicted_step_s=plan.step_s,
        error_percent=_percent(step_s, plan.step_s),
        shared_cores=_shared_cores([gpu.name for gpu in gpus]),
        samples_per_s=_rate(run.num_samples / run.num_steps, step_s) if run.num_steps else None,
        tokens_per_s=_rate(run.num_tokens / run.num_steps, step_s) if run.num_tokens else None,
        timeline_s=timeline.step_s,
        gpus=gpus,
        host_update_s=timeline.busy_s(f"{HOST}.{HOST_STREAM}"),
        host_nbytes=max(timeline.host_nbytes, plan.host_nbytes),
        host_parts={} if run.layers is None else host_memory(plan, run.layers[0]),
        host_limit_nbytes=plan.machine.host.memory_nbytes,
        bound=bound,
        advice=advice,
    )


def of_limit(nbytes: int, limit_nbytes: int) -> str:
    """``"51.0 of 64.0 MiB"``, or with two units where they differ."""
    used, limit = format_bytes(nbytes), format_bytes(limit_nbytes)
    number, unit = used.split()
    return f"{number if limit.endswith(f' {unit}') else used} of {limit}"


def forward_seconds(plan: Plan, graph: LayerGraph, costs: CostTable, machine: Machine) -> float:
    """Seconds of the forward where it has a schedule of its own; else 0."""
    if plan.spec.phase is not Phase.BACKWARD:
        return 0.0
    return simulate(plan.schedules[Phase.FORWARD], graph, costs, machine).step_s


def packs_of(program: Iterable[Instruction]) -> str:
    """Packs of a device in the order it first runs them: ``"F[0:3] F[6:9] | B[3:6]"``."""
    names: dict[TaskKind, list[str]] = {TaskKind.FORWARD: [], TaskKind.BACKWARD: []}
    for step in program:
        if step.op is Op.RUN and step.task is not None and step.task.kind in names:
            text = f"{step.task.kind.value}{step.task.pack}"
            if text not in names[step.task.kind]:
                names[step.task.kind].append(text)
    return " | ".join(" ".join(_elide(group)) for group in names.values() if group)


def _gpus(run: PlanRun, timeline: Timeline) -> list[GpuMetrics]:
    plan = run.plan
    stalls = stall_causes(timeline, run.ran or plan.schedule)
    found = []
    for index, device in enumerate(plan.machine.devices[: plan.schedule.num_devices]):
        prefix = f"gpu{index}"
        traffic: dict[str, dict[str, int]] = {}
        lanes = [f"{prefix}.{link}" for link in LINKS]
        for (link, kind), nbytes in timeline.bytes_by(lanes).items():
            traffic.setdefault(link, {})[kind] = nbytes
        peaks = timeline.peak_nbytes or plan.peak_nbytes
        found.append(
            GpuMetrics(
                name=device.name,
                busy_s=timeline.busy_s(f"{prefix}.compute"),
                stalls_s=dict(stalls[index]),
                peak_nbytes=peaks[index],
                limit_nbytes=device.memory_nbytes,
                link_busy_s={link: timeline.busy_s(f"{prefix}.{link}") for link in LINKS},
                traffic_nbytes=traffic,
                packs=packs_of(plan.schedule.programs[index]),
            )
        )
    return found


def _keeps(plan: Plan) -> str:
    """``"activations of 3 packs on the GPU, of 12 on the host; weights of 4 packs for good"``."""
    spec, policy = plan.spec, plan.policy
    parts = []
    if spec.saved:
        each = "of each" if spec.rounds == 1 else "a round of each"
        some = f" ({spec.saved_runs} microbatches {each})" if spec.saved_runs else ""
        parts.append(f"activations of {_places(spec.saved, policy)}{some}")
    if spec.products:
        others = " of the other microbatches" if spec.saved_runs and spec.saved else ""
        if spec.products_runs:
            each = "of each" if spec.rounds == 1 else "a round of each"
            others = f" ({spec.products_runs} microbatches {each})"
        parts.append(f"results of products of {_places(spec.products, policy)}{others}")
    if policy.hold:
        parts.append(f"weights of up to {_packs(policy.hold)} a GPU until the backward")
    if policy.resident:
        parts.append(f"weights of {_packs(len(policy.resident))} from step to step")
    return "; ".join(parts)


def _places(kept: Sequence[Pack], policy: Policy) -> str:
    on_host = len({*kept}.intersection(policy.offload))
    places = [f"{_packs(len(kept) - on_host)} on the GPUs"] if len(kept) > on_host else []
    return " and ".join(places + ([f"{_packs(on_host)} on the host"] if on_host else []))


def _packs(count: int) -> str:
    return "1 pack" if count == 1 else f"{count} packs"


def _microbatches(run: PlanRun) -> str:
    """``"4 microbatches of 2 samples"``, of a GPU where each has its own share."""
    spec = run.plan.spec
    sizes = {}
    for kind in (TaskKind.FORWARD, TaskKind.BACKWARD):
        batches = spec.microbatches(0, kind)
        size = spec.forward_size if kind is TaskKind.FORWARD else spec.backward_size
        size = min(size, spec.minibatch)
        plural = "" if len(batches) == 1 else "es"
        samples = "1 sample" if size == 1 else f"{size} samples"
        sizes[kind] = f"{len(batches)} microbatch{plural} of {samples}"
    forward, backward = sizes.values()
    each = " on each GPU" if len(spec.shares) > 1 else ""
    together = " interleaved" if spec.interleaved else ""
    each += f" in {spec.rounds}{together} rounds" if spec.rounds > 1 else ""
    if forward == backward:
        return forward + each
    return f"{forward} forward, {backward} backward{each}"


def _shared_cores(gpus: list[str]) -> int:
    num_cores = os.cpu_count() or 1
    return num_cores if gpus[0].startswith("vgpu") and len(gpus) > num_cores else 0


def _elide(names: list[str], keep: int = 16) -> list[str]:
    if len(names) <= keep:
        return names
    return [*names[: keep - 4], f"... {len(names) - keep + 1} more ...", *names[-3:]]


def _rate(count: float, seconds: float | None) -> float | None:
    return count / seconds if seconds else None


def _percent(measured: float | None, predicted: float) -> float | None:
    return (measured / predicted - 1) * 100 if measured and predicted else None
