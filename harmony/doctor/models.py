"""What models of some usual sizes would take here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harmony.core.units import format_bytes
from harmony.doctor.findings import Finding, ok, warning
from harmony.runtime.host.limits import available_host_nbytes

HOST_NBYTES = 16
"""Per parameter in fp32 with Adam: weight, gradient and two states, 4 bytes each."""

DEVICE_NBYTES = 8
"""Per parameter of the largest layer in fp32, on a GPU: its weights and its gradients."""

_LESS_ON_HOST = (
    "train adapters (LoRA), whose frozen weights take 2 bytes a parameter in bf16; or several "
    "servers with shard_optimizer_state=True; or add host memory. What a model of yours takes: "
    "harmony-run plan --model CONFIG --gpu NAME --host-memory SIZE --lora 16"
)
_LESS_ON_GPU = 'train with precision="bf16", which takes less of a GPU, or on larger GPUs'


@dataclass(frozen=True)
class Size:
    """A transformer as it is published.

    Attributes:
        num_params: of the model.
        largest: parameters of its largest layer, a block or the embedding.
    """

    name: str
    num_params: float
    largest: float


def _transformer(
    name: str, layers: int, width: int, inner: int, kv_width: int, tokens: int = 32_000
) -> Size:
    """Parameters of a Llama: two square and two narrower projections, three of the inner layer."""
    block = 2 * width * width + 2 * width * kv_width + 3 * width * inner + 2 * width
    embedding = tokens * width
    return Size(name, layers * block + 2 * embedding + width, max(block, embedding))


SIZES = (
    _transformer("1B", 22, 2048, 5632, 256),
    _transformer("7B", 32, 4096, 11008, 4096),
    _transformer("13B", 40, 5120, 13824, 5120),
    _transformer("70B", 80, 8192, 28672, 1024),
)


def look_at_models() -> Iterator[Finding]:
    """Say of each size whether its training state, and its largest layer, find room here."""
    import torch

    free = available_host_nbytes()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    device = min((gpu.total_memory for gpu in gpus), default=None)
    where = f"{count} x {gpus[0].name}" if gpus else "virtual GPUs"
    for size in SIZES:
        yield what_it_takes(size, free, device, where)


def what_it_takes(size: Size, free: int, device: int | None, where: str) -> Finding:
    """Compare a size with the memory that there is.

    Args:
        free: bytes of host memory.
        device: bytes of the smallest GPU; None where GPUs are virtual, which have what one gives.
        where: what it would train on.
    """
    host, layer = int(size.num_params * HOST_NBYTES), int(size.largest * DEVICE_NBYTES)
    text = (
        f"{size.num_params / 1e9:.1f} billion parameters: {format_bytes(host)} of host memory, "
        f"at least {format_bytes(layer)} of each GPU and activations"
    )
    figures = {"host_nbytes": host, "device_nbytes": layer, "num_params": int(size.num_params)}
    lacking, remedies = [], []
    if host > free:
        lacking.append(f"{format_bytes(host - free)} of host memory more than is free")
        remedies.append(_LESS_ON_HOST)
    if device is not None and layer > device:
        lacking.append(f"GPUs of more than {format_bytes(device)}")
        remedies.append(_LESS_ON_GPU)
    name = f"a {size.name} model"
    if lacking:
        text = f"does not fit: it needs {' and '.join(lacking)}. {text}"
        return warning(name, text, "; ".join(remedies), fits=False, **figures)
    return ok(name, f"fits, on {where}. {text}", fits=True, **figures)
