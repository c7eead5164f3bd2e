"""Parameters and buffers whose memory an array or another tensor has, which writes there.

No version counter tells of that.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import harmony
from tests.training.changing import FORMS, Change, same_with_changes
from tests.training.conftest import VirtualGPUs
from tests.training.models import square_loss, vector_batch

WIDTH = 24


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)) * self.scale))


def scale_of_array(net: nn.Module, _: object) -> None:
    net.__dict__["array"] = np.full(WIDTH, 0.5, dtype="float32")
    net.scale = torch.from_numpy(net.array)


def statistics_of_array(net: nn.Module, _: object) -> None:
    net.__dict__["array"] = np.zeros(WIDTH, dtype="float32")
    net.norm.running_mean = torch.from_numpy(net.array)


def write_array(net: nn.Module, _: object) -> None:
    net.array[:] += 0.25


def scale_of_table(net: nn.Module, _: object) -> None:
    net.__dict__["table"] = torch.linspace(0, 1, 3 * WIDTH).view(3, WIDTH)
    net.scale = net.table[0]


def next_row(net: nn.Module, _: object) -> None:
    net.scale.data = net.table[1]


def write_table_as_data(net: nn.Module, _: object) -> None:
    net.table.data.add_(1)


def write_table_as_array(net: nn.Module, _: object) -> None:
    net.table.numpy()[:] *= 0.5


def write_weight_as_array(net: nn.Module, _: object) -> None:
    net.last.weight.detach().numpy()[:] *= 0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        {1: scale_of_array, 2: write_array, 4: write_array},
        {1: statistics_of_array, 3: write_array},
        {1: scale_of_table, 2: next_row, 3: write_table_as_data, 4: write_table_as_array},
        {2: write_weight_as_array, 3: write_weight_as_array},
    ],
    ids=["array", "statistics", "table", "weight"],
)
def test_what_is_written_there_counts(
    vgpus: VirtualGPUs, form: str, changes: dict[int, Change]
) -> None:
    same_with_changes(Net(), changes, form)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_array_that_somebody_holds_writes_to_a_parameter(
    vgpus: VirtualGPUs, precision: str
) -> None:
    """Where weights stay on the GPU, and where a copy in bf16 is computed with."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.0},
        loss_fn=square_loss,
        precision=precision,
        devices=1,
    )
    x, y = vector_batch(0)
    first = model.train_step(x, y)
    held = net[1].weight.detach().numpy()
    for _ in range(2):
        held[:] *= 2
        second = model.train_step(x, y)
        assert second != first
        first = second
    held[:] /= 4
    net[1].weight.detach().numpy()[:] *= 0  # and one that is gone at once
    with torch.no_grad():
        expected = square_loss(net(x), y)
    assert model.train_step(x, y).item() == pytest.approx(expected.item(), rel=1e-2)


def test_an_array_of_a_frozen_weight_that_stays_on_a_gpu(vgpus: VirtualGPUs) -> None:
    """It needs no detach()."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    net[1].requires_grad_(False)
    plain = copy.deepcopy(net)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=square_loss,
        microbatch_size=len(vector_batch(0)[0]),
        devices=1,
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(4):
        x, y = vector_batch(step)
        if step >= 2:
            for module in (net, plain):
                module[1].weight.numpy()[:] *= 0.5
        optimizer.zero_grad()
        expected = square_loss(plain(x), y)
        expected.backward()
        optimizer.step()
        assert torch.equal(model.train_step(x, y), expected), step


def by_view(param: torch.Tensor) -> None:
    with torch.no_grad():
        param.view(-1).numpy()[:] *= 0.5


def by_rows(param: torch.Tensor) -> None:
    np.asarray(torch.flatten(param[1:]).detach())[:] *= 0.5
    with torch.no_grad():
        for row in param:
            row.numpy()[0] += 0.5


def by_transpose(param: torch.Tensor) -> None:
    param.T.detach().numpy()[3] *= 0.5


def by_storage(param: torch.Tensor) -> None:
    param.untyped_storage().fill_(0)


def by_typed_storage(param: torch.Tensor) -> None:
    param.storage()[3] = 0.5


def by_dlpack(param: torch.Tensor) -> None:
    np.from_dlpack(param.detach())[:] *= 0.5


def by_twin(param: torch.Tensor) -> None:
    torch.empty(0).set_(param.untyped_storage(), 0, param.shape).mul_(0.5)


def by_halves(param: torch.Tensor) -> None:
    with torch.no_grad():
        param.hsplit(2)[0].moveaxis(0, 1).numpy()[1] *= 0.5
    param.detach().adjoint().cpu().numpy()[2] *= 0.5


WRITES = [
    by_view,
    by_halves,
    by_rows,
    by_transpose,
    by_storage,
    by_typed_storage,
    by_dlpack,
    by_twin,
]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_and_gone_at_once_counts(
    vgpus: VirtualGPUs, write: Any, precision: str
) -> None:
    """To a weight that stays on the GPU, or of which a copy in bf16 is computed with."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))]
    nets.append(copy.deepcopy(nets[0]))
    models = [
        harmony.Harmony(
            net,
            optimizer=torch.optim.SGD,
            optimizer_kwargs={"lr": 0.1},
            loss_fn=square_loss,
            microbatch_size=len(vector_batch(0)[0]),
            precision=precision,
            updates=updates,
            devices=1,
        )
        for net, updates in zip(nets, ("auto", "host"), strict=True)
    ]
    for step in range(4):
        if step >= 2:
            write(nets[0][1].weight)
            with torch.no_grad():  # PyTorch counts this one
                nets[1][1].weight.copy_(nets[0][1].weight.detach().clone())
        first, second = (model.train_step(*vector_batch(step)) for model in models)
        assert torch.equal(first, second), step


def test_parameters_have_pytorchs_own_methods_when_nobody_watches(vgpus: VirtualGPUs) -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    options["updates"] = "auto"  # on the GPU, where weights then stay
    model = harmony.Harmony(net, loss_fn=square_loss, devices=1, **options)
    model.train_step(*vector_batch(0))
    assert "view" in vars(nn.Parameter)
    assert torch.equal(net[0].weight.T, torch.Tensor.transpose(net[0].weight, 0, 1))
    model.close()
    del model
    net[0].weight.data  # noqa: B018  whoever asks next leaves the class as it was
    assert not {"view", "data", "T", "__getitem__"} & vars(nn.Parameter).keys()
    assert nn.Parameter.view is torch.Tensor.view
