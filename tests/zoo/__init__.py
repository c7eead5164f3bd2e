"""The model zoo: what people train, each model tiny, with the check that Harmony trains it."""

from __future__ import annotations

from tests.zoo import control, denoisers, multimodal, pictures, sequences, state, text
from tests.zoo.entry import Entry

MODULES = (text, multimodal, denoisers, pictures, sequences, control, state)
ZOO: dict[str, Entry] = {entry.name: entry for module in MODULES for entry in module.ENTRIES}

__all__ = ["ZOO", "Entry"]
