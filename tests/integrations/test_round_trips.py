"""What plain PyTorch has saved Harmony goes on from, and the other way round, in every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

import harmony
from tests.integrations.common import VOCABULARY, digest, wrapped
from tests.training.conftest import VirtualGPUs

Pair = tuple[Any, torch.optim.Optimizer]


def made(side: str, seed: int, tied: bool, dtype: torch.dtype) -> Pair:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    net = LlamaForCausalLM(config).to(dtype)
    model: nn.Module = net if side == "plain" else wrapped(net, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def steps(pair: Pair, numbers: range) -> list[torch.Tensor]:
    model, optimizer = pair
    losses = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(VOCABULARY, (4, 8), generator=generator)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def net_of(model: Any) -> Any:
    return model.module if isinstance(model, harmony.Harmony) else model


def save_torch(pair: Pair, folder: Path) -> None:
    torch.save([held.state_dict() for held in pair], folder / "all.pt")


def load_torch(pair: Pair, folder: Path) -> None:
    for held, state in zip(pair, torch.load(folder / "all.pt"), strict=True):
        held.load_state_dict(state)


def save_hugging_face(pair: Pair, folder: Path) -> None:
    net_of(pair[0]).save_pretrained(folder)
    torch.save(pair[1].state_dict(), folder / "optimizer.pt")


def load_hugging_face(pair: Pair, folder: Path) -> None:
    model, optimizer = pair
    if isinstance(model, harmony.Harmony):
        harmony.load_pretrained(model, folder)
    else:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(folder).state_dict())
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))


def prepared(pair: Pair) -> Accelerator:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(*pair)
    return accelerator


def save_dcp(pair: Pair, folder: Path) -> None:
    model, optimizer = get_state_dict(*pair)
    states = {"model": model, "optimizer": optimizer}
    checkpoint.save(states, checkpoint_id=folder, no_dist=True)


def load_dcp(pair: Pair, folder: Path) -> None:
    model, optimizer = get_state_dict(*pair)
    states = {"model": model, "optimizer": optimizer}
    checkpoint.load(states, checkpoint_id=folder, no_dist=True)
    set_state_dict(*pair, model_state_dict=model, optim_state_dict=states["optimizer"])


FORMATS: dict[str, tuple[Callable[[Pair, Path], None], Callable[[Pair, Path], None]]] = {
    "torch": (save_torch, load_torch),
    "hugging face": (save_hugging_face, load_hugging_face),
    "accelerate": (
        lambda pair, folder: prepared(pair).save_state(str(folder)),
        lambda pair, folder: prepared(pair).load_state(str(folder)),
    ),
    "dcp": (save_dcp, load_dcp),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_run_goes_on_on_the_other_side(
    vgpus: VirtualGPUs, tmp_path: Path, form: str, tied: bool, dtype: torch.dtype
) -> None:
    save, load = FORMATS[form]
    whole = made("plain", 0, tied, dtype)
    expected = steps(whole, range(4)), digest(whole[0].state_dict())
    for writer, reader in (("plain", "harmony"), ("harmony", "plain"), ("harmony", "harmony")):
        folder = tmp_path / f"{writer} {reader}"
        folder.mkdir()
        first, second = made(writer, 0, tied, dtype), made(reader, 1, tied, dtype)
        losses = steps(first, range(2))
        save(first, folder)
        steps(second, range(7, 8))  # it has a state of its own by then
        load(second, folder)
        losses += steps(second, range(2, 4))
        assert (losses, digest(second[0].state_dict())) == expected, (writer, reader)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_is_a_folder_of_hugging_face(
    vgpus: VirtualGPUs, tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    model, optimizer = made("harmony", 0, tied, dtype)
    steps((model, optimizer), range(1))
    folder = model.save_checkpoint(tmp_path, optimizer=optimizer)
    plain = LlamaForCausalLM.from_pretrained(folder)
    assert plain.dtype is dtype
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is tied
    assert digest(plain.state_dict()) == digest(model.state_dict())
    again, _ = made("harmony", 1, tied, dtype)
    harmony.load_pretrained(again, folder)
    assert digest(again.state_dict()) == digest(model.state_dict())
