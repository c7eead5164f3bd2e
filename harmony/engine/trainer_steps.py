"""The number of steps in the saves of Hugging Face's Trainer, since random numbers depend on it.

Trainer saves and restores the random states of torch, Python and NumPy. The numbers that layers
draw here follow from the model's seed and its number of steps. Both are kept in
``trainer_state.json``, where Trainer keeps what its callbacks know, so that a resumed run draws
what the run that was not interrupted draws.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_NAME = "HarmonyRandomNumbers"
"""Of the callback, and of what it keeps in the state of a Trainer."""


def keep_steps_in_trainers() -> None:
    """Let each Trainer that is made from now on keep the steps of a Harmony model in its saves.

    For a Trainer of another model nothing changes.
    """
    module = sys.modules.get("transformers.trainer")
    defaults = getattr(module, "DEFAULT_CALLBACKS", None)
    if not isinstance(defaults, list) or any(known.__name__ == _NAME for known in defaults):
        return
    callback = sys.modules["transformers.trainer_callback"].TrainerCallback
    hooks = {"on_train_begin": _restore, "on_step_end": _keep, "num_steps": 0, "seed": 0}
    defaults.append(type(_NAME, (callback,), hooks))


def _restore(
    callback: Any, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
) -> None:
    kept: Any = (state.stateful_callbacks or {}).get(_NAME)
    if not kept:
        return
    for engine in _engines(model):
        engine.num_steps = int(kept["attributes"]["num_steps"])
        engine.options.seed = int(kept["attributes"]["seed"])


def _keep(
    callback: Any, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
) -> None:
    for engine in _engines(model):
        numbers = {"num_steps": engine.num_steps, "seed": engine.options.seed}
        state.stateful_callbacks[_NAME] = {"args": {}, "attributes": numbers}


def _engines(model: nn.Module | None) -> Iterator[Any]:
    """The engine of the Harmony model that is this one, or inside of it, as inside of PEFT's."""
    waiting = [] if model is None else [model]
    while waiting:
        module = waiting.pop()
        if "_engine" in vars(module) and type(module).__module__.startswith("harmony."):
            yield vars(module)["_engine"]
            return
        waiting += [child for child in module._modules.values() if child is not None]
