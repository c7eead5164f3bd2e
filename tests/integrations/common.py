"""Models, data and comparisons that the tests of every library share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import harmony

VOCABULARY = 97

NUM_GPUS = (1, 2)


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def saved_language_model(folder: Path) -> LlamaForCausalLM:
    """A model as it comes from a folder, whose name it knows."""
    language_model().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def texts(count: int = 24, length: int = 12) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(2, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone(), "unused": n} for n, row in enumerate(rows)]


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 4))


def pictures(count: int = 32) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 16, generator=generator)
    return torch.utils.data.TensorDataset(
        inputs, torch.randint(0, 4, (count,), generator=generator)
    )


def wrapped(net: nn.Module, num_gpus: int, **options: Any) -> harmony.Harmony:
    """A model in front of ``net``, whose batches stay whole: the same operations run."""
    return harmony.Harmony(net, devices=num_gpus, microbatch_size=64, **options)


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """A hash of names and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode())
        found.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
