"""Sizes of published language models by name, as their configurations give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192}
_QWEN = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768}


def _sizes(
    hidden: int, inner: int, layers: int, heads: int, key_value_heads: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "tie_word_embeddings": False,
    }


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "gpt2-xl": {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024,
        "n_embd": 1600, "n_layer": 48, "n_head": 25,
    },
    "llama-7b": {**_LLAMA2, **_sizes(4096, 11008, 32, 32, 32)},
    "llama-13b": {**_LLAMA2, **_sizes(5120, 13824, 40, 40, 40)},
    "llama-70b": {**_LLAMA2, **_sizes(8192, 28672, 80, 64, 8)},
    "llama3-8b": {**_LLAMA3, **_sizes(4096, 14336, 32, 32, 8)},
    "llama3-70b": {**_LLAMA3, **_sizes(8192, 28672, 80, 64, 8)},
    "mistral-7b": {
        "model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768,
        "sliding_window": None, **_sizes(4096, 14336, 32, 32, 8),
    },
    "qwen2.5-7b": {**_QWEN, **_sizes(3584, 18944, 28, 28, 4)},
    "qwen2.5-14b": {**_QWEN, **_sizes(5120, 13824, 48, 40, 8)},
    "qwen2.5-32b": {**_QWEN, **_sizes(5120, 27648, 64, 40, 8)},
    "qwen2.5-72b": {**_QWEN, **_sizes(8192, 29568, 80, 64, 8)},
}  # fmt: skip
"""What `transformers.AutoConfig.for_model` is told."""
