"""Models built without memory get, bit for bit, what the eager construction would have given."""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import harmony
from harmony.errors import ConfigError
from harmony.weights import meta_init as bigmodel

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Scaled(nn.Module):
    """Initialises in the ways of models that people write."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=2)
        self.position = nn.Parameter(torch.randn(1, 5, 8) * 0.02)
        self.gain = nn.Parameter(torch.ones(8))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)), persistent=False)
        self.apply(self._init)
        for index, block in enumerate(self.blocks):
            nn.init.normal_(block.weight, std=0.02 / math.sqrt(2 * (index + 1)))

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.uniform_(-0.1, 0.1)
            module.weight.data[module.padding_idx].zero_()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.position
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.gain
        return self.head(self.norm(x))


class InitFunctions(nn.Module):
    """The functions of ``torch.nn.init`` that do nothing on meta, or look at what they drew."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.conv = nn.Conv2d(4, 4, 3)
        nn.init.trunc_normal_(self.a.weight, std=0.5, a=-0.4, b=0.4)
        nn.init.orthogonal_(self.b.weight, gain=2.0)
        nn.init.sparse_(self.c.weight, 0.3)
        nn.init.dirac_(self.conv.weight)
        nn.init.kaiming_normal_(self.conv.weight[:2], nonlinearity="relu")
        nn.init.constant_(self.a.bias, 0.5)
        self.made = nn.Parameter(nn.init.trunc_normal_(torch.zeros(3, 5), std=1.0, a=-1, b=1))
        self.eye = nn.Parameter(nn.init.eye_(torch.empty(4, 4)))


class ByHand(nn.Module):
    """Parameters filled, converted, shared and replaced by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.half = nn.Linear(4, 4).to(torch.bfloat16)
        both = nn.Parameter(torch.randn(3, 3))
        self.one, self.inner = both, nn.Module()
        self.inner.two = both
        early = torch.empty(4, 4)
        self.early = nn.Parameter(early)
        nn.init.normal_(early)
        self.frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.parts = nn.ParameterList(nn.Parameter(torch.rand(3)) for _ in range(3))
        self.set = nn.Linear(3, 3)
        self.set.weight.data = torch.eye(3) * 2
        self.set.bias.data = torch.tensor([1.0, 2.0, 3.0])
        self.turned = nn.Linear(3, 3)
        self.turned.weight.data = self.turned.weight.data.t() * 2
        self.last = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        with torch.no_grad():
            self.set.weight[0:2].add_(torch.arange(3.0))
            self.turned.bias.copy_(self.parts[0])
        generator = torch.Generator().manual_seed(9)
        self.own = nn.Parameter(torch.randn(4, generator=generator))
        nn.init.normal_(self.turned.bias, generator=generator)
        loose = torch.zeros(4)
        loose.numpy()[:] = 7.0
        self.loose = nn.Parameter(loose)
        rejected = torch.randn(6)
        while bool((rejected.abs() > 1).any()):
            rejected = torch.where(rejected.abs() > 1, torch.randn(6), rejected)
        self.rejected = nn.Parameter(rejected)


class Library(nn.Module):
    """Modules of PyTorch that copy layers, compute parameters, or watch them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.weighted = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        self.attention = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.GRU(4, 5, 2)
        self.convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def both_ways(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return the module built eagerly and built without memory, from the same seed."""
    torch.manual_seed(3)
    eager = make()
    torch.manual_seed(3)
    with harmony.meta_init():
        meta = make()
    return eager, meta


def assert_same_parameters(one: nn.Module, other: nn.Module, but: tuple[str, ...] = ()) -> None:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    for (name, expected), (other_name, found) in pairs:
        assert name == other_name
        if name not in but:
            assert torch.equal(expected, found), name
        assert (expected.dtype, expected.requires_grad) == (found.dtype, found.requires_grad), name


@pytest.mark.parametrize("make", [Scaled, InitFunctions, Library])
def test_values_are_those_of_an_eager_construction(make: Callable[[], nn.Module]) -> None:
    eager, meta = both_ways(make)
    assert all(param.is_meta for param in meta.parameters())
    assert harmony.materialise(meta) is meta
    assert_same_parameters(eager, meta)


def test_values_made_by_hand_are_those_of_an_eager_construction() -> None:
    """Content that Python has looked at stays as it was drawn."""
    eager, meta = both_ways(ByHand)
    assert all(param.is_meta for param in meta.parameters())
    harmony.materialise(meta)
    assert meta.rejected.abs().max() <= 1
    assert_same_parameters(eager, meta, but=("rejected",))
    assert meta.one is meta.inner.two
    assert eager.last.weight.stride() == meta.last.weight.stride()


def test_buffers_are_real() -> None:
    eager, meta = both_ways(Scaled)
    assert torch.equal(eager.mask, meta.mask)


def test_parameters_stay_the_same_objects() -> None:
    _, meta = both_ways(Scaled)
    before = dict(meta.named_parameters())
    optimizer = torch.optim.AdamW(meta.parameters(), fused=True)
    harmony.materialise(meta)
    assert all(param is before[name] for name, param in meta.named_parameters())
    assert meta.head.weight is meta.table.weight
    meta(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
    optimizer.step()
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"cpu"}


def test_attributes_and_hooks_of_parameters_survive() -> None:
    _, meta = both_ways(Scaled)
    seen: list[str] = []
    meta.gain.learning_rate = 0.5
    meta.gain.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    meta.norm.bias.register_hook(lambda gradient: seen.append("computed"))
    harmony.materialise(meta)
    assert meta.gain.learning_rate == 0.5
    meta(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
    assert sorted(seen) == ["accumulated", "computed"]


def test_the_seed_decides_what_is_drawn() -> None:
    def build(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with harmony.meta_init():
            net = nn.Linear(4, 4)
        torch.rand(100)  # what happens in between does not matter
        return harmony.materialise(net).weight

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))


def test_materialising_leaves_the_random_state_alone() -> None:
    _, meta = both_ways(Scaled)
    state = torch.get_rng_state()
    harmony.materialise(meta)
    assert torch.equal(state, torch.get_rng_state())


def test_other_tensors_do_not_repeat_the_parameters_random_numbers() -> None:
    with harmony.meta_init():
        other = torch.randn(4, 4)
        net = nn.Linear(4, 4, bias=False)
        nn.init.normal_(net.weight)
        after = torch.randn(4, 4)
    later = torch.randn(4, 4)
    drawn = [other, harmony.materialise(net).weight, after, later]
    for index, one in enumerate(drawn):
        assert not any(torch.equal(one, another) for another in drawn[index + 1 :])


def test_two_models_of_one_context_are_drawn_apart() -> None:
    with harmony.meta_init():
        one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    harmony.materialise(one)
    harmony.materialise(two)
    assert not torch.equal(one.weight, two.weight)
    assert one.weight.abs().max() <= 0.5


def test_only_this_thread_builds_without_memory() -> None:
    built: list[nn.Linear] = []
    with harmony.meta_init():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert not built[0].weight.is_meta


def test_contexts_nest_and_are_undone_by_an_error() -> None:
    with harmony.meta_init():
        with harmony.meta_init():
            inner = nn.Linear(2, 2)
        outer = nn.Linear(2, 2)
    assert inner.weight.is_meta
    assert outer.weight.is_meta
    with pytest.raises(ZeroDivisionError), harmony.meta_init():
        _ = 1 / 0
    assert not nn.Linear(2, 2).weight.is_meta


def test_parameters_take_no_memory() -> None:
    with harmony.meta_init():
        net = nn.Sequential(*(nn.Linear(1 << 16, 1 << 16) for _ in range(8)))
    assert sum(p.nbytes for p in net.parameters()) > 1 << 36


def test_notes_go_with_the_model() -> None:
    with harmony.meta_init():
        net = nn.Linear(4, 4)
    keys = {bigmodel.key_of(param) for param in net.parameters()}
    assert keys <= bigmodel._SOURCES.keys()
    del net
    gc.collect()
    bigmodel.remember({})
    assert not keys & bigmodel._SOURCES.keys()


def test_a_state_dict_finds_room() -> None:
    """`load_state_dict` alone does nothing for a parameter on meta, and only warns."""
    eager, meta = both_ways(Scaled)
    gain = meta.gain
    bigmodel.make_room(meta, {**eager.state_dict(), "gain": torch.ones(9)})
    assert gain.is_meta  # it would not fit, so the value to come is kept
    bigmodel.make_room(meta, eager.state_dict())
    meta.load_state_dict(eager.state_dict())
    assert meta.gain is gain
    assert_same_parameters(eager, meta)


def test_buffers_in_the_form_of_a_parameter_are_real() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("mean", torch.zeros_like(self.layer.weight))
            self.register_buffer("count", self.layer.weight.new_ones(2, dtype=torch.long))
            self.scale = nn.Parameter(torch.empty_like(self.layer.bias).uniform_(1, 2))

    eager, meta = both_ways(Averaged)
    assert torch.equal(meta.mean, torch.zeros(3, 3))
    assert torch.equal(meta.count, torch.ones(2, dtype=torch.long))
    assert meta.scale.is_meta
    harmony.materialise(meta)
    assert_same_parameters(eager, meta)


# What cannot be


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = float(self.layer.weight.detach().abs().max())


class Derived(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("start", self.layer.weight.detach().clone())


class Special(torch.Tensor):
    pass


def test_a_construction_that_reads_a_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match="values of a parameter"), harmony.meta_init():
        Reads()


def test_a_buffer_computed_from_parameters_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"buffer Derived\.start"), harmony.meta_init():
        Derived()


def test_lazy_modules_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"LazyLinear\.weight gets its shape"):  # noqa: SIM117
        with harmony.meta_init():
            nn.LazyLinear(3)


def test_special_tensors_are_refused_by_name() -> None:
    module = nn.Module()
    with pytest.raises(ConfigError, match=r"Module\.weight is a Special"):  # noqa: SIM117
        with harmony.meta_init():
            module.weight = nn.Parameter(torch.ones(3).as_subclass(Special))


def test_a_parameter_that_nothing_initialises_is_named_and_nothing_changes() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Linear(2, 2)
            self.forgotten = nn.Parameter(torch.empty(3))

    with harmony.meta_init():
        net = Careless()
    with pytest.raises(ConfigError, match="nothing gives a value to forgotten:"):
        harmony.materialise(net)
    assert net.fine.weight.is_meta


def test_a_copy_made_outside_is_not_given_other_values_silently() -> None:
    with harmony.meta_init():
        net = Scaled()
    with pytest.raises(ConfigError, match=r"position, gain.*inside the context"):
        harmony.materialise(copy.deepcopy(net))


def test_a_change_of_dtype_outside_is_refused() -> None:
    with harmony.meta_init():
        net = nn.Linear(3, 3)
    net.to(torch.bfloat16)
    with pytest.raises(ConfigError, match="weight was changed after"):
        harmony.materialise(net)


def test_lost_buffers_are_named() -> None:
    with torch.device("meta"):
        net = nn.BatchNorm1d(3)
    with pytest.raises(ConfigError, match="buffer running_mean"):
        harmony.materialise(net)


def test_tensors_computed_from_parameters_are_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with harmony.meta_init():
            net = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ConfigError, match=r"0\.weight is a tensor computed from parameters"):
        harmony.materialise(net)


def test_parameters_of_the_meta_device_are_initialised_by_convention_with_a_warning() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2))
    net[0].bias = nn.Parameter(torch.full((4,), 3.0))
    with pytest.warns(UserWarning, match=r"0\.weight.*outside of harmony\.meta_init"):
        harmony.materialise(net)
    assert torch.equal(net[0].bias, torch.full((4,), 3.0))  # it had a value
    assert 0 < net[0].weight.abs().max() <= 0.5
    assert torch.equal(net[1].weight, torch.ones(4))
    assert net[2].in_proj_weight.abs().max() > 0


# Hugging Face


def _huggingface() -> dict[str, Callable[[], nn.Module]]:
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    wide = {**small, "intermediate_size": 64}
    decoder = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "vocab_size": 67}
    tokens = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}

    def make(kind: str, config: str, **options: object) -> Callable[[], nn.Module]:
        return lambda: getattr(transformers, kind)(getattr(transformers, config)(**options))

    llama = transformers.LlamaConfig(vocab_size=67, **wide)
    gpt2 = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, **tokens}
    experts = {"vocab_size": 67, "num_key_value_heads": 2, "num_local_experts": 4}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    whisper = {**decoder, **heads, **tokens, "decoder_start_token_id": 1}
    return {
        "llama": make("LlamaForCausalLM", "LlamaConfig", vocab_size=67, **wide),
        "llama-bf16": lambda: transformers.AutoModelForCausalLM.from_config(
            llama, dtype=torch.bfloat16
        ),
        "gpt2": make("GPT2LMHeadModel", "GPT2Config", **gpt2),
        "bert": make("BertForMaskedLM", "BertConfig", vocab_size=67, **wide),
        "t5": make("T5ForConditionalGeneration", "T5Config", vocab_size=67, d_model=32, d_kv=8),
        "vit": make("ViTForImageClassification", "ViTConfig", image_size=32, **wide),
        "whisper": make("WhisperForConditionalGeneration", "WhisperConfig", **whisper),
        "mixtral": make("MixtralForCausalLM", "MixtralConfig", **experts, **wide),
        "mamba": make("MambaForCausalLM", "MambaConfig", vocab_size=67, hidden_size=32),
    }


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-bf16", "gpt2", "bert", "t5", "vit", "whisper", "mixtral", "mamba"],
)
def test_hugging_face_models_get_the_values_of_an_eager_construction(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager, meta = both_ways(_huggingface()[name])
    assert all(param.is_meta for param in meta.parameters())
    harmony.materialise(meta)
    assert_same_parameters(eager, meta)
    buffers = zip(eager.named_buffers(), meta.named_buffers(), strict=True)
    assert all(torch.equal(expected, found) for (_, expected), (_, found) in buffers)


# Memory

_PEAK = """
import torch
from torch import nn
import harmony
from harmony.weights.meta_init import materialise
from harmony.capture import capture
from harmony.runtime.host.arena import HostArena
from harmony.runtime.host.arena_layout import ArenaLayout

torch.set_num_threads(1)
with harmony.meta_init():
    net = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(20)))
{wrap}
captured = capture(net, (torch.zeros(2, 2048),))
layout = ArenaLayout(captured.params, captured.graph.num_layers, 0)
nn.Linear(64, 64)(torch.zeros(2, 64)).sum().backward()
def status(key):
    line = next(x for x in open("/proc/self/status") if x.startswith(key + ":"))
    return int(line.split()[1]) * 1024
now = status("VmRSS")
assert status("VmHWM") - now < 50e6
{load}
arena = HostArena(layout, None, "the weights")
arena.adopt(net, materialise)
peak = status("VmHWM") - now
assert all(float(param.abs().max()) > 0 for param in net.parameters())
print(layout.nbytes, max(p.nbytes for p in net.parameters()), peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("source", ["built", "safetensors"])
def test_peak_memory_is_the_arena_and_one_layer(source: str, tmp_path: Path) -> None:
    wrap = load = ""
    if source == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        net = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(20)))
        safetensors.save_file(net.state_dict(), tmp_path / "model.safetensors")
        del net
        wrap = "model = harmony.Harmony(net)"
        load = f"harmony.load_pretrained(model, {str(tmp_path)!r})"
    script = _PEAK.replace("{wrap}", wrap).replace("{load}", load)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    arena, layer, peak = map(int, done.stdout.split()[-3:])
    assert arena > 300e6
    assert peak <= arena + layer + 40e6
