"""Every model, cut in every way and run pack by pack, gives what plain PyTorch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .models import CASES
from .packs import captured_case, every_cut, largest_difference, packed_step, plain_step

SAMPLES, SIZE = 6, 2


def cut_batch(call: Any, low: int, high: int) -> Any:
    def part(leaf: Any) -> Any:
        return leaf[low:high].clone() if isinstance(leaf, torch.Tensor) else leaf

    return torch.utils._pytree.tree_map(part, call)


@pytest.mark.parametrize("name", CASES)
def test_packs_give_what_plain_pytorch_gives(name: str) -> None:
    net, captured, call = captured_case(name)
    ranges = [(low, min(low + SIZE, SAMPLES)) for low in range(0, SAMPLES, SIZE)]
    parts = [cut_batch(call, low, high) for low, high in ranges]
    losses, gradients = plain_step(net, parts, CASES[name].loss)
    for cuts in every_cut(captured.graph.num_layers):
        found, found_gradients = packed_step(net, captured, call, SIZE, cuts)
        assert all(map(torch.equal, losses, found)), cuts
        difference = largest_difference(gradients, found_gradients)
        assert difference <= (5e-7 if CASES[name].tied and cuts else 0.0), cuts


@pytest.mark.parametrize("name", ["gpt", "glue_head", "llama_labels", "in_place"])
def test_an_uneven_last_microbatch(name: str) -> None:
    net, captured, call = captured_case(name)
    parts = [cut_batch(call, 0, 4), cut_batch(call, 4, 6)]
    losses, gradients = plain_step(net, parts, CASES[name].loss)
    found, found_gradients = packed_step(net, captured, call, 4, [1])
    assert all(map(torch.equal, losses, found))
    assert largest_difference(gradients, found_gradients) <= 5e-7
