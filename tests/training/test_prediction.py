"""The executor does what the simulator thinks: the same spans, in an order that it allows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import harmony
from harmony.engine.call_key import CallKind
from harmony.planner.predict.simulate import _Work
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, token_batch, token_loss

CLOCK_S = 2e-6
"""Times are differences of float milliseconds."""


@pytest.mark.parametrize(("mode", "devices"), [("pp", 1), ("pp", 3), ("dp", 2)])
def test_what_the_simulator_lets_wait_does_wait(
    vgpus: VirtualGPUs, mode: str, devices: int
) -> None:
    """Every predecessor that it gives an activity of the same device has ended when that starts.

    Clocks of different devices are set by threads that may be late, so they are not compared.
    """
    vgpus(count=devices, memory="1MiB", link="200MB/s", delay_us=50.0)
    torch.manual_seed(0)
    model: Any = harmony.Harmony(
        copy.deepcopy(GPT()),
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=token_loss,
        mode=mode,
        microbatch_size=1,
    )
    for step in range(2):
        model.train_step(*token_batch(step))
    ready = model._engine.variants.ready(
        CallKind.TRAIN_STEP, ((token_batch(0)[0],), {}, token_batch(0)[1])
    )
    variant, planned = ready.variant, ready.planned
    plan, known = planned.plan, planned.measured
    work = _Work(plan.schedule, variant.graph, known.costs, known.machine)
    names = [name for name, _ in plan.schedule.all_programs()]
    measured = {(span.lane.split(".")[0], span.index): span for span in model.last_timeline.spans}
    place = {number: (names[program], index) for number, program, index in work.made}
    assert set(place.values()) == set(measured)
    compared = 0
    for number, (name, index) in place.items():
        for before in work.activities.after[number]:
            if place.get(before, ("", 0))[0] == name:
                earlier, later = measured[place[before]], measured[name, index]
                assert earlier.end_s <= later.start_s + CLOCK_S, f"{earlier} {later}"
                compared += 1
    assert compared > len(place) / 2
