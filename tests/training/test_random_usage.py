"""Whatever is done to a model between its steps, it trains as its plain twin does."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import example, given, settings

from tests import devices
from tests import race_check as racecheck
from tests.training.random_usage import KNOWN, WAYS, Steps, Usage, Way, usages


def train(way: Way, steps: Steps) -> None:
    """Do it all with the race checker on."""
    torch.set_num_threads(1)
    devices.provide(count=4, memory="64MiB")
    with warnings.catch_warnings(), racecheck.checked(ordered_frees=True):
        warnings.simplefilter("ignore")
        Usage(way).run(steps)


@settings(
    max_examples=30,
    derandomize=True,
)
@given(way=WAYS, steps=usages())
@example(way=Way(), steps=(("step", 0), ("save", 0), ("step", 0), ("load", 0)))
def test_random_usage_trains_as_in_plain_pytorch(way: Way, steps: Steps) -> None:
    train(way, steps)


@pytest.mark.parametrize("form", ["step", "dropin"])
@pytest.mark.parametrize("operation", sorted({"write", "rate", "attribute"} & set(KNOWN)))
def test_the_comparison_sees_what_only_one_side_does(form: str, operation: str) -> None:
    torch.set_num_threads(1)
    devices.provide(count=4, memory="64MiB")
    usage = Usage(Way(form))
    usage.run((("step", 0),))
    model, net = usage.plain, usage.net
    with torch.no_grad():
        if operation == "write":
            net.head.bias.add_(1e-6)
        elif operation == "attribute":
            net.gain = 1.001
        else:
            model.optimizer.param_groups[0]["lr"] *= 1.001
    with pytest.raises(AssertionError):
        usage.run((("step", 0),))
