"""Models of the zoo on the CUDA path equal plain PyTorch there, bit for bit."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import harmony
from tests.devices import on_real_gpus
from tests.zoo import ZOO
from tests.zoo.check import SGD, PlainTraining, amp, as_call, compare, gradients_of, moved
from tests.zoo.entry import Entry

pytest.importorskip("transformers")
pytestmark = on_real_gpus

NAMES = ("gpt2", "llama", "mixtral_eager", "t5", "resnet18", "unet")
"""With dropout where the models have it."""

PRECISIONS = pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])


@PRECISIONS
@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_by_steps_as_plain_pytorch(name: str, autocast: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = compare(ZOO[name], autocast=autocast)
    assert not outcome.misses, "; ".join(outcome.misses[:5])
    assert outcome.packs >= min(4, outcome.layers)


def loss_of(entry: Entry, output: Any, targets: Any) -> torch.Tensor:
    """Return the loss as a script gets it: made by the model, or on the host from its output."""
    return output.loss if entry.loss is None else entry.loss(output, targets)


class LossOnHost(PlainTraining):
    """As in a loop of one's own: Harmony hands outputs out on the host, where targets are."""

    def _loss(self, inputs: Any, targets: Any) -> torch.Tensor:
        args, kwargs = as_call(inputs)
        host = torch.device("cpu")
        return loss_of(self._entry, moved(self._net(*args, **kwargs), host), moved(targets, host))


@PRECISIONS
@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_in_a_loop_of_ones_own_as_plain_pytorch(name: str, autocast: bool) -> None:
    entry = replace(ZOO[name], microbatch=ZOO[name].num_samples, last_samples=0)
    plain = LossOnHost(entry, entry.make(), autocast)
    net = entry.make()
    model = harmony.Harmony(
        net, devices=2, device_memory="2MiB", microbatch_size=entry.num_samples, mode="pp"
    )
    optimizer = torch.optim.SGD(model.parameters(), **SGD)  # type: ignore[arg-type]
    for step, batch in enumerate(entry.batches(2)):
        expected = plain.step(step, batch)
        args, kwargs = as_call(batch[0])
        with warnings.catch_warnings(), amp(autocast):
            warnings.simplefilter("ignore")
            loss = loss_of(entry, model(*args, **kwargs), batch[1])
        loss.backward()
        found = gradients_of(net)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(loss.detach(), expected.loss)
        for key, gradient in expected.gradients.items():
            assert torch.equal(found[key], gradient), key
