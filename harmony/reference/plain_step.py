"""A step as plain PyTorch runs it: the user's own module, on the host, hooks and all.

Nothing here knows what Harmony has captured or planned. Where the step has microbatches, they are
given, as are their seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from harmony.capture import Batch
from harmony.capture.graph.structure import flatten
from harmony.capture.replay.kept_types import names_kept
from harmony.capture.state.python_state import is_plain
from harmony.capture.state.random_state import GeneratorStates, PythonState
from harmony.capture.trace.isolation import autocast_dtype, undisturbed
from harmony.core.units import format_bytes
from harmony.errors import DoesNotFitError
from harmony.planner.ir.tasks import Samples
from harmony.reference.draws import DrawPlayer, DrawRecorder, drawn_state
from harmony.reference.outputs import LossFn, Piece, batch_dim, loss_of
from harmony.reference.snapshot import Snapshot
from harmony.runtime.host.limits import available_host_nbytes
from harmony.runtime.step.randomness import seed_microbatch

Tensors = dict[str, torch.Tensor]
"""By name; what has none is left out."""

_MACHINERY = frozenset(vars(nn.Module())) - {"training"}

Parts = tuple[tuple[Samples, ...], ...]
"""Microbatches of each replica."""


@dataclass
class Result:
    """What a step has left, before the optimizer.

    Attributes:
        loss: of the whole batch.
        gradients: of the parameters.
        inputs: gradients of the inputs that require one.
        buffers: all of them, after the step.
        given: the tensors of the call after the step, which a forward may change in place.
        left: what is on attributes of the modules then (`left_on`).
        draws: whether random numbers were drawn.
        draws_in_python: whether Python or NumPy drew some.
    """

    loss: torch.Tensor | None
    gradients: Tensors
    inputs: Tensors
    buffers: Tensors
    given: Tensors = field(default_factory=dict)
    left: dict[str, Any] = field(default_factory=dict)
    draws: bool = False
    draws_in_python: bool = False


@dataclass
class PlainStep:
    """One batch, to be run by a module as it stands.

    Attributes:
        loss_fn: maps the output and the targets to the loss; None if the output holds it.
        batch_dims: as `harmony.Harmony` takes them.
        step, seed: what random numbers are seeded with.
        parts: the microbatches; empty for the whole batch at once.
        weights: what their losses count; by default each counts its samples.
        dtype: what parameters and inputs of floating point are cast to for the forward, as FSDP2
            casts them at the root of a model; None: they are taken as they are.
        device: where it runs; the parameters stay on the host.
    """

    net: nn.Module
    loss_fn: LossFn | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    batch_dims: Mapping[str, int | None]
    step: int
    seed: int
    parts: Parts = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    draws: DrawRecorder | DrawPlayer | None = None
    weights: Mapping[Samples, float] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        leaves, self._structure = flatten((self.args, self.kwargs, self.targets))
        own = {id(leaf): _own(leaf, self.device) for leaf in leaves}  # model(x, x) stays that
        self._leaves = [own[id(leaf)] for leaf in leaves]
        self._given = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        self._used: list[tuple[Samples | None, list[Any]]] = []
        self._dims: Sequence[int | None] = ()
        self._num_samples = 0
        if self.parts:
            batch = Batch.of(self.args, self.kwargs, self.targets, self.batch_dims)
            self._num_samples = batch.num_samples
            known = {id(x): dim for x, dim in zip(batch.leaves, batch.batch_dims, strict=True)}
            self._dims = [known.get(id(leaf)) for leaf in leaves]

    # The three ways to run it

    def by_steps(self) -> Result:
        """Run forward, loss and backward of each microbatch, as `train_step` stands for."""
        losses: list[torch.Tensor] = []

        def run(index: int, samples: Samples | None) -> None:
            out, targets = self._forward(samples)
            loss = loss_of(self.loss_fn, out, targets)
            self._note_draws()
            weight = self._weight(samples)
            losses.append(loss.detach() if samples is None else loss.detach() * weight)
            torch.autograd.backward(loss if samples is None else loss * weight)

        result = self._run(run)
        total = sum(losses, torch.zeros((), device=self.device))
        result.loss = total.to(losses[0].dtype).cpu()
        return result

    def by_loop(self) -> Result:
        """Run the forward, one loss of the whole batch, and its backward, as an own loop does."""
        found: list[torch.Tensor] = []

        def finish(out: Any) -> torch.Tensor:
            self._drawn_before.restore()
            _, _, targets = self._part(None)
            found.append(loss_of(self.loss_fn, out, targets))
            return found[0]

        result = self._through_outputs(lambda out: torch.autograd.backward(finish(out)))
        result.loss = found[0].detach().cpu()
        return result

    def by_gradients(self, given: Sequence[torch.Tensor | None]) -> tuple[Result, list[Any]]:
        """Run the forward, and the backward from the gradients of the outputs.

        Args:
            given: of the tensors of the output, in order; None where there is none.

        Returns:
            The result, and the tensors of the output.
        """
        shown: list[Any] = []

        def backward(out: Any) -> None:
            leaves = [leaf for leaf in flatten(out)[0] if isinstance(leaf, torch.Tensor)]
            shown.extend(leaf.detach().cpu() for leaf in leaves)
            pairs = [(o, g) for o, g in zip(leaves, given, strict=True) if g is not None]
            tensors = [output for output, _ in pairs]
            torch.autograd.backward(tensors, [g.to(o.device) for o, g in pairs])

        return self._through_outputs(backward), shown

    # Microbatches

    def _through_outputs(self, backward: Callable[[Any], None]) -> Result:
        """Run all forwards, then the backward of what they return together."""
        outs: list[tuple[Samples, Any]] = []

        def run(index: int, samples: Samples | None) -> None:
            out, _ = self._forward(samples)
            self._note_draws()
            if samples is None:
                backward(out)
            else:
                outs.append((samples, out))

        def finish() -> None:
            joined, pieces = self._joined(outs)
            backward(joined)
            for piece in pieces:
                piece.backward()

        return self._run(run, finish if self.parts else None)

    def _joined(self, outs: list[tuple[Samples, Any]]) -> tuple[Any, list[Piece]]:
        """Put the outputs of microbatches together, apart from their graphs."""
        flat = [flatten(out) for _, out in outs]
        every = [samples for samples, _ in outs]
        pieces = [Piece() for _ in outs]
        joined: list[Any] = []
        for chunks in zip(*(leaves for leaves, _ in flat), strict=True):
            first = chunks[0]
            if not isinstance(first, torch.Tensor):
                joined.append(first)
                continue
            dim = batch_dim(chunks, every)
            if dim is not None:
                whole = torch.cat([chunk.detach() for chunk in chunks], dim)
            elif first.dim() == 0 and first.is_floating_point():
                pairs = zip(chunks, every, strict=True)
                weighted = [chunk.detach() * self._weight(samples) for chunk, samples in pairs]
                whole = sum(weighted[1:], weighted[0])
            else:
                joined.append(first.detach())
                continue
            joined.append(whole.requires_grad_(first.requires_grad))
            if first.requires_grad:
                low = 0
                for piece, chunk, samples in zip(pieces, chunks, every, strict=True):
                    high = low + (0 if dim is None else chunk.shape[dim])
                    share = 1.0 if dim is not None else self._weight(samples)
                    piece.add(chunk, whole, dim, low, high, share)
                    low = high
        return flat[0][1].unflatten(joined), pieces

    def _weight(self, samples: Samples | None) -> float:
        if samples is None:
            return 1.0
        default = (samples[1] - samples[0]) / self._num_samples
        return self.weights.get(samples, default)

    # Running

    def _run(
        self,
        run: Callable[[int, Samples | None], None],
        finish: Callable[[], None] | None = None,
    ) -> Result:
        params = dict(self.net.named_parameters())
        total: Tensors = {}
        index = 0
        self._drew = self._drew_in_python = False
        self._drawn_before = GeneratorStates.now()
        with self._surroundings():
            for replica in self.parts or ((None,),):
                for samples in replica:
                    self._seed(index)
                    run(index, samples)
                    index += 1
                if finish is None:
                    _add(total, params)
            if finish is not None:
                finish()
                _add(total, params)
            if isinstance(self.draws, DrawPlayer):
                self.draws.finish()
        return Result(
            loss=None,
            gradients={name: gradient.cpu() for name, gradient in total.items()},
            inputs=self._input_gradients(),
            buffers={n: b.detach().cpu().clone() for n, b in self.net.named_buffers()},
            given=self._after(),
            left=left_on(self.net),
            draws=self._drew,
            draws_in_python=self._drew_in_python,
        )

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        dtype = autocast_dtype()
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(undisturbed(self.device))
            stack.enter_context(_single_thread())
            stack.enter_context(_within_memory())
            if dtype is not None:
                stack.enter_context(torch.autocast(self.device.type, dtype))
            stack.enter_context(self.draws or nullcontext())
            yield

    def _seed(self, index: int) -> None:
        seed_microbatch(self.step, index, self.seed)
        self._seeded, self._state = PythonState.now(), drawn_state(self.device)
        if isinstance(self.draws, DrawRecorder):
            self.draws.begin()

    def _note_draws(self) -> None:
        if not self._seeded.same(PythonState.now()):
            self._drew = self._drew_in_python = True
        elif not torch.equal(self._state, drawn_state(self.device)):
            self._drew = True

    def _forward(self, samples: Samples | None) -> tuple[Any, Any]:
        args, kwargs, targets = self._part(samples)
        if self.device.type == "cpu" and self.dtype is None:
            return self.net(*args, **kwargs), targets
        leaves, structure = flatten((args, kwargs))
        args, kwargs = structure.unflatten(map(self._cast, leaves))
        kept, pairs = names_kept(self.net), self.net.named_parameters()
        held = {n: p.to(self.device) for n, p in pairs}
        held = {n: p if n in kept else self._cast(p) for n, p in held.items()}
        if self.device.type != "cpu":
            held |= {n: b.to(self.device) for n, b in self.net.named_buffers()}
        out = torch.func.functional_call(self.net, held, args, kwargs)
        with torch.no_grad():
            for name, buffer in self.net.named_buffers():
                buffer.copy_(held.get(name, buffer))
        return out, targets

    def _cast(self, leaf: Any) -> Any:
        if self.dtype is None or not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(self.dtype) if leaf.is_floating_point() else leaf

    def _part(self, samples: Samples | None) -> tuple[Any, Any, Any]:
        """Arguments and targets of a microbatch: copies, since a forward may change them."""
        made: dict[int, Any] = {}
        for index, leaf in enumerate(self._leaves):
            dim = self._dims[index] if samples is not None else None
            if not isinstance(leaf, torch.Tensor) or (samples is None and leaf.requires_grad):
                made[id(leaf)] = leaf
            elif id(leaf) not in made:
                some = leaf
                if samples is not None and dim is not None:
                    some = leaf.narrow(dim, samples[0], samples[1] - samples[0])
                made[id(leaf)] = some.clone()
        parts = [made[id(leaf)] for leaf in self._leaves]
        self._used.append((samples, parts))
        args, kwargs, targets = self._structure.unflatten(parts)
        return args, kwargs, targets

    def _after(self) -> Tensors:
        """The tensors of the call as the forwards have left them, by rows of the microbatches."""
        for samples, parts in self._used[:1] if not self.parts else self._used:
            for index, part in enumerate(parts):
                if not isinstance(part, torch.Tensor):
                    continue
                dim = self._dims[index] if samples is not None else None
                place = self._given[index]
                if samples is not None and dim is not None:
                    place = place.narrow(dim, samples[0], samples[1] - samples[0])
                place.copy_(part.detach())
        self._used.clear()
        return tensors_of(self._structure.unflatten(self._given))

    def _input_gradients(self) -> Tensors:
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]
        wanted = [leaf for leaf in tensors if leaf.requires_grad]
        found = {f"input {i}": leaf.grad for i, leaf in enumerate(wanted)}
        return {name: gradient.cpu() for name, gradient in found.items() if gradient is not None}


@dataclass(frozen=True)
class PlainForward:
    """A forward of an own loop, to be run by plain PyTorch once its backward has come.

    Attributes:
        before: the module as it was.
    """

    step: PlainStep
    before: Snapshot


def left_on(net: nn.Module) -> dict[str, Any]:
    """Return copies of what is on the attributes of modules, by name: tensors, and plain values.

    What containers of the usual kinds hold is there under its place in them; other objects are
    left out.
    """
    found: dict[str, Any] = {}
    for path, module in net.named_modules():
        for name, held in module.__dict__.items():
            if name in _MACHINERY:
                continue
            for place, leaf in tree_flatten_with_path(held)[0]:
                if isinstance(leaf, torch.Tensor):
                    if not leaf.is_meta and leaf.layout is torch.strided:
                        found[f"{path}.{name}{keystr(place)}"] = leaf.detach().cpu().clone()
                elif is_plain(leaf):
                    found[f"{path}.{name}{keystr(place)}"] = leaf
    return {name.removeprefix("."): leaf for name, leaf in found.items()}


def tensors_of(call: Any) -> Tensors:
    """Copies of the tensors of a call, by their place in it."""
    return {
        f"input {index} after the step": leaf.detach().cpu().clone()
        for index, leaf in enumerate(flatten(call)[0])
        if isinstance(leaf, torch.Tensor)
    }


def _own(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().to(device, copy=True).requires_grad_(leaf.requires_grad)


def _add(total: Tensors, params: Mapping[str, nn.Parameter]) -> None:
    """Take the gradients of a replica, and add them to those of the ones before."""
    for name, param in params.items():
        part, param.grad = param.grad, None
        if part is not None:
            total[name] = total[name].add_(part) if name in total else part


def _within_memory() -> AbstractContextManager[Any]:
    """Refuse to go on when the activations of the batch are about to exceed the host's memory."""
    limit, taken, known = int(0.8 * available_host_nbytes()), 0, set[int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal taken
        if tensor.device.type == "cpu" and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                taken += min(storage.nbytes(), tensor.numel() * tensor.element_size())
        if taken > limit:
            raise DoesNotFitError(
                "plain PyTorch, which this is compared with, keeps the activations of the whole "
                f"batch: more than {format_bytes(limit)} of host memory here. Verify a smaller "
                "batch, or free host memory"
            )
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


@contextmanager
def _single_thread() -> Iterator[None]:
    """Compute on one thread of the host, as virtual GPUs do: sums are then of the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
