"""The header of a report: a model's size, its devices, its memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from harmony.core.machine import Machine
from harmony.core.units import format_bytes
from harmony.profiling.update_times import UpdateCost
from harmony.runtime.device import DeviceContext
from harmony.runtime.hardware import is_virtual
from harmony.runtime.host.host_state import HostState
from harmony.runtime.update.optimizer import PackOptimizer

Facts = dict[str, str]


def of_model(
    net: nn.Module, contexts: Sequence[DeviceContext], optimizer: PackOptimizer | None
) -> Facts:
    """Return what is known before the first batch."""
    count = sum(param.numel() for param in net.parameters())
    kind = "virtual GPU" if is_virtual([context.device for context in contexts]) else "GPU"
    facts = {
        "parameters": f"{count / 1e6:.1f} M",
        "devices": f"{len(contexts)} {kind}{'s' * (len(contexts) > 1)}",
    }
    if optimizer is not None:
        facts["optimizer"] = optimizer.describe()
    return facts


def sparse_notice(net: nn.Module) -> str | None:
    """Say that gradients which plain PyTorch makes sparse are dense; None if there are none."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    sparse = [n for n, m in net.named_modules() if isinstance(m, kinds) and m.sparse]
    if not sparse:
        return None
    return (
        f"{sparse[0]} has sparse=True: its gradient is dense here, with the same sums. "
        "torch.optim.SparseAdam cannot take it; use torch.optim.Adam, or another optimizer"
    )


def of_memory(host: HostState, machine: Machine, update: UpdateCost) -> Facts:
    """Return what is known once the parameters lie in the arena.

    Args:
        update: what the optimizer costs; nothing where it is the user's.
    """
    arenas = (host.weights.arena, host.gradients.arena)
    pinned = all(buffer.pinned for arena in arenas for buffer in arena.buffers)
    text = " + ".join(format_bytes(arena.nbytes) for arena in arenas)
    places = host.gradients.layout.places.values()
    state = sum(arena.nbytes for arena in arenas)
    state += sum(update.state_of(place) for place in places)
    memory = sum(device.memory_nbytes for device in machine.devices)
    return {
        "host arena": f"{text} {'pinned' if pinned else 'not pinned'}",
        "training state": f"{format_bytes(state)}, {state / memory:.1f} times the "
        f"{format_bytes(memory)} of all GPUs",
    }
