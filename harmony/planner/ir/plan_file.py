"""Plans in files: saved, read back, matched with a model and a machine, compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from harmony.core.files import read_json, write_json
from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.core.units import format_bytes, format_seconds
from harmony.errors import PlanError
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.tasks import Pack, Phase

FORMAT = "harmony-plan"
VERSION = 1
_AGAIN = "plan again, or leave the plan out"
_FORMS = {
    Phase.TRAIN: "whole steps (train_step)",
    Phase.BACKWARD: "a loop of one's own (loss.backward())",
    Phase.FORWARD: "forwards of a loop of one's own",
    Phase.INFER: "inference",
}


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan, so that nobody ever sees half of one.

    Raises:
        ConfigError: if it cannot be written.
    """
    write_json({"format": FORMAT, "version": VERSION, **plan.to_json()}, path, "the plan")


def load_plan(path: Path) -> Plan:
    """Read a plan back.

    Raises:
        ConfigError: if there is no such file.
        PlanError: if it holds no plan that this version reads.
    """
    data = read_json(path, "plan")
    if data.get("format") != FORMAT:
        raise PlanError(f"{path}: it is not a plan of Harmony")
    if data.get("version") != VERSION:
        raise PlanError(
            f"{path}: it is of version {data.get('version')}, this Harmony reads {VERSION}: plan"
            " again"
        )
    try:
        return Plan.from_json(data)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def check_plan(plan: Plan, graph: LayerGraph, machine: Machine, phase: Phase) -> None:
    """Refuse a plan that was made for another model, or that a machine is too small for.

    The schedule itself is checked by `harmony.planner.check.verify`.

    Raises:
        PlanError: with what differs and what to do.
    """
    if plan.spec.phase is not phase:
        raise PlanError(
            f"the plan is for {_FORMS[plan.spec.phase]}, this is {_FORMS[phase]}: {_AGAIN}"
        )
    layers = plan.spec.backward_packs[-1].last
    if layers != graph.num_layers:
        raise PlanError(
            f"the plan is for a model of {layers} layers, this one has {graph.num_layers}:"
            f" {_AGAIN}"
        )
    if plan.model and plan.model != graph.fingerprint:
        raise PlanError(
            f"the plan is for another model of {layers} layers, whose layers or values have other"
            f" sizes (its fingerprint is {plan.model}, this model's {graph.fingerprint}): {_AGAIN}"
        )
    if plan.schedule.num_devices > machine.num_devices:
        raise PlanError(
            f"the plan needs {plan.schedule.num_devices} devices, there are"
            f" {machine.num_devices}: {_AGAIN}"
        )
    for index, (peak, device) in enumerate(zip(plan.peak_nbytes, machine.devices, strict=False)):
        if peak > device.memory_nbytes:
            raise PlanError(
                f"the plan needs {format_bytes(peak)} on gpu{index}, which has"
                f" {format_bytes(device.memory_nbytes)}: {_AGAIN}"
            )
    if plan.host_nbytes > machine.host.memory_nbytes:
        raise PlanError(
            f"the plan needs {format_bytes(plan.host_nbytes)} of host memory, the limit is"
            f" {format_bytes(machine.host.memory_nbytes)}: {_AGAIN}"
        )


def check_minibatch(plan: Plan, minibatch: int) -> None:
    """Refuse a plan for other batches than the first one.

    Raises:
        PlanError: if it is for another number of samples.
    """
    if plan.minibatch != minibatch:
        raise PlanError(
            f"the plan is for minibatches of {plan.minibatch} samples, this one has {minibatch}:"
            f" {_AGAIN}"
        )


def compare_plans(first: Plan, second: Plan, names: tuple[str, str]) -> list[str]:
    """Say in lines of text how two plans differ, in words and figures."""
    a, b = names
    lines = [f"A  {a}", f"B  {b}", ""]
    if first.model != second.model:
        lines.append("They are plans for different models.")
    ratio = second.step_s / first.step_s if first.step_s else 1.0
    per_s = [plan.minibatch / plan.step_s if plan.step_s else 0.0 for plan in (first, second)]
    if abs(ratio - 1) < 5e-4:
        lines.append("B takes as long as A is predicted to take.")
    else:
        lines.append(f"B is predicted to take {_change(ratio)} A.")
    if first.minibatch != second.minibatch and per_s[0]:
        lines.append(
            f"Their minibatches differ: B trains {per_s[1] / per_s[0]:.3g} times as many"
            " samples a second."
        )
    rows = [(what, *pair) for what, *pair in _rows(first, second) if pair[0] != pair[1]]
    if not rows:
        return [*lines, "They decide everything alike."]
    widths = [max(len(row[i]) for row in (*rows, ("", "A", "B"))) for i in range(3)]
    lines.append("")
    for row in (("", "A", "B"), *rows):
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    same = [what for what, left, right in _rows(first, second) if left == right]
    return [*lines, "", f"The same in both: {', '.join(same)}."] if same else lines


def _change(ratio: float) -> str:
    if ratio >= 2:
        return f"{ratio:.3g} times as long as"
    return f"{abs(ratio - 1):.1%} {'more' if ratio > 1 else 'less'} time a step than"


def _rows(first: Plan, second: Plan) -> Iterator[tuple[str, str, str]]:
    pair = (dict(_decisions(first)), dict(_decisions(second)))
    for what in dict.fromkeys((*pair[0], *pair[1])):
        yield what, pair[0].get(what, "-"), pair[1].get(what, "-")


def _decisions(plan: Plan) -> Iterator[tuple[str, str]]:
    """What a plan decides and predicts, each in a few words."""
    spec, policy = plan.spec, plan.policy
    gpus = {device.name for device in plan.machine.devices}
    yield "machine", f"{plan.machine.num_devices} x {', '.join(sorted(gpus))}"
    yield "minibatch", str(plan.minibatch)
    yield "mode", f"{plan.mode}, {len(spec.shares)} share{'s' * (len(spec.shares) > 1)}"
    yield "microbatch F / B", f"{spec.forward_size} / {spec.backward_size}"
    yield "FORWARD packs", packs_text(spec.forward_packs)
    yield "BACKWARD packs", packs_text(spec.backward_packs)
    some = f", of {spec.saved_runs} microbatches" if spec.saved and spec.saved_runs else ""
    yield "activations saved for", packs_text(spec.saved) + some
    some = f", of {spec.products_runs} microbatches" if spec.products_runs else ""
    yield "results of products kept for", packs_text(spec.products) + some
    yield "of those on the host", packs_text(policy.offload)
    yield "weights held F to B", f"{policy.hold} packs a GPU"
    yield "weights resident", packs_text(policy.resident)
    yield "slots W / dW", f"{policy.weight_slots} / {policy.gradient_slots}"
    yield "lookahead", str(policy.lookahead)
    yield "boundaries", policy.boundary + (", mirrored" if policy.mirror else "")
    # In a loop of one's own the plan is the backward's, whose forward has a schedule of its own.
    yield "step" if spec.phase is Phase.TRAIN else spec.phase.value, format_seconds(plan.step_s)
    yield "binds", plan.bound
    yield "peak on a GPU", format_bytes(max(plan.peak_nbytes, default=0))
    yield "host memory", format_bytes(plan.host_nbytes)
    for link in ("h2d", "d2h", "p2p"):
        moved = sum(nbytes for (on, _), nbytes in plan.traffic.items() if on == link)
        yield f"{link} a step", format_bytes(moved)


def packs_text(packs: Sequence[Pack]) -> str:
    """``"12: [0:4] [4:8] ..."``, at most a handful of them in full."""
    if not packs:
        return "none"
    shown = " ".join(str(pack) for pack in packs[:4])
    return f"{len(packs)}: {shown}{' ...' if len(packs) > 4 else ''}"
