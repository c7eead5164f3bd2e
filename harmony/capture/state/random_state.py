"""The random generators that all threads share: torch's on the CPU, Python's, NumPy's."""

from __future__ import annotations

import random
import sys
from typing import Any, NamedTuple

import torch


class GeneratorStates(NamedTuple):
    """Their states; NumPy's is None if the program does not use NumPy."""

    cpu: torch.Tensor
    python: Any
    numpy: Any

    @staticmethod
    def now() -> GeneratorStates:
        """Read the states."""
        numpy = sys.modules.get("numpy")
        state = None if numpy is None else numpy.random.get_state(legacy=True)
        return GeneratorStates(torch.get_rng_state(), random.getstate(), state)

    @staticmethod
    def seeded(seed: int) -> GeneratorStates:
        """Return the states that seeding gives; the present ones stay."""
        before = GeneratorStates.now()
        try:
            torch.default_generator.manual_seed(seed)
            seed_python(seed)
            return GeneratorStates.now()
        finally:
            before.restore()

    def restore(self) -> None:
        """Set the states."""
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class PythonState(NamedTuple):
    """States of Python's and NumPy's generators alone: quick to compare."""

    python: Any
    numpy: Any

    @staticmethod
    def now() -> PythonState:
        """Read the states."""
        numpy = sys.modules.get("numpy")
        state = None if numpy is None else numpy.random.get_state(legacy=True)
        return PythonState(random.getstate(), state)

    def restore(self) -> None:
        """Set the states."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def same(self, other: PythonState) -> bool:
        """Whether nothing was drawn between the two."""
        if self.python != other.python:
            return False
        if self.numpy is None or other.numpy is None:
            return True
        return bool(self.numpy[2] == other.numpy[2] and (self.numpy[1] == other.numpy[1]).all())


def seed_python(seed: int) -> None:
    """Seed Python's generator, and NumPy's if the program uses NumPy."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
