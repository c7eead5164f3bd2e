"""Forwards that look at values: what one trace found is not used for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import harmony

from .conftest import VirtualGPUs
from .side_by_side import assert_same_training

Forward = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


class Masked(nn.Module):
    """Two layers; what happens between them depends on an input that no layer reads."""

    def __init__(self, between: Forward) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.table = nn.Embedding(9, 8)
        self.between = between

    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x) + self.table.weight[0]
        return self.b(self.between(self, mask, h))


def halved_by_padding(net: nn.Module, mask: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return h if mask.all() else h * 0.5


def dropped_when_it_masks_nothing(
    net: nn.Module, mask: torch.Tensor, h: torch.Tensor
) -> torch.Tensor:
    added = (1.0 - mask) * -1e4
    return h if torch.all(added == 0) else h + added[:, :1]


def scaled_by_the_longest(net: nn.Module, mask: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return h * int(mask.sum(-1).max())


def checked_only(net: nn.Module, mask: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(mask).all() or mask.sum().item() < 0:
        raise ValueError("a mask that is none")
    return h


def listed(net: nn.Module, mask: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    lengths = mask.sum(-1).tolist()
    return h * (2.0 if lengths[0] == lengths[-1] else 1.0)


def changed_first(net: nn.Module, mask: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    mask.clamp_(max=0.5)
    return h if mask.max() <= 0.5 else -h


LOOKS = [
    halved_by_padding,
    dropped_when_it_masks_nothing,
    scaled_by_the_longest,
    checked_only,
    listed,
    changed_first,
]


@pytest.mark.parametrize("between", LOOKS)
def test_an_input_that_the_forward_only_looks_at_trains(
    between: Forward, vgpus: VirtualGPUs
) -> None:
    """The script ``input_only_looked_at``: an attention mask without padding, and its like."""
    torch.manual_seed(0)
    targets = torch.randint(0, 4, (4,))
    padded = torch.ones(4, 8)
    padded[:, 6:] = 0
    batches = [
        ((mask.clone(), torch.randn(4, 8)), targets) for mask in (torch.ones(4, 8), padded) * 2
    ]
    model = assert_same_training(Masked(between), batches)
    assert model.capture_mode == ("eager" if between is changed_first else "trace")


def test_an_input_that_is_only_looked_at_is_cut_into_microbatches(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Masked(dropped_when_it_masks_nothing)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=F.cross_entropy,
        microbatch_size=2,
        devices=2,
        updates="host",
    )
    plain = Masked(dropped_when_it_masks_nothing)
    plain.load_state_dict(net.state_dict())
    x, y = torch.randn(4, 8), torch.randint(0, 4, (4,))
    loss = model.train_step((torch.ones(4, 8), x), y)
    wanted = F.cross_entropy(plain(torch.ones(4, 8), x), y)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())  # the mean of two means rounds otherwise
    for name, param in plain.named_parameters():
        torch.testing.assert_close(net.get_parameter(name).grad, param.grad)


def test_a_mask_without_padding_trains_in_the_drop_in_form(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net, plain = (Masked(dropped_when_it_masks_nothing) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    model = harmony.Harmony(net, devices=2)
    mask, x = torch.ones(4, 8), torch.randn(4, 8)
    for one in (model, plain):
        one(mask, x).square().sum().backward()
    for name, param in plain.named_parameters():
        torch.testing.assert_close(net.get_parameter(name).grad, param.grad)


class Experts(nn.Module):
    """A loop over experts, written in one of the ways that people write it in."""

    def __init__(self, way: str, width: int = 16, count: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(count)
        )
        self.way = way

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.gate(h).softmax(-1).topk(2, -1)
        out = torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            getattr(self, self.way)(h, weight, chosen, k, expert, out)
        return h + out

    def in_place(self, h: Any, weight: Any, chosen: Any, k: int, expert: Any, out: Any) -> None:
        mine = (chosen == k).any(-1)
        if mine.any():
            scale = (weight * (chosen == k)).sum(-1)[mine][:, None]
            out[mine] += expert(h[mine]) * scale

    def index_add(self, h: Any, weight: Any, chosen: Any, k: int, expert: Any, out: Any) -> None:
        token, place = torch.where(chosen == k)
        if token.numel() == 0:
            return
        out.index_add_(0, token, expert(h[token]) * weight[token, place, None])

    def counted(self, h: Any, weight: Any, chosen: Any, k: int, expert: Any, out: Any) -> None:
        count = int((chosen == k).sum())
        if count:
            token, place = (chosen == k).nonzero(as_tuple=True)
            made = expert(h.index_select(0, token)) * weight[token, place].unsqueeze(-1)
            out.scatter_add_(0, token[:, None].expand(count, h.shape[-1]), made)

    def hit_only(self, h: Any, weight: Any, chosen: Any, k: int, expert: Any, out: Any) -> None:
        if k not in chosen.unique().tolist():
            return
        out += expert(h) * (weight * (chosen == k)).sum(-1, keepdim=True)


@pytest.mark.parametrize("mode", ["pp", "auto"])
@pytest.mark.parametrize("way", ["in_place", "index_add", "counted", "hit_only"])
def test_a_plain_loop_over_experts_trains(way: str, mode: str, vgpus: VirtualGPUs) -> None:
    """The script ``experts_in_place``: an expert without a token in another size crashed."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), Experts(way), Experts(way), nn.Linear(16, 4))
    batches = [((torch.randn(8, 8),), torch.randint(0, 4, (8,))) for _ in range(3)]
    assert_same_training(net, batches, mode=mode)


def test_experts_learn_in_the_drop_in_form(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net, plain = (nn.Sequential(nn.Linear(8, 16), Experts("in_place")) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    model = harmony.Harmony(net, devices=2)
    x = torch.randn(8, 8)
    for one in (model, plain):
        one(x).square().sum().backward()
    for name, param in plain.named_parameters():
        gradient = net.get_parameter(name).grad
        assert (gradient is None) == (param.grad is None), name
        assert gradient is None or torch.equal(gradient, param.grad), name
