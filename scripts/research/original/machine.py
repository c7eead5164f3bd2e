"""The original's server in the words of our machine model."""

from __future__ import annotations

from harmony.core.machine import Device, Host, Machine, Switch
from research.original.estimator import SERVER, Server

UPDATE_BYTES_PER_S = 484e9 * 0.8 / 7
"""Gradient bytes that an update on a GTX 1080 Ti takes in: 80 % of its 484 GB/s (specification of
2017), seven bytes moved for each byte of gradient by Adam in fp32."""

HOST_NBYTES = 750 * 10**9
"""Host memory that is assumed; the profiles do not say. What may be offloaded depends on it."""

TASK_OVERHEAD_S = 1e-4
"""Seconds to issue a Run. The original's 40 ms a task are for deleting tensors; there is nothing
to delete where packs take turns in slots."""


def machine_of(num_gpus: int, memory_nbytes: int, server: Server = SERVER) -> Machine:
    """The server with GPUs of so much memory: one link to the host, which they share fairly.

    Each direction of that link carries what one GPU alone gets, between GPUs it goes over links
    of their own, as in the original's model; updates run on the host or on a GPU.
    """
    swap = server.swap_bytes_per_s
    device = Device(
        "GTX 1080 Ti",
        memory_nbytes,
        swap,
        swap,
        server.peer_bytes_per_s,
        TASK_OVERHEAD_S,
        UPDATE_BYTES_PER_S,
    )
    shared = (Switch(tuple(range(num_gpus)), swap, swap),) if num_gpus > 1 else ()
    return Machine((device,) * num_gpus, Host(HOST_NBYTES), switches=shared)
