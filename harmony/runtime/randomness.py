"""Each microbatch's own random stream, kept at pack boundaries, replayed in the recompute."""

from __future__ import annotations

import hashlib
import threading

import torch

from harmony.planner.tasks import Samples
from harmony.runtime.device import DeviceContext


def microbatch_seed(step: int, index: int, seed: int = 0) -> int:
    """Return the seed from which microbatch ``index`` of step ``step`` draws its random numbers.

    Harmony trains like this loop, whatever the plan::

        for index, (x, y) in enumerate(microbatches):
            torch.manual_seed(harmony.microbatch_seed(step, index, seed))
            (loss_fn(net(x), y) * len(x) / len(batch)).backward()

    Args:
        step: number of the step, from 0.
        index: number of the microbatch within the minibatch, from 0.
        seed: the run's seed.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch wants a non-negative int64


class RandomStates:
    """Random states of one step, by microbatch and layer.

    A state is written by the thread that issues the layer before and read by the thread that
    issues the layer itself; the schedule orders the two, since the layer reads what the one
    before it made.
    """

    def __init__(self, keep_at: frozenset[int]) -> None:
        """Keep the state at the start of each of these layers."""
        self.keep_at = keep_at
        self._states: dict[tuple[Samples, int], torch.Tensor] = {}
        self._lock = threading.Lock()

    def start(self, samples: Samples, layer: int, state: torch.Tensor) -> None:
        """Set the state from which a microbatch starts at a layer."""
        with self._lock:
            self._states[samples, layer] = state

    def enter(self, context: DeviceContext, samples: Samples, layer: int) -> None:
        """Give the device the state that the microbatch had when it came to the layer."""
        with self._lock:
            state = self._states.get((samples, layer))
        if state is not None:
            context.set_random_state(state)

    def keep(self, context: DeviceContext, samples: Samples, layer: int) -> None:
        """Keep the device's state for whoever runs the layer, now or in the recompute."""
        if layer in self.keep_at:
            self.start(samples, layer, context.random_state())
