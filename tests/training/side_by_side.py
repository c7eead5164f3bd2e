"""The same steps by Harmony and by plain PyTorch, compared bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import harmony
from tests.training.plain import computing, moved

Batch = tuple[tuple[Any, ...], Any]
"""Positional arguments of the model, and targets."""


def assert_same_training(
    net: nn.Module,
    batches: Sequence[Batch],
    *,
    loss_fn: Callable[[Any, Any], torch.Tensor] = F.cross_entropy,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    options: Mapping[str, Any] | None = None,
    plain: nn.Module | None = None,
    **settings: Any,
) -> harmony.Harmony:
    """Train with whole batches; losses, gradients, parameters and buffers must be the same.

    Args:
        plain: the same model, where a copy is none.

    Returns:
        The trained model.
    """
    plain = copy.deepcopy(net) if plain is None else plain
    given = dict(options or {"lr": 0.01, "foreach": False})
    reference = optimizer([p for p in plain.parameters() if p.requires_grad], **given)
    size = len(next(x for x in batches[0][0] if isinstance(x, torch.Tensor) and x.dim()))
    settings = {"devices": 2, "microbatch_size": size, "mode": "pp", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = harmony.Harmony(
            net,
            optimizer=optimizer,
            optimizer_kwargs=given,
            loss_fn=loss_fn,
            updates="host",
            **settings,
        )
        for step, (args, targets) in enumerate(batches):
            harmony.seed_microbatch(step, 0)
            reference.zero_grad()
            with computing(plain) as there:
                plain_args, plain_targets = moved((args, targets), there)
                wanted = loss_fn(plain(*plain_args), plain_targets)
                wanted.backward()
            found = model.train_step(args, targets)
            assert float(found) == float(wanted.detach()), f"loss of step {step}"
            own = dict(net.named_parameters())
            for name, param in plain.named_parameters():
                gradient = own[name].grad
                assert (gradient is None) == (param.grad is None), f"{name}, step {step}"
                same = param.grad is None or torch.equal(gradient, param.grad)
                assert same, f"gradient of {name}, step {step}"
            reference.step()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    return model
