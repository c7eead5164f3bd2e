"""Weights that stay on their device between steps, and are updated there.

A pack is resident as a whole: its weights, and if they are trained its gradients and its optimizer
state. Nothing of it comes in. The new weights go out in every step, since anybody may read the
parameters on the host once the step is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from harmony.errors import PlanError
from harmony.planner.place import Placement
from harmony.planner.policy import Policy
from harmony.planner.tasks import (
    Pack,
    Phase,
    Task,
    TaskKind,
    TensorRef,
    state,
    weight_gradients,
    weights,
)


@dataclass(frozen=True)
class Residents:
    """The resident packs and what each keeps on its device.

    Attributes:
        device: of each pack.
        refs: of each pack.
        trained: the packs that are updated on their device in this step.
    """

    device: dict[Pack, int] = field(default_factory=dict)
    refs: dict[Pack, tuple[TensorRef, ...]] = field(default_factory=dict)
    trained: frozenset[Pack] = frozenset()

    def refs_on(self, device: int) -> tuple[TensorRef, ...]:
        """All resident tensors of a device."""
        return tuple(r for p, refs in self.refs.items() if self.device[p] == device for r in refs)

    def device_of(self, task: Task) -> int | None:
        """The device that runs an UPDATE, if one does."""
        is_update = task.kind is TaskKind.UPDATE and task.pack in self.trained
        return self.device[task.pack] if is_update else None


def find_resident(placement: Placement, policy: Policy) -> Residents:
    """Return what the policy leaves on the devices between steps.

    Raises:
        PlanError: if a pack cannot stay: it has replicas, runs on several devices, shares
            parameters with other packs, or has buffers that its forward changes.
    """
    graph, spec = placement.tasks.layers, placement.tasks.spec
    if not policy.resident:
        return Residents()
    if len(spec.shares) > 1:
        raise PlanError(
            f"weights stay on a device between steps only where they have one replica, not"
            f" {len(spec.shares)}. Use mode='pp', or leave resident= out"
        )
    if spec.phase not in (Phase.TRAIN, Phase.INFER):
        raise PlanError(
            f"weights stay on a device between whole training steps, not to {spec.phase.value}:"
            " there the update is the caller's. Leave resident= out"
        )
    where: dict[Pack, set[int]] = {pack: set() for pack in policy.resident}
    for task, device in placement.device.items():
        for pack in policy.resident:
            if task.pack == pack:
                where[pack].add(device)
            elif task.pack.first < pack.last and pack.first < task.pack.last:
                raise PlanError(f"{pack} is to stay on its device, but {task.pack} overlaps it")
    devices, refs, trained = {}, {}, set()
    for pack, found in where.items():
        if len(found) != 1:
            raise PlanError(
                f"{pack} is to stay on one device, but runs on {sorted(found)}. Use"
                " Policy(mirror=True), or leave it out of resident="
            )
        if graph.shared_in(pack.first, pack.last):
            raise PlanError(f"{pack} shares parameters with other packs: it cannot be resident")
        if any(graph.layers[i].changes_state for i in pack):
            raise PlanError(f"the forward of {pack} changes buffers: it cannot be resident")
        own = [weights(pack)]
        if graph.gradient_nbytes(range(pack.first, pack.last)):
            own += [weight_gradients(pack), state(pack)]
            if spec.phase is Phase.TRAIN:
                trained.add(pack)
        devices[pack] = found.pop()
        refs[pack] = tuple(ref for ref in own if ref.nbytes(graph) or ref == state(pack))
    return Residents(devices, refs, frozenset(trained))
