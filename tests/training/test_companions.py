"""What stands beside the weights of a checkpoint: configurations and tokenizers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import harmony
from harmony.errors import ConfigError
from tests.training.conftest import VirtualGPUs

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<unk>", "<eos>", "the", "step", "is", "saved"]


def tokenizer() -> Any:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<eos>"
    )
    found.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    return found


@pytest.fixture
def model(vgpus: VirtualGPUs) -> harmony.Harmony:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=16,
        vocab_size=len(WORDS),
        n_positions=16,
        bos_token_id=1,
        eos_token_id=1,
    )
    net = transformers.GPT2LMHeadModel(config)
    net.generation_config.max_new_tokens = 3
    made = harmony.Harmony(net, optimizer=torch.optim.SGD, optimizer_kwargs={"lr": 0.1})
    ids = torch.randint(len(WORDS), (4, 8))
    made.train_step({"input_ids": ids, "labels": ids})
    return made


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("is_own", [True, False], ids=["of the module", "given"])
def test_hugging_face_reads_model_and_tokenizer_from_the_folder(
    model: harmony.Harmony, tmp_path: Path, is_own: bool
) -> None:
    given = {} if is_own else {"tokenizer": tokenizer()}
    if is_own:
        model.module.tokenizer = tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = model.save_checkpoint(tmp_path / "run", **given)
    tokenizer().save_pretrained(tmp_path / "beside")
    beside, written = files(tmp_path / "beside"), files(folder)
    assert {"tokenizer.json", "additional_chat_templates/tools.jinja"} <= beside.keys()
    assert beside.items() <= written.items()
    read = transformers.AutoTokenizer.from_pretrained(folder)
    assert read("the step is lost")["input_ids"] == [2, 3, 4, 0]
    assert read.chat_template == tokenizer().chat_template
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert again.generation_config.max_new_tokens == 3
    state = model.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    for names in ({}, given):  # nothing of a tokenizer is brought back
        assert model.load_checkpoint(tmp_path / "run", **names).step == 1


def test_a_run_writes_the_files_of_its_tokenizer(model: harmony.Harmony, tmp_path: Path) -> None:
    with harmony.Run(model, tmp_path, every=1, save_on_error=True, tokenizer=tokenizer()) as run:
        run.resume()
        ids = torch.randint(len(WORDS), (4, 8))
        for _ in range(2):
            model.train_step({"input_ids": ids, "labels": ids})
            run.step()
    newest = max(tmp_path.glob("step-*"))
    assert transformers.AutoTokenizer.from_pretrained(newest)("saved")["input_ids"] == [5]


def test_damaged_files_of_a_tokenizer_are_refused(model: harmony.Harmony, tmp_path: Path) -> None:
    folder = model.save_checkpoint(tmp_path, tokenizer=tokenizer())
    for name in ("tokenizer.json", "additional_chat_templates/tools.jinja"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(ConfigError, match=rf"{name} has {len(whole) - 1} bytes"):
            model.load_checkpoint(tmp_path)
        (folder / name).write_bytes(whole)
    assert model.load_checkpoint(tmp_path).step == 1


class Writes:
    """Something like a processor."""

    def __init__(self, name: str) -> None:
        self._name = name

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / self._name).write_text("{}")


def test_a_file_that_two_would_write_is_refused(model: harmony.Harmony, tmp_path: Path) -> None:
    for name in ("config.json", "state.json", "model.safetensors"):
        with pytest.raises(ConfigError, match=rf"processor=Writes: it writes {name}"):
            model.save_checkpoint(tmp_path, processor=Writes(name))
    with pytest.raises(ConfigError, match=r"processor=Writes: its save_pretrained\(\) fails"):
        model.save_checkpoint(tmp_path, processor=Writes("no folder/x"))
    assert not any(tmp_path.iterdir())
