"""Whether this process trains alone: Harmony adds up no gradients over processes."""

from __future__ import annotations

import os

import torch.distributed as dist

from harmony.errors import ConfigError


def check_alone() -> None:
    """Refuse to be one of several processes that are to train one model.

    Each of them would train a model of its own on its share of the data, in silence.

    Raises:
        ConfigError: where a launcher or ``init_process_group`` says that there are several.
    """
    rank, count, said_by = _place()
    if count > 1:
        raise ConfigError(
            f"this is process {rank} of {count} ({said_by}), and Harmony drives all GPUs of a "
            "server from one process: several would each train a model of their own. Start the "
            "script once: harmony-run SCRIPT --gpus N, python SCRIPT, or torchrun "
            "--nproc-per-node 1 on one server; devices= says which GPUs"
        )


def _place() -> tuple[int, int, str]:
    """The rank of this process, the number of processes, and who says so."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), "torch.distributed"
    rank, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and count.isdecimal():
        return int(rank), int(count), f"RANK={rank} WORLD_SIZE={count}: torchrun or alike"
    return 0, 1, ""
