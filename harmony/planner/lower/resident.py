"""Weights that stay on their device between steps, and are updated there.

A pack is resident as a whole: its weights, and if they are trained its gradients and its optimizer
state. Nothing of it comes in. The new weights go out in every step, since anybody may read the
parameters on the host once the step is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from harmony.core.layergraph import LayerGraph
from harmony.errors import PlanError
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import (
    Pack,
    Phase,
    Task,
    TaskKind,
    TensorRef,
    shared,
    shared_gradient,
    state,
    weight_gradients,
    weights,
)
from harmony.planner.lower.place import Placement


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
        refs[pack] = _refs(graph, pack)
        if state(pack) in refs[pack] and spec.phase is Phase.TRAIN:
            trained.add(pack)
        devices[pack] = found.pop()
    return Residents(devices, refs, frozenset(trained))


def can_stay(graph: LayerGraph, pack: Pack) -> str | None:
    """Why a pack cannot be resident; None if it can."""
    for k in graph.shared_in(pack.first, pack.last):
        if not all(layer in pack for layer in graph.shared[k].layers):
            return f"{pack} shares {graph.shared[k].name} with other packs"
    if any(graph.layers[i].changes_state for i in pack):
        return f"the forward of {pack} changes buffers"
    tied = [graph.shared[k] for k in graph.shared_in(pack.first, pack.last)]
    own = graph.layers[pack.first : pack.last]
    if any(x.master_nbytes and x.gradient_nbytes for x in own) or any(
        x.master_nbytes and x.gradient_nbytes for x in tied
    ):
        return f"the parameters of {pack} are updated on the host, where their masters are"
    return None


def _refs(graph: LayerGraph, pack: Pack) -> tuple[TensorRef, ...]:
    """What a pack keeps, its weights first; gradients and state if any of them are trained.

    Raises:
        PlanError: if it cannot be resident.
    """
    why = can_stay(graph, pack)
    if why is not None:
        raise PlanError(f"{why}: it cannot stay on a device. Leave it out of resident=")
    tied = graph.shared_in(pack.first, pack.last)
    own = [weights(pack), *(shared(k) for k in tied)]
    if graph.gradient_nbytes(range(pack.first, pack.last)):
        own.append(weight_gradients(pack))
        own += [shared_gradient(k, 0) for k in tied if graph.shared[k].gradient_nbytes]
        own.append(state(pack))
    return tuple(own)
