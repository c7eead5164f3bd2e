"""Models that change between steps: buffers, layers, dtypes. Right is what plain PyTorch does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import harmony
from tests import devices

from .changing import FORMS, Change, assert_same, same_with_changes
from .conftest import VirtualGPUs
from .models import square_loss, vector_batch

WIDTH = 24


class Net(nn.Module):
    """BatchNorm, whose buffers the forward changes, and a buffer of its own that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)) * self.scale))


class Glued(Net):
    """Modules without parameters between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.glue = nn.Sequential(nn.Tanh(), nn.LeakyReLU(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.glue(self.norm(self.first(x))))


def assign_statistics(net: nn.Module, _: object) -> None:
    net.norm.running_mean = torch.zeros(WIDTH)


def reset_statistics(net: nn.Module, _: object) -> None:
    net.norm.reset_running_stats()


def assign_scale(net: nn.Module, _: object) -> None:
    net.scale = torch.linspace(0, 1, WIDTH)


def assign_part_of_a_table(net: nn.Module, _: object) -> None:
    net.table = torch.rand(3, WIDTH, generator=torch.Generator().manual_seed(0))
    net.scale = net.table[1]


def change_the_table(net: nn.Module, _: object) -> None:
    net.table.mul_(2)


def widen_scale(net: nn.Module, _: object) -> None:
    net.scale = torch.linspace(0, 1, WIDTH)[None]


def no_statistics(net: nn.Module, _: object) -> None:
    net.norm.running_mean = net.norm.running_var = None
    net.norm.track_running_stats = False


def load_assigned(net: nn.Module, _: object) -> None:
    net.load_state_dict({"scale": net.scale + 1}, strict=False, assign=True)


def add_buffer(net: nn.Module, _: object) -> None:
    net.last.register_buffer("unused", torch.ones(3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        {2: assign_statistics, 4: reset_statistics},
        {2: assign_scale, 3: assign_part_of_a_table, 4: change_the_table},
        {1: widen_scale, 3: no_statistics},
        {1: load_assigned, 3: add_buffer},
    ],
    ids=lambda changes: "-".join(change.__name__ for change in changes.values()),
)
def test_buffers_that_are_assigned_between_steps_are_seen(
    vgpus: VirtualGPUs, form: str, changes: dict[int, Change]
) -> None:
    torch.manual_seed(0)
    same_with_changes(Net(), changes, form)


def new_last(seed: int = 1) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(WIDTH, WIDTH)


def replace_last(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.last = new_last()
    optimizer.add_param_group({"params": list(net.last.parameters())})


def replace_bias(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.last.bias = nn.Parameter(torch.ones(WIDTH))
    optimizer.add_param_group({"params": [net.last.bias]})


def deepen(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.last = nn.Sequential(net.last, nn.Tanh(), new_last(2))
    optimizer.add_param_group({"params": list(net.last[2].parameters())})


def narrow(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A layer of another shape under the same name, and the one before it."""
    net.first = nn.Sequential(net.first, new_last(3), nn.Identity())
    net.last = nn.Sequential(nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH))
    for i, param in enumerate(net.last.parameters()):
        nn.init.constant_(param, 0.01 * i)
    added = [*net.first[1].parameters(), *net.last.parameters()]
    optimizer.add_param_group({"params": added})


def tie(net: nn.Module, _: object) -> None:
    net.last.weight = net.first.weight


def drop_norm(net: nn.Module, _: object) -> None:
    net.norm = nn.Identity()


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def other_kind(net: nn.Module, _: object) -> None:
    """Another module with the very parameters of the one before it."""
    first = Doubled(WIDTH, WIDTH)
    first.weight, first.bias = net.first.weight, net.first.bias
    net.first = first


def other_activation(net: nn.Module, _: object) -> None:
    net.glue[0] = nn.GELU()


def other_order(net: nn.Module, _: object) -> None:
    net.glue[0], net.glue[1] = net.glue[1], net.glue[0]


def other_class(net: nn.Module, _: object) -> None:
    net.last.__class__ = Doubled


def parametrized(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.parametrizations.weight_norm(net.last)
    added = [p for n, p in net.last.named_parameters() if "weight" in n]
    optimizer.add_param_group({"params": added})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [{2: replace_last, 3: replace_bias}, {2: deepen, 4: narrow}, {1: tie, 3: drop_norm}],
    ids=lambda changes: "-".join(change.__name__ for change in changes.values()),
)
def test_layers_may_be_replaced_between_steps(
    vgpus: VirtualGPUs, form: str, changes: dict[int, Change]
) -> None:
    torch.manual_seed(0)
    same_with_changes(Net(), changes, form)


@pytest.mark.parametrize("form", FORMS)
def test_parts_may_be_replaced_that_bring_no_parameters(vgpus: VirtualGPUs, form: str) -> None:
    torch.manual_seed(0)
    changes: dict[int, Change] = {1: other_kind, 2: other_activation, 3: other_order}
    same_with_changes(Glued(), {**changes, 4: other_class}, form)


def test_an_optimizer_with_state_sees_replaced_layers(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    for form in FORMS:
        same_with_changes(
            Net(),
            {2: replace_last, 3: assign_statistics, 4: parametrized},
            form,
            optimizer=torch.optim.AdamW,
            options=options,
        )


def test_what_is_replaced_before_the_first_batch_is_trained(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net)
    options = {"lr": 0.05, "foreach": False}
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=options,
        loss_fn=square_loss,
        param_groups=lambda module: [
            {"params": [p for n, p in module.named_parameters() if "last" not in n]},
            {"params": module.last.parameters(), "weight_decay": 0.5},
        ],
        microbatch_size=8,
        devices=1,
    )
    for module in (net, plain):
        module.last = new_last()
    theirs = torch.optim.AdamW(
        [
            {"params": [p for n, p in plain.named_parameters() if "last" not in n]},
            {"params": plain.last.parameters(), "weight_decay": 0.5},
        ],
        **options,
    )
    for step in range(3):
        x, y = vector_batch(step)
        theirs.zero_grad()
        square_loss(plain(x), y).backward()
        theirs.step()
        model.train_step(x, y)
        assert_same(net, plain, f"after step {step}")


def test_a_new_layer_that_the_optimizer_does_not_have_is_refused_by_name(
    vgpus: VirtualGPUs,
) -> None:
    net = Net()
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=square_loss,
        microbatch_size=8,
        devices=1,
    )
    model.train_step(*vector_batch(0))
    net.last = new_last()
    with pytest.raises(harmony.ConfigError, match=r"does not have last\.weight, last\.bias"):
        model.train_step(*vector_batch(1))
    model.optimizer.add_param_group({"params": list(net.last.parameters())})
    model.train_step(*vector_batch(1))
    seen = Net()
    model = harmony.Harmony(seen, optimizer=torch.optim.SGD, loss_fn=square_loss, devices=1)
    torch.optim.lr_scheduler.ExponentialLR(model.optimizer, 0.5)
    seen.last = new_last()
    with pytest.raises(harmony.ConfigError, match=r"does not have last\.weight, last\.bias"):
        model.train_step(*vector_batch(1))


def test_a_backward_of_the_model_as_it_was_is_refused(vgpus: VirtualGPUs) -> None:
    net = Net()
    model = harmony.Harmony(net, devices=1, microbatch_size=8)
    x, y = vector_batch(0)
    before = square_loss(model(x), y)
    net.last = new_last()
    square_loss(model(x), y).backward()
    with pytest.raises(harmony.HarmonyError, match="its forward belongs to another model"):
        before.backward()
    before = square_loss(model(x), y)
    net.scale.mul_(2)
    with pytest.raises(harmony.HarmonyError, match="after buffer scale had been changed"):
        before.backward()
    for change in (assign_scale, assign_part_of_a_table):
        before = square_loss(model(x), y)
        change(net, None)
        model(x)
        with pytest.raises(harmony.HarmonyError, match="after buffer scale had been changed"):
            before.backward()


def halve(net: nn.Module, _: object) -> None:
    net.half().float()


def to_bfloat16(net: nn.Module, _: object) -> None:
    net.to(torch.bfloat16)


def to_double(net: nn.Module, _: object) -> None:
    net.double()


def to_float(net: nn.Module, _: object) -> None:
    net.float()


class Casting(Net):
    """Takes batches of single precision whatever its own precision is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.first.weight.dtype)).float()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [{2: halve}, {1: to_double, 3: to_float}, {2: to_bfloat16}],
    ids=lambda changes: "-".join(change.__name__ for change in changes.values()),
)
def test_the_dtype_may_change_between_steps(
    vgpus: VirtualGPUs, form: str, changes: dict[int, Change]
) -> None:
    torch.manual_seed(0)
    same_with_changes(Casting(), changes, form, options={"lr": 0.05}, steps=4)


@pytest.mark.parametrize("inside", [False, True])
def test_conversions_that_change_nothing_do_nothing(vgpus: VirtualGPUs, inside: bool) -> None:
    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1, microbatch_size=8)
    owner = nn.Sequential(model) if inside else model
    theirs, own = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, owner))
    conversions = (
        lambda m: m.cpu(),
        lambda m: m.to("cpu"),
        lambda m: m.float(),
        lambda m: m.to(torch.float32),
        lambda m: m.to(torch.zeros(1)),
        lambda m: m.half().float(),
        lambda m: m.type(torch.float32),
    )
    for step, convert in enumerate(conversions):
        x, y = vector_batch(step)
        for module, optimizer in ((plain, theirs), (owner, own)):
            optimizer.zero_grad()
            square_loss(module(x), y).backward()
            optimizer.step()
            assert convert(module) is module
        assert_same(net, plain, f"after step {step}")
    assert model._engine.factory.generation == 0, "the model is the same"


def test_a_move_changes_the_dtype_and_nothing_else(vgpus: VirtualGPUs) -> None:
    net = Net()
    model = harmony.Harmony(net, devices=1, microbatch_size=8)
    model(vector_batch(0)[0])
    for _ in range(2):
        with pytest.warns(UserWarning, match="stay on the host"):
            model.to(devices.device(), torch.float64)
        assert {p.dtype for p in net.parameters()} == {torch.float64}
        assert {p.device.type for p in net.parameters()} == {"cpu"}
        assert net.norm.num_batches_tracked.dtype == torch.int64
        model(vector_batch(0)[0].double())


def test_a_tensor_on_a_device_is_refused_by_name(vgpus: VirtualGPUs) -> None:
    net = Net()
    model = harmony.Harmony(net, devices=1, microbatch_size=8)
    model(vector_batch(0)[0])
    net.scale = torch.ones(WIDTH, device=devices.device())
    with pytest.raises(harmony.HarmonyError, match=f"scale is on {devices.device()}"):
        model(vector_batch(0)[0])
    net.scale = torch.ones(WIDTH)
    model(vector_batch(0)[0])
