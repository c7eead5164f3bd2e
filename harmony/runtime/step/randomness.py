"""Each microbatch's own random stream, kept at pack boundaries, replayed in the recompute."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from harmony.capture.state.random_state import GeneratorStates, seed_python
from harmony.planner.ir.tasks import Samples
from harmony.runtime.device import DeviceContext

_LOOK_AGAIN_S = 0.1


def microbatch_seed(step: int, index: int, seed: int = 0) -> int:
    """Return the seed from which microbatch ``index`` of step ``step`` draws its random numbers.

    Args:
        step: number of the step, from 0.
        index: number of the microbatch within the minibatch, from 0.
        seed: the run's seed.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch wants a non-negative int64


def seed_microbatch(step: int, index: int, seed: int = 0) -> None:
    """Seed every generator as Harmony does at the start of a microbatch.

    These are torch's on all devices, Python's `random`, and NumPy's if the program uses NumPy.
    Harmony trains like this loop, whatever the plan::

        for index, (x, y) in enumerate(microbatches):
            harmony.seed_microbatch(step, index, seed)
            (loss_fn(net(x), y) * len(x) / len(batch)).backward()

    Args:
        step: as for `microbatch_seed`.
        index: as for `microbatch_seed`.
        seed: the model's `Harmony.seed`.
    """
    torch.manual_seed(microbatch_seed(step, index, seed))
    seed_python(microbatch_seed(step, index, seed))


def drawn_seed() -> int:
    """Return a seed that follows from the state of torch's generator, which stays as it is.

    After `torch.manual_seed` it is the same in every run; and what a program draws next does not
    depend on whether it has asked for a seed.
    """
    generator = torch.Generator()
    generator.set_state(torch.default_generator.get_state())
    return int(torch.randint(2**63 - 1, (), generator=generator))


def _nothing() -> None:
    """Accept: the default check."""


class RandomStreams:
    """Random states of one step, by microbatch and layer.

    A state is written by the thread that issues the layer before, and read by the thread that
    issues the layer itself. That one waits for it: a layer need not read what the one before it
    made, so the schedule may not order the two.

    Attributes:
        keep_at: layers at whose start the state is kept.
        on_host: whether layers draw from the generators that all threads share; such layers run
            one at a time.
        check: raises if there is nothing to wait for any more, since another thread failed.
    """

    def __init__(self, keep_at: frozenset[int], on_host: bool = False) -> None:
        self.keep_at = keep_at
        self.on_host = on_host
        self._states: dict[tuple[Samples, int], torch.Tensor] = {}
        self._host_states: dict[tuple[Samples, int], GeneratorStates] = {}
        self.check: Callable[[], None] = _nothing
        self._arrived = threading.Condition()
        self._host = threading.Lock()

    def start(self, samples: Samples, layer: int, state: torch.Tensor, seed: int) -> None:
        """Let a microbatch start at a layer from this state of the device, and this seed."""
        with self._arrived:
            self._states[samples, layer] = state
            if self.on_host:
                self._host_states[samples, layer] = GeneratorStates.seeded(seed)

    @contextmanager
    def borrowed(self, contexts: Sequence[DeviceContext]) -> Iterator[None]:
        """Give the shared generators, and those of devices, back to the program as they were.

        What they would be left with depends on which layers a device has run, so on the plan.
        """
        before = GeneratorStates.now() if self.on_host else None
        states = [(context, context.random_state()) for context in contexts if self.keep_at]
        try:
            yield
        finally:
            for context, state in states:
                context.set_random_state(state)
            if before is not None:
                before.restore()

    @contextmanager
    def turn(self, context: DeviceContext, samples: Samples, layer: int) -> Iterator[None]:
        """Run the block from the state that the microbatch had when it came to the layer.

        Where layers draw from generators that all threads share, no two blocks run at once.
        """
        if layer not in self.keep_at:
            yield
            return
        with self._arrived:
            while (samples, layer) not in self._states:
                self.check()
                self._arrived.wait(_LOOK_AGAIN_S)
        with self._host if self.on_host else nullcontext():
            context.set_random_state(self._states[samples, layer])
            if self.on_host:
                self._host_states[samples, layer].restore()
            yield

    def keep(self, context: DeviceContext, samples: Samples, layer: int) -> None:
        """Keep the states for whoever runs the layer, now or in the recompute."""
        if layer not in self.keep_at:
            return
        state = context.random_state()
        host = GeneratorStates.now() if self.on_host else None
        with self._arrived:
            self._states[samples, layer] = state
            if host is not None:
                self._host_states[samples, layer] = host
            self._arrived.notify_all()
