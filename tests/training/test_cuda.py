"""The same training on a real GPU; skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch

import harmony
from tests.training.models import GPT, token_batch, token_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a real GPU"),
]


def test_gpt_as_plain_pytorch_on_the_gpu() -> None:
    """Kernels of a real GPU may add in another order, so the last bits may differ."""
    torch.manual_seed(0)
    net = GPT(width=64, dropout=0.1)
    twin = copy.deepcopy(net).cuda()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1, "momentum": 0.9},
        loss_fn=token_loss,
        microbatch_size=2,
        devices=["cuda:0"],
        device_memory="2MiB",
    )
    for step in range(5):
        x, y = token_batch(step)
        optimizer.zero_grad()
        total = torch.zeros((), device="cuda")
        for index in range(4):
            rows = slice(2 * index, 2 * index + 2)
            torch.manual_seed(harmony.microbatch_seed(step, index))
            loss = token_loss(twin(x[rows].cuda()), y[rows].cuda())
            (loss * 0.25).backward()
            total += loss.detach() * 0.25
        optimizer.step()
        torch.testing.assert_close(model.train_step(x, y), total.cpu(), rtol=1e-4, atol=1e-5)
    assert model.plan is not None
    assert len(model.plan.spec.backward_packs) > 1
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected.cpu(), rtol=1e-3, atol=1e-5, msg=name)
