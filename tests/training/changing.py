"""The same training by Harmony and by plain PyTorch, with changes of the model between steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import harmony

from .models import square_loss, vector_batch

FORMS = ("step", "dropin")
Change = Callable[[nn.Module, torch.optim.Optimizer], object]
"""Changes a module, or its optimizer, between two steps."""


def same_with_changes(
    net: nn.Module,
    changes: Mapping[int, Change],
    form: str,
    *,
    optimizer: Any = torch.optim.SGD,
    options: Mapping[str, Any] | None = None,
    batch: Callable[[int], tuple[Any, Any]] = vector_batch,
    loss_fn: Callable[[Any, Any], torch.Tensor] = square_loss,
    steps: int = 5,
    **settings: Any,
) -> harmony.Harmony:
    """Train two copies, change both before the steps named, and compare all bits of all steps.

    The module of the Harmony model is changed as plain PyTorch's is, not by the wrapper.
    """
    options = {"lr": 0.05, "momentum": 0.9} if options is None else options
    options = {**options, "foreach": False}
    plain = copy.deepcopy(net)
    steps_itself = {"optimizer": optimizer, "optimizer_kwargs": options, "loss_fn": loss_fn}
    model = harmony.Harmony(
        net,
        devices=2,
        microbatch_size=len(batch(0)[0]),
        mode="pp",
        **(steps_itself if form == "step" else {}),
        **settings,
    )
    theirs = optimizer(plain.parameters(), **options)
    own = None if form == "step" else optimizer(model.parameters(), **options)
    for step in range(steps):
        if step in changes:
            changes[step](plain, theirs)
            changes[step](net, own or model.optimizer)
        x, y = batch(step)
        theirs.zero_grad()
        expected = loss_fn(plain(x), y)
        expected.backward()
        theirs.step()
        if own is None:
            found = model.train_step(x, y)
        else:
            own.zero_grad()
            found = loss_fn(model(x), y)
            found.backward()
            own.step()
        assert torch.equal(found, expected), f"loss of step {step}: {found} for {expected}"
        assert_same(net, plain, f"after step {step}")
    state, expected_state = (o.state_dict()["state"] for o in (own or model.optimizer, theirs))
    assert state.keys() == expected_state.keys()
    for key, held in expected_state.items():
        for name, value in held.items():
            assert same(state[key][name], value), f"{name} of parameter {key}"
    return model


def assert_same(net: nn.Module, plain: nn.Module, when: str) -> None:
    """Parameters and buffers are the same, bit for bit."""
    for of in (nn.Module.named_parameters, nn.Module.named_buffers):
        expected, found = dict(of(plain)), dict(of(net))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert same(found[name], tensor), f"{name} {when}"


def same(one: Any, two: Any) -> bool:
    """Whether two tensors or other values are equal, dtype included."""
    if isinstance(two, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one.cpu(), two)
    return bool(one == two)
