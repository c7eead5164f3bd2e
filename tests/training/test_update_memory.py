"""What an optimizer keeps, and takes while it updates: measured on copies, and planned."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.profiling.update_times import UpdateCost, kind_of, measure_update
from harmony.runtime.device import DeviceContext, available_devices
from harmony.runtime.update.optimizer import PackOptimizer
from tests import devices

from .conftest import VirtualGPUs
from .models import square_loss
from .optimizers import Lion, NormSGD

SHAPES = [(40, 30), (40,), (8, 3, 3, 3)]


def made(kind: Any, dtype: torch.dtype = torch.float32, **options: Any) -> PackOptimizer:
    params = {str(s): nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES}
    return PackOptimizer(params, kind, options)


@pytest.mark.parametrize(
    ("kind", "options", "tensors"),
    [
        ("AdamW", {}, 2),
        ("Adam", {"amsgrad": True}, 3),
        ("SGD", {"lr": 0.1}, 0),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, 1),
        ("RMSprop", {"centered": True}, 2),
        ("Adagrad", {}, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_counted_in_the_dtype_that_it_has(
    kind: str, options: dict[str, Any], tensors: int, dtype: torch.dtype
) -> None:
    found = measure_update(made(getattr(torch.optim, kind), dtype, **options))
    assert found.state_nbytes == {
        kind_of(dtype, len(shape)): float(tensors * dtype.itemsize) for shape in SHAPES
    }


def test_a_factored_state_is_counted_as_it_is() -> None:
    """Adafactor keeps a row and a column of a matrix."""
    params = {"w": nn.Parameter(torch.randn(400, 300)), "b": nn.Parameter(torch.randn(300))}
    found = measure_update(PackOptimizer(params, torch.optim.Adafactor, {})).state_nbytes
    assert found[kind_of(torch.float32, 1)] == 4.0
    assert 0.0 < found[kind_of(torch.float32, 2)] < 0.1


def test_models_of_two_dtypes_have_each_counted(vgpus: VirtualGPUs) -> None:
    params = {
        "w": nn.Parameter(torch.randn(40, 30).bfloat16()),
        "norm": nn.Parameter(torch.randn(40)),
    }
    found = measure_update(PackOptimizer(params, torch.optim.AdamW, {})).state_nbytes
    assert found == {kind_of(torch.bfloat16, 2): 4.0, kind_of(torch.float32, 1): 8.0}


def test_the_report_has_torchs_own_bytes(vgpus: VirtualGPUs) -> None:
    """The script bf16_state: the state of bf16 parameters was counted as fp32."""
    net = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(4)]).bfloat16()

    def loss_fn(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (out.float() - target).square().mean()

    model = harmony.Harmony(net, optimizer=torch.optim.AdamW, loss_fn=loss_fn, devices=1)
    model.train_step(torch.randn(8, 128).bfloat16(), torch.zeros(8, 128))
    assert model.optimizer is not None
    state = [v for held in model.optimizer.state.values() for v in held.values() if v.dim()]
    count = sum(p.numel() for p in net.parameters())
    assert sum(v.nbytes for v in state) == 4 * count
    assert model.record.facts["training state"].startswith("512 KiB")  # 8 bytes each
    variant = model._engine.variants.active
    assert variant is not None and variant.graph.state_nbytes() == 4 * count


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise NotImplementedError("not today")


def test_an_optimizer_that_fails_where_it_is_measured_is_not_measured() -> None:
    found = measure_update(made(Failing, lr=0.1))
    assert found.seconds > 0 and found.device_bytes_per_s == 0.0
    assert found.state_nbytes[kind_of(torch.float32, 2)] == 8.0


def test_an_optimizer_that_wants_matrices_gets_some(vgpus: VirtualGPUs) -> None:
    params = {"w": nn.Parameter(torch.randn(40, 30))}
    found = measure_update(PackOptimizer(params, torch.optim.Muon, {}))
    assert found.state_nbytes == {kind_of(torch.float32, 2): 4.0}


class Hungry(torch.optim.Optimizer):
    """Takes sixteen times the memory of a parameter while it updates it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    many = param.grad.repeat(16, *([1] * (param.dim() - 1)))
                    param.sub_(many[: len(param)], alpha=group["lr"])
                    del many


class AllAtOnce(Hungry):
    """Takes memory for all of its parameters together."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        pairs = [
            (p, g["lr"], p.grad * 1.0)
            for g in self.param_groups
            for p in g["params"]
            if p.grad is not None
        ]
        for param, rate, gradient in pairs:
            param.sub_(gradient, alpha=rate)


def test_temporaries_are_measured_and_those_that_grow_keep_updates_on_the_host(
    vgpus: VirtualGPUs,
) -> None:
    context = DeviceContext(available_devices()[0])
    params = {str(i): nn.Parameter(torch.randn(64, 64)) for i in range(6)}
    hungry = measure_update(PackOptimizer(params, Hungry, {}), context)
    assert hungry.device_bytes_per_s > 0 and 64 <= hungry.temporary_nbytes < 72
    frugal = measure_update(PackOptimizer(params, torch.optim.SGD, {"lr": 0.1}), context)
    assert frugal.device_bytes_per_s > 0 and frugal.temporary_nbytes < 1
    assert measure_update(PackOptimizer(params, AllAtOnce, {}), context).device_bytes_per_s == 0
    assert measure_update(PackOptimizer(params, NormSGD, {}), context).device_bytes_per_s == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("RAdam", {}),
        ("Adafactor", {}),
        ("Adagrad", {}),
        ("AdamW", {"amsgrad": True}),
        ("ASGD", {}),
        ("Muon", {}),
        ("NAdam", {}),
        ("SGD", {"momentum": 0.9}),
    ],
)
@devices.virtual_only("blocks of CUDA's allocator add some bytes, now more, now fewer")
def test_an_optimizer_costs_the_same_before_its_first_step_and_after_many(
    vgpus: VirtualGPUs, kind: str, options: dict[str, Any]
) -> None:
    """It decides plans: RAdam takes 20 bytes an element from its sixth step on, 8 before."""
    context = DeviceContext(available_devices()[0])
    params = {"w": nn.Parameter(torch.randn(40, 30)), "v": nn.Parameter(torch.randn(30, 30))}
    optimizer = PackOptimizer(params, getattr(torch.optim, kind), {"lr": 0.1, **options})
    before = measure_update(optimizer, context)
    for _ in range(10):
        for param in params.values():
            param.grad = torch.randn_like(param)
        optimizer.full.step()
    after = measure_update(optimizer, context)
    assert _what_plans_see(before) == _what_plans_see(after)
    assert before.device_bytes_per_s > 0
    if kind == "RAdam":
        assert 16 <= before.temporary_nbytes < 24


def _what_plans_see(cost: UpdateCost) -> tuple[Any, ...]:
    on_device = cost.device_bytes_per_s > 0
    return cost.state_nbytes, on_device, cost.temporary_nbytes, cost.alike


@pytest.mark.parametrize("kind", [Hungry, AllAtOnce, Lion, NormSGD, torch.optim.NAdam])
@pytest.mark.parametrize("memory", ["384KiB", "640KiB", "2MiB"])
def test_no_update_runs_out_of_memory(vgpus: VirtualGPUs, kind: Any, memory: str) -> None:
    """The script update_out_of_memory: it did in mid-step, though the plan expected to fit."""
    vgpus(count=1, memory=memory)
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(96, 96) for _ in range(5)])
    plain = copy.deepcopy(net)
    options = {"lr": 0.01}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = harmony.Harmony(
            net, optimizer=kind, optimizer_kwargs=options, loss_fn=square_loss, microbatch_size=8
        )
        optimizer = kind(plain.parameters(), **options)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            inputs, targets = torch.randn(2, 8, 96, generator=generator)
            model.train_step(inputs, targets)
            optimizer.zero_grad()
            square_loss(plain(inputs), targets).backward()
            optimizer.step()
    assert all(map(torch.equal, net.parameters(), plain.parameters()))
