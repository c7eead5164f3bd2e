"""Training steps of models whose parameters have hooks.

A hook sees what it sees in plain PyTorch: the gradient of a backward. That is the whole batch's
where Harmony chooses the microbatches, and each microbatch's where the user has fixed them. Either
way it gets a tensor on the host, where the parameter is, and no parameter is updated before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from harmony.engine.call_key import Call, CallKind
from harmony.engine.dynamic import ModuleState
from harmony.engine.engine import Engine
from harmony.engine.step_result import RanStep, ReadyStep
from harmony.planner.ir.tasks import Samples, TaskKind
from harmony.runtime.interrupts import held_back
from harmony.runtime.update.param_hooks import GradientSums, call_hooks

Run = Callable[[ReadyStep], RanStep]


def hooked_step(engine: Engine, call: Call, ready: ReadyStep, run: Run) -> RanStep:
    """Run a planned step up to its gradients, with the hooks of its parameters.

    Args:
        run: runs a batch up to its gradients, and leaves them as ``grad``.
    """
    engine.record.warn(
        "a parameter has a hook: gradients go to the host, and all updates wait for the backward"
    )
    parts = ready.planned.in_order[TaskKind.BACKWARD]
    if len(parts) == 1 or engine.options.microbatch_size is None:
        ran = run(ready)
        call_hooks(engine.net.parameters())
        engine.options.check_finite(engine.net, ran.loss, parts[-1][1])
    else:
        before = ModuleState(engine.net)
        try:
            with held_back() as held, held.open():
                ran = _in_parts(engine, call, ready, parts, run)
            engine.options.check_finite(engine.net, ran.loss, parts[-1][1])
        except BaseException:
            before.restore()
            raise
    return replace(ran, excess=None)


def _in_parts(
    engine: Engine, call: Call, whole: ReadyStep, parts: tuple[Samples, ...], run: Run
) -> RanStep:
    """Run forward and backward of one microbatch after the other, with the hooks of each."""
    assert engine.factory.arenas is not None and whole.variant.graph.loss is not None
    sums = GradientSums(dict(engine.net.named_parameters()), hooks_each=True)
    total = torch.zeros(())
    ran: RanStep | None = None
    for index, samples in enumerate(parts):
        if ran is not None:
            ran.replay.states.commit([])
        part = whole.variant.captured.part_of_call(call, *samples)
        ready = engine.ready(CallKind.TRAIN_STEP, *part)
        weight = whole.weights[whole.variant.graph.loss, samples]
        weights = dict.fromkeys(ready.weights, weight)
        ran = run(replace(ready, weights=weights, first_index=index))
        total = total + ran.loss
        sums.add()
    sums.publish(engine.factory.arenas[1].own)
    assert ran is not None, "a batch has samples"
    return replace(ran, loss=total)
