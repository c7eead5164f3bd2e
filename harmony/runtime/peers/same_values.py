"""Tensors that have to have the same values in all processes: compared, and made so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

from harmony.capture.graph.params import dense_stride
from harmony.errors import ConfigError
from harmony.runtime.peers.chunks import CHUNK_NBYTES
from harmony.runtime.peers.exchange import in_memory_order
from harmony.runtime.peers.group import PeerGroup


def digests_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a number of 64 bits for the values of each tensor: int64 of shape ``(n,)``.

    Raises:
        ConfigError: if one has no values.
    """
    found = [_digest_of(tensor) for tensor in tensors]
    return torch.tensor(found, dtype=torch.int64)


def take_from_first(group: PeerGroup, tensors: Iterable[torch.Tensor]) -> None:
    """Let these tensors have the values that they have in process 0; on the group's thread."""
    with torch.no_grad():
        for tensor in tensors:
            packed = tensor.detach().cpu().contiguous().clone()
            flat = in_memory_order(packed).view(torch.uint8)
            for start in range(0, flat.numel(), CHUNK_NBYTES):
                group.from_first(flat[start : start + CHUNK_NBYTES])
            if group.rank:
                tensor.copy_(packed)


def _digest_of(tensor: torch.Tensor) -> int:
    if tensor.is_meta:
        raise ConfigError(
            "a parameter is still on the meta device when processes are to compare its values: "
            "harmony.materialise(module) before the first step"
        )
    values = tensor.detach().cpu()
    if values.stride() != dense_stride(values.shape, values.stride()):
        values = values.contiguous()
    flat = in_memory_order(values).view(torch.uint8).numpy()
    digest = hashlib.blake2b(flat.data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
