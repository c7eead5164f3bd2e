"""Capture: turns any ``nn.Module`` into a LayerGraph and layers that can be run.

The forward is run once and recorded as a flat list of steps (`trace`), which is cut into layers
(`graph`). A layer runs again by its steps on a copy of the module tree that holds no parameters of
its own (`replay`). What the forward's Python read from outside is guarded (`guards`). Where one
run does not stand for others, each microbatch is traced as it runs, or the module's own Python
runs (`eager`).
"""

from __future__ import annotations

from harmony.capture.api import capture
from harmony.capture.cost.footprint import Footprint
from harmony.capture.cost.products import is_product
from harmony.capture.eager.dynamic_trace import DynamicTrace, same_path
from harmony.capture.eager.own_python import brought_home, running_on
from harmony.capture.eager.streamed import StreamedModule
from harmony.capture.graph.layered import LayerChanges
from harmony.capture.graph.params import ParamInfo
from harmony.capture.guards.module_hooks import check_hooks
from harmony.capture.guards.outside import Outside
from harmony.capture.replay.captured import Captured
from harmony.capture.replay.inputs import Batch, form_of_leaf
from harmony.capture.replay.replay import GuardError, call_in_progress
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.state.python_state import is_plain, plain_attributes
from harmony.capture.state.random_state import seed_python
from harmony.capture.trace.irregular import form_of, irregular_input
from harmony.capture.trace.isolation import autocast_dtype, no_cast_cache, undisturbed
from harmony.capture.trace.refuse import DynamicOnlyError, or_eager

__all__ = [
    "brought_home",
    "Batch",
    "Captured",
    "Footprint",
    "GuardError",
    "LayerChanges",
    "DynamicTrace",
    "DynamicOnlyError",
    "Outside",
    "ParamInfo",
    "ModuleShell",
    "StreamedModule",
    "autocast_dtype",
    "call_in_progress",
    "capture",
    "check_hooks",
    "form_of",
    "form_of_leaf",
    "irregular_input",
    "is_plain",
    "is_product",
    "no_cast_cache",
    "or_eager",
    "plain_attributes",
    "running_on",
    "same_path",
    "seed_python",
    "undisturbed",
]
