"""Weights that stay on a device from step to step, with room for their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmony.planner.tasks import TensorKind, TensorRef
from harmony.runtime.device import DeviceContext
from harmony.runtime.hoststate import HostState


class Residents:
    """The resident packs of one device.

    The parameters on the host stay what everybody reads; each step writes the new weights there.
    What somebody else changes there, between steps, is noticed by PyTorch's version counters and
    copied to the device before the next step.

    Attributes:
        refs: what is resident, as the schedule names it.
        weights: memory of each W, in the order of ``refs``.
        gradients: memory of each dW, likewise.
    """

    def __init__(
        self, context: DeviceContext, host: HostState, refs: Sequence[TensorRef]
    ) -> None:
        """Take memory on the device, in the order of its current stream."""
        self.refs = tuple(refs)
        self._context = context
        self._host = host
        self.weights = self._room(TensorKind.WEIGHTS)
        self.gradients = self._room(TensorKind.WEIGHT_GRADIENTS)
        self._seen: dict[str, int] = {}

    def _room(self, kind: TensorKind) -> dict[TensorRef, torch.Tensor]:
        device, graph = self._context.device, self._host.graph
        return {
            ref: torch.empty(ref.nbytes(graph), dtype=torch.uint8, device=device)
            for ref in self.refs
            if ref.kind is kind
        }

    def refresh(self) -> None:
        """Copy weights that others have changed, on the current stream."""
        for ref, memory in self.weights.items():
            names = self._names(ref)
            now = {name: self._version(name) for name in names}
            if all(self._seen.get(name) == version for name, version in now.items()):
                continue
            for piece in self._host.parameter_pieces(ref):
                target = memory[piece.offset : piece.offset + piece.data.numel()]
                target.copy_(piece.data, non_blocking=True)
            self._seen.update(now)

    def leave(self) -> None:
        """Let the optimizer state be on the host again; the memory is given back elsewhere."""
        optimizer = self._host.optimizer
        names = [n for ref in self.gradients for n in self._host.names(ref)]
        if optimizer is not None and names:
            optimizer.bring_home([self._host.params[name] for name in names])

    def _names(self, ref: TensorRef) -> list[str]:
        layers = self._host.weights.layout.layers[ref.first : ref.last]
        return [name for region in layers for name in region.places]

    def _version(self, name: str) -> int:
        return self._host.weights.arena.tensors[name]._version
