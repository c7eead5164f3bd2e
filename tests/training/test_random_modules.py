"""Any module, any plan: random modules train by random plans as plain PyTorch trains them."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st

import harmony
from harmony.engine import variant
from harmony.planner.check.verify import verify
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, StepSpec
from harmony.planner.lower.passes import lower
from tests import devices
from tests import race_check as racecheck

from .models import square_loss, vector_batch
from .plain import gradients_of
from .random_modules import CHANGING, WIDTH, Net, Recipe, recipes
from .test_plans import CUTS, POLICIES, packs

SGD = {"lr": 0.05, "momentum": 0.9, "foreach": False}
NUM_SAMPLES = 8
NUM_STEPS = 2
TIED_TOLERANCE = 2e-7
"""Of the gradient's largest entry, for parameters that are used more than once.

Plain PyTorch adds a microbatch's uses, then the next microbatch's; Harmony adds all microbatches
of a pack, then the packs. Every other gradient is compared bit for bit.
"""


@dataclass(frozen=True)
class Way:
    """How steps are planned, as far as a model allows it.

    Attributes:
        forward, backward: cuts between packs.
        size: samples of a microbatch.
        num_devices: 1 to 3.
        replicated: whether each device runs all packs on its share of the batch.
    """

    forward: list[int]
    backward: list[int]
    size: int
    num_devices: int
    replicated: bool
    policy: Policy

    def spec(self, num_layers: int, minibatch: int, num_shares: int) -> StepSpec:
        """The four-tuple for a captured model."""
        last = packs(self.backward, num_layers)
        all_packs = packs([*self.forward, last[-1].first], num_layers)
        first = tuple(pack for pack in all_packs if pack.last <= last[-1].first)
        each = minibatch // num_shares
        bounds = [*(each * share for share in range(num_shares)), minibatch]
        shares = tuple(itertools.pairwise(bounds))
        return StepSpec(minibatch, self.size, self.size, first, last, shares)


WAYS = st.builds(
    Way,
    forward=CUTS,
    backward=CUTS,
    size=st.sampled_from([1, 2, 3, 4, 8]),
    num_devices=st.integers(1, 3),
    replicated=st.sampled_from([False, False, True]),
    policy=POLICIES,
)


@contextmanager
def plans_by_force(way: Way) -> Iterator[list[Plan]]:
    """Let every plan be of this way, verified, whatever the search would choose."""
    choose, made = variant.choose_steadily, []

    def forced(steady: Any, captured: Any, *known: Any, **asked: Any) -> Plan:
        plan = choose(steady, captured, *known, **asked)
        graph, costs, machine, minibatch = known
        num_shares = way.num_devices if asked["mode"] == "dp" else 1
        spec = way.spec(graph.num_layers, minibatch, num_shares)
        tasks = build_tasks(graph, spec)
        schedule = lower(tasks, machine, way.policy)
        verify(schedule, graph, costs, Phase.TRAIN, tasks)
        made.append(replace(plan, spec=spec, policy=way.policy, schedules={Phase.TRAIN: schedule}))
        return made[-1]

    variant.choose_steadily = forced
    try:
        yield made
    finally:
        variant.choose_steadily = choose


class PlainTraining:
    """The reference: plain PyTorch that accumulates the same microbatches' gradients."""

    def __init__(self, net: Net, way: Way) -> None:
        self.net = net
        self._trained = [param for param in net.parameters() if param.requires_grad]
        self._optimizer = torch.optim.SGD(self._trained, **SGD)
        self._way = way

    def step(self, step: int, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Train on one batch, share after share, and return its loss."""
        shares = self._way.num_devices if self._way.replicated else 1
        spec = self._way.spec(1, len(inputs), shares)
        total, index = torch.zeros(()), 0
        sums: dict[int, torch.Tensor] = {}
        for first, last in spec.shares:
            self._optimizer.zero_grad()
            for low in range(first, last, self._way.size):
                high = min(low + self._way.size, last)
                harmony.seed_microbatch(step, index)
                weight, index = (high - low) / len(inputs), index + 1
                # Copies: a product may depend on how its operands are aligned.
                loss = square_loss(self.net(inputs[low:high].clone()), targets[low:high].clone())
                (loss * weight).backward()
                total = total + loss.detach() * weight
            for place, param in enumerate(self._trained):
                if param.grad is not None and place in sums:
                    sums[place].add_(param.grad)
                elif param.grad is not None:
                    sums[place] = param.grad.clone()
        for place, param in enumerate(self._trained):
            param.grad = sums.get(place)
        self._optimizer.step()
        return total


def fits(way: Way, recipe: Recipe, decides: str) -> Way:
    """Take from a way what the recipe does not allow."""
    names = {name for name, _ in recipe}
    if "batch norm" in names and way.size == 1:
        way = replace(way, size=2)  # one sample has no variance: plain PyTorch refuses it
    if names & CHANGING or decides == "mixed":
        way = replace(way, replicated=False)
    return way


def batch(step: int, decides: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch whose samples, for a net that decides, have all one sign, or mixed ones."""
    inputs, targets = vector_batch(step, NUM_SAMPLES, WIDTH)
    if decides == "alike":
        inputs = inputs.abs() * (-1) ** step
    return inputs, targets


def compare(recipe: Recipe, way: Way, decides: str = "") -> None:
    """Train in both ways and compare everything."""
    torch.manual_seed(0)
    net = Net(recipe, bool(decides))
    twin = copy.deepcopy(net)
    plain = PlainTraining(copy.deepcopy(net), way)
    try:
        PlainTraining(net, way).step(0, *batch(0, decides))
    except RuntimeError as error:
        assert "inplace operation" in str(error)
        reject()  # no module that can be trained
    model = harmony.Harmony(
        twin,
        optimizer=torch.optim.SGD,
        updates="host",
        optimizer_kwargs=SGD,
        loss_fn=square_loss,
        microbatch_size=way.size,
        mode="dp" if way.replicated else "pp",
        devices=way.num_devices,
    )
    tied = twin.tied_names()
    for step in range(NUM_STEPS):
        inputs, targets = batch(step, decides)
        wanted = plain.step(step, inputs.clone(), targets)
        loss = model.train_step(inputs, targets)
        assert torch.equal(loss, wanted), f"step {step}: loss {loss} instead of {wanted}"
        check_gradients(twin, plain.net, tied, step)
        check_state(twin, plain.net, tied, step)
        plain.net.load_state_dict(twin.state_dict())  # tied weights may differ: start equal


def check_gradients(net: Net, plain: Net, tied: set[str], step: int) -> None:
    """Compare bit for bit, within the tolerance where a parameter is used more than once."""
    found = gradients_of(net)
    for name, wanted in gradients_of(plain).items():
        gradient = found[name]
        assert (gradient is None) == (wanted is None), f"step {step}: {name}: {gradient}"
        if gradient is None or wanted is None:
            continue
        if name not in tied:
            assert same_bits(gradient, wanted), f"step {step}: gradient of {name}"
        else:
            worst = (gradient - wanted).abs().max() / wanted.abs().max()
            assert worst <= TIED_TOLERANCE, f"step {step}: tied {name} differs by {worst}"


def check_state(net: Net, plain: Net, tied: set[str], step: int) -> None:
    """Compare parameters, buffers and Python counters."""
    wanted = plain.state_dict()
    for name, tensor in net.state_dict().items():
        if name in tied:
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)
        else:
            assert same_bits(tensor, wanted[name]), f"step {step}: {name}"
    for ours, theirs in zip(net.modules(), plain.modules(), strict=True):
        assert getattr(ours, "calls", 0) == getattr(theirs, "calls", 0), f"step {step}"


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors are equal, the signs of their zeros included."""
    if not one.is_floating_point():
        return one.equal(two)
    return one.contiguous().view(torch.int32).equal(two.contiguous().view(torch.int32))


ONE_GPU = Way([], [], 4, 1, False, Policy())
"""A way for what was found here, in its shortest form."""


@settings(
    max_examples=40,
    derandomize=True,
    suppress_health_check=[*settings.default.suppress_health_check, HealthCheck.filter_too_much],
)
@given(recipe=recipes(), way=WAYS, decides=st.sampled_from(["", "", "", "", "alike", "mixed"]))
@example(recipe=(("batch norm", 0),), way=ONE_GPU, decides="")
@example(recipe=(("linear", 0),), way=ONE_GPU, decides="alike")
@example(recipe=(("counts", 0),), way=ONE_GPU, decides="mixed")
def test_random_modules_train_as_in_plain_pytorch(recipe: Recipe, way: Way, decides: str) -> None:
    torch.set_num_threads(1)
    way = fits(way, recipe, decides)
    devices.provide(count=3, memory="64MiB")
    forced = plans_by_force(way)
    with warnings.catch_warnings(), racecheck.checked(ordered_frees=True), forced as plans:
        warnings.simplefilter("ignore")  # a dynamic run is announced
        compare(recipe, way, decides)
    assert plans, "no plan was forced"
