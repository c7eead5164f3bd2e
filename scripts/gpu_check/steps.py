"""The steps, in the order in which they are worth having when time runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Note(Protocol):
    """Keeps figures; what was noted stays when a step fails or is ended."""

    def __call__(self, **figures: Any) -> None:
        """Note figures by name; ``what`` says of what, ``skipped`` why there are none."""


Run = Callable[..., bool]
"""Runs a step; returns whether all is well.

Takes a `Note`, whether models are to be tiny, and of a step that goes on what it had noted before.
"""

TRAINING_PARTS = 8
"""Steps that the tests of training are cut into: two minutes each on two cores, of eight."""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: on the command line and in the results.
        what: it finds out.
        run: does it.
        goes_on: whether, once interrupted or failed, it does not begin anew.
    """

    name: str
    what: str
    run: Run
    goes_on: bool = False


def _later(module: str, function: str, *args: Any) -> Run:
    """A function whose module is imported by the step that needs it."""

    def run(*given: Any) -> bool:
        import importlib

        found = getattr(importlib.import_module(f"gpu_check.{module}"), function)
        return bool(found(*args, *given))

    return run


STEPS = (
    Step("machine", "the machine, its GPUs, what is installed", _later("machine", "describe")),
    Step("exact", "training against plain PyTorch on the same GPU", _later("exact", "compare")),
    Step("suite", "the tests that say most, on these GPUs", _later("suite", "run"), True),
    Step("memory", "what PyTorch reserves at most, of the limit", _later("limits", "run")),
    Step("links", "links as Harmony measures them and by copies", _later("links", "run")),
    Step("prediction", "predicted against measured steps", _later("speed", "predict")),
    Step("speed-1B", "tokens/s of 1 billion parameters", _later("speed", "run", "1B")),
    Step("speed-7B", "tokens/s of 7 billion parameters", _later("speed", "run", "7B")),
    Step("speed-14B", "tokens/s of 14 billion parameters", _later("speed", "run", "14B")),
    Step("largest", "the largest model that the host holds", _later("largest", "run")),
    *(
        Step(
            f"training-{part + 1}",
            f"the other tests of training, part {part + 1} of {TRAINING_PARTS}",
            _later("suite", "run_part", part, TRAINING_PARTS),
            goes_on=True,
        )
        for part in range(TRAINING_PARTS)
    ),
    Step("sanitizer", "a few steps under compute-sanitizer", _later("sanitizer", "run")),
)
