"""Models of transformers on the CUDA path equal plain PyTorch there, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

import harmony
from tests.devices import on_real_gpus
from tests.training.plain import computing

pytestmark = on_real_gpus

transformers = pytest.importorskip("transformers")


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":  # with its dropout of 0.1
        config = transformers.GPT2Config(
            n_embd=64,
            n_layer=3,
            n_head=4,
            vocab_size=200,
            n_positions=64,
            # Two uses of one weight are added in another order than by plain PyTorch where a
            # plan has them in two packs.
            tie_word_embeddings=False,
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        max_position_embeddings=64,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_of_transformers_trains_on_two_gpus_as_plain_pytorch(kind: str) -> None:
    net = make(kind).train()
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.05},
        microbatch_size=2,
        mode="pp",
        device_memory="4MiB",
        updates="host",
        devices=2,
    )
    for step in range(2):
        ids = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        total = torch.zeros(())
        with computing(twin, torch.device("cuda:0")) as there:
            for index in range(2):
                harmony.seed_microbatch(step, index)
                rows = ids[2 * index : 2 * index + 2].to(there)
                loss = twin(input_ids=rows, labels=rows).loss / 2
                loss.backward()
                total += loss.detach().cpu()
        optimizer.step()
        assert float(model.train_step({"input_ids": ids, "labels": ids})) == float(total)
    assert model.plan is not None and len(model.plan.spec.backward_packs) > 1
    for (name, found), expected in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected), name
