"""One device's packs: their parameters in slots, their forward, recompute and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import nn

from harmony.capture import Captured
from harmony.core.layergraph import LayerGraph
from harmony.planner.ir.tasks import Pack, Task
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.kept_products import KeptProducts
from harmony.runtime.exec.saved_forward import Root, SavedForward, gradients_of, run_backward
from harmony.runtime.host.arena_layout import ArenaLayout
from harmony.runtime.host.pinned_memory import view_bytes
from harmony.runtime.step.finite import FirstBad
from harmony.runtime.step.recompute import ReplayState, as_recomputed

Values = dict[int, torch.Tensor]
"""Tensors by the id of their value."""


class GradientSink:
    """Where the gradients of the pack that runs backward go.

    The parameters' hooks hold on to this and to nothing else: a hook that held the stage, which
    holds the parameters, would be a cycle that Python cannot collect, with device memory in it.

    Attributes:
        views: gradient of each parameter in the gradient slot.
        touched: parameters that have got one.
    """

    def __init__(self) -> None:
        self.views: dict[str, torch.Tensor] = {}
        self.touched: set[str] = set()

    def hook(self, name: str) -> Callable[[torch.Tensor], None]:
        """Return a hook that moves a microbatch's gradient into the slot.

        Copying the first there, not adding it to zeros, keeps the sign of a zero as plain PyTorch
        has it; the following ones are added in place by autograd itself, but where the slot's are
        of another type than the parameter.
        """

        def keep_gradient(param: torch.Tensor) -> None:
            view, gradient = self.views[name], param.grad
            is_first = name not in self.touched
            if gradient is None or (not is_first and gradient.dtype == view.dtype):
                return
            if gradient.layout is not torch.strided:
                # Of an embedding with ``sparse=True``; its rows have their places here.
                gradient = gradient.to(view.dtype)
                (view.zero_() if is_first else view).add_(gradient)
            elif is_first:
                view.copy_(gradient)
            else:
                view.add_(gradient)
            param.grad = view if view.dtype == param.dtype else None
            self.touched.add(name)

        return keep_gradient


class Stage:
    """Runs packs on one device.

    A pack's parameters are views of the weight slot it was copied to; the gradients accumulate in
    place in a gradient slot, in the order of the microbatches.

    Attributes:
        touched_by: per pack, the parameters that got a gradient in this step; the others keep
            none, as in plain PyTorch.
        look: is shown all that is computed.
    """

    def __init__(
        self,
        context: DeviceContext,
        code: Captured,
        graph: LayerGraph,
        weights: ArenaLayout,
        gradients: ArenaLayout,
        guarded: bool = True,
    ) -> None:
        """Run layers of ``code``; to measure them, no matter on what values, not ``guarded``."""
        self.context = context
        self.graph = graph
        self._code = code
        self._guarded = guarded
        self._weights = weights
        self._gradients = gradients
        self._shell = code.make_shell(context.device)
        self._trainable = frozenset(gradients.places)
        self._weight_slots: list[torch.Tensor] = []
        self._gradient_slots: list[torch.Tensor] = []
        self._slot_memory: set[int] = set()
        self._bound: tuple[Pack, int] | None = None
        self._tensors: dict[tuple[Pack, int], dict[str, torch.Tensor]] = {}
        self._gradient_views: dict[tuple[Pack, int], dict[str, torch.Tensor]] = {}
        self._sink = GradientSink()
        self._accumulating: tuple[Pack, int] | None = None
        self._gathering: tuple[Pack, int] | None = None
        self.touched_by: dict[Pack, set[str]] = {}
        self.look: FirstBad | None = None

    def set_slots(self, weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        """Use these device buffers as slots; what was bound to others is let go."""
        self.unbind()
        self._tensors.clear()
        self._gradient_views.clear()
        self._sink.views = {}
        self._accumulating = self._gathering = None
        self._weight_slots, self._gradient_slots = weights, gradients
        self._slot_memory = {slot.untyped_storage().data_ptr() for slot in weights}

    def forward(
        self, task: Task, slot: int, inputs: Values, wanted: Iterable[int], replay: ReplayState
    ) -> Values:
        """Run the pack forward and keep only the values of ``wanted``."""
        self._bind(task.pack, slot)
        if not replay.states.recomputed:
            with torch.no_grad():
                return self._own(self._run(task, inputs, wanted, replay))
        leaves = {v: self._leaf(v, tensor) for v, tensor in inputs.items()}
        with as_recomputed():
            found = self._run(task, leaves, wanted, replay)
        return self._own({v: tensor.detach() for v, tensor in found.items()})

    def forward_keeping(
        self,
        task: Task,
        slot: int,
        inputs: Values,
        wanted: Iterable[int],
        replay: ReplayState,
        given: KeptProducts | None = None,
    ) -> tuple[Values, KeptProducts]:
        """Run the pack forward, and keep what its products made beside the values.

        Args:
            given: what those made before, not to compute them again.
        """
        self._bind(task.pack, slot)
        leaves = {v: self._leaf(v, tensor) for v, tensor in inputs.items()}
        kept = KeptProducts(self.context.device) if given is None else given
        with as_recomputed(), kept.keeping() if given is None else kept.giving():
            found = self._run(task, leaves, wanted, replay)
        return self._own({v: tensor.detach() for v, tensor in found.items()}), kept

    def forward_saving(
        self, task: Task, slot: int, inputs: Values, wanted: Iterable[int], replay: ReplayState
    ) -> tuple[Values, SavedForward]:
        """Run the pack forward, and keep what its backward needs beside the values."""
        self._bind(task.pack, slot)
        leaves = {v: self._leaf(v, tensor) for v, tensor in inputs.items()}
        kept = SavedForward(slot, self.context.device)
        with kept.saving(self._slot(slot)):
            found = self._run(task, dict(leaves), wanted, replay)
        kept.finish(leaves, found)
        return self._own({v: tensor.detach() for v, tensor in found.items()}), kept

    def backward_saved(
        self, pack: Pack, slot: int, kept: SavedForward, output_gradients: Values
    ) -> Values:
        """Run the backward of a pack's forward that was kept; return its inputs' gradients.

        Args:
            slot: where the pack's weights are now.
            output_gradients: as for `backward`.
        """
        roots = [(kept.leaves.get(v, kept.roots.get(v)), g) for v, g in output_gradients.items()]
        pairs = [(root, g) for root, g in roots if root is not None and _is_root(root)]
        self._accumulate_in(pack, kept.slot)
        with kept.reading(self._slot(slot)):
            run_backward(pairs)
        return gradients_of(kept.leaves)

    def _slot(self, slot: int) -> torch.Tensor | None:
        return self._weight_slots[slot] if slot >= 0 else None

    def _own(self, found: Values) -> Values:
        """Copies of those values that are views of a weight slot, which other packs will fill."""
        slots = self._slot_memory
        return {
            v: t.clone() if t.untyped_storage().data_ptr() in slots else t
            for v, t in found.items()
        }

    def backward(
        self,
        task: Task,
        slot: int,
        inputs: Values,
        output_gradients: Values,
        outputs: Iterable[int],
        replay: ReplayState,
        loss_starts: tuple[float, float] | None,
        kept: KeptProducts | None = None,
    ) -> tuple[Values, Values]:
        """Recompute the pack from its inputs and run it backward.

        Args:
            output_gradients: gradients of the pack's outputs, and of those inputs that a later
                pack has read too: their sum so far.
            outputs: values to return beside the gradients (the loss, in the last pack).
            loss_starts: how much the loss counts, and what it is scaled by, where the pack makes
                the loss.
            kept: what its products have made in its FORWARD; None to compute them again.

        Returns:
            The outputs, and the gradient of each input that requires one.
        """
        self._bind(task.pack, slot)
        self._accumulate_in(task.pack, slot)
        leaves = {v: self._leaf(v, tensor) for v, tensor in inputs.items()}
        made = [v for v in output_gradients if v not in leaves]
        outputs = tuple(outputs)
        with torch.enable_grad(), nullcontext() if kept is None else kept.giving():
            found = self._run(task, dict(leaves), {*made, *outputs}, replay)
        # A partial sum enters as the gradient of the input itself: autograd then adds the pack's
        # own uses to it one by one, in the order in which plain PyTorch would.
        roots = [(leaves.get(v, found.get(v)), g) for v, g in output_gradients.items()]
        loss = self.graph.loss
        if loss in found and loss_starts is not None:
            roots.append((found[loss], _loss_gradient(found[loss], *loss_starts)))
        run_backward([(t, g) for t, g in roots if t is not None and _is_root(t)])
        return self._own({v: found[v].detach() for v in outputs}), gradients_of(leaves)

    def gather(self, pack: Pack, weight_slot: int, slot: int, begins: bool) -> None:
        """Let the coming microbatch of the pack add to its gradients in a gradient slot.

        Args:
            begins: whether it is the first of the step; otherwise the slot has the sum so far.
        """
        if begins:
            self.touched_by[pack] = set()
        elif self._gathering == (pack, slot):
            return
        self._gathering, self._accumulating = (pack, slot), None
        self._bind(pack, weight_slot)
        self._sink.views = self._views_of_gradients(pack, slot)
        self._sink.touched = self.touched_by[pack]
        self._accumulate_in(pack, weight_slot)

    def _accumulate_in(self, pack: Pack, weight_slot: int) -> None:
        """Let the next backward add to what the pack's earlier ones have left.

        The forward of one microbatch may have been kept from when the pack was in another slot,
        with other parameters, than where the next one is recomputed.
        """
        if self._accumulating == (pack, weight_slot) and self._sink.touched:
            return
        self._accumulating = (pack, weight_slot)
        for name, view in self._sink.views.items():
            param = self._tensors[pack, weight_slot][name]
            goes_on = name in self._sink.touched and view.dtype == param.dtype
            param.grad = view if goes_on else None

    def weight_range(self, slot: int, low: int, high: int) -> torch.Tensor:
        """Bytes ``low`` to ``high - 1`` of a weight slot."""
        return self._weight_slots[slot][low:high]

    def gradient_range(self, slot: int, low: int, high: int) -> torch.Tensor:
        """Bytes ``low`` to ``high - 1`` of a gradient slot."""
        return self._gradient_slots[slot][low:high]

    def parameters(self, pack: Pack, slot: int) -> dict[str, torch.Tensor]:
        """The pack's tensors in a slot; ``grad`` is there for those that got one."""
        return self._tensors[pack, slot]

    def unbind(self) -> None:
        """Let go of the parameters of the pack that ran last."""
        if self._bound is not None:
            self._shell.release(self._tensors[self._bound])
            self._bound = None

    def _run(
        self, task: Task, inputs: Values, wanted: Iterable[int], replay: ReplayState
    ) -> Values:
        pack, samples, random = task.pack, task.samples, replay.random
        assert samples is not None, "only tasks with a microbatch run on a device"

        def at_layer(layer: int) -> None:
            random.keep(self.context, samples, layer)

        steps = self._code.pack(pack.first, pack.last, samples[1] - samples[0], wanted)
        look = None if self.look is None else self.look.run_of(task)
        with random.turn(self.context, samples, pack.first) if random.keep_at else nullcontext():
            replay.states.enter(task, self._shell)
            keep = at_layer if random.keep_at else None
            found = steps.run(self._shell, inputs, keep, self._guarded, look)
            if random.keep_at:
                random.keep(self.context, samples, pack.last)
            replay.states.leave(task, self._shell)
        if self._guarded:
            steps.check_forms(found)
        return found

    def _leaf(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().requires_grad_(self.graph.values[index].requires_grad)

    def _bind(self, pack: Pack, slot: int) -> None:
        if self._bound == (pack, slot):
            return
        self.unbind()
        if (pack, slot) not in self._tensors:
            self._tensors[pack, slot] = self._make_tensors(pack, slot)
        self._shell.bind(self._tensors[pack, slot])
        self._bound = (pack, slot)

    def _make_tensors(self, pack: Pack, slot: int) -> dict[str, torch.Tensor]:
        """Parameters and buffers of a pack as views of a slot."""
        shared = self.graph.shared_in(pack.first, pack.last)
        places = self._weights.in_slot(pack.first, pack.last, shared)
        tensors: dict[str, torch.Tensor] = {}
        for name, (offset, place) in places.items():
            # Not a view for autograd: a buffer that changes would else count as a change of all.
            view = view_bytes(self._weight_slots[slot], offset, place).data
            if name in self._trainable:
                tensors[name] = param = nn.Parameter(view)
                hook = self._sink.hook(name)
                param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            else:
                tensors[name] = view
        return tensors

    def _views_of_gradients(self, pack: Pack, slot: int) -> dict[str, torch.Tensor]:
        if (pack, slot) not in self._gradient_views:
            shared = self.graph.shared_in(pack.first, pack.last)
            places = self._gradients.in_slot(pack.first, pack.last, shared)
            self._gradient_views[pack, slot] = {
                name: view_bytes(self._gradient_slots[slot], offset, place)
                for name, (offset, place) in places.items()
            }
        return self._gradient_views[pack, slot]


def _loss_gradient(loss: torch.Tensor, weight: float, scale: float) -> torch.Tensor:
    """The gradient of a loss whose product with both is to be made small."""
    if scale == 1.0:
        return torch.full_like(loss, weight)
    # A `GradScaler` multiplies by an fp32 tensor, what comes back has the loss's type: it may be
    # infinite in that.
    return torch.full_like(loss, scale, dtype=torch.float32).to(loss.dtype).mul_(weight)


def _is_root(root: Root) -> bool:
    return not isinstance(root, torch.Tensor) or root.requires_grad
