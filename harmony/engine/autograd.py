"""Autograd: a forward whose outputs take part in the user's own autograd graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from harmony.engine.inflight import InFlight, gradients_left
from harmony.engine.planned import Planned
from harmony.engine.read_again import ReadAgain
from harmony.engine.variant import Variant
from harmony.errors import HarmonyError
from harmony.planner.ir.tasks import TensorKind, value_gradient
from harmony.reference.plain_step import PlainForward
from harmony.runtime.exec.executor import PreparedSchedule
from harmony.runtime.exec.stage import Values
from harmony.runtime.step.recompute import ReplayState
from harmony.runtime.step.self_check import SelfCheck
from harmony.runtime.step.step import Weights

Gradients = Sequence[torch.Tensor | None]


@dataclass(eq=False)
class ForwardCall:
    """What a backward needs to know of its forward. It lives as long as the graph that it is in.

    Attributes:
        run_backward: returns the gradients of ``inputs`` and then of ``params``.
        weights: how much the scalars of each microbatch count.
        in_flight: the host copies of its values; free again when the call dies.
        step: number of the forward.
        syncs: whether its backward averages gradients over processes (see `Harmony.no_sync`).
        check: figures of what the first forward made, for its backward to compare with.
        plain: the same by plain PyTorch, and ``values`` what the forward returned: to verify it.
        outputs: ids of the values that the forward returned.
        inputs: ids of the model's inputs that require a gradient.
        params: names of the trained parameters.
        read_again: the parameters when the forward ran, and the buffers that it left alone.
    """

    run_backward: Callable[[ForwardCall, Gradients], Gradients]
    variant: Variant
    planned: Planned
    replay: ReplayState
    weights: Weights
    in_flight: InFlight
    step: int
    syncs: bool = True
    check: SelfCheck | None = None
    plain: PlainForward | None = None
    values: Values = field(default_factory=dict)
    outputs: tuple[int, ...] = ()
    inputs: tuple[int, ...] = field(init=False)
    params: tuple[str, ...] = field(init=False)
    read_again: ReadAgain = field(init=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, self.in_flight.free).atexit = False
        graph, host = self.variant.graph, self.variant.host
        values = (graph.values[v] for v in graph.input_ids)
        self.inputs = tuple(v.id for v in values if v.requires_grad and v.consumers)
        self.params = tuple(host.gradients.layout.places)
        changed = {n for c in self.variant.captured.changes.values() for n in c.buffers}
        self.read_again = ReadAgain(host.weights.arena, changed)


class ForwardObserver(Protocol):
    """Sees every forward and backward of an own loop, e.g. to compare them."""

    def before_forward(
        self, call: ForwardCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> PlainForward | None:
        """A forward begins; what is returned stays with its call."""

    def after_backward(
        self, call: ForwardCall, given: Values, gradients: Mapping[str, torch.Tensor]
    ) -> None:
        """A backward made ``gradients`` of what it was ``given``."""


class RunBackward(torch.autograd.Function):
    """Makes the outputs of a forward part of the user's autograd graph.

    Inputs and parameters are arguments, so that autograd itself does with their gradients what it
    does with any: adds them up, calls hooks, returns them from ``torch.autograd.grad``.
    """

    @staticmethod
    def forward(
        ctx: Any, call: ForwardCall, outputs: Sequence[torch.Tensor], *sources: torch.Tensor
    ) -> Any:
        """Hand the outputs through."""
        # Autograd lets go of what is saved when the graph is freed, and with it of the call. Until
        # the first backward the node holds it: with several threads, what was saved can be gone.
        ctx.save_for_backward(torch.empty(0))
        ctx.call, ctx.first = weakref.ref(call), call
        ctx.devices = [source.device for source in sources]
        ctx.set_materialize_grads(False)
        values = call.variant.graph.values
        fixed = [
            t for v, t in zip(call.outputs, outputs, strict=True) if not values[v].requires_grad
        ]
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Run the packs backward.

        Raises:
            HarmonyError: under ``create_graph=True``, or if the parameters have changed.
            RuntimeError: PyTorch's own, if the graph was freed by an earlier backward.
        """
        ctx.saved_tensors  # noqa: B018  raises if the graph was freed
        if torch.is_grad_enabled():
            raise HarmonyError(
                "create_graph=True: Harmony recomputes its layers in the backward and keeps no "
                "graph of it, so there is no second derivative. Let the model's forward compute "
                "the gradient and return what needs it (a gradient penalty, for instance), or "
                "keep that part of the model outside of Harmony(...)"
            )
        if any(gradient is not None and _is_batched(gradient) for gradient in gradients):
            raise HarmonyError(
                "is_grads_batched=True or jacobian(vectorize=True): Harmony runs one backward at "
                "a time. Call torch.autograd.grad once for each row"
            )
        call: ForwardCall | None = ctx.first or ctx.call()
        if call is None:
            raise HarmonyError("this forward's values were freed by an earlier backward")
        found = call.run_backward(call, gradients)
        ctx.first = None
        placed = [
            None if gradient is None else gradient.to(device)
            for gradient, device in zip(found, ctx.devices, strict=True)
        ]
        return (None, None, *placed)


def needs_graph(net: nn.Module, call: Any) -> bool:
    """Whether a backward could want anything of this call: gradients of parameters or inputs."""
    if any(param.requires_grad for param in net.parameters()):
        return True
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves(call))


def check_surroundings(net: nn.Module, call: Any) -> None:
    """Refuse a call from inside of a function transform, or one that tangents go into.

    Raises:
        HarmonyError: naming what to use instead.
    """
    if _functorch.maybe_current_level() is not None:
        raise HarmonyError(
            "a Harmony model inside of torch.func (grad, vjp, vmap, jacrev, ...): it runs on real "
            "batches only. Use loss.backward() or torch.autograd.grad, or transform the module "
            "itself before you wrap it"
        )
    if forward_ad._current_level < 0:
        return
    given = [x for x in tree_leaves(call) if isinstance(x, torch.Tensor)]
    unpack: Any = forward_ad.unpack_dual
    if any(unpack(x).tangent is not None for x in (*given, *net.parameters())):
        raise HarmonyError(
            "a Harmony model inside of torch.autograd.forward_ad: its outputs would have no "
            "tangents. Use loss.backward() or torch.autograd.grad, or call the module itself"
        )


def attach(values: Values, inputs: Values, call: ForwardCall) -> Values:
    """Return the outputs of a forward as tensors whose backward runs the packs."""
    params = call.variant.host.params
    call.outputs = tuple(values)
    sources = [inputs[v] for v in call.inputs] + [params[name] for name in call.params]
    given = tuple(values.values())
    with saved_tensors_hooks(lambda _: call, lambda _: torch.empty(0)):
        outputs = RunBackward.apply(call, given, *sources)  # type: ignore[no-untyped-call]
    return dict(zip(values, outputs, strict=True))


def input_gradients(prepared: PreparedSchedule, call: ForwardCall) -> list[torch.Tensor | None]:
    """Return the gradients of the inputs that a backward has just left on the host.

    None for one that no gradient reaches. One without a dimension of samples gets the sum over
    the microbatches, in their order.
    """
    graph, host = call.variant.graph, call.variant.host
    given = gradients_left(prepared.schedule)
    found: list[torch.Tensor | None] = []
    for index in call.inputs:
        if index not in given:
            found.append(None)
            continue
        dim = graph.values[index].batch_dim
        known = prepared.values[TensorKind.VALUE_GRADIENT, index].chunks()
        if all(value_gradient(index, samples) in host.absent for samples, _ in known):
            found.append(None)
            continue
        chunks = [chunk for _, chunk in known]
        if dim is not None:
            found.append(torch.cat(chunks, dim))
            continue
        total = chunks[0].clone()
        for chunk in chunks[1:]:
            total.add_(chunk)
        found.append(total)
    return found


def _is_batched(tensor: torch.Tensor) -> bool:
    return _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)
