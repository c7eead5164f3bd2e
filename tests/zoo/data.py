"""Random batches and losses for the models of the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

VOCAB, TIME, WIDTH = 67, 12, 32


def generator(seed: int) -> torch.Generator:
    """A generator that nothing else draws from."""
    return torch.Generator().manual_seed(seed)


def ids(num_samples: int, seed: int, time: int = TIME, vocab: int = VOCAB) -> torch.Tensor:
    """Token ids, int64 ``[num_samples, time]``."""
    return torch.randint(0, vocab, (num_samples, time), generator=generator(seed))


def classes(num_samples: int, seed: int, num_classes: int = 10) -> torch.Tensor:
    """Labels, int64 ``[num_samples]``."""
    return torch.randint(0, num_classes, (num_samples,), generator=generator(seed))


def normal(num_samples: int, seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers ``[num_samples, *shape]``."""
    return torch.randn(num_samples, *shape, generator=generator(seed))


def padding(num_samples: int, time: int = TIME) -> torch.Tensor:
    """An attention mask, int64: every second sample has three padded places at its end."""
    mask = torch.ones(num_samples, time, dtype=torch.long)
    mask[1::2, time - 3 :] = 0
    return mask


def causal_batch(num_samples: int, seed: int) -> Any:
    """Token ids that are their own labels, as causal language models of Hugging Face take."""
    tokens = ids(num_samples, seed)
    return {"input_ids": tokens, "labels": tokens.clone()}, None


def masked_causal_batch(num_samples: int, seed: int) -> Any:
    """The same, with an attention mask."""
    inputs, targets = causal_batch(num_samples, seed)
    return {**inputs, "attention_mask": padding(num_samples)}, targets


def ragged_batch(num_samples: int, seed: int) -> Any:
    """Labels of which the microbatches ignore unequal numbers."""
    inputs, targets = causal_batch(num_samples, seed)
    for row in range(num_samples):
        inputs["labels"][row, TIME - 2 * row - 1 :] = -100
    return inputs, targets


def masked_language_batch(num_samples: int, seed: int) -> Any:
    """Token ids, an attention mask, and labels at every place."""
    inputs = {"input_ids": ids(num_samples, seed), "attention_mask": padding(num_samples)}
    return {**inputs, "labels": ids(num_samples, seed + 1)}, None


def sequence_batch(num_samples: int, seed: int) -> Any:
    """Source tokens with a mask, and target tokens."""
    inputs = {"input_ids": ids(num_samples, seed), "attention_mask": padding(num_samples)}
    return {**inputs, "labels": ids(num_samples, seed + 1, time=8)}, None


def picture_batch(size: int, channels: int = 3) -> Any:
    """Make batches of pictures and classes, for models that take ``pixel_values``."""

    def batch(num_samples: int, seed: int) -> Any:
        pixels = normal(num_samples, seed, channels, size, size)
        return {"pixel_values": pixels, "labels": classes(num_samples, seed)}, None

    return batch


def image_batch(size: int, channels: int = 3) -> Any:
    """Make batches of pictures, and classes as targets."""

    def batch(num_samples: int, seed: int) -> Any:
        return normal(num_samples, seed, channels, size, size), classes(num_samples, seed)

    return batch


def token_batch(num_samples: int, seed: int) -> Any:
    """Token ids, and token ids as targets."""
    return ids(num_samples, seed), ids(num_samples, seed + 1)


def vector_batch(num_samples: int, seed: int) -> Any:
    """Sequences of vectors, and vectors as targets."""
    return normal(num_samples, seed, TIME, WIDTH), normal(num_samples, seed + 1, TIME, WIDTH)


def row_batch(num_samples: int, seed: int) -> Any:
    """Vectors, and classes as targets."""
    return normal(num_samples, seed, WIDTH), classes(num_samples, seed)


def class_loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of classes."""
    return F.cross_entropy(output, targets)


def token_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of tokens."""
    logits = output["logits"] if isinstance(output, Mapping) else output
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def square_loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean square error."""
    return ((output - targets) ** 2).mean()
