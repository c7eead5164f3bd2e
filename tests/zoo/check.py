"""Trains a model of the zoo with Harmony and with plain PyTorch, and compares everything.

Three steps on two devices, by a plan of at least four packs whose FORWARD packs are cut at
other layers than its BACKWARD packs, with the race checker on. The reference accumulates the same
microbatches, each seeded by `harmony.seed_microbatch`.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import harmony
from harmony.engine import variant
from harmony.errors import HarmonyWarning
from harmony.planner.check.verify import verify
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Pack, Phase, StepSpec
from harmony.planner.lower.passes import lower
from tests import devices
from tests import race_check as racecheck
from tests.training.plain import computing
from tests.zoo.entry import Entry

NUM_STEPS, NUM_DEVICES = 3, 2
POLICY = Policy(weight_slots=2, gradient_slots=2, lookahead=2, boundary="swap")
SGD = {"lr": 0.05, "momentum": 0.9, "foreach": False}
"""Not fused: PyTorch's fused SGD fails if a parameter gets its first gradient in a later step."""

Tensors = Mapping[str, "torch.Tensor | None"]


@dataclass
class Step:
    """What a training step left."""

    loss: torch.Tensor
    gradients: Tensors
    buffers: Tensors
    params: Tensors


@dataclass
class Outcome:
    """What the comparison found.

    Attributes:
        capture_mode: how the model was captured (`Harmony.capture_mode`).
        packs: how many BACKWARD packs the plan had.
        layers: how many layers the model was cut into.
        num_params: parameters, tied ones once.
        differences: by ``"loss"``, ``"gradient"``, ``"buffer"``, ``"parameter"`` the largest
            difference relative to the largest entry of the tensor; 0 means equal bits.
        misses: what differs by more than the entry allows, in words.
        notes: warnings that Harmony gave.
    """

    capture_mode: str
    packs: int
    layers: int
    num_params: int
    differences: dict[str, float] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(entry: Entry) -> Outcome:
    """Compare on devices set up for it, with the race checker on.

    Raises:
        HarmonyError: if Harmony cannot train it.
        RaceError: if the runtime did something that only luck put in order.
    """
    with one_thread():
        devices.provide(count=NUM_DEVICES, memory="256MiB")
        with racecheck.checked(ordered_frees=True), warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            outcome = compare(entry)
        gc.collect()
    outcome.notes = sorted(
        {str(w.message) for w in given if issubclass(w.category, HarmonyWarning)}
    )
    return outcome


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, which fixes the order of every sum; no downloads."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare(entry: Entry, *, autocast: bool = False) -> Outcome:
    """Train the model in both ways on the devices that there are, and compare each step.

    Args:
        autocast: both run their forwards and losses under bfloat16 autocast.
    """
    net = entry.make()
    plain = PlainTraining(entry, entry.make(), autocast)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        updates="host",
        optimizer_kwargs=SGD,
        loss_fn=entry.loss,
        mode="pp",
        microbatch_size=entry.microbatch,
        devices=NUM_DEVICES,
        seed=0,
    )
    if autocast and entry.tolerance:  # for the same reason, in roundings of bfloat16
        entry = replace(entry, tolerance=4 * torch.finfo(torch.bfloat16).eps)
    outcome = Outcome("", 0, 0, sum(p.numel() for p in net.parameters()))
    for step, batch in enumerate(entry.batches(NUM_STEPS)):
        if entry.tolerance and step:
            model.load_state_dict(plain.state())
        expected = plain.step(step, _copied(batch))
        with plans_by_force(entry, outcome), amp(autocast):
            loss = model.train_step(*_copied(batch))
        found = Step(loss, gradients_of(net), buffers_of(net), params_of(net))
        _judge(entry, step, found, expected, outcome)
    outcome.capture_mode = getattr(model, "capture_mode", "trace")
    return outcome


# Harmony


@contextmanager
def plans_by_force(entry: Entry, outcome: Outcome) -> Iterator[None]:
    """Let every plan have the packs of `spec_of`, whatever the search would choose.

    A dynamic model gets a plan for each path that a microbatch takes; the outcome notes the packs
    of the plan that has the fewest.
    """
    choose = variant.choose_steadily

    def forced(steady: Any, captured: Any, *known: Any, **asked: Any) -> Plan:
        plan = choose(steady, captured, *known, **asked)
        graph, costs, machine, minibatch = known
        spec = spec_of(graph.num_layers, minibatch, entry)
        tasks = build_tasks(graph, spec)
        schedule = lower(tasks, machine, POLICY)
        verify(schedule, graph, costs, Phase.TRAIN, tasks)
        packs = len(spec.backward_packs)
        if not outcome.packs or packs < outcome.packs:
            outcome.packs, outcome.layers = packs, graph.num_layers
        return replace(plan, spec=spec, policy=POLICY, schedules={Phase.TRAIN: schedule})

    variant.choose_steadily = forced
    try:
        yield
    finally:
        variant.choose_steadily = choose


def spec_of(num_layers: int, minibatch: int, entry: Entry) -> StepSpec:
    """Cut the layers evenly: BACKWARD into the packs asked for, FORWARD into others."""
    backward = _evenly(num_layers, min(entry.num_packs, num_layers))
    end = backward[-1].first
    forward = _evenly(end, min(max(2, len(backward) - 2), end)) if end else ()
    size = entry.microbatch
    return StepSpec(minibatch, size, size, forward, backward, ((0, minibatch),))


def _evenly(num_layers: int, num_packs: int) -> tuple[Pack, ...]:
    bounds = [index * num_layers // num_packs for index in range(num_packs + 1)]
    return tuple(Pack(first, last) for first, last in itertools.pairwise(bounds))


# Plain PyTorch


class PlainTraining:
    """The reference: accumulates the microbatches' gradients, then steps.

    Virtual GPUs compute what the CPU does. On the stand-in attention and others are another sum,
    so the reference runs there.
    """

    def __init__(self, entry: Entry, net: nn.Module, autocast: bool = False) -> None:
        self._entry = entry
        self._device = torch.device("cpu") if devices.TYPE == "vgpu" else devices.device()
        self._net = net
        self._autocast = autocast
        trained = [p for p in net.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(trained, **SGD)  # type: ignore[arg-type]

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers."""
        return {name: tensor.cpu() for name, tensor in self._net.state_dict().items()}

    def step(self, step: int, batch: Any) -> Step:
        """Run one training step."""
        entry = self._entry
        minibatch = count_samples(batch)
        size = minibatch if entry.whole_batch else entry.microbatch
        self._optimizer.zero_grad()
        total = torch.zeros(())
        with computing(self._net, self._device):
            for index, low in enumerate(range(0, minibatch, size)):
                high = min(low + size, minibatch)
                inputs, targets = moved(_cut(batch, low, high, minibatch), self._device)
                harmony.seed_microbatch(step, index)
                with amp(self._autocast):
                    loss = self._loss(inputs, targets)
                weight = 1.0 if entry.summed else (high - low) / minibatch
                (loss * weight).backward()
                total = total + loss.detach().cpu() * weight
        gradients = gradients_of(self._net)
        self._optimizer.step()
        return Step(total, gradients, buffers_of(self._net), params_of(self._net))

    def _loss(self, inputs: Any, targets: Any) -> torch.Tensor:
        args, kwargs = as_call(inputs)
        output = self._net(*args, **kwargs)
        if self._entry.loss is not None:
            return self._entry.loss(output, targets)
        return output["loss"] if isinstance(output, Mapping) else output.loss


def amp(on: bool) -> AbstractContextManager[Any]:
    """Return what a script enters around its forward for mixed precision."""
    return torch.autocast(devices.TYPE, torch.bfloat16) if on else nullcontext()


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch or an output on a device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as positional arguments and keywords."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, Sequence) else ((inputs,), {})


def _copied(batch: Any) -> Any:
    """A copy of a batch, since a model may change its inputs in place."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, batch)


def count_samples(batch: Any) -> int:
    """Rows of the first tensor of a batch."""
    return len(next(x for x in tree_leaves(batch) if isinstance(x, torch.Tensor) and x.dim()))


def _cut(batch: Any, low: int, high: int, num_samples: int) -> Any:
    """Copies of some samples: a product may depend on the alignment of its operands."""

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        batched = leaf.dim() > 0 and len(leaf) == num_samples
        return leaf[low:high].clone() if batched else leaf.clone()

    return tree_map(cut, batch)


# What is compared


def gradients_of(net: nn.Module) -> Tensors:
    """Copies of the gradients; None where there is none."""
    return _copies((name, p.grad) for name, p in net.named_parameters())


def buffers_of(net: nn.Module) -> Tensors:
    """Copies of the buffers."""
    return _copies(net.named_buffers())


def params_of(net: nn.Module) -> Tensors:
    """Copies of the parameters."""
    return _copies(net.named_parameters())


def _copies(named: Any) -> Tensors:
    return {n: None if t is None else t.detach().to("cpu", copy=True) for n, t in named}


def _judge(entry: Entry, step: int, found: Step, expected: Step, outcome: Outcome) -> None:
    kinds: list[tuple[str, Tensors, Tensors]] = [
        ("loss", {"": found.loss}, {"": expected.loss}),
        ("gradient", found.gradients, expected.gradients),
        ("buffer", found.buffers, expected.buffers),
        ("parameter", found.params, expected.params),
    ]
    for kind, ours, theirs in kinds:
        if ours.keys() != theirs.keys():
            outcome.misses.append(f"step {step}: {kind}s {set(ours) ^ set(theirs)} on one side")
        for name in theirs.keys() & ours.keys():
            difference = relative(ours[name], theirs[name])
            worst = outcome.differences.get(kind, 0.0)
            outcome.differences[kind] = max(worst, difference)
            if not difference <= entry.tolerance:
                outcome.misses.append(f"step {step}: {kind} {name} differs by {difference:.1e}")


def relative(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Largest difference relative to the largest entry; 0 only for equal bits."""
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    if expected.is_sparse:  # plain PyTorch's; ours are dense
        expected = expected.to_dense()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if _bits(found).equal(_bits(expected)):
        return 0.0
    difference = (found.double() - expected.double()).abs().max().item()
    if math.isnan(difference):
        return math.inf
    largest = expected.double().abs().max().item()
    # Zeros of other signs differ too, if only by the least number.
    return max(difference / largest if largest else difference, math.ulp(0.0))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as integers: -0.0 is not 0.0, and NaN equals itself."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])
