"""What differs between a real and a virtual GPU: pinning, memory totals, the access trace.

The only place that asks which of the two it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
import weakref
from collections.abc import Sequence
from itertools import permutations
from types import ModuleType
from typing import Any

import torch

from harmony.errors import DeviceLostError, ExecutionError, text_of
from harmony.vgpu import access_trace

_CUDA_HOST_REGISTER_DEFAULT = 0

_pinned_copies: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
"""What `pinned_copy` has returned and is still held."""

_tokens_lock = threading.Lock()
_next_token = 0


def _vgpu() -> ModuleType | None:
    """The virtual GPU's module if it has been loaded in this process."""
    module = sys.modules.get("harmony.vgpu.api")
    return module if module is not None and module.is_loaded() else None


def _cudart() -> Any:
    """The CUDA runtime's functions, as PyTorch exposes them."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def is_virtual(device: torch.device) -> bool:
    """Whether a device is a virtual GPU."""
    return device.type == "vgpu"


def identity(device: torch.device) -> str:
    """Text that is equal for devices of equal speed, as far as software can tell."""
    if is_virtual(device):
        return f"vgpu {sorted(virtual_settings().items())}"
    total = memory_info(device)[1]
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {total} bytes, driver {driver}, CUDA {torch.version.cuda}"


def product_name(device: torch.device) -> str:
    """What the device is sold as: ``"NVIDIA GeForce RTX 4090"``; of a virtual GPU, that it is."""
    if is_virtual(device):
        return "virtual GPU"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def virtual_settings() -> dict[str, Any]:
    """What the virtual GPUs of this process are set to; empty without any."""
    vgpu = _vgpu()
    return {} if vgpu is None else dict(vgpu.current_settings())


def memory_info(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a device."""
    free, total = torch.accelerator.get_memory_info(device)
    return int(free), int(total)


def reserve_nbytes(device: torch.device) -> int:
    """Bytes of a device's free memory that no plan may count on.

    A virtual GPU has none: every byte on it is a tensor's. A real one needs room for what the
    libraries take beside PyTorch's tensors (workspaces of matrix products, loaded kernels) and
    for gaps between blocks.
    """
    if is_virtual(device):
        return 0
    return max(512 * 2**20, memory_info(device)[1] // 20)


def cached_nbytes(device: torch.device) -> int:
    """Bytes that PyTorch's allocator holds of a device without a tensor in them.

    The driver counts them as taken; for this process they are free.
    """
    if is_virtual(device):
        return 0
    reserved = torch.accelerator.memory_reserved(device)
    return int(reserved) - int(torch.accelerator.memory_allocated(device))


def owned_nbytes(device: torch.device) -> int:
    """Bytes without a tensor in them that no other process can take."""
    return memory_info(device)[0] if is_virtual(device) else cached_nbytes(device)


def take_segment(device: torch.device, nbytes: int) -> None:
    """Have PyTorch's allocator reserve memory of a real GPU in one piece, from which it cuts.

    It goes on without where there is no such piece.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        torch.empty(nbytes, dtype=torch.uint8, device=device)


def bound_reserved(device: torch.device, nbytes: int) -> float:
    """Let PyTorch's allocator reserve at most so many bytes of a real GPU.

    Returns:
        What `unbound_reserved` needs to let it take what it did.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(before, nbytes / total), device)
    return before


def unbound_reserved(device: torch.device, before: float) -> None:
    """Undo `bound_reserved`."""
    torch.cuda.set_per_process_memory_fraction(before, device)


def peak_reserved_nbytes(device: torch.device) -> int:
    """Bytes that PyTorch's allocator has held at most since the peaks were reset."""
    return int(torch.accelerator.max_memory_reserved(device))


def is_lost(device: torch.device) -> bool:
    """Whether a device does not even do a trivial thing any more, as after a kernel's assert."""
    if is_virtual(device):
        return False
    try:
        torch.zeros(1, device=device).add_(1).item()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


def pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor of a device to pinned memory of PyTorch's, in the current stream's order."""
    try:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        _pinned_copies.add(host)
        return host.copy_(tensor, non_blocking=True)
    except RuntimeError:
        if is_lost(tensor.device):
            _keep_pinned_copies()  # whoever has made others would drop them on the way out
        raise


def _keep_pinned_copies() -> None:
    """Keep pinned memory of PyTorch's for good, once a GPU is lost.

    PyTorch records an event when it is given back. On a lost GPU that raises, in a destructor: the
    process would be aborted before anybody has saved anything.
    """
    for copy in _pinned_copies:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(copy))


def device_lost(
    where: str, error: BaseException, after: str, *, torn: bool = False
) -> DeviceLostError:
    """Return the error that names the task, and says what to do.

    Args:
        after: what parameters are like now.
    """
    _keep_pinned_copies()
    first = text_of(error).partition("\n")[0]
    rescue = "start the script again from its last checkpoint"
    if not torn:
        rescue = (
            "parameters are on the host: save model.state_dict() now, then start the script again "
            "from it"
        )
    return DeviceLostError(
        f"{where} failed, and the GPU with it ({type(error).__name__}: {first}): nothing runs on "
        f"a GPU in this process any more. To go on, {rescue} (CUDA_LAUNCH_BLOCKING=1 shows the "
        f"kernel). {after}.",
        where,
        torn=torn,
    )


def call_failed(
    where: str, error: BaseException, devices: Sequence[torch.device], after: str, *, torn: bool
) -> ExecutionError:
    """Return the error that says what a call of the GPU's runtime that failed has led to.

    Args:
        after: what parameters are like now.
    """
    if any(map(is_lost, devices)):
        return device_lost(where, error, after, torn=torn)
    first = text_of(error).partition("\n")[0]
    said = f"{where} failed. {type(error).__name__}: {first}. {after}"
    return ExecutionError(said, where, torn=torn)


def have_own_links(devices: Sequence[torch.device]) -> bool:
    """Whether copies between devices leave their links to the host alone: by NVLink.

    GPUs that may reach each other's memory mostly do so over PCIe, which is that link; so
    without a word of NVML none is believed.
    """
    if is_virtual(devices[0]):
        return True
    if any(device.type != "cuda" for device in devices):
        return False
    pairs = list(permutations(devices, 2))
    reach = all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    return reach and _have_nvlink(pairs)


def _have_nvlink(pairs: Sequence[tuple[torch.device, torch.device]]) -> bool:
    """Whether NVML says of each pair of GPUs that NVLink, also through a switch, joins them.

    A GPU with an active NVLink may share it with another GPU than the one that is asked about.
    """
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()

        def handle(device: torch.device) -> Any:
            uuid = torch.cuda.get_device_properties(device).uuid
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

        kind, joined = pynvml.NVML_P2P_CAPS_INDEX_NVLINK, pynvml.NVML_P2P_STATUS_OK
        return all(
            pynvml.nvmlDeviceGetP2PStatus(handle(a), handle(b), kind) == joined for a, b in pairs
        )
    except Exception:  # no NVML, an older driver, a GPU without the question: each its own error
        return False


def can_run_kernels(device: torch.device) -> bool:
    """Whether this build of PyTorch has kernels for a device's compute capability."""
    if device.type != "cuda" or torch.version.hip:
        return True
    major, minor = torch.cuda.get_device_capability(device)
    for name in torch.cuda.get_arch_list():
        kind, _, digits = name.partition("_")
        number = int("".join(c for c in digits if c.isdigit()))
        # Machine code runs on later GPUs of its generation; the other form is compiled for any.
        same = number // 10 == major and number % 10 <= minor
        if same or (kind == "compute" and number <= 10 * major + minor):
            return True
    return False


def pin_range(device: torch.device, address: int, nbytes: int) -> str | None:
    """Page-lock a range of host memory for a device's copies.

    Returns:
        None if it worked, else the reason why not.
    """
    if is_virtual(device):
        vgpu = _vgpu()
        assert vgpu is not None
        vgpu.host_register(address, nbytes)
        return None
    if device.type != "cuda":
        return f"pinning is not known on {device.type}"
    with torch.accelerator.device_index(device.index):  # else it makes a context on GPU 0
        status = _cudart().cudaHostRegister(address, nbytes, _CUDA_HOST_REGISTER_DEFAULT)
        if int(status) == 0:
            return None
        _clear_error(device)
    return f"cudaHostRegister: {status}"


def _clear_error(device: torch.device) -> None:
    """Forget the error that a CUDA call of this thread has left behind for the next to find.

    CUDA keeps it until somebody asks, and PyTorch asks after it launches a kernel: the next
    kernel of the model would be blamed.
    """
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)


def unpin_range(device: torch.device, address: int) -> None:
    """Undo ``pin_range``."""
    if is_virtual(device):
        vgpu = _vgpu()
        if vgpu is not None:
            vgpu.host_unregister(address)
    elif device.type == "cuda":
        _cudart().cudaHostUnregister(address)  # fails on a lost device, where all is lost anyway


def withhold_from_children(device: torch.device, memory: mmap.mmap, *, withhold: bool) -> None:
    """Say whether a forked process, as a worker of a DataLoader, gets this pinned memory.

    A real GPU reads and writes pages by their place. A fork would have them copied at once or, on
    older kernels, move them away from the GPU at the next write; both for memory that may be most
    of the host's. A virtual GPU uses addresses, so there a child may have it and read it.
    """
    if not is_virtual(device):
        memory.madvise(mmap.MADV_DONTFORK if withhold else mmap.MADV_DOFORK)


def trace_host_access(what: str, tensor: torch.Tensor, *, write: bool) -> None:
    """Tell the access trace that the calling thread reads or writes host memory."""
    if access_trace.is_open:
        access_trace.host_access(what, tensor.data_ptr(), tensor.nbytes, write)


def new_tokens(count: int) -> range:
    """Numbers for hand-overs between threads, which nothing else in the process has."""
    global _next_token
    with _tokens_lock:
        tokens = range(_next_token, _next_token + count)
        _next_token = tokens.stop
    return tokens


def trace_release(token: int) -> None:
    """Tell the access trace that the calling thread publishes what it did so far."""
    if access_trace.is_open:
        access_trace.host_release(token)


def trace_acquire(token: int) -> None:
    """Tell the access trace that the calling thread has seen what ``token`` published."""
    if access_trace.is_open:
        access_trace.host_acquire(token)
