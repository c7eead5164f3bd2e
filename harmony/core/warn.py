"""Warnings of Harmony's, shown at the line of the program that led to them."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from harmony.core.files import PACKAGE
from harmony.errors import HarmonyWarning

_OWN = str(PACKAGE)


def warn(text: str) -> None:
    """Warn at the innermost line that is neither Harmony's nor torch's."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _is_between(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, HarmonyWarning, stacklevel=level)


def _is_between(filename: str) -> bool:
    torch = sys.modules.get("torch")
    own = "" if torch is None else str(torch.__file__).rpartition("__init__")[0]
    python = filename.endswith(("/contextlib.py", "/functools.py"))
    return filename.startswith(_OWN) or bool(own and filename.startswith(own)) or python
