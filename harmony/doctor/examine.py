"""All probes, in the order in which a bug report is read."""

from __future__ import annotations

from pathlib import Path

from harmony.doctor import disk, gpus, host, models, software
from harmony.doctor.findings import Probe

_TORCH = "install PyTorch as pytorch.org says, in the environment that runs harmony-run"
_DRIVER = "nvidia-smi shows whether the driver answers; if it does not, restart or reinstall it"


def probes(checkpoints: Path | None) -> list[Probe]:
    """What to look at.

    Args:
        checkpoints: where checkpoints are to be; None: here, if anywhere.
    """
    folder, chosen = checkpoints or Path(), checkpoints is not None
    return [
        Probe("harmony", software.look_at_python),
        Probe("torch", software.look_at_torch, _TORCH, essential=True),
        Probe("kernels", software.look_at_kernels, _TORCH),
        Probe("updates", software.look_at_updates, _TORCH),
        Probe("GPUs", gpus.look_at_gpus, _DRIVER, essential=True),
        Probe("measured links", gpus.look_at_measured_links),
        Probe("virtual GPUs", software.look_at_virtual_gpus),
        Probe("cores", host.look_at_cores),
        Probe("host memory", host.look_at_memory),
        Probe("memlock", host.look_at_limits),
        Probe("memory rate", host.look_at_memory_rate),
        Probe("checkpoint folder", lambda: disk.look_at_checkpoint_folder(folder, chosen)),
        Probe("cache", disk.look_at_caches),
        Probe("models", models.look_at_models),
    ]
