"""Capture: turns any ``nn.Module`` into a LayerGraph and layers that can be run.

The forward is run once and recorded as a flat list of steps (`tape`, `record`, `trace`), which is
cut into layers (`leaves`, `layers`, `graph`). A layer runs again by its steps (`replay`) on a
copy of the module tree that holds no parameters of its own (`skeleton`). Where one run does not
stand for others, each microbatch is captured live (`live`).
"""

from __future__ import annotations

from harmony.capture.api import capture
from harmony.capture.captured import Captured
from harmony.capture.direct import moved, running_on
from harmony.capture.footprint import Footprint
from harmony.capture.hooks import check_hooks
from harmony.capture.inputs import Batch
from harmony.capture.isolation import autocast_dtype, undisturbed
from harmony.capture.layered import LayerChanges
from harmony.capture.live import LiveCapture, same_path
from harmony.capture.outside import Outside
from harmony.capture.params import ParamInfo
from harmony.capture.pythonstate import is_plain, plain_attributes
from harmony.capture.randomstate import seed_python
from harmony.capture.refuse import LiveOnlyError, or_as_it_is
from harmony.capture.replay import GuardError
from harmony.capture.skeleton import Skeleton
from harmony.capture.streamed import StreamedModule

__all__ = [
    "Batch",
    "Captured",
    "Footprint",
    "GuardError",
    "LayerChanges",
    "LiveCapture",
    "LiveOnlyError",
    "Outside",
    "ParamInfo",
    "Skeleton",
    "StreamedModule",
    "autocast_dtype",
    "capture",
    "check_hooks",
    "is_plain",
    "moved",
    "or_as_it_is",
    "plain_attributes",
    "running_on",
    "same_path",
    "seed_python",
    "undisturbed",
]
