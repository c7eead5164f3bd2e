"""``model.generate()`` of Hugging Face models whose parameters are streamed."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.capture import StreamedModule
from tests import devices

from .conftest import VirtualGPUs

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

HOW: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "without a cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled": {"do_sample": True, "temperature": 0.9},
}


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=97,
        n_positions=64,
        n_embd=64,
        n_layer=4,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_what_is_generated_is_what_plain_pytorch_generates(make: Any, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = make().eval()
    plain = copy.deepcopy(net)
    weights = sum(param.nbytes for param in net.parameters())
    vgpus(count=1, memory=weights * 3 // 4)  # one leaf at a time is all that has to fit
    before = torch.accelerator.memory_allocated(0)
    model = harmony.Harmony(net, devices=1)
    ids = torch.randint(3, 97, (1, 5))
    for how in HOW.values():
        made = []
        for one in (model, plain):
            torch.manual_seed(7)
            made.append(one.generate(ids, max_new_tokens=6, pad_token_id=0, **how))
        assert torch.equal(*made)
    assert torch.accelerator.memory_allocated(0) == before
    assert "forward" not in net.__dict__


def test_training_goes_on_after_generating(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = gpt2()
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2, mode="pp", device_memory="640KiB")
    ids = torch.randint(3, 97, (1, 5))
    for one in (model, plain):
        one.eval()
        one.generate(ids, max_new_tokens=3, pad_token_id=0)
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        one.generate(ids, max_new_tokens=3, pad_token_id=0)
    for (name, param), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(param.grad, other.grad, rtol=0, atol=1e-6), name


def test_a_model_without_generate_has_none(vgpus: VirtualGPUs) -> None:
    assert not hasattr(harmony.Harmony(nn.Linear(3, 3), devices=1), "generate")


def test_streamed_forwards_keep_what_they_change(vgpus: VirtualGPUs) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    plain = copy.deepcopy(net)
    streamed = StreamedModule(net, devices.device())
    x = torch.randn(4, 8)
    for _ in range(2):
        assert torch.equal(streamed(x), plain(x))
    for name, buffer in plain.named_buffers():
        assert torch.equal(net.get_buffer(name), buffer), name
