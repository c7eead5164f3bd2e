"""What the host holds for the runtime: weights, gradients, optimizer, stash, staging buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from harmony.core.layergraph import LayerGraph
from harmony.errors import ScheduleError
from harmony.planner.ir.schedule import Slots
from harmony.planner.ir.tasks import Pack, TensorKind, TensorRef
from harmony.runtime import native
from harmony.runtime.host.arena import ArenaView, Piece
from harmony.runtime.host.pinned_memory import HostBuffer, view_bytes
from harmony.runtime.peers.exchange import Arrived
from harmony.runtime.update.clipping import norm_of
from harmony.runtime.update.optimizer import Options, PackOptimizer, Share


@dataclass
class HostState:
    """The host side of the model.

    Attributes:
        params: the module's parameters by canonical name; they live in the weight arena.
        optimizer: None where the user's own loop updates.
        generation: of the model, which is another where layers were replaced.
        touched: per gradient part of the step, which parameters it has a gradient for.
        absent: gradients of values that nothing depends on; zeros are copied in their place.
        staged: per gradient part that is added on the host, where it lands.
        stages: per device, its staging buffers and the bytes of each.
    """

    graph: LayerGraph
    weights: ArenaView
    gradients: ArenaView
    params: Mapping[str, nn.Parameter]
    optimizer: PackOptimizer | None = None
    generation: int = 0
    touched: dict[TensorRef, frozenset[str]] = field(default_factory=dict)
    absent: set[TensorRef] = field(default_factory=set)
    staged: dict[TensorRef, torch.Tensor] = field(default_factory=dict)
    stages: dict[int, tuple[HostBuffer, int]] = field(default_factory=dict)
    _complete: dict[str, bool] = field(default_factory=dict)
    _settled: set[TensorRef] = field(default_factory=set)
    _norms: dict[int, torch.Tensor] = field(default_factory=dict)

    def set_stages(self, index: int, slots: Slots, device: torch.device) -> None:
        """Make room for the gradient parts of device ``index`` that are added on the host."""
        known = self.stages.get(index)
        if slots.count and (known is None or known[0].tensor.numel() < slots.total_nbytes):
            buffer = HostBuffer(slots.total_nbytes, device, "gradient staging")
            self.stages[index] = (buffer, slots.nbytes)
        elif known is not None and slots.count:
            self.stages[index] = (known[0], slots.nbytes)

    def stage_bytes(self, index: int, stage: int, nbytes: int) -> torch.Tensor:
        """The first bytes of a staging buffer of device ``index``."""
        buffer, size = self.stages[index]
        return buffer.tensor[stage * size : stage * size + nbytes]

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""
        self.touched.clear()
        self.absent.clear()
        self._complete.clear()
        self._settled.clear()
        self._norms.clear()

    def parameter_pieces(self, ref: TensorRef) -> list[Piece]:
        """Host bytes of W[a:b] or Tk."""
        return _pieces_of(self.weights, ref, TensorKind.WEIGHTS)

    def gradient_pieces(self, ref: TensorRef) -> list[Piece]:
        """Host bytes of dW[a:b] or dTk in the gradient arena."""
        return _pieces_of(self.gradients, ref, TensorKind.WEIGHT_GRADIENTS)

    def names(self, ref: TensorRef) -> list[str]:
        """Names of the trainable parameters that a gradient part covers."""
        layout = self.gradients.layout
        if ref.kind is TensorKind.SHARED_GRADIENTS:
            return list(layout.shared[ref.first].places)
        return [n for region in layout.layers[ref.first : ref.last] for n in region.places]

    def settle(self, ref: TensorRef) -> None:
        """Start a gradient from its first part, which already lies in the arena; once a step."""
        if ref in self._settled:
            return
        self._settled.add(ref)
        touched = self._arrived(ref)
        for name in self.names(ref):
            self._complete[name] = name in touched

    def accumulate(self, ref: TensorRef) -> None:
        """Run A(ref): add a part of a gradient that lies in a staging buffer."""
        stage = self.staged[ref]
        layout = self.gradients.layout
        names, touched = self.names(ref), self._arrived(ref)
        if not names:
            return
        base = min(layout.places[name].offset for name in names)
        for name in names:
            if name not in touched:
                continue
            place = layout.places[name]
            part = view_bytes(stage, place.offset - base, place)
            whole = self.gradients.views[name]
            native.trace_host_access(f"A({ref})", part, write=False)
            native.trace_host_access(f"A({ref})", whole, write=True)
            if self._complete.get(name):
                whole.add_(part)
            else:
                whole.copy_(part)
            self._complete[name] = True

    def _arrived(self, ref: TensorRef) -> frozenset[str]:
        """Names of the parameters that a gradient part has something for."""
        if ref not in self.touched:
            raise ScheduleError(f"{ref} is used on the host before it was copied there")
        return self.touched[ref]

    def forget_gradients(self) -> None:
        """Let no parameter have the gradient of an earlier step; who holds one keeps it."""
        for param in self.params.values():
            param.grad = None
        self.gradients.arena.part()

    def forget_gradients_of(self, pack: Pack) -> None:
        """Let the parameters of a pack have no gradient: what they had was of the step before."""
        for name in self.updated_by(pack):
            self.params[name].grad = None

    def publish(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Give these parameters their gradient, or None if nothing reached them."""
        ready = []
        for name in names:
            param = self.params[name]
            param.grad = self.gradients.arena.own(name) if self._complete.get(name) else None
            if param.grad is not None:
                ready.append(param)
        return ready

    def publish_all(self) -> None:
        """Give every parameter its gradient, where the user's own loop updates."""
        self.settle_all()
        self.publish(self.gradients.layout.places)

    def gradients_of(self, names: Iterable[str]) -> dict[str, Arrived]:
        """Return the complete gradients of parameters, for the average over processes."""
        views = self.gradients.views
        return {n: Arrived(views[n], self._complete.get(n, False)) for n in names}

    def settle_all(self) -> None:
        """Settle all gradients that have arrived, of which nothing more comes."""
        for ref in list(self.touched):
            if ref.part == 0:
                self.settle(ref)

    def averaged(self, names: Collection[str]) -> None:
        """Note which parameters have a gradient: the average over processes lies in its place."""
        self._complete = {name: name in names for name in self.gradients.layout.places}

    def updated_by(self, pack: Pack) -> list[str]:
        """Names of the parameters that U[a:b] updates: the pack's, and shared ones it begins."""
        layout = self.gradients.layout
        own = [n for region in layout.layers[pack.first : pack.last] for n in region.places]
        begun = [s.id for s in self.graph.shared if s.layers[0] in pack]
        return own + [n for index in begun for n in layout.shared[index].places]

    def take_norms(self, pack: Pack, names: Sequence[str]) -> None:
        """Run N[a:b]: take the norms of a pack's gradients, which are complete, for clipping.

        Args:
            names: what `updated_by` says of the pack.
        """
        optimizer = self.optimizer
        if optimizer is None or optimizer.max_norm is None or optimizer.scaling is not None:
            return  # what is scaled is divided first, once all have arrived
        for name in names:
            if self._complete.get(name):
                gradient = self.gradients.views[name]
                native.trace_host_access(f"N{pack}", gradient, write=False)
                self._norms[id(self.params[name])] = norm_of(gradient)

    def measure(self, share: Share | None = None) -> None:
        """Let the optimizer look at all gradients; those of other processes by what they share."""
        optimizer, params = self.optimizer, self.params.values()
        assert optimizer is not None, "a step without an optimizer has no updates"
        writes = optimizer.scaling is not None
        for param in params:
            if param.grad is not None and id(param) not in self._norms:
                native.trace_host_access("norm", param.grad, write=writes)
        optimizer.measure(params, self._norms, share)

    def update(self, pack: Pack, names: Sequence[str]) -> None:
        """Run U[a:b]: update the parameters of the pack from their complete gradients.

        Args:
            names: what `updated_by` says of the pack.
        """
        self._update(pack, names, self.publish(names))

    def update_late(self, pack: Pack, options: Options) -> None:
        """Run L[a:b]: do what `update` does, from gradients that the step before has published.

        Args:
            options: what the groups of the optimizer held in that step.
        """
        names = self.updated_by(pack)
        params = (self.params[name] for name in names)
        self._update(pack, names, [param for param in params if param.grad is not None], options)

    def has_gradient(self, name: str) -> bool:
        """Whether a parameter has a complete gradient."""
        return self._complete.get(name, False)

    def update_unused(self, names: Sequence[str]) -> None:
        """Update parameters that are in no pack of this step."""
        self._update("[unused]", names, self.publish(names))

    def _update(
        self,
        pack: Pack | str,
        names: Sequence[str],
        params: list[nn.Parameter],
        options: Options | None = None,
    ) -> None:
        """Take the optimizer's step for a pack: the one place where a host's update is."""
        optimizer = self.optimizer
        if not params or optimizer is None:
            return
        for param in params:
            native.trace_host_access(f"U{pack}", param, write=True)
            if param.grad is not None:
                clips = optimizer.max_norm is not None
                native.trace_host_access(f"U{pack}", param.grad, write=clips)
        arena = self.weights.arena
        arena.refresh(names, optimizer.update(params, arena.copies(names), options))


def _pieces_of(arena: ArenaView, ref: TensorRef, by_layer: TensorKind) -> list[Piece]:
    if ref.kind is by_layer:
        return arena.layers(ref.first, ref.last)
    return arena.shared(ref.first)
