"""Models built without memory train as if they had been built with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.errors import ConfigError
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, token_batch, token_loss
from tests.training.plain import params_of, train_plain

OPTIONS: dict[str, Any] = {"lr": 1e-2}


def gpt_both_ways(tied: bool = False) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    eager = GPT(tied=tied)
    torch.manual_seed(0)
    with harmony.meta_init():
        return eager, GPT(tied=tied)


def wrap(net: nn.Module) -> harmony.Harmony:
    return harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=OPTIONS,
        loss_fn=token_loss,
        mode="pp",
        microbatch_size=2,
        devices=2,
        device_memory="400KiB",
    )


def assert_trains_like(model: harmony.Harmony, eager: nn.Module, tolerance: float = 0.0) -> None:
    batches = [token_batch(step) for step in range(3)]
    expected = train_plain(
        eager,
        batches,
        optimizer=torch.optim.AdamW,
        options=OPTIONS,
        loss_fn=token_loss,
        microbatch=2,
    )
    for step, (inputs, targets) in enumerate(batches):
        assert torch.equal(model.train_step(inputs, targets), expected.losses[step]), step
    assert all(torch.equal(p, expected.params[n]) for n, p in model.named_parameters())


def test_the_step_form(vgpus: VirtualGPUs) -> None:
    eager, net = gpt_both_ways()
    params = list(net.parameters())
    model = wrap(net)
    assert model.optimizer.param_groups[0]["params"][0] is params[0]
    assert_trains_like(model, eager)
    assert all(one is other for one, other in zip(params, net.parameters(), strict=True))
    assert len(model.plan.spec.backward_packs) > 1


def test_the_drop_in_form(vgpus: VirtualGPUs) -> None:
    """The same as of an eager build, with an optimizer that was made before the first batch."""
    trained = []
    for net in gpt_both_ways():
        model = harmony.Harmony(net, mode="pp", microbatch_size=2, devices=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            inputs, targets = token_batch(step)
            optimizer.zero_grad()
            token_loss(model(inputs), targets).backward()
            optimizer.step()
        trained.append(params_of(net))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_evaluation_first(vgpus: VirtualGPUs) -> None:
    eager, net = gpt_both_ways()
    inputs, _ = token_batch(0)
    model = harmony.Harmony(net.eval(), microbatch_size=2, devices=1)
    with torch.no_grad():
        expected = torch.cat([eager.eval()(part) for part in inputs.split(2)])
        assert torch.equal(model(inputs), expected)


def test_tied_weights(vgpus: VirtualGPUs) -> None:
    """Against a Harmony model that was built with memory: the order of sums is the same."""
    models = [wrap(net) for net in gpt_both_ways(tied=True)]
    for step in range(3):
        losses = [model.train_step(*token_batch(step)) for model in models]
        assert torch.equal(*losses)
    assert models[1].module.head.weight is models[1].module.tokens.weight
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_some_parameters_with_memory_and_some_without(vgpus: VirtualGPUs) -> None:
    eager, net = gpt_both_ways()
    net.blocks[1] = copy.deepcopy(eager.blocks[1])
    net.norm = copy.deepcopy(eager.norm)
    assert_trains_like(wrap(net), eager)


def test_the_state_dict_before_and_after_the_first_batch(vgpus: VirtualGPUs) -> None:
    eager, net = gpt_both_ways()
    model = wrap(net)
    assert all(value.is_meta for value in model.state_dict().values())
    model.train_step(*token_batch(0))
    assert not any(value.is_meta for value in model.state_dict().values())
    assert model.state_dict().keys() == eager.state_dict().keys()


def test_a_missing_value_is_named_before_anything_is_trained(vgpus: VirtualGPUs) -> None:
    with harmony.meta_init():
        net = GPT()
        net.norm.bias = nn.Parameter(torch.empty(32))
    model = wrap(net)
    with pytest.raises(ConfigError, match="nothing gives a value to norm"):
        model.train_step(*token_batch(0))
    assert model.num_steps == 0
    assert all(param.is_meta for param in net.parameters())


def saved_safetensors(net: nn.Module, directory: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(net.state_dict(), directory / "weights.safetensors")
    return directory / "weights.safetensors"


def saved_by_torch(net: nn.Module, directory: Path) -> Path:
    torch.save(net.state_dict(), directory / "weights.pt")
    return directory / "weights.pt"


@pytest.mark.parametrize("save", [saved_safetensors, saved_by_torch])
@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_of_a_file(
    vgpus: VirtualGPUs,
    tmp_path: Path,
    save: Callable[[nn.Module, Path], Path],
    when: str,
) -> None:
    """Read when the parameters are placed, or straight into their place if they are."""
    torch.manual_seed(5)
    eager, (_, net) = GPT(), gpt_both_ways()
    path = save(eager, tmp_path)
    model = wrap(net)
    if when == "after":
        with torch.no_grad():
            model.eval()
            model(token_batch(0)[0])
            model.train()
        assert not any(p.is_meta for p in net.parameters())
    harmony.load_pretrained(model, path)
    assert_trains_like(model, eager)


def test_a_file_that_was_cut_off_meanwhile_changes_nothing(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    eager, net = gpt_both_ways()
    path = saved_safetensors(eager, tmp_path)
    model = wrap(net)
    harmony.load_pretrained(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=r"has been changed.*no parameter has been changed"):
        model.train_step(*token_batch(0))
    assert all(param.is_meta for param in net.parameters())
    path.write_bytes(whole)
    harmony.load_pretrained(model, path)
    assert_trains_like(model, eager)
