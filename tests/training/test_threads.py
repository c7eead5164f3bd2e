"""Several models of one process, each trained in a thread of its own."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import harmony

from .conftest import VirtualGPUs

SGD = {"lr": 0.1, "foreach": False}
STEPS = 6


def _net() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(16, 4))


def test_models_in_two_threads_draw_their_own_numbers(vgpus: VirtualGPUs) -> None:
    """Generators are the process's: what one seeds, the other must not draw from."""
    torch.manual_seed(0)
    nets = [_net(), _net()]
    plain = copy.deepcopy(nets)
    batches = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(STEPS)]
    common: dict[str, Any] = {"devices": 1, "microbatch_size": 8, "seed": 0}
    step_form = harmony.Harmony(
        nets[0], optimizer=torch.optim.SGD, optimizer_kwargs=SGD, loss_fn=F.cross_entropy, **common
    )
    own = harmony.Harmony(nets[1], **common)
    optimizer = torch.optim.SGD(own.parameters(), **SGD)

    def by_loop() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(own(x), y).backward()
            optimizer.step()

    def by_steps() -> None:
        for x, y in batches:
            step_form.train_step(x, y)

    before = torch.get_rng_state()
    threads = [threading.Thread(target=run) for run in (by_loop, by_steps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), before)
    step_form.close()  # in its turn: that other threads have ended is not in the trace of accesses
    own.close()
    for net, found in zip(plain, nets, strict=True):
        reference = torch.optim.SGD(net.parameters(), **SGD)
        for step, (x, y) in enumerate(batches):
            reference.zero_grad()
            harmony.seed_microbatch(step, 0)
            F.cross_entropy(net(x), y).backward()
            reference.step()
        assert all(map(torch.equal, net.parameters(), found.parameters()))


def test_a_loss_asks_a_model_of_its_own(vgpus: VirtualGPUs) -> None:
    """It runs on a thread of the step's, which is in its turn."""
    torch.manual_seed(0)
    nets = [_net().eval(), _net().eval()]
    teacher, net = copy.deepcopy(nets)
    batches = [(torch.randn(8, 16), torch.randn(8, 16)) for _ in range(2)]
    asked = harmony.Harmony(nets[0], devices=1)

    def loss_with(model: nn.Module) -> Any:
        def loss_fn(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                wanted = model(x.cpu()).to(out.device)
            return F.mse_loss(out, wanted)

        return loss_fn

    model = harmony.Harmony(
        nets[1],
        optimizer=torch.optim.SGD,
        optimizer_kwargs=SGD,
        loss_fn=loss_with(asked),
        devices=1,
        microbatch_size=8,
    )
    reference = torch.optim.SGD(net.parameters(), **SGD)
    for x, y in batches:
        reference.zero_grad()
        expected = loss_with(teacher)(net(x), y)
        expected.backward()
        reference.step()
        assert torch.equal(model.train_step(x, y), expected.detach())
    assert all(map(torch.equal, net.parameters(), nets[1].parameters()))
