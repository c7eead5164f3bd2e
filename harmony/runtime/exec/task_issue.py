"""What a device issues for a task: a pack's forward, or its recompute and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from harmony.planner.ir.schedule import Instruction
from harmony.planner.ir.tasks import TensorKind, TensorRef
from harmony.runtime.exec.kept_products import KeptProducts
from harmony.runtime.exec.saved_forward import SavedForward
from harmony.runtime.exec.stage import Stage
from harmony.runtime.host.host_state import HostState
from harmony.runtime.step.step import Step
from harmony.runtime.unsaved import about_to_change

Issue = Callable[[Step], None]
Env = dict[TensorRef, torch.Tensor]
"""The values that are on a device now."""

SavedForwards = dict[TensorRef, SavedForward | KeptProducts]
"""What forwards on a device have left for their backwards."""


@dataclass(frozen=True)
class TaskIssuer:
    """Looks up what tasks need, once, on one device; what it returns is issued every step."""

    stage: Stage
    env: Env
    host: HostState
    saved: SavedForwards

    def forward(self, instruction: Instruction, slot: int) -> Issue:
        """Prepare the forward of a pack for a microbatch.

        Args:
            slot: of the pack's parameters; -1 if it has none.
        """
        task, env, stage = instruction.task, self.env, self.stage
        assert task is not None
        inputs = [ref for ref in instruction.reads if ref.is_value]
        outputs = [ref for ref in instruction.writes if ref.kind is TensorKind.VALUE]
        wanted = [ref.first for ref in outputs]
        kept = _kept(instruction.writes)
        keep = stage.forward_keeping if _is_products(kept) else stage.forward_saving

        def issue(step: Step) -> None:
            values = {ref.first: env[ref] for ref in inputs}
            if kept is None:
                found = stage.forward(task, slot, values, wanted, step.replay)
            else:
                found, self.saved[kept] = keep(task, slot, values, wanted, step.replay)
            for ref in outputs:
                env[ref] = found[ref.first]
            if step.check is not None:
                step.check.record(task, found)

        return issue

    def backward(self, instruction: Instruction, slot: int, gradient_slot: int) -> Issue:
        """Prepare the recompute and the backward of a pack for a microbatch.

        Args:
            slot: of the pack's parameters; -1 if it has none.
            gradient_slot: of their gradients, likewise.
        """
        kept = _kept(instruction.reads)
        if kept is not None and not _is_products(kept):
            return self._backward_saved(instruction, slot, gradient_slot, kept)
        task, env, stage = instruction.task, self.env, self.stage
        assert task is not None and task.samples is not None
        samples = task.samples
        begins = not any(ref.is_gradient_part for ref in instruction.reads)
        reads = [ref for ref in instruction.reads if ref.is_value]
        inputs = [ref for ref in reads if ref.kind is TensorKind.VALUE]
        incoming = [ref for ref in reads if ref.kind is TensorKind.VALUE_GRADIENT]
        outputs = [ref for ref in instruction.writes if ref.kind is TensorKind.VALUE]
        outgoing = [ref for ref in instruction.writes if ref.kind is TensorKind.VALUE_GRADIENT]
        wanted = [ref.first for ref in outputs]
        graph = self.host.graph
        loss = graph.loss
        own = {ref.first for ref in incoming if graph.values[ref.first].producer in task.pack}
        absent = self.host.absent

        def issue(step: Step) -> None:
            stage.gather(task.pack, slot, gradient_slot, begins)
            values = {ref.first: env[ref] for ref in inputs}
            came = [ref for ref in incoming if ref in env and ref not in absent]
            above = {ref.first: env[ref] for ref in came if _counts(ref, step)}
            weight = None if loss is None else step.weights[loss, samples] or None
            again = [] if step.check is None else [v for v in above if v in own]
            results = [*wanted, *again]
            starts = None if weight is None else (weight, step.loss_scale)
            given = None if kept is None else self.saved[kept]
            assert not isinstance(given, SavedForward)
            made, below = stage.backward(
                task, slot, values, above, results, step.replay, starts, given
            )
            if step.check is not None:
                step.check.record(task, {v: made[v] for v in again})
            for ref in outputs:
                env[ref] = made[ref.first]
            self._hand_on(outgoing, below, values)

        return issue

    def _backward_saved(
        self, instruction: Instruction, slot: int, gradient_slot: int, kept: TensorRef
    ) -> Issue:
        """Prepare the backward of a pack whose forward was kept: nothing is recomputed."""
        task, env, stage = instruction.task, self.env, self.stage
        assert task is not None
        begins = not any(ref.is_gradient_part for ref in instruction.reads)
        incoming = [ref for ref in instruction.reads if ref.kind is TensorKind.VALUE_GRADIENT]
        outgoing = [ref for ref in instruction.writes if ref.kind is TensorKind.VALUE_GRADIENT]
        absent = self.host.absent

        def issue(step: Step) -> None:
            found = self.saved[kept]
            assert isinstance(found, SavedForward)
            stage.gather(task.pack, found.slot, gradient_slot, begins)
            came = [ref for ref in incoming if ref in env and ref not in absent]
            above = {ref.first: env[ref] for ref in came if _counts(ref, step)}
            below = stage.backward_saved(task.pack, slot, found, above)
            self._hand_on(outgoing, below, found.leaves)

        return issue

    def update(self, instruction: Instruction, slot: int) -> Issue:
        """Prepare the update of a pack on the device."""
        task, host, stage = instruction.task, self.host, self.stage
        assert task is not None and host.optimizer is not None
        names, optimizer = host.updated_by(task.pack), host.optimizer

        def issue(step: Step) -> None:
            about_to_change((host.params[name] for name in names), step.signals.check)
            step.updated.append(str(task))
            found = stage.parameters(task.pack, slot)
            pairs = []
            for name in names:
                stand_in = found[name]
                host.params[name].grad = None
                if isinstance(stand_in, nn.Parameter) and stand_in.grad is not None:
                    pairs.append((host.params[name], stand_in))
            if pairs:
                optimizer.update_elsewhere(pairs)

        return issue

    def _hand_on(
        self,
        outgoing: Sequence[TensorRef],
        gradients: Mapping[int, torch.Tensor],
        values: Mapping[int, torch.Tensor],
    ) -> None:
        """Let the packs below have the gradients of the values that they made."""
        absent = self.host.absent
        for ref in outgoing:
            self.env[ref] = _gradient(gradients, ref, values)
            (absent.discard if ref.first in gradients else absent.add)(ref)


def _kept(refs: Sequence[TensorRef]) -> TensorRef | None:
    """What a forward keeps, among what a task writes or reads."""
    return next((ref for ref in refs if ref.is_kept), None)


def _is_products(kept: TensorRef | None) -> bool:
    return kept is not None and kept.kind is TensorKind.PRODUCTS


def _gradient(
    gradients: Mapping[int, torch.Tensor], ref: TensorRef, values: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Return a value's gradient: zeros if the pack read the value but nothing depends on it.

    They take the memory that the schedule counts on; `HostState.absent` has those that are none.
    """
    found = gradients.get(ref.first)
    return torch.zeros_like(values[ref.first]) if found is None else found


def _counts(ref: TensorRef, step: Step) -> bool:
    """Whether a gradient enters at all: that of a mean over nothing is NaN, and weighs 0."""
    assert ref.samples is not None
    return step.weights.get((ref.first, ref.samples)) != 0.0
