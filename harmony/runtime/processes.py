"""Whether this process trains alone, and which GPUs of the server are its own."""

from __future__ import annotations

import os

import torch.distributed as dist

from harmony.errors import ConfigError
from harmony.runtime.host.limits import available_host_nbytes


def check_alone() -> None:
    """Refuse to be one of several processes that are to train one model.

    Each of them would train a model of its own on its share of the data, in silence.

    Raises:
        ConfigError: where a launcher or ``init_process_group`` says that there are several.
    """
    rank, count, said_by = 0, 1, ""
    told = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if dist.is_available() and dist.is_initialized():
        rank, count, said_by = dist.get_rank(), dist.get_world_size(), "torch.distributed"
    elif told[0].isdecimal() and told[1].isdecimal():
        rank, count = int(told[0]), int(told[1])
        said_by = f"RANK={rank} WORLD_SIZE={count}: torchrun or alike"
    if count > 1:
        raise ConfigError(
            f"this is process {rank} of {count} ({said_by}), and this model is not told to train "
            "with the others: each would train a model of its own. Call torch.distributed."
            "init_process_group and give it Harmony(..., process_group=torch.distributed.group."
            "WORLD). On one server one process drives all GPUs: start the script once, with "
            "harmony-run SCRIPT --gpus N or python SCRIPT; devices= says which GPUs"
        )


def local_share(process_group: object) -> tuple[int, int]:
    """Number of this process on its server, and how many processes of the model there are.

    It is what torchrun says; where nobody says anything, a server has one process.
    """
    rank, count = os.environ.get("LOCAL_RANK", ""), os.environ.get("LOCAL_WORLD_SIZE", "")
    if process_group is None or not (rank.isdecimal() and count.isdecimal()):
        return 0, 1
    return int(rank), max(1, int(count))


def host_memory_of(asked_nbytes: int | None, share: tuple[int, int]) -> int | None:
    """Bytes of the host that one of several processes on it may use; None for what is free.

    Args:
        asked_nbytes: what the command line says, which counts for each process.
        share: as for `harmony.runtime.hardware.choose_devices`.
    """
    if asked_nbytes is not None or share[1] == 1:
        return asked_nbytes
    return available_host_nbytes() // share[1]
