"""The generators of devices are the script's: a step leaves them as they were."""

from __future__ import annotations

import pytest
import torch

import harmony
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, token_batch, token_loss


@pytest.mark.parametrize("form", ["step", "loop"])
def test_a_step_leaves_the_generators_of_devices_as_they_were(
    form: str, vgpus: VirtualGPUs
) -> None:
    """They were left as the last layers that ran there had them: as the plan would have it.

    A script that draws on a GPU between steps got other numbers under another plan.
    """
    vgpus(count=2)
    torch.manual_seed(3)
    net = GPT(width=16, depth=2, dropout=0.1)
    trains = {"optimizer": torch.optim.SGD, "loss_fn": token_loss} if form == "step" else {}
    model = harmony.Harmony(net, microbatch_size=2, devices=2, mode="pp", **trains)
    module = torch.get_device_module(devices.TYPE)
    for index in range(2):
        before = module.get_rng_state_all()[:2]
        tokens, targets = token_batch(index)
        if form == "step":
            model.train_step(tokens, targets)
        else:
            token_loss(model(tokens), targets).backward()
        assert all(map(torch.equal, before, module.get_rng_state_all()[:2]))
