"""A step by plain PyTorch: the same microbatches, seeds and weights, without Harmony's runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harmony.binding import Binding
from harmony.capture.isolation import undisturbed
from harmony.capture.structure import flatten
from harmony.capture.trace import Program
from harmony.planner.plan import Plan
from harmony.planner.tasks import Samples, TaskKind
from harmony.runtime.randomness import seed_microbatch
from harmony.runtime.stage import Values
from harmony.runtime.step import Weights

Gradients = dict[str, torch.Tensor]
"""By name of the parameter; those that got none are left out."""


@dataclass
class PlainStep:
    """One batch, to be run through a copy of the module that shares its parameters' memory.

    Attributes:
        weights: how much the scalars of each microbatch count.
        args, kwargs, targets: the batch.
        step, seed: what the microbatches' random numbers are seeded with.
        device: where it runs.
        twin: the copy; its buffers and attributes are its own.
        loss: of the whole batch, if the step makes it.
        outputs: of the whole batch, by value.
    """

    net: nn.Module
    binding: Binding
    plan: Plan
    weights: Weights
    step: int
    seed: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loss: torch.Tensor | None = None
    outputs: Values = field(default_factory=dict)
    twin: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.twin = _twin(self.net, self.device)

    def by_loss(self, program: Program) -> Gradients:
        """Return the gradients of the whole batch's loss, and keep the loss.

        Args:
            program: runs the module, and makes the loss.
        """
        value = self.binding.graph.loss
        assert value is not None, "only a step that has a loss runs by it"
        losses: list[torch.Tensor] = []

        def run(samples: Samples) -> None:
            args, kwargs, targets = self._part(samples)
            loss = program(self.twin, args, kwargs, targets)
            weight = self.weights[value, samples]
            if weight != 0.0:
                losses.append(loss.detach() * weight)
                (loss * weight).backward()

        gradients = self._accumulate(run)
        self.loss = sum(losses, torch.zeros(())).cpu() if losses else torch.tensor(torch.nan)
        return gradients

    def by_gradients(self, given: Values) -> Gradients:
        """Return the parameters' gradients from those of the outputs, and keep the outputs.

        Args:
            given: by value, of the whole batch.
        """
        found: dict[int, list[tuple[Samples, torch.Tensor]]] = {}

        def run(samples: Samples) -> None:
            args, kwargs, _ = self._part(samples)
            values = self._values_of(self.twin(*args, **kwargs))
            for value, tensor in values.items():
                found.setdefault(value, []).append((samples, tensor.detach()))
            seeds = {v: self._share(v, gradient, samples) for v, gradient in given.items()}
            pairs = [(values[v], g) for v, g in seeds.items() if g is not None]
            if pairs:
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])

        gradients = self._accumulate(run)
        self.outputs = {v: self._joined(v, chunks) for v, chunks in found.items()}
        return gradients

    def _accumulate(self, run: Callable[[Samples], None]) -> Gradients:
        """Run every microbatch; add gradients within a replica, then those of the replicas."""
        spec = self.plan.spec
        params = {n: p for n, p in self.twin.named_parameters() if p.requires_grad}
        total: Gradients = {}
        index = 0
        with torch.enable_grad(), undisturbed(self.device), _single_thread():
            for replica in range(len(spec.shares)):
                for samples in spec.microbatches(replica, TaskKind.BACKWARD):
                    seed_microbatch(self.step, index, self.seed)
                    run(samples)
                    index += 1
                for name, param in params.items():
                    part, param.grad = param.grad, None
                    if part is not None:
                        total[name] = total[name].add_(part) if name in total else part
        return {name: gradient.cpu() for name, gradient in total.items()}

    def _part(self, samples: Samples) -> tuple[Any, Any, Any]:
        """Arguments and targets of a microbatch, on the device."""
        low, high = samples
        leaves, structure = flatten((self.args, self.kwargs, self.targets))
        parts = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                leaf = leaf.detach().to(self.device)
                if leaf.dim() > 0 and leaf.shape[0] == self.plan.minibatch:
                    leaf = leaf[low:high].clone()  # aligned, as a GPU's copy of it is
            parts.append(leaf)
        args, kwargs, targets = structure.unflatten(parts)
        return args, kwargs, targets

    def _values_of(self, out: Any) -> Values:
        """The tensors that the module returned, by the ids of the outputs."""
        stand_ins = {v: torch.empty(0) for v in self.binding.graph.output_ids}
        known = {id(tensor): v for v, tensor in stand_ins.items()}
        shown = flatten(self.binding.captured.unflatten_output(stand_ins))[0]
        pairs = zip(shown, flatten(out)[0], strict=True)
        return {known[id(stand_in)]: tensor for stand_in, tensor in pairs if id(stand_in) in known}

    def _share(
        self, value: int, gradient: torch.Tensor, samples: Samples
    ) -> torch.Tensor | None:
        """What of an output's gradient is a microbatch's; None for one that does not count."""
        gradient, dim = gradient.to(self.device), self.binding.graph.values[value].batch_dim
        if dim is not None:
            rows = gradient.shape[dim] // self.plan.minibatch
            return gradient.narrow(dim, samples[0] * rows, (samples[1] - samples[0]) * rows)
        weight = self.weights.get((value, samples), 1.0)
        return None if weight == 0.0 else gradient * weight

    def _joined(self, value: int, chunks: Sequence[tuple[Samples, torch.Tensor]]) -> torch.Tensor:
        dim = self.binding.graph.values[value].batch_dim
        if dim is not None:
            return torch.cat([chunk for _, chunk in chunks], dim).cpu()
        if (value, chunks[0][0]) not in self.weights:
            return chunks[0][1].cpu()
        pairs = ((chunk, self.weights[value, samples]) for samples, chunk in chunks)
        counted = [chunk * weight for chunk, weight in pairs if weight != 0.0]
        return sum(counted, torch.zeros_like(chunks[0][1])).cpu()


@contextmanager
def restored(net: nn.Module, attributes: Iterable[tuple[str, str]]) -> Iterator[None]:
    """Give a module its gradients, buffers and these attributes back as they were."""
    modules = dict(net.named_modules())
    tensors = [(b, b.clone()) for b in net.buffers()]
    grads = [
        (param, param.grad, None if param.grad is None else param.grad.clone())
        for param in net.parameters()
    ]
    held = [
        (modules[module].__dict__, name, copy.deepcopy(modules[module].__dict__.get(name)))
        for module, name in attributes
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in tensors:
                buffer.copy_(before)
            for param, grad, content in grads:
                param.grad = grad
                if grad is not None and content is not None:
                    grad.copy_(content)
        for owner, name, value in held:
            owner[name] = value


def _twin(net: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of the module on a device; on the host the parameters share their memory."""
    memo: dict[int, Any] = {
        id(param): nn.Parameter(param.detach(), requires_grad=param.requires_grad)
        for param in net.parameters()
    }
    # Buffers are views of the arena: left alone, deepcopy would copy all of that for each.
    memo |= {id(buffer): buffer.detach().clone() for buffer in net.buffers()}
    return copy.deepcopy(net, memo).to(device)


@contextmanager
def _single_thread() -> Iterator[None]:
    """Compute on one thread of the host, as virtual GPUs do: sums are then of the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
