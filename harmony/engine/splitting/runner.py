"""Runs one layer alone on a few samples, with copies of its parameters, nothing drawn."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from harmony.capture import Captured, plain_attributes, seed_python
from harmony.capture.state.determined import Determined
from harmony.core.layergraph import Layer, LayerGraph
from harmony.engine.splitting.recording import Origin, Recorder
from harmony.engine.splitting.samples import unsettled
from harmony.errors import text_of
from harmony.runtime import native
from harmony.runtime.device import DeviceContext, streams_restored
from harmony.runtime.exec.stage import Values
from harmony.runtime.host.arena import ArenaView

Leaf = int | str
"""An input by its value, or a parameter by its name."""

Gradients = dict[Leaf, torch.Tensor]


@dataclass(frozen=True)
class Scalars:
    """What a layer made of some samples: its scalars, and the gradients of each."""

    values: Values
    gradients: dict[int, Gradients]


_INTEGERS = frozenset({torch.int64, torch.int32})
_IGNORING = frozenset({"cross_entropy", "nll_loss", "crossentropyloss", "nllloss"})


_OUT_OF_RANGE = re.compile("out of (bounds|range)|smaller than num_classes")
"""What PyTorch's kernels for the host say of an index that is too large; some by IndexError."""


class LayerRunner:
    """Has one layer's parameters on a device at a time.

    Ids that are right for a whole batch may be out of range for a part of it. A real GPU is lost
    by that, and the process with it; so a layer with integers runs on the host first.

    Attributes:
        origins: of the inputs of the model, and of what layers have made for a recorder.
    """

    def __init__(
        self,
        captured: Captured,
        graph: LayerGraph,
        weights: ArenaView,
        context: DeviceContext | None,
    ) -> None:
        """Run on the context's device; on the host without one."""
        self.device = torch.device("cpu") if context is None else context.device
        self._captured = captured
        self._graph = graph
        self._weights = weights
        self._context = context
        self._shell = captured.make_shell(self.device)
        self._trained = {p.name for p in captured.params if p.requires_grad}
        self._params = {p.name for p in captured.params}
        self._held: dict[str, torch.Tensor] = {}
        self.origins = dict.fromkeys(graph.input_ids, Origin.INPUT)
        is_real = context is not None and not native.is_virtual(context.device)
        self._host = LayerRunner(captured, graph, weights, None) if is_real else None

    @property
    def may_ignore(self) -> bool:
        """Whether targets may be the one that PyTorch's losses ignore, an index out of range.

        Only where a loss knows it: other kernels may write to memory that is not theirs.
        """
        names = {step.name.lower() for step in self._captured.trace.steps}
        known = not _IGNORING.isdisjoint(names)
        unchecked = any("ctc" in name for name in names)
        return known and not unchecked and self.device.type != "cuda"

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Let the calling thread, which is the user's, issue to the device meanwhile."""
        if self._context is None:
            yield
            return
        with streams_restored([self._context]):
            self._context.enter()
            self._context.use("compute")
            try:
                yield
            finally:
                self._held.clear()

    def kind_of_work(self, layer: Layer) -> object:
        """Return what layers that do the same with samples have in common."""
        given = [v for v in layer.inputs if not self._graph.values[v].requires_grad]
        return layer.signature, tuple(self.origins.get(v) for v in given)

    def load(self, layer: Layer) -> None:
        """Bring the parameters and buffers of a layer to the device, as if it were trained."""
        self._held.clear()
        names = [info.name for info in self._captured.tensors_of(layer.index)]
        names += [self._graph.shared[index].name for index in layer.shared]
        views = self._weights.views
        tensors = {name: unsettled(views[name]) for name in names}
        self._held = {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}
        if self._host is not None:
            self._host._held = {name: tensor.clone() for name, tensor in tensors.items()}

    def run(
        self, layer: Layer, inputs: Values, num_samples: int, recorder: Recorder | None = None
    ) -> Values:
        """Return what the layer makes of its inputs, on the host.

        Args:
            recorder: notes how it is made.
        """
        self._check_ids(layer, inputs, num_samples)
        with torch.no_grad(), self._bound(layer) as tensors:
            env = {v: inputs[v].to(self.device) for v in layer.inputs}
            if recorder is None:
                found = self._call(layer, env, num_samples)
            else:
                self._enter(recorder, env, tensors)
                with recorder:
                    found = self._call(layer, env, num_samples)
                recorder.leave(found)
                self.origins.update({v: recorder.origin(v) for v in found})
            return {v: tensor.cpu() for v, tensor in found.items()}

    def _enter(self, recorder: Recorder, env: Values, tensors: Mapping[str, torch.Tensor]) -> None:
        for value, tensor in env.items():
            is_trained = self._graph.values[value].requires_grad
            origin = self.origins.get(value, Origin.CONSTANT)
            origin = origin | Origin.TRAINED if is_trained else origin
            recorder.enter(tensor, origin, is_parameter=False)
        for name, tensor in tensors.items():
            origin = Origin.TRAINED if name in self._trained else Origin.STATE
            recorder.enter(tensor, origin, is_parameter=True)

    def run_scalars(
        self, layer: Layer, inputs: Values, num_samples: int, wanted: Sequence[int]
    ) -> Scalars:
        """Return scalars that the layer makes, and their gradients, on the host.

        The gradients are those of its inputs; of its parameters, where no input has one.
        """
        self._check_ids(layer, inputs, num_samples)
        with torch.enable_grad(), self._bound(layer) as params:
            env = {v: inputs[v].detach().to(self.device) for v in layer.inputs}
            leaves: dict[Leaf, torch.Tensor] = {
                v: t.requires_grad_()
                for v, t in env.items()
                if self._graph.values[v].requires_grad
            }
            # What changes a leaf in place would be refused.
            env = {v: t.view_as(t) if v in leaves else t for v, t in env.items()}
            leaves = leaves or {n: p for n, p in params.items() if p.requires_grad}
            found = self._call(layer, env, num_samples)
            gradients = {v: _gradients(found[v], leaves) for v in wanted}
            return Scalars({v: found[v].detach().cpu() for v in wanted}, gradients)

    def _check_ids(self, layer: Layer, inputs: Values, num_samples: int) -> None:
        """Run a layer with integers on the host, where an index out of range is an error.

        Raises:
            IndexError, RuntimeError: what PyTorch raises of such an index.
        """
        if self._host is None:
            return
        tensors = [*(inputs[v] for v in layer.inputs), *self._held.values()]
        if not any(t.dtype in _INTEGERS and t.dim() for t in tensors):
            return
        try:
            self._host.run(layer, inputs, num_samples)
        except Exception as error:
            if isinstance(error, IndexError) or _OUT_OF_RANGE.search(text_of(error)):
                raise
            # Whatever else the host cannot do is for the device to show.

    def _call(self, layer: Layer, env: Values, num_samples: int) -> Values:
        torch.default_generator.manual_seed(0)
        seed_python(0)
        mode: AbstractContextManager[object] = nullcontext()
        if layer.uses_rng:
            mode = Determined()  # type: ignore[no-untyped-call]
        if self._context is not None:
            self._context.set_random_state(self._context.seeded_state(0))
        with mode:
            return self._captured.run(
                layer.index,
                layer.index + 1,
                self._shell,
                env,
                num_samples,
                wanted=layer.outputs,
                guarded=False,
            )

    @contextmanager
    def _bound(self, layer: Layer) -> Iterator[dict[str, torch.Tensor]]:
        """Bind the layer's tensors, buffers as copies; what it changes is forgotten afterwards."""
        tensors = {
            name: nn.Parameter(held, requires_grad=name in self._trained)
            if name in self._params and (held.is_floating_point() or held.is_complex())
            else held.clone()
            for name, held in self._held.items()
        }
        change = self._captured.changes.get(layer.index)
        names = {module for module, _ in change.attributes} if change is not None else set()
        modules = [self._shell.modules[name] for name in names]
        before = [copy.deepcopy(dict(plain_attributes(module))) for module in modules]
        self._shell.bind(tensors)
        try:
            yield tensors
        finally:
            self._shell.release(tensors)
            for module, attributes in zip(modules, before, strict=True):
                module.__dict__.update(attributes)


def _gradients(scalar: torch.Tensor, leaves: dict[Leaf, torch.Tensor]) -> Gradients:
    if not scalar.requires_grad or not leaves:
        return {}
    found = torch.autograd.grad(
        scalar, list(leaves.values()), retain_graph=True, allow_unused=True
    )
    pairs = zip(leaves, found, strict=True)
    return {leaf: gradient.cpu() for leaf, gradient in pairs if gradient is not None}
