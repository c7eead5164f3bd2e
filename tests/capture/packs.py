"""A small engine that trains pack by pack, and the plain loop that it must agree with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from harmony.capture import Captured, ModuleShell, capture

from .models import CASES, make

Gradients = dict[str, torch.Tensor | None]


@cache
def captured_case(name: str, num_samples: int = 6) -> tuple[nn.Module, Captured, Any]:
    """A model of ``CASES``, captured once for all tests, and its ``(args, kwargs, targets)``."""
    net, case = make(name), CASES[name]
    call = case.batch(num_samples)
    args, kwargs, targets = call
    return net, capture(net, args, kwargs, targets=targets, **case.options), call


def seed(microbatch: int) -> None:
    torch.manual_seed(1234 + microbatch)
    random.seed(1234 + microbatch)


def plain_step(
    net: nn.Module, microbatches: Sequence[Any], loss_of: Callable[..., torch.Tensor]
) -> tuple[list[torch.Tensor], Gradients]:
    """Accumulate gradients over the microbatches: each is ``(args, kwargs, targets)``."""
    net.zero_grad()
    losses = []
    for index, (args, kwargs, targets) in enumerate(microbatches):
        seed(index)
        loss = loss_of(net(*args, **kwargs), targets)
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.detach())
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    return losses, gradients


@dataclass
class Engine:
    """Runs a captured model pack by pack: all microbatches forward, then all backward."""

    captured: Captured
    net: nn.Module
    cuts: Sequence[int]
    states: dict[tuple[int, int], tuple[torch.Tensor, Any]] = field(default_factory=dict)

    @property
    def packs(self) -> list[tuple[int, int]]:
        edges = [0, *self.cuts, self.captured.graph.num_layers]
        return list(pairwise(edges))

    def step(self, inputs: dict[int, torch.Tensor], size: int, total: int) -> Any:
        graph = self.captured.graph
        assert graph.loss is not None
        shell = self.captured.make_shell(torch.device("cpu"))
        tensors = {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
        ranges = [(low, min(low + size, total)) for low in range(0, total, size)]
        kept = [self.captured.split(inputs, low, high) for low, high in ranges]
        ends: list[Any] = []
        for index in range(len(ranges)):
            seed(index)
            ends.append((torch.get_rng_state(), random.getstate()))
        for first, last in self.packs:
            names = self.bind(shell, first, last, tensors)
            for index, (low, high) in enumerate(ranges):
                torch.set_rng_state(ends[index][0])
                random.setstate(ends[index][1])
                with torch.no_grad():
                    kept[index] |= self.captured.run(
                        first,
                        last,
                        shell,
                        dict(kept[index]),
                        high - low,
                        wanted=graph.pack_outputs(first, last),
                        at_layer=self.keep_state(index),
                    )
                ends[index] = (torch.get_rng_state(), random.getstate())
            shell.release(names)
        self.backward(shell, tensors, kept, ranges)
        return [values[graph.loss] for values in kept]

    def backward(self, shell: ModuleShell, tensors: Any, kept: Any, ranges: Any) -> None:
        graph = self.captured.graph
        gradients = [{graph.loss: torch.ones_like(values[graph.loss])} for values in kept]
        for first, last in reversed(self.packs):
            names = self.bind(shell, first, last, tensors)
            for index, (low, high) in enumerate(ranges):
                self.backward_pack(
                    shell, first, last, kept[index], gradients[index], high - low, index
                )
            shell.release(names)

    def backward_pack(
        self,
        shell: Any,
        first: int,
        last: int,
        kept: Any,
        gradients: Any,
        size: int,
        index: int,
    ) -> None:
        graph = self.captured.graph
        leaves = {
            v: kept[v].detach().requires_grad_(graph.values[v].requires_grad)
            for v in graph.pack_inputs(first, last)
        }
        made = graph.pack_outputs(first, last)
        with torch.enable_grad():
            found = self.captured.run(
                first,
                last,
                shell,
                dict(leaves),
                size,
                wanted=made,
                at_layer=self.restore(index),
            )
        for v in made:  # the recompute gives what the forward gave
            assert torch.equal(found[v], kept[v]), graph.values[v].name
            assert found[v].requires_grad == graph.values[v].requires_grad, graph.values[v].name
        roots = {**leaves, **found}
        pairs = [(roots[v], gradients[v]) for v in roots if v in gradients]
        pairs = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        for v, leaf in leaves.items():
            if leaf.grad is not None:
                gradients[v] = leaf.grad

    def bind(self, shell: ModuleShell, first: int, last: int, tensors: Any) -> list[str]:
        captured = self.captured
        shared = set(captured.graph.shared_in(first, last))
        names = [
            info.name
            for info in (*captured.params, *captured.buffers)
            if info.shared_id in shared or (info.layer is not None and first <= info.layer < last)
        ]
        shell.bind({name: tensors[name] for name in names})
        return names

    def keep_state(self, index: int) -> Callable[[int], None]:
        def keep(layer: int) -> None:
            self.states[index, layer] = (torch.get_rng_state(), random.getstate())

        return keep

    def restore(self, index: int) -> Callable[[int], None]:
        def restore(layer: int) -> None:
            state, python = self.states[index, layer]
            torch.set_rng_state(state)
            random.setstate(python)

        return restore


def packed_step(
    net: nn.Module, captured: Captured, call: Any, size: int, cuts: Sequence[int]
) -> tuple[list[torch.Tensor], Gradients]:
    """Train one step pack by pack; ``call`` is ``(args, kwargs, targets)`` of the whole batch."""
    net.zero_grad()
    engine = Engine(captured, net, cuts)
    total = captured.num_samples
    losses = engine.step(captured.flatten_inputs(*call), size, total)
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    return losses, gradients


def every_cut(num_layers: int) -> list[list[int]]:
    """Ways to cut a model: not at all, in the middle, in three, at every layer."""
    ways = [[], [num_layers // 2], [num_layers // 3, 2 * num_layers // 3], [*range(1, num_layers)]]
    return [sorted({cut for cut in way if 0 < cut < num_layers}) for way in ways]


def largest_difference(left: Gradients, right: Gradients) -> float:
    """Largest difference relative to the largest gradient of the parameter."""
    assert left.keys() == right.keys()
    worst = 0.0
    for name, one in left.items():
        two = right[name]
        assert (one is None) == (two is None), name
        if one is not None and two is not None and not torch.equal(one, two):
            worst = max(worst, float((one - two).abs().max() / one.abs().max()))
    return worst
