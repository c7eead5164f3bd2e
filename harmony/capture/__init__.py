"""Capture: turns any ``nn.Module`` into a LayerGraph and layers that can be run.

The forward is run once and recorded as a flat list of steps (`tape`, `record`, `trace`), which is
cut into layers (`leaves`, `layers`, `graph`). A layer runs again by its steps (`replay`) on a
copy of the module tree that holds no parameters of its own (`skeleton`).
"""

from __future__ import annotations

from harmony.capture.api import capture
from harmony.capture.captured import Captured
from harmony.capture.footprint import Footprint
from harmony.capture.params import ParamInfo
from harmony.capture.skeleton import Skeleton

__all__ = ["Captured", "Footprint", "ParamInfo", "Skeleton", "capture"]
