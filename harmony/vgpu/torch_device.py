"""What PyTorch expects to find at ``torch.vgpu``: the device module of the virtual GPU."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import ctypes

Device = torch.device | str | int | None

MAX_COUNT = 16
"""Virtual GPUs that one process can have, as the library has them."""


class VirtualGPUModule(ModuleType):
    """The functions of ``torch.cuda`` that PyTorch itself, and generic code, call by name."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__("torch.vgpu", "The virtual GPU of Harmony.")
        self._library = library
        self.Stream, self.Event = torch.Stream, torch.Event
        self._initialized = True  # or checkpointing would not replay our random numbers

    # ---- devices and streams

    def is_available(self) -> bool:
        """Return whether there is a virtual GPU: this module only exists with one."""
        return True

    def is_initialized(self) -> bool:
        """Return True: there is nothing to initialise lazily."""
        return True

    def _is_in_bad_fork(self) -> bool:
        return bool(self._library.vgpu_in_forked_child())

    def device_count(self) -> int:
        """Return the number of virtual GPUs."""
        return int(self._library.vgpu_device_count())

    def device(self, device: Device) -> torch.accelerator.device_index:
        """Return a context that makes a device current; a negative index changes nothing."""
        index = self._index(device)
        return torch.accelerator.device_index(index if index >= 0 else None)

    def current_device(self) -> int:
        """Return the index of the current device of the calling thread."""
        return torch.accelerator.current_device_index()

    def set_device(self, device: Device) -> None:
        """Make a device current in the calling thread."""
        torch.accelerator.set_device_index(self._index(device))

    def current_stream(self, device: Device = None) -> torch.Stream:
        """Return the current stream of a device."""
        return torch.accelerator.current_stream(self._index(device))

    def stream(self, stream: torch.Stream) -> torch.Stream:
        """Return a context that makes a stream current: streams are their own."""
        return stream

    def set_stream(self, stream: torch.Stream) -> None:
        """Make a stream current on its device."""
        torch.accelerator.set_stream(stream)

    def synchronize(self, device: Device = None) -> None:
        """Wait for all streams of a device; raises the first error of their kernels."""
        torch.accelerator.synchronize(self._index(device))

    def _index(self, device: Device) -> int:
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return self.current_device() if index is None else index

    # ---- memory

    def empty_cache(self) -> None:
        """Hand pages that no tensor uses back to the system."""
        torch.accelerator.empty_cache()

    def mem_get_info(self, device: Device = None) -> tuple[int, int]:
        """Return free and total bytes of a device."""
        return torch.accelerator.get_memory_info(self._index(device))

    def memory_allocated(self, device: Device = None) -> int:
        """Return the bytes of live tensors, each rounded up to 512."""
        return torch.accelerator.memory_allocated(self._index(device))

    def max_memory_allocated(self, device: Device = None) -> int:
        """Return the peak of ``memory_allocated`` since the last reset."""
        return torch.accelerator.max_memory_allocated(self._index(device))

    def reset_peak_memory_stats(self, device: Device = None) -> None:
        """Start the peak anew from the bytes that are live now."""
        torch.accelerator.reset_peak_memory_stats(self._index(device))

    def memory_stats(self, device: Device = None) -> dict[str, Any]:
        """Return the statistics of the device's allocator, named as CUDA's."""
        return torch.accelerator.memory_stats(self._index(device))

    # ---- random numbers

    @property
    def default_generators(self) -> tuple[torch.Generator, ...]:
        """The generator of each device."""
        return tuple(self._generator(index) for index in range(self.device_count()))

    def _generator(self, device: Device) -> torch.Generator:
        generator: torch.Generator = torch.ops.vgpu.default_generator(self._index(device))
        return generator

    def manual_seed(self, seed: int) -> None:
        """Seed the generator of the current device."""
        self._generator(None).manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the generators of all devices, also of those that a later call adds."""
        for index in range(MAX_COUNT):
            self._generator(index).manual_seed(seed)

    def seed_all(self) -> None:
        """Seed the generators of all devices with one fresh random number."""
        self.manual_seed_all(torch.Generator().seed())

    def initial_seed(self) -> int:
        """Return the seed of the current device's generator."""
        return self._generator(None).initial_seed()

    def get_rng_state(self, device: Device = None) -> torch.Tensor:
        """Return the state of a device's generator, laid out as CPU's."""
        return self._generator(device).get_state()

    def set_rng_state(self, state: torch.Tensor, device: Device = None) -> None:
        """Set the state of a device's generator; CPU's states are fine too."""
        self._generator(device).set_state(state.cpu())

    def get_rng_state_all(self) -> list[torch.Tensor]:
        """Return the states of all devices' generators."""
        return [generator.get_state() for generator in self.default_generators]

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        """Set the states of all devices' generators."""
        for index, state in enumerate(states):
            self.set_rng_state(state, index)

    # ---- data types

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return the data types autocast may lower to, as on CPU."""
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self) -> bool:
        """Return True: CPU kernels know bfloat16."""
        return True
