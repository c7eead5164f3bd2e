"""Weights that stay on a device from step to step, with room for their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from harmony.core.units import aligned
from harmony.planner.ir.schedule import DeviceSpec, resident_groups
from harmony.planner.ir.tasks import TensorKind, TensorRef
from harmony.runtime.data_watch import DataWatch
from harmony.runtime.device import DeviceContext
from harmony.runtime.host.host_state import HostState
from harmony.runtime.host.memory_holders import shares_memory


class Residents:
    """The resident packs of one device.

    The parameters on the host stay what everybody reads; each step writes the new weights there.
    What somebody else changes there, between steps, is copied to the device before the next step.
    PyTorch's version counters tell, a `DataWatch`, and who holds the memory; buffers are compared.

    Attributes:
        refs: what is resident, as the schedule names it.
        weights: memory of each pack's weights, in the order of ``refs``.
        gradients: memory of each pack's gradients, likewise; empty for packs without.
    """

    def __init__(self, context: DeviceContext, host: HostState, refs: Sequence[TensorRef]) -> None:
        """Take memory on the device, in the order of its current stream."""
        self.refs = tuple(refs)
        self._host = host
        self._seen: dict[str, int] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._places: dict[TensorRef, tuple[torch.Tensor, int]] = {}
        self._slots: dict[TensorRef, int] = {}
        self.weights: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        for slot, group in enumerate(resident_groups(self.refs)):
            params = [ref for ref in group if ref.is_parameter]
            grads = [ref for ref in group if ref.is_gradient_part]
            self.weights.append(self._room(context, params, slot))
            self.gradients.append(self._room(context, grads, slot))
        tensors = host.weights.arena.tensors
        held = [tensors[n] for ref in self._places if ref.is_parameter for n in self._names(ref)]
        self._watch = DataWatch(t for t in held if isinstance(t, nn.Parameter))

    def _room(self, context: DeviceContext, refs: Sequence[TensorRef], slot: int) -> torch.Tensor:
        """Memory for tensors side by side, as in a slot."""
        sizes = [aligned(ref.nbytes(self._host.graph)) for ref in refs]
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=context.device)
        offset = 0
        for ref, size in zip(refs, sizes, strict=True):
            self._places[ref] = memory, offset
            self._slots[ref] = slot
            offset += size
        return memory

    def slots(self, spec: DeviceSpec) -> dict[TensorRef, int]:
        """Number of the slot that each tensor is in, behind those that a schedule has."""
        first = {True: spec.weight_slots.count, False: spec.gradient_slots.count}
        return {ref: first[ref.is_parameter] + slot for ref, slot in self._slots.items()}

    @property
    def trained(self) -> list[TensorRef]:
        """The gradients."""
        return [ref for ref in self._places if ref.is_gradient_part]

    def refresh(self) -> None:
        """Copy weights that others have changed, on the current stream."""
        for ref in self._places:
            if not ref.is_parameter:
                continue
            # All of them are asked: what was seen now is not seen again.
            changed = [name for name in self._names(ref) if self._has_changed(name)]
            if changed:
                for target, source in self.pairs(ref):
                    target.copy_(source, non_blocking=True)

    def pairs(self, ref: TensorRef) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The bytes of a tensor on the device, and on the host."""
        memory, base = self._places[ref]
        host = self._host
        of = host.parameter_pieces if ref.is_parameter else host.gradient_pieces
        return [
            (memory[base + p.offset : base + p.offset + p.data.numel()], p.data) for p in of(ref)
        ]

    def leave(self) -> None:
        """Let the optimizer state be on the host again; the memory is given back elsewhere."""
        optimizer = self._host.optimizer
        names = [n for ref in self.trained for n in self._host.names(ref)]
        if optimizer is not None and names:
            optimizer.bring_home([self._host.params[name] for name in names])

    def _names(self, ref: TensorRef) -> list[str]:
        layout = self._host.weights.layout
        regions = layout.layers if ref.kind is TensorKind.WEIGHTS else layout.shared
        return [name for region in regions[ref.first : ref.last] for name in region.places]

    def _has_changed(self, name: str) -> bool:
        """Whether somebody may have changed a tensor on the host since the last time."""
        tensor = self._host.weights.arena.tensors[name]
        version, touched = tensor._version, self._watch.may_have_changed(tensor)
        changed = self._seen.get(name) != version or touched or shares_memory(tensor)
        self._seen[name] = version
        if not isinstance(tensor, nn.Parameter):
            # Few bytes, and nothing tells of their ``data``.
            known, now = self._buffers.get(name), self._host.weights.views[name]
            if known is None or not torch.equal(known, _bytes(now)):
                self._buffers[name] = _bytes(now).clone()
                changed = True
        return changed


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
