"""What has to be the same in all processes that train one model, as numbers to compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harmony.capture.graph.params import dense_stride
from harmony.errors import ConfigError
from harmony.runtime.peers.owners import Owners
from harmony.runtime.peers.same_values import digests_of
from harmony.runtime.update.optimizer import PackOptimizer


def hash_of(values: Iterable[object]) -> str:
    """A text that is equal where these values are."""
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        digest.update(repr(value).encode())
    return digest.hexdigest()


def form_of(net: nn.Module) -> Iterator[object]:
    """Names, forms and types of parameters and buffers, and which are trained."""
    for name, param in net.named_parameters():
        stride = dense_stride(param.shape, param.stride())
        yield name, tuple(param.shape), stride, str(param.dtype), param.requires_grad
    for name, buffer in net.named_buffers():
        yield name, tuple(buffer.shape), str(buffer.dtype)


def options_of(optimizer: PackOptimizer | None) -> Iterator[object]:
    """What decides an update, as far as it is made of numbers."""
    if optimizer is None:
        return
    yield type(optimizer.full).__qualname__, optimizer.max_norm
    for group, options in zip(optimizer.full.param_groups, optimizer.options(), strict=True):
        yield len(group["params"])
        for key, value in sorted(options.items()):
            if isinstance(value, (bool, int, float, str, tuple, torch.Tensor, type(None))):
                yield key, value.tolist() if isinstance(value, torch.Tensor) else value


def state_of(optimizer: PackOptimizer, net: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of the optimizer's state, by the parameter's name and theirs."""
    found = {}
    for name, param in net.named_parameters():
        state = optimizer.full.state.get(param) or {}
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        if tensors:
            found[name] = tensors
    return found


def _digest_of(states: Mapping[str, Mapping[str, torch.Tensor]]) -> int:
    """A number of 64 bits for the values of states, and their names."""
    named = {f"{n}.{k}": v for n, held in states.items() for k, v in held.items()}
    values = digests_of(list(named.values())).view(torch.uint8)
    digest = hashlib.blake2b(bytes(values.tolist()), digest_size=8)
    digest.update("\n".join(named).encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


def refuse_own_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Refuse a step of all parameters, the state of some of which is elsewhere.

    Raises:
        ConfigError: with the remedy.
    """
    raise ConfigError(
        f"{type(optimizer).__name__}.step() with shard_optimizer_state=True: this process has the "
        "state of its own parameters only. train_step updates all of them; in a loop of your own "
        "use torch.distributed.optim.ZeroRedundancyOptimizer. Nothing was changed"
    )


def state_digests(
    states: Mapping[str, Mapping[str, torch.Tensor]], net: nn.Module, owners: Owners | None
) -> list[int]:
    """Numbers that are equal where the optimizer's state is: one, or one a parameter.

    Where each process keeps the state of some parameters it is 0 for those without.
    """
    if owners is None:
        return [_digest_of(states)]
    names = (name for name, _ in net.named_parameters())
    return [_digest_of({n: states[n]}) | 1 if n in states else 0 for n in names]


def compare_states(found: torch.Tensor, net: nn.Module, owners: Owners | None) -> None:
    """Refuse states of the optimizer that differ, or that are not where they are wanted.

    Args:
        found: what `state_digests` has returned, a row for each process.

    Raises:
        ConfigError: naming two processes.
    """
    expected = found[:1]
    if owners is not None:  # each is compared with the process that keeps the state
        keepers = [owners.of[name] for name, _ in net.named_parameters()]
        expected = found.gather(0, torch.tensor([keepers]))
        expected = torch.where(found == 0, found, expected.expand_as(found))
    bad = (found != expected).any(1).nonzero().flatten().tolist()
    if bad:
        raise ConfigError(
            f"processes 0 and {bad[0]} of {len(found)} have another state of the optimizer: load "
            "the same checkpoint in all of them. Nothing was changed"
        )
