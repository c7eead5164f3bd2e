"""Own loops by any plan: packs, policies, outputs in use, gradients of inputs."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import harmony
from harmony.core.layergraph import LayerGraph
from harmony.engine.call_key import CallKind
from harmony.planner.check.verify import check_together, verify
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Schedule
from harmony.planner.ir.task_graph import backward_packs, build_tasks
from harmony.planner.ir.tasks import Pack, Phase, StepSpec
from harmony.planner.lower.passes import in_the_same_slots, lower
from harmony.planner.search.trial import for_phase, policy_for
from tests import devices
from tests import race_check as racecheck
from tests.toys import halves
from tests.training.models import square_loss, vector_batch
from tests.training.plain import gradients_of

RANDOM = settings(
    max_examples=15,
    derandomize=True,
    suppress_health_check=[
        *settings.default.suppress_health_check,
        HealthCheck.function_scoped_fixture,
    ],
)
POLICIES = st.builds(
    Policy,
    weight_slots=st.integers(1, 3),
    gradient_slots=st.integers(1, 2),
    lookahead=st.integers(1, 3),
    boundary=st.sampled_from(["keep", "swap", "host"]),
)


class Branches(nn.Module):
    """Inputs that several far layers read, three outputs, tied weights, a frozen layer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.layers[4].weight = self.layers[1].weight
        self.layers[2].requires_grad_(False)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.tanh(self.layers[0](x))
        early = torch.tanh(self.layers[1](y + shift))
        y = torch.tanh(self.layers[2](early)) + x
        y = torch.tanh(self.layers[3](y)) * shift
        late = self.layers[4](y)
        return late, early, self.layers[5](y + x)


def packs(cuts: list[int], num_layers: int) -> tuple[Pack, ...]:
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < num_layers}), num_layers]
    return tuple(Pack(a, b) for a, b in itertools.pairwise(bounds))


def use_plan(
    model: harmony.Harmony,
    call: tuple[torch.Tensor, ...],
    cuts: list[int],
    size: int,
    replicas: int,
    policy: Policy,
    kept: str = "none",
) -> None:
    """Make the model run this batch by a plan of the test's own, all phases verified.

    Args:
        kept: of which packs activations wait for the backward: ``"none"``, ``"all"`` on the
            device, ``"out"`` all on the host, ``"some"``: one on the device, one on the host, one
            not at all, and of some microbatches only; ``"products"``: results of those alone.
    """
    ready = model._engine.variants.ready(CallKind.OWN_LOOP, (call, {}, None))
    variant, planned = ready.variant, ready.planned
    minibatch = planned.plan.minibatch
    every = packs(cuts, variant.graph.num_layers)
    spec = StepSpec(
        minibatch, size, size, every, every, halves(minibatch, replicas), Phase.BACKWARD
    )
    spec, policy = _keeping(variant.graph, spec, policy, kept)
    phases = (Phase.FORWARD, Phase.BACKWARD)
    made = {phase: build_tasks(variant.graph, for_phase(spec, phase)) for phase in phases}
    known = planned.measured
    lowered = [lower(tasks, known.machine, policy_for(policy, p)) for p, tasks in made.items()]
    schedules = dict(zip(phases, in_the_same_slots(lowered), strict=True))
    for phase, tasks in made.items():
        verify(schedules[phase], variant.graph, known.costs, phase, tasks)
        assert Schedule.parse(str(schedules[phase])) == schedules[phase]
    check_together(schedules[Phase.FORWARD], schedules[Phase.BACKWARD])
    own = replace(planned.plan, spec=spec, policy=policy, schedules=schedules)
    variant.learn(replace(planned, plan=own))


def _keeping(
    graph: LayerGraph, spec: StepSpec, policy: Policy, kept: str
) -> tuple[StepSpec, Policy]:
    back = {item.pack for item in backward_packs(graph, spec)}
    may = tuple(p for p in spec.backward_packs if p in back and graph.keepable(p.first, p.last))
    mirrored = replace(policy, mirror=True)
    if kept == "products":
        some = tuple(pack for pack in may if graph.products_nbytes(pack.first, pack.last, 1))
        return replace(spec, products=some), replace(mirrored, offload=some[1::2])
    if kept == "all":
        return replace(spec, saved=may), mirrored
    if kept == "out":
        return replace(spec, saved=may), replace(mirrored, offload=may)
    if kept == "some":
        saved, runs = tuple(p for i, p in enumerate(may) if i % 3 != 2), spec.runs_of_round(0)
        least = min(runs, *(spec.runs_of_round(r) for r in range(len(spec.shares))))
        found = replace(spec, saved=saved, saved_runs=least if least > 1 else 0)
        return found, replace(mirrored, offload=saved[1::2])
    return spec, policy


@RANDOM
@given(
    cuts=st.lists(st.integers(1, 7), max_size=5),
    size=st.sampled_from([1, 3, 8]),
    num_devices=st.integers(1, 4),
    replicated=st.booleans(),
    policy=POLICIES,
    wants=st.tuples(st.booleans(), st.booleans()),
    used=st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=2, max_size=2),
    kept=st.sampled_from(["none", "all", "out", "some", "products"]),
)
def test_gradients_of_inputs_and_parameters(
    cuts: list[int],
    size: int,
    num_devices: int,
    replicated: bool,
    policy: Policy,
    wants: tuple[bool, bool],
    used: list[set[int]],
    kept: str,
) -> None:
    torch.set_num_threads(1)
    devices.provide(count=4, memory="64MiB")
    torch.manual_seed(0)
    net = Branches()
    replicas = num_devices if replicated else 1
    x, target = vector_batch(0)
    shift = torch.randn(24, generator=torch.Generator().manual_seed(3))
    with racecheck.checked(ordered_frees=True):
        model = harmony.Harmony(copy.deepcopy(net), devices=num_devices, microbatch_size=size)
        leaves = [x.clone().requires_grad_(wants[0]), shift.clone().requires_grad_(wants[1])]
        use_plan(model, tuple(leaves), cuts, size, replicas, policy, kept)
        calls = [model(*leaves) for _ in used]
        losses = [
            sum(square_loss(out[i], target) for i in which)
            for out, which in zip(calls, used, strict=True)
        ]
        for loss in reversed(losses):
            loss.backward()
        del calls, losses, loss
    twins = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    for which in reversed(used):
        outs = net(*twins)
        sum(square_loss(outs[i], target) for i in which).backward()
    # Samples a few at a time: kernels of other sizes, and their gradients added in another order.
    bound = 0.0 if size == 8 and replicas == 1 else 2e-5
    found = [*gradients_of(model.module).items(), *(("input", leaf.grad) for leaf in leaves)]
    expected = [*gradients_of(net).values(), *(twin.grad for twin in twins)]
    for (name, gradient), other in zip(found, expected, strict=True):
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert (gradient - other).abs().max() <= bound * other.abs().max(), name
