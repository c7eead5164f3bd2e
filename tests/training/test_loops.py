"""Loops with several models or several passes a step train as plain PyTorch does, bit for bit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs

Wrap = Callable[[nn.Module], Any]

SIZE, WIDTH, STEPS = 8, 16, 3


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(SIZE, *shape, generator=torch.Generator().manual_seed(seed))


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adversaries(wrap: Wrap) -> list[nn.Module]:
    """A GAN: the discriminator is frozen while the generator is trained through it."""
    nets = [mlp(4, 32, WIDTH), mlp(WIDTH, 32, 1)]
    generator, discriminator = (wrap(net) for net in nets)
    one, other = sgd(generator), sgd(discriminator)
    real_is, fake_is = torch.ones(SIZE, 1), torch.zeros(SIZE, 1)
    for step in range(STEPS):
        fake = generator(numbers(step, 4)).detach()
        other.zero_grad()
        real = discriminator(numbers(100 + step, WIDTH))
        loss = F.binary_cross_entropy_with_logits(real, real_is)
        loss = loss + F.binary_cross_entropy_with_logits(discriminator(fake), fake_is)
        loss.backward()
        other.step()
        for param in discriminator.parameters():
            param.requires_grad_(False)
        one.zero_grad()
        made = discriminator(generator(numbers(50 + step, 4)))
        F.binary_cross_entropy_with_logits(made, real_is).backward()
        one.step()
        for param in discriminator.parameters():
            param.requires_grad_(True)
    return nets


def proximal(wrap: Wrap) -> list[nn.Module]:
    """PPO: old probabilities without gradients, then several updates on the same samples."""
    net = mlp(WIDTH, 32, 6)
    actor = wrap(net)
    optimizer = sgd(actor)
    for step in range(STEPS):
        seen = numbers(step, WIDTH)
        with torch.no_grad():
            old = actor(seen)[:, :5].log_softmax(-1)
        actions = old.argmax(-1, keepdim=True)
        returns = numbers(10 + step, 1).squeeze(-1)
        for _ in range(2):
            out = actor(seen)
            chances, values = out[:, :5].log_softmax(-1), out[:, 5]
            gain = returns - values.detach()
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            ratio = (chances - old).gather(-1, actions).squeeze(-1).exp()
            clipped = torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            loss = F.mse_loss(values, returns) - clipped
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(actor.parameters(), 0.5)
            optimizer.step()
    return [net]


def preferences(wrap: Wrap) -> list[nn.Module]:
    """DPO with a second, frozen model that gives the reference."""
    nets = [mlp(WIDTH, 32, 5), mlp(WIDTH, 32, 5)]
    nets[1].requires_grad_(False)
    policy, reference = (wrap(net) for net in nets)
    optimizer = torch.optim.SGD(nets[0].parameters(), lr=0.05)
    for step in range(STEPS):
        better, worse = numbers(step, WIDTH), numbers(20 + step, WIDTH)
        with torch.no_grad():
            known = reference(better).logsumexp(-1) - reference(worse).logsumexp(-1)
        margin = policy(better).logsumexp(-1) - policy(worse).logsumexp(-1) - known
        optimizer.zero_grad()
        (-F.logsigmoid(0.1 * margin).mean()).backward()
        optimizer.step()
    return nets


def distilled(wrap: Wrap) -> list[nn.Module]:
    """A teacher that follows its student by a moving average."""
    nets = [mlp(WIDTH, 32, 5), mlp(WIDTH, 32, 5)]
    student, teacher = (wrap(net) for net in nets)
    optimizer = sgd(student)
    for step in range(STEPS):
        inputs = numbers(step, WIDTH)
        with torch.no_grad():
            target = teacher(inputs).softmax(-1)
        optimizer.zero_grad()
        F.cross_entropy(student(inputs), target).backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
    return nets


@pytest.mark.parametrize("loop", [adversaries, proximal, preferences, distilled])
def test_a_loop_leaves_the_parameters_that_plain_pytorch_leaves(
    vgpus: VirtualGPUs, loop: Callable[[Wrap], list[nn.Module]]
) -> None:
    def wrapped(net: nn.Module) -> harmony.Harmony:
        return harmony.Harmony(net, microbatch_size=SIZE, devices=1)

    torch.manual_seed(0)
    found = loop(wrapped)
    torch.manual_seed(0)
    expected = loop(lambda net: net)
    for ours, theirs in zip(found, expected, strict=True):
        for name, tensor in copy.deepcopy(ours.state_dict()).items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
