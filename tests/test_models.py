"""Every model of the zoo trains as plain PyTorch trains it."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator

import pytest
import torch

import harmony
from tests.zoo import IN_TESTS, ZOO, Entry, families, kinds
from tests.zoo.check import PlainTraining, check, relative
from tests.zoo.entry import LAYOUT

SLOW = [pytest.mark.slow]


@pytest.fixture(autouse=True)
def _free_devices() -> Iterator[None]:
    """Let go of a test's model, so that the next one has the devices to itself."""
    yield
    gc.collect()


@pytest.mark.parametrize(
    "entry",
    [pytest.param(e, id=e.name, marks=SLOW if e.slow else []) for e in IN_TESTS],
)
def test_a_model_trains_as_in_plain_pytorch(entry: Entry) -> None:
    missing = entry.missing()
    if missing is not None:
        pytest.skip(missing)
    pytest.importorskip("transformers")
    if entry.refused:
        with pytest.raises(harmony.HarmonyError, match=re.escape(entry.refused)):
            check(entry)
        return
    outcome = check(entry)
    assert not outcome.misses, "; ".join(outcome.misses[:5])
    # The path of a dynamic microbatch may have fewer layers, and so may a model that is one
    # function.
    assert outcome.packs >= min(4, outcome.layers)


def test_a_tolerance_has_a_reason_and_nothing_else_has_one() -> None:
    for entry in ZOO.values():
        assert bool(entry.reason) is (entry.tolerance > 0), entry.name
        loose = entry.whole_batch or entry.reason == LAYOUT
        # What TorchScript has compiled rounds otherwise than what it runs at first.
        rounded = 4e-7 if entry.name == "script_module" else 2e-7
        assert entry.tolerance <= (1e-6 if loose else rounded), entry.name


def test_the_zoo_is_as_large_as_promised() -> None:
    optional = [entry for entry in ZOO.values() if entry.needs]
    assert len(ZOO) - len(optional) >= 34
    assert len(families.ENTRIES) >= 40
    assert len(kinds.ENTRIES) >= 20


def test_the_comparison_sees_a_small_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_of = PlainTraining._loss
    monkeypatch.setattr(PlainTraining, "_loss", lambda *args: loss_of(*args) * (1 + 1e-6))
    kinds = {miss.split()[2] for miss in check(ZOO["dense_skips"]).misses}
    assert kinds == {"loss", "gradient", "parameter"}


def test_bits_are_compared_rather_than_values() -> None:
    zero, minus = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    nan = torch.tensor([float("nan")])
    assert relative(zero, zero.clone()) == 0.0
    assert relative(zero, minus) > 0.0
    assert relative(nan, nan.clone()) == 0.0
    assert relative(nan, torch.zeros(1)) == float("inf")
    assert relative(None, zero) == float("inf")
    assert relative(None, None) == 0.0
    assert relative(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
