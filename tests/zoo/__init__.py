"""The model zoo: what people train, each model tiny, with the check that Harmony trains it."""

from __future__ import annotations

from tests.zoo import (
    control,
    denoisers,
    families,
    kinds,
    multimodal,
    pictures,
    sequences,
    state,
    text,
)
from tests.zoo.entry import Entry

MODULES = (text, multimodal, denoisers, pictures, sequences, control, state, kinds, families)
ZOO: dict[str, Entry] = {entry.name: entry for module in MODULES for entry in module.ENTRIES}

SAMPLE = 8
"""The tests train every eighth of the further families; the script trains all."""

IN_TESTS = tuple(
    entry
    for module in MODULES
    for number, entry in enumerate(module.ENTRIES)
    if module is not families or number % SAMPLE == 0
)

__all__ = ["IN_TESTS", "ZOO", "Entry"]
