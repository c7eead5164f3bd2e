"""Plans, timelines and records made up for the tests of the report: no model, no GPU."""

from __future__ import annotations

from typing import Any

from harmony.core.machine import Device, Host, Machine
from harmony.core.timeline import Span, Timeline
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import DeviceSpec, Instruction, Schedule, parse_instruction
from harmony.planner.ir.tasks import Pack, Phase, StepSpec
from harmony.report.session import ModelRecord, StepStats, register

MIB = 2**20
PACKS = tuple(Pack(first, first + 3) for first in range(0, 18, 3))


def make_schedule(num_gpus: int, minibatch: int = 8) -> Schedule:
    """Wrap-around packs of three layers, forward and then backward, two microbatches each."""
    half = minibatch // 2 or 1

    def program(gpu: int) -> tuple[Instruction, ...]:
        mine = PACKS[gpu::num_gpus]
        tasks = [f"F{p}" for p in mine] + [f"B{p}" for p in reversed(mine)]
        return tuple(
            parse_instruction(f"compute Run {task}@{at}:{at + half} () ->")
            for task in tasks
            for at in (0, half)
        )

    specs = tuple(DeviceSpec(64 * MIB) for _ in range(num_gpus))
    return Schedule(minibatch, specs, tuple(program(gpu) for gpu in range(num_gpus)))


def make_plan(num_gpus: int = 2, minibatch: int = 8, **changes: Any) -> Plan:
    """Make a plan of this schedule with ``changes`` to its fields."""
    half = minibatch // 2 or 1
    devices = tuple(Device(f"vgpu:{i}", 64 * MIB, 8e9, 8e9, 8e9) for i in range(num_gpus))
    fields: dict[str, Any] = {
        "mode": "pp",
        "minibatch": minibatch,
        "spec": StepSpec(minibatch, half, half, PACKS[:-1], PACKS, ((0, minibatch),)),
        "machine": Machine(devices, Host(100 * 1024 * MIB)),
        "policy": Policy(),
        "schedules": {Phase.TRAIN: make_schedule(num_gpus, minibatch)},
        "step_s": 1.0,
        "peak_nbytes": (50 * MIB,) * num_gpus,
        "host_nbytes": 800 * MIB,
        "traffic": {},
        "bound": "h2d",
        "advice": "A larger minibatch helps.",
    }
    return Plan(**{**fields, **changes})


def make_timeline(num_gpus: int = 2, step_s: float = 1.0) -> Timeline:
    """One step in which every GPU computes 75 % of the time."""
    spans = []
    half = 0.5 * step_s
    for gpu in range(num_gpus):
        name = f"gpu{gpu}"
        spans += [
            Span(f"{name}.compute", "Run F[0:3]@0:4", "forward", 0.25 * step_s, half, 0, 0),
            Span(f"{name}.compute", "Run B[0:3]@0:4", "backward", half, step_s, 0, 1),
            Span(f"{name}.h2d", "SwapIn W[0:3]", "weights", 0.0, 0.25 * step_s, 123 * MIB),
            Span(f"{name}.h2d", "SwapIn X0@0:4", "inputs", 0.25 * step_s, 0.3 * step_s, 4096),
            Span(f"{name}.d2h", "SwapOut dW[0:3]%0", "gradients", 0.9, 0.95, 77 * MIB),
            Span(f"{name}.d2h", "SwapOut X3@0:4", "stash", 0.5, 0.55, 5 * MIB),
        ]
        if num_gpus > 1:
            spans.append(
                Span(f"{name}.p2p", "Send X3@0:4 gpu1", "activations", 0.6, 0.65, 3 * MIB)
            )
    spans.append(Span("host.update", "Run U[0:3]", "update", 0.95 * step_s, step_s))
    return Timeline(spans, step_s, [51 * MIB] * num_gpus, 812 * MIB)


def make_record(num_gpus: int = 2, steps: int = 20, step_s: float = 1.1) -> ModelRecord:
    """Return the record of a model after some steps."""
    facts = {"parameters": "50.4 M", "training state": "769 MiB, 6.0x the memory of all GPUs"}
    record = register("GPT", facts)
    record.planned(make_plan(num_gpus), make_timeline(num_gpus))
    for step in range(steps):
        timeline = make_timeline(num_gpus, step_s)
        record.stepped(StepStats(step, 5.5 - 0.1 * step, 8, 512, step_s, timeline))
    return record
