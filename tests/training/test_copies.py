"""Deep copies of a Harmony model: models of their own, as an average of weights wants them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import harmony

from .conftest import VirtualGPUs
from .models import SkipMLP, square_loss, vector_batch

ADAM = {"lr": 1e-2, "fused": False}


def _trained(net: nn.Module, groups: bool = False) -> harmony.Harmony:
    params = list(net.parameters())
    parted = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:]}]
    return harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=ADAM,
        param_groups=parted if groups else None,
        loss_fn=square_loss,
        devices=2,
        mode="pp",
    )


@pytest.mark.parametrize("groups", [False, True], ids=["one group", "groups"])
def test_a_copy_trains_on_as_the_original_does_and_apart_from_it(
    vgpus: VirtualGPUs, groups: bool
) -> None:
    torch.manual_seed(0)
    model = _trained(SkipMLP(), groups)
    for step in range(2):
        model.train_step(*vector_batch(step))
    copied = copy.deepcopy(model)
    assert copied.num_steps == 2
    before = copy.deepcopy(copied.state_dict())
    losses = [model.train_step(*vector_batch(step)) for step in (2, 3)]
    assert all(map(torch.equal, before.values(), copied.state_dict().values()))
    assert [copied.train_step(*vector_batch(step)) for step in (2, 3)] == losses
    for one, two in zip(model.parameters(), copied.parameters(), strict=True):
        assert one is not two
        assert torch.equal(one, two)


def test_an_average_of_weights_is_plain_pytorchs(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    plain = SkipMLP()
    model = harmony.Harmony(copy.deepcopy(plain), devices=2, mode="pp")
    found = []
    for trained in (plain, model):
        average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for step in range(3):
            inputs, targets = vector_batch(step)
            optimizer.zero_grad()
            square_loss(trained(inputs), targets).backward()
            optimizer.step()
            average.update_parameters(trained)
        average.eval()
        with torch.no_grad():
            found.append(average(vector_batch(0)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=1e-6)


def test_a_model_inside_of_another_module_is_copied_with_it(vgpus: VirtualGPUs) -> None:
    outer = nn.Sequential(harmony.Harmony(SkipMLP(), devices=1)).eval()
    copied = copy.deepcopy(outer)
    inputs, _ = vector_batch(0)
    with torch.no_grad():
        assert torch.equal(outer(inputs), copied(inputs))
    assert not copied[0].training
