"""Hugging Face GPT-2 and Llama, built from a config with random weights, losses inside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.plain import gradients_of, params_of

transformers = pytest.importorskip("transformers")

VOCAB = 67


def gpt2(tied: bool) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=32,
        n_layer=4,
        n_head=4,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def llama(tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def batch(step: int, masked: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (8, 12), generator=generator)
    found = {"input_ids": ids, "labels": ids.clone()}
    if masked:
        found["attention_mask"] = torch.ones_like(ids)
        found["attention_mask"][:, -2:] = 0
    return found


def train_plainly(
    net: nn.Module, batches: list[Any], shares: int, first_step: int = 0
) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    losses, gradients = [], []
    for step, inputs in enumerate(batches, first_step):
        total = torch.zeros(())
        partial = []
        for share in range(shares):
            optimizer.zero_grad()
            for index in range(share * 4 // shares, (share + 1) * 4 // shares):
                torch.manual_seed(harmony.microbatch_seed(step, index))
                part = {key: value[2 * index : 2 * index + 2] for key, value in inputs.items()}
                loss = net(**part).loss
                (loss * 0.25).backward()
                total = total + loss.detach() * 0.25
            partial.append([p.grad for p in net.parameters()])
        for i, param in enumerate(net.parameters()):
            param.grad = partial[0][i]
            for grads in partial[1:]:
                param.grad.add_(grads[i])
        gradients.append(gradients_of(net))
        optimizer.step()
        losses.append(total)
    return losses, gradients


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(("mode", "num_devices"), [("pp", 1), ("pp", 2), ("dp", 2)])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_training(
    vgpus: VirtualGPUs, make: Any, mode: str, num_devices: int, masked: bool
) -> None:
    torch.manual_seed(0)
    net = make(tied=False).train()
    twin = copy.deepcopy(net)
    batches = [batch(step, masked) for step in range(4)]
    expected = train_plainly(twin, batches, num_devices if mode == "dp" else 1)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        updates="host",
        optimizer_kwargs={"lr": 0.1, "momentum": 0.9},
        mode=mode,
        microbatch_size=2,
        devices=num_devices,
        device_memory="400KiB",
    )
    for step, inputs in enumerate(batches):
        assert torch.equal(model.train_step(inputs), expected[0][step]), step
        for name, gradient in gradients_of(net).items():
            assert torch.equal(gradient, expected[1][step][name]), (step, name)
    assert len(model.plan.spec.backward_packs) > 1
    values = params_of(twin)
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_tied_weights(vgpus: VirtualGPUs, make: Any) -> None:
    """Pack by pack, the head's uses are added up before the embedding's: another order."""
    torch.manual_seed(0)
    net = make(tied=True).train()
    twin = copy.deepcopy(net)
    batches = [batch(step, True) for step in range(3)]
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        updates="host",
        optimizer_kwargs={"lr": 0.1, "momentum": 0.9},
        mode="pp",
        microbatch_size=2,
        devices=2,
        device_memory="400KiB",
    )
    for step, inputs in enumerate(batches):
        model.load_state_dict(twin.state_dict())
        (loss,), (expected,) = train_plainly(twin, [inputs], 1, first_step=step)
        assert torch.equal(model.train_step(inputs), loss)
        for name, gradient in gradients_of(net).items():
            worst = (gradient - expected[name]).abs().max()
            assert worst <= 2e-7 * expected[name].abs().max(), (step, name)
