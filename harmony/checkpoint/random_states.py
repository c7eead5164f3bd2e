"""The states of all random generators that are not somebody's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from harmony.capture.state.random_state import GeneratorStates


@dataclass(frozen=True)
class RandomStates:
    """States of all random generators that are not somebody's own.

    Attributes:
        host: torch's on the CPU, Python's, NumPy's.
        devices: of real GPUs.
    """

    host: GeneratorStates
    devices: list[torch.Tensor]

    @staticmethod
    def now() -> RandomStates:
        """Read the states."""
        made = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return RandomStates(GeneratorStates.now(), torch.cuda.get_rng_state_all() if made else [])

    def restore(self) -> None:
        """Set the states."""
        self.host.restore()
        if torch.cuda.is_available() and len(self.devices) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(self.devices)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Set the states while the block runs."""
        before = RandomStates.now()
        self.restore()
        try:
            yield
        finally:
            before.restore()
