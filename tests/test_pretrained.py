"""Weights of files: the same values as PyTorch and transformers load, or a clear refusal."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.errors import ConfigError
from harmony.weights.checkpoint_files import open_checkpoint

safetensors = pytest.importorskip("safetensors.torch")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.image = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight


def saved(net: nn.Module, path: Path, **more: torch.Tensor) -> Path:
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state.update(more)
    if path.suffix == ".safetensors":
        state.pop("head.weight", None)
        safetensors.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    for (name, expected), (_, found) in pairs:
        assert torch.equal(expected, found), name


@pytest.fixture
def source() -> Net:
    torch.manual_seed(1)
    net = Net()
    net.norm.running_mean.normal_()
    return net


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "any.pt"])
@pytest.mark.parametrize("meta", [True, False])
def test_a_plain_module_gets_the_values(
    tmp_path: Path, source: Net, name: str, meta: bool
) -> None:
    path = saved(source, tmp_path / name)
    if meta:
        with harmony.meta_init():
            net = Net()
    else:
        net = Net()
    params = list(net.parameters())
    loaded = harmony.load_pretrained(net, path if name == "any.pt" else tmp_path)
    assert loaded == ((), ())
    assert_same_state(source, net)
    assert all(one is other for one, other in zip(params, net.parameters(), strict=True))


def test_other_layouts_in_memory_get_the_values(tmp_path: Path, source: Net) -> None:
    path = saved(source, tmp_path / "model.safetensors")
    net = Net().to(memory_format=torch.channels_last)
    harmony.load_pretrained(net, path)
    assert_same_state(source, net)
    assert not net.image.weight.is_contiguous()


def test_values_are_converted_to_the_type_of_the_parameter(tmp_path: Path, source: Net) -> None:
    half = Net()
    half.load_state_dict(source.state_dict())
    half = half.to(torch.bfloat16)
    path = saved(half, tmp_path / "model.safetensors")
    net = Net()
    harmony.load_pretrained(net, path)
    assert net.body.weight.dtype == torch.float32
    assert torch.equal(net.body.weight, half.body.weight.float())


def test_what_is_missing_is_initialised_if_not_strict(tmp_path: Path, source: Net) -> None:
    path = saved(source, tmp_path / "model.safetensors", extra=torch.ones(2))
    state = safetensors.load_file(path)
    del state["body.bias"]
    safetensors.save_file(state, path)
    with harmony.meta_init():
        net = Net()
    with pytest.raises(ConfigError, match=r"1 missing in the file: body\.bias; 1 not in .*extra"):
        harmony.load_pretrained(net, path)
    assert net.body.weight.is_meta
    loaded = harmony.load_pretrained(net, path, strict=False)
    assert loaded == (("body.bias",), ("extra",))
    assert torch.equal(net.body.weight, source.body.weight)
    assert 0 < net.body.bias.abs().max() <= 0.5


def test_wrong_shapes_and_kinds_are_all_named(tmp_path: Path, source: Net) -> None:
    wrong = {"body.bias": torch.ones(5), "body.weight": torch.ones(4, 4, dtype=torch.int32)}
    path = saved(source, tmp_path / "model.safetensors", **wrong)
    net = Net()
    before = net.table.weight.detach().clone()
    message = r"body.weight is torch.float32, in the file torch.int32; body.bias has shape \(4,\)"
    with pytest.raises(ConfigError, match=message):
        harmony.load_pretrained(net, path, strict=False)
    assert torch.equal(before, net.table.weight)


def test_tied_parameters_that_differ_in_the_file_are_refused(tmp_path: Path, source: Net) -> None:
    path = saved(source, tmp_path / "any.pt", **{"head.weight": torch.ones(7, 4)})
    with pytest.raises(ConfigError, match=r"table.weight and head.weight are tied, but differ"):
        harmony.load_pretrained(Net(), path)


# Damaged files


def test_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        harmony.load_pretrained(Net(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has none of model\.safetensors"):
        harmony.load_pretrained(Net(), tmp_path)


@pytest.mark.parametrize("name", ["any.safetensors", "any.pt"])
@pytest.mark.parametrize("keep", [0, 5, 60, -10])
def test_truncated_files_are_refused(tmp_path: Path, source: Net, name: str, keep: int) -> None:
    path = saved(source, tmp_path / name)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="is damaged, or not a"):
        open_checkpoint(path)


def header(entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        header([1, 2]) + bytes(16),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}}) + bytes(16),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}) + bytes(16),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}}) + bytes(16),
        header({"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}) + bytes(16),
        header({"a": {"dtype": "F32", "shape": [2]}}) + bytes(16),
        header({"a": 3}) + bytes(16),
        struct.pack("<Q", 1 << 60) + bytes(16),
        b"\x05\x00\x00\x00\x00\x00\x00\x00{nope" + bytes(16),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged, or not a safetensors file"):
        open_checkpoint(path)


def test_a_checkpoint_that_is_no_state_dict_is_refused(tmp_path: Path, source: Net) -> None:
    torch.save({"model": source.state_dict(), "step": 3}, tmp_path / "any.pt")
    with pytest.raises(ConfigError, match=r"a dict of \['model', 'step'\], not a state dict"):
        open_checkpoint(tmp_path / "any.pt")
    torch.save(source, tmp_path / "any.pt")
    with pytest.raises(ConfigError, match="holds more than tensors"):
        open_checkpoint(tmp_path / "any.pt")


def test_an_index_without_its_shards_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    with pytest.raises(ConfigError, match="1 files that are not there"):
        open_checkpoint(tmp_path)
    index.write_text("[]")
    with pytest.raises(ConfigError, match="not an index of shards"):
        open_checkpoint(tmp_path)


# Hugging Face

transformers = pytest.importorskip("transformers")


def llama_config(**more: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **more,
    )


def assert_loads_like(
    kind: Any, config: Any, directory: Path, loaded: nn.Module | None = None
) -> None:
    expected = kind.from_pretrained(directory) if loaded is None else loaded
    with harmony.meta_init():
        net = kind(config)
    harmony.load_pretrained(net, directory)
    assert_same_state(expected, net)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_saved_models_load_as_transformers_loads_them(
    tmp_path: Path, tied: bool, shard: str
) -> None:
    config = llama_config(tie_word_embeddings=tied)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    assert_loads_like(transformers.LlamaForCausalLM, config, tmp_path)


def gpt2(directory: Path) -> None:
    config = transformers.GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4)
    transformers.GPT2Model(config).save_pretrained(directory)
    assert_loads_like(transformers.GPT2LMHeadModel, config, directory)  # the head is tied


def llama(directory: Path) -> None:
    transformers.LlamaForCausalLM(llama_config()).save_pretrained(directory)
    net = transformers.LlamaModel(llama_config())
    loaded = harmony.load_pretrained(net, directory, strict=False)
    assert loaded.unexpected == ("lm_head.weight",)
    assert_same_state(transformers.LlamaModel.from_pretrained(directory), net)


@pytest.mark.parametrize("check", [gpt2, llama])
def test_prefixes_of_base_models(tmp_path: Path, check: Callable[[Path], None]) -> None:
    check(tmp_path)


def test_a_new_head_is_initialised_and_named(tmp_path: Path) -> None:
    transformers.LlamaModel(llama_config()).save_pretrained(tmp_path)
    with harmony.meta_init():
        net = transformers.LlamaForSequenceClassification(llama_config(num_labels=3))
    with pytest.raises(ConfigError, match=r"1 missing in the file: score\.weight"):
        harmony.load_pretrained(net, tmp_path)
    loaded = harmony.load_pretrained(net, tmp_path, strict=False)
    assert loaded.missing == ("score.weight",)
    assert 0.005 < net.score.weight.std() < 0.05  # initializer_range is 0.02


def test_models_that_transformers_converts_are_refused(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    net = transformers.MixtralForCausalLM(config)
    net.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="load the model with its from_pretrained"):
        harmony.load_pretrained(transformers.MixtralForCausalLM(config), tmp_path)
    torch.save(net.state_dict(), tmp_path / "as_it_is.pt")
    assert_loads_like(
        transformers.MixtralForCausalLM, config, tmp_path / "as_it_is.pt", loaded=net
    )
