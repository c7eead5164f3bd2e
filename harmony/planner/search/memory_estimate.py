"""Memory of a candidate, on devices and host, estimated from its outline before it is lowered.

An estimate from above in nearly all cases; `verify` has the last word. It tells how much room a
candidate leaves, which keeping activations or weights on a device can use.
"""

from __future__ import annotations

from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import Phase, StepSpec, TaskKind
from harmony.planner.search.outline import Outline, StageOutline
from harmony.planner.search.packing import Packer


def parked(policy: Policy, ring: int, microbatches: int) -> int:
    """Microbatches whose boundary values may wait on a device for the next pack.

    With ``boundary="keep"``: all but those that a ring of devices has in flight when the first
    comes round again.
    """
    return max(0, microbatches - ring + 1) if policy.boundary == "keep" else 0


def peaks_nbytes(
    packer: Packer, shape: Outline, spec: StepSpec, policy: Policy
) -> tuple[int, ...]:
    """Bytes that each device of a ring needs at most, slots and resident packs included."""
    return tuple(_peak(packer, shape, spec, policy, here) for here in _by_seat(shape))


def slots_nbytes(
    packer: Packer, shape: Outline, spec: StepSpec, policy: Policy
) -> tuple[int, ...]:
    """Bytes that the slots and resident packs of each device of a ring take all the time."""
    return tuple(_slots_nbytes(packer, spec, policy, here) for here in _by_seat(shape))


def _by_seat(shape: Outline) -> list[list[StageOutline]]:
    """The stages of each device of a ring."""
    found: list[list[StageOutline]] = [[] for _ in range(shape.ring)]
    for stage in shape.stages:
        found[stage.seat].append(stage)
    return found


def host_nbytes(packer: Packer, shape: Outline, spec: StepSpec) -> int:
    """Bytes of host memory that a step takes; see `memory.host_nbytes`."""
    graph = packer.graph
    found = packer.arena_nbytes
    found += sum(graph.values[v].nbytes(spec.minibatch) for v in graph.input_ids)
    if shape.replicas > 1:
        most = max(stage.gradients for stage in shape.stages)
        found += 2 * most * (shape.replicas - 1) * shape.ring
    return found + shape.replicas * sum(s.outputs * s.num_runs for s in shape.stages)


def _peak(
    packer: Packer, shape: Outline, spec: StepSpec, policy: Policy, here: list[StageOutline]
) -> int:
    kept, peak = 0, 0
    if shape.interleaved:  # of one round or the next
        kept = sum(_kept_nbytes(stage) for stage in here if stage.kind is TaskKind.FORWARD)
    if spec.phase is Phase.BACKWARD and not any(s.kind is TaskKind.FORWARD for s in here):
        kept = sum(_kept_nbytes(stage) for stage in here)  # it is there when the step begins
    for stage in here:
        if stage.kind is TaskKind.FORWARD and not shape.interleaved:
            kept += _kept_nbytes(stage)
        peak = max(peak, kept + _stage_nbytes(packer, shape, spec, policy, stage))
        if stage.kind is TaskKind.BACKWARD and not shape.interleaved:
            kept -= _kept_nbytes(stage)
    return _slots_nbytes(packer, spec, policy, here) + peak


def _kept_nbytes(stage: StageOutline) -> int:
    """What all microbatches of a pack leave on the device for its BACKWARD."""
    return stage.saved * stage.saved_runs + stage.products * stage.product_runs


def _slots_nbytes(packer: Packer, spec: StepSpec, policy: Policy, here: list[StageOutline]) -> int:
    coming = [stage.slot for stage in here if stage.weights]
    held = sum(1 for stage in here if stage.holds and stage.kind is TaskKind.FORWARD)
    made = [s.gradients for s in here if s.gradients and not s.updates_here]
    size = min(spec.backward_size, spec.shares[0][1] - spec.shares[0][0])
    resident = (packer.facts(p, size).resident for p in {s.pack for s in here if s.resident})
    found = min(policy.weight_slots + held, len(coming)) * max(coming, default=0)
    found += min(policy.gradient_slots, len(made)) * max(made, default=0)
    return found + sum(resident)


def _stage_nbytes(
    packer: Packer, shape: Outline, spec: StepSpec, policy: Policy, stage: StageOutline
) -> int:
    """Values and workspace of a stage while it runs, beyond what waits for a BACKWARD."""
    backward = stage.kind is TaskKind.BACKWARD
    size = spec.backward_size if backward else spec.forward_size
    size = min(size, spec.shares[0][1] - spec.shares[0][0])
    facts = packer.facts(stage.pack, size)
    inputs, outputs = facts.inputs, facts.outputs
    # With few microbatches it reaches into the next packs, whose values are as large.
    ahead = 1 + policy.lookahead
    found = parked(policy, shape.ring, stage.num_runs) * max(inputs, outputs)
    if shape.interleaved:  # of the other round, too
        found *= 2
    if not backward:
        found += ahead * (inputs + outputs) + facts.forward_workspace
    elif stage.saved_runs == stage.num_runs:
        found += ahead * (inputs + outputs) + facts.transient
    else:
        found += ahead * (2 * inputs + outputs) + facts.backward_workspace
    if stage.updates_here:
        found += facts.updating
    # Those of the next packs arrive while this one runs; of another round they leave as well.
    times = 2 if shape.interleaved else 1
    if stage.saved_runs and not stage.saved:
        alive = 1 + -(-ahead * stage.saved_runs // stage.num_runs)
        found += times * min(ahead, alive) * facts.saved
    if stage.product_runs and not stage.products:
        alive = 1 + -(-ahead * stage.product_runs // stage.num_runs)
        found += times * min(ahead, alive) * facts.products
    return found
