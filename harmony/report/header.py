"""The header of a report: a model's size, its devices, its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def of_memory(
    host: HostState,
    machine: Machine,
    update: UpdateCost,
    is_here: Callable[[str], bool] = lambda _: True,
    shares: int = 1,
) -> Facts:
    """Return what is known once the parameters lie in the arena.

    Args:
        update: what the optimizer costs; nothing where it is the user's.
        is_here: whether this process keeps the optimizer's state of a parameter.
        shares: over how many processes that is shared out.
    """
    arenas = (host.weights.arena, host.gradients.arena)
    pinned = all(buffer.pinned for arena in arenas for buffer in arena.buffers)
    text = " + ".join(format_bytes(arena.nbytes) for arena in arenas)
    text += " pinned" if pinned else " not pinned"
    masters = sum(place.nbytes for place in host.weights.layout.masters().places.values())
    if masters:
        text += f", masters {format_bytes(masters)}"
    places = host.gradients.layout.places.items()
    kept = sum(update.state_of(place) for name, place in places if is_here(name))
    state = sum(arena.nbytes for arena in arenas) + masters + kept
    memory = sum(device.memory_nbytes for device in machine.devices)
    return {
        "precision": _precision(host, kept) + _shared(shares),
        "host arena": text,
        "training state": f"{format_bytes(state)}, {state / memory:.1f} times the "
        f"{format_bytes(memory)} of all GPUs{_beside(host)}",
    }


def _beside(host: HostState) -> str:
    return "" if host.optimizer is not None else "; the state of your optimizer comes on top"


def _shared(shares: int) -> str:
    """Where the rest of the optimizer's state is."""
    return "" if shares == 1 else f", the optimizer's state shared out over {shares} processes"


def _precision(host: HostState, kept: int) -> str:
    """What a trained parameter is computed in, and what it takes on the host.

    Args:
        kept: bytes of the state of the optimizer.
    """
    trained = host.gradients.layout.places
    count = max(1, sum(param.numel() for name, param in host.params.items() if name in trained))
    masters = host.weights.layout.masters().places
    parts = {
        "weight": sum(host.weights.layout.places[name].nbytes for name in trained),
        "master": sum(masters[name].nbytes for name in trained if name in masters),
        "gradient": sum(place.nbytes for place in trained.values()),
        "optimizer": kept,
    }
    shown = ", ".join(f"{name} {nbytes / count:.3g}" for name, nbytes in parts.items() if nbytes)
    widest = {str(host.weights.layout.places[name].dtype) for name in trained}
    types = " and ".join(sorted(kind.removeprefix("torch.") for kind in widest))
    if masters:
        types += " with fp32 masters"
    total = sum(parts.values()) / count
    beside = "" if kept else ", beside the optimizer's state"
    return f"{types}, {total:.3g} bytes a parameter on the host ({shown}){beside}"
