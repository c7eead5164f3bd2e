"""Others take device memory while a model trains: a smaller plan repeats the step, exactly."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.runtime import native
from harmony.runtime.exec.stage import Stage
from harmony.runtime.host.host_state import HostState
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, square_loss, token_batch, token_loss

LIMIT = 1 << 20

by_the_byte = devices.virtual_only(
    "of a segment of 2 MiB that has a tensor in it PyTorch's allocator gives nothing back"
)
"""What these models need lies in such segments, whoever takes the rest."""


def trained(net: nn.Module, **options: Any) -> harmony.Harmony:
    settings: dict[str, Any] = {
        "optimizer": torch.optim.AdamW,
        "optimizer_kwargs": {"lr": 1e-2},
        "loss_fn": token_loss,
        "microbatch_size": 2,
        "devices": 1,
        "seed": 5,
    }
    return harmony.Harmony(net, **{**settings, **options})


def state(model: harmony.Harmony) -> list[torch.Tensor]:
    params = (
        model.parameters() if model.optimizer is not None else ()
    )  # the order in it is a plan's
    values = [v.cpu() for param in params for v in model.optimizer.state[param].values()]
    return [t.clone() for t in (*model.state_dict().values(), *values, torch.get_rng_state())]


def device_of(model: harmony.Harmony) -> torch.device:
    return model._engine.devices[0]


def taken(model: harmony.Harmony, left: float) -> torch.Tensor:
    """Take memory of the device, but for a part of what is free."""
    free, _ = torch.accelerator.get_memory_info(device_of(model))
    return torch.empty(int(free * (1 - left)), dtype=torch.uint8, device=device_of(model))


@by_the_byte
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
def test_a_step_for_which_memory_was_taken_is_planned_again_and_repeated(
    options: dict[str, Any], vgpus: VirtualGPUs
) -> None:
    vgpus(count=1, memory=LIMIT)
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    results = []
    for disturbed in (False, True):
        torch.manual_seed(1)
        model = trained(copy.deepcopy(net), **options)
        losses = [model.train_step(*token_batch(step)) for step in range(2)]
        before = model.plan
        if disturbed:
            held = taken(model, 0.1)
            with pytest.warns(harmony.HarmonyWarning, match=r"step 2 ran out of device memory .*"):
                losses.append(model.train_step(*token_batch(2)))
            assert model.plan is not before
            losses.append(model.train_step(*token_batch(3)))
            del held
        else:
            losses += [model.train_step(*token_batch(step)) for step in (2, 3)]
        results.append([*losses, *state(model)])
        model.close()
        gc.collect()
    assert all(map(torch.equal, *results))


def test_what_runs_out_late_is_undone_and_too_often_is_an_error(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers, random states and parameters are those before the step."""
    left, backward = [0], Stage.backward

    def called(*args: Any, **kwargs: Any) -> Any:
        found = backward(*args, **kwargs)
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("others have taken it")
        return found

    monkeypatch.setattr(Stage, "backward", called)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8))
    x, results = torch.randn(4, 8), []
    for times in (0, 2):
        torch.manual_seed(1)
        model = trained(
            copy.deepcopy(net),
            loss_fn=square_loss,
            microbatch_size="auto",
            activations="recompute",
        )
        losses = [model.train_step(x, x)]
        if times:
            before = state(model)
            left[0] = 4
            with (
                pytest.warns(harmony.HarmonyWarning, match="others have taken it"),
                pytest.raises(harmony.ExecutionError, match="No parameter was changed"),
            ):
                model.train_step(x, x)
            assert all(map(torch.equal, before, state(model)))
            assert (model.num_steps, left) == (1, [0])
            left[0] = times
            with pytest.warns(harmony.HarmonyWarning, match="others have taken it"):
                losses.append(model.train_step(x, x))
        else:
            losses.append(model.train_step(x, x))
        results.append([*losses, model.train_step(x, x), *state(model)])
    assert all(map(torch.equal, *results))


def test_updates_wait_while_others_may_take_what_a_step_needs(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a step that runs out of memory in its last backward is undone, too."""
    order: list[str] = []
    last, backward, update = [0], Stage.backward, HostState.update

    def called(*args: Any, **kwargs: Any) -> Any:
        order.append("backward")
        found = backward(*args, **kwargs)
        if order.count("backward") == last[0]:
            last[0] = 0
            raise torch.OutOfMemoryError("others have taken it")
        return found

    def updated(*args: Any) -> None:
        order.append("update")
        update(*args)

    monkeypatch.setattr(Stage, "backward", called)
    monkeypatch.setattr(HostState, "update", updated)
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    results, num_backwards = [], 0
    for disturbed in (False, True):
        torch.manual_seed(1)
        options = {"device_memory": "500KiB", "updates": "host", "activations": "recompute"}
        model = trained(copy.deepcopy(net), **options)
        losses = []
        for step in range(4):
            order.clear()
            if step == 2 and disturbed:
                # As after `torch.cuda.empty_cache()`, where a step takes more than a few MiB.
                monkeypatch.setattr(native, "owned_nbytes", lambda _: 0)
                last[0] = num_backwards
                with pytest.warns(harmony.HarmonyWarning, match="others have taken it"):
                    losses.append(model.train_step(*token_batch(step)))
                assert order.count("backward") == 2 * num_backwards
                assert "update" not in order[: 2 * num_backwards]
            else:
                losses.append(model.train_step(*token_batch(step)))
                num_backwards = order.count("backward")
        results.append([*losses, *state(model)])
        model.close()
    assert all(map(torch.equal, *results))


@by_the_byte
def test_a_forward_of_a_loop_of_ones_own_is_repeated(vgpus: VirtualGPUs) -> None:
    vgpus(count=1, memory=LIMIT)
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    results = []
    for disturbed in (False, True):
        model = harmony.Harmony(copy.deepcopy(net), devices=1, microbatch_size=2, seed=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(3):
            x, y = token_batch(step)
            if step == 1 and disturbed:
                held = taken(model, 0.1)
                with pytest.warns(harmony.HarmonyWarning, match="ran out of device memory"):
                    loss = token_loss(model(x), y)
            else:
                loss = token_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append([*losses, *state(model)])
        model.close()
        gc.collect()
    del held
    assert all(map(torch.equal, *results))
