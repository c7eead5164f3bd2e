"""``precision="bf16"``: what FSDP2's mixed precision computes, bit for bit, for any plan."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from harmony.capture.replay.kept_types import names_kept
from harmony.core import options
from harmony.errors import ConfigError
from harmony.planner.ir.tasks import Pack
from harmony.planner.lower.resident import can_stay
from harmony.report.metrics import metrics_of
from tests.toys import chain
from tests.training.conftest import VirtualGPUs
from tests.training.mixed import BF16, in_bf16, train_fsdp, train_plain
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch
from tests.training.plain import Run, gradients_of, params_of
from tests.training.test_exact import assert_same
from tests.zoo.pictures import UNet as NormedByBatch

AdamW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True)
SGD = partial(torch.optim.SGD, lr=1e-1, momentum=0.9, foreach=False)
MAKERS = pytest.mark.parametrize("make", [AdamW, SGD], ids=["adamw", "sgd"])


class UNet(NormedByBatch):
    """With GroupNorm: PyTorch's BatchNorm on the CPU refuses bf16 weights beside fp32 statistics,
    in FSDP2 as anywhere."""

    def __init__(self) -> None:
        super().__init__()
        for module in [*self.modules()]:
            for name, inner in [*module.named_children()]:
                if isinstance(inner, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(2, inner.num_features))


Small = partial(GPT, depth=2)


def tokens(num_steps: int = 3) -> list[Any]:
    return [token_batch(step) for step in range(num_steps)]


def wrapped(net: nn.Module, make: Any = AdamW, **options: Any) -> harmony.Harmony:
    """A model for `train_step`, streamed through little memory, that leaves all gradients."""
    settings: dict[str, Any] = {
        "optimizer": make.func,
        "optimizer_kwargs": make.keywords,
        "loss_fn": token_loss,
        "microbatch_size": 2,
        "devices": 1,
        "device_memory": "200KiB",
        "precision": "bf16",
        "updates": "host",
    }
    return harmony.Harmony(copy.deepcopy(net), **{**settings, **options})


def train_steps(model: harmony.Harmony, batches: list[Any]) -> Run:
    run = Run()
    for inputs, targets in batches:
        run.losses.append(model.train_step(inputs, targets))
        run.gradients.append(gradients_of(model.module))
    run.params = params_of(model.module)
    return run


def train_by_loop(net: nn.Module, batches: list[Any], make: Any, **options: Any) -> Run:
    """A loop of one's own; no random numbers, as its microbatches are Harmony's."""
    model = in_a_loop(copy.deepcopy(net), **options)
    optimizer = make(model.parameters())
    run = Run()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = token_loss(model(inputs), targets)
        loss.backward()
        run.losses.append(loss.detach())
        run.gradients.append(gradients_of(model.module))
        optimizer.step()
    run.params = params_of(model.module)
    return run


def in_a_loop(net: nn.Module, **options: Any) -> harmony.Harmony:
    settings: dict[str, Any] = {"devices": 1, "device_memory": "600KiB", "precision": "bf16"}
    return harmony.Harmony(net, **{**settings, **options})


def seeded(make: Any) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = make()
    return net


# Training steps


@MAKERS
@pytest.mark.parametrize(("mode", "num_devices"), [("pp", 1), ("pp", 2), ("dp", 2)])
def test_a_gpt_with_dropout(vgpus: VirtualGPUs, make: Any, mode: str, num_devices: int) -> None:
    net = seeded(Small)
    shares = num_devices if mode == "dp" else 1
    expected = train_plain(net, tokens(), make, token_loss, microbatch=2, shares=shares)
    model = wrapped(net, make, mode=mode, devices=num_devices)
    assert_same(train_steps(model, tokens()), expected)
    assert len(model.plan.spec.backward_packs) > 1


@MAKERS
def test_a_gpt_is_trained_as_by_fsdp(vgpus: VirtualGPUs, make: Any) -> None:
    net = seeded(Small)
    expected = train_fsdp(net, tokens(10), make, token_loss, microbatch=2)
    assert_same(train_steps(wrapped(net, make), tokens(10)), expected)


def test_a_unet_is_trained_as_by_fsdp(vgpus: VirtualGPUs) -> None:
    net = seeded(UNet)
    generator = torch.Generator().manual_seed(1)
    batches = [
        tuple(torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2)) for _ in range(10)
    ]
    expected = train_fsdp(net, batches, SGD, F.mse_loss, microbatch=2)
    model = wrapped(net, SGD, loss_fn=F.mse_loss, device_memory="600KiB")
    assert_same(train_steps(model, batches), expected)
    plain = train_plain(net, batches, SGD, F.mse_loss, microbatch=2)
    assert_same(plain, expected)


def test_a_llama_is_trained_as_by_fsdp(vgpus: VirtualGPUs) -> None:
    pytest.importorskip("transformers")
    from tests.training.test_huggingface import llama

    net = seeded(lambda: llama(tied=False))
    net.config.attention_dropout = 0.0

    def loss_fn(out: Any, targets: torch.Tensor) -> torch.Tensor:
        return token_loss(out.logits, targets)

    expected = train_fsdp(net, tokens(10), AdamW, loss_fn, microbatch=2)
    model = wrapped(net, loss_fn=loss_fn, device_memory="400KiB")
    assert_same(train_steps(model, tokens(10)), expected)


def test_skips_and_inputs_of_floating_point(vgpus: VirtualGPUs) -> None:
    net = seeded(SkipMLP)
    batches = [vector_batch(step) for step in range(5)]
    expected = train_plain(net, batches, SGD, square_loss, microbatch=4)
    model = wrapped(net, SGD, loss_fn=square_loss, microbatch_size=4, device_memory="24KiB")
    assert_same(train_steps(model, batches), expected)


@MAKERS
def test_clipping(vgpus: VirtualGPUs, make: Any) -> None:
    net = seeded(Small)
    expected = train_plain(net, tokens(), make, token_loss, microbatch=2, clip=0.5)
    model = wrapped(net, make, max_grad_norm=0.5)
    found = train_steps(model, tokens())
    assert_same(found, expected)
    assert model.last_grad_norm.dtype is torch.float32


def test_a_tied_weight_in_one_pack(vgpus: VirtualGPUs) -> None:
    net = seeded(lambda: GPT(tied=True, depth=2))
    expected = train_plain(net, tokens(), SGD, token_loss, microbatch=2)
    model = wrapped(net, SGD, device_memory="8MiB")
    found = train_steps(model, tokens())
    for a, b in zip(found.losses, expected.losses, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=0)


def test_an_embedding_with_sparse_gradients(vgpus: VirtualGPUs) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(61, 8, sparse=True)
            self.head = nn.Linear(8, 61)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    sparse = seeded(Words)
    inputs, targets = token_batch(0)
    expected = torch.zeros(61, 8)
    for low in range(0, 8, 2):  # autograd itself casts no sparse gradient
        held = {name: param.to(BF16) for name, param in sparse.named_parameters()}
        out = torch.func.functional_call(sparse, held, (inputs[low : low + 2],))
        loss = token_loss(out, targets[low : low + 2]) * 0.25
        (gradient,) = torch.autograd.grad(loss, [held["table.weight"]])
        expected.add_(gradient.float())
    found = train_steps(wrapped(sparse, SGD), tokens(1))
    assert torch.equal(found.gradients[0]["table.weight"], expected)


def test_frozen_parameters_and_those_in_bf16_already(vgpus: VirtualGPUs) -> None:
    net = seeded(Small)
    net.blocks[0].to(BF16).requires_grad_(False)
    net.blocks[1].requires_grad_(False)
    expected = train_plain(net, tokens(4), AdamW, token_loss, microbatch=2)
    model = wrapped(net)
    assert_same(train_steps(model, tokens(4)), expected)
    assert model.module.blocks[0].up.weight.dtype is BF16
    assert model.module.blocks[1].up.weight.dtype is torch.float32


# A loop of one's own


@MAKERS
def test_a_loop_of_ones_own(vgpus: VirtualGPUs, make: Any) -> None:
    net = seeded(lambda: Small(dropout=0.0))
    expected = train_plain(net, tokens(), make, token_loss, microbatch=8)
    assert_same(train_by_loop(net, tokens(), make, microbatch_size=8), expected)


def test_a_loop_of_ones_own_that_accumulates(vgpus: VirtualGPUs) -> None:
    net = seeded(lambda: Small(dropout=0.0))
    expected = train_plain(net, tokens(5), AdamW, token_loss, microbatch=2)
    model = in_a_loop(net)
    optimizer = AdamW(model.parameters())
    for step, (inputs, targets) in enumerate(tokens(5)):
        optimizer.zero_grad()
        for low in range(0, 8, 2):
            part = slice(low, low + 2)
            loss = token_loss(model(inputs[part]), targets[part]) * 0.25
            loss.backward()
        assert all(p.grad.dtype is torch.float32 for p in model.parameters())
        assert_gradients(gradients_of(model.module), expected.gradients[step])
        optimizer.step()
    assert_gradients(params_of(model.module), expected.params)


def test_gradients_of_inputs_have_the_inputs_type(vgpus: VirtualGPUs) -> None:
    net = seeded(SkipMLP)
    inputs, targets = vector_batch(0)
    mine, plain = (inputs.clone().requires_grad_() for _ in range(2))
    square_loss(in_bf16(net, plain), targets).backward()
    model = harmony.Harmony(net, devices=1, microbatch_size=8, precision="bf16")
    square_loss(model(mine), targets).backward()
    assert mine.grad.dtype is torch.float32
    assert torch.equal(mine.grad, plain.grad)


# The copies are never stale


def _in_place(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.mul_(1.5)


def _through_data(param: nn.Parameter) -> None:
    param.data.mul_(1.5)


def _kept_data(param: nn.Parameter) -> None:
    _KEPT.append(param.data)
    _KEPT[-1].mul_(1.5)


def _new_data(param: nn.Parameter) -> None:
    param.data = param.detach() * 1.5


def _detached(param: nn.Parameter) -> None:
    param.detach().mul_(1.5)


def _held_array(param: nn.Parameter) -> None:
    _KEPT.append(param.detach().numpy())
    _KEPT[-1] *= 1.5


def _set(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.set_(param.detach() * 1.5)


def _swapped(param: nn.Parameter) -> None:
    torch.utils.swap_tensors(param, nn.Parameter(param.detach() * 1.5))


def _in_inference_mode(param: nn.Parameter) -> None:
    with torch.inference_mode():
        param.mul_(1.5)


def _by_foreach(param: nn.Parameter) -> None:
    with torch.no_grad():
        torch._foreach_mul_([param], 1.5)


def _by_a_fused_optimizer(param: nn.Parameter) -> None:
    param.grad = -0.5 * param.detach()
    torch.optim.SGD([param], lr=1.0, fused=True).step()
    param.grad = None


_KEPT: list[Any] = []
WAYS = [
    _in_place,
    _through_data,
    _kept_data,
    _new_data,
    _detached,
    _held_array,
    _set,
    _swapped,
    _in_inference_mode,
    _by_foreach,
    _by_a_fused_optimizer,
]


@pytest.mark.parametrize("form", ["train_step", "loop"])
def test_what_a_user_changes_between_steps_is_computed_with(vgpus: VirtualGPUs, form: str) -> None:
    _KEPT.clear()
    net = seeded(lambda: GPT(depth=1, dropout=0.0))
    inputs, targets = token_batch(0)
    step_form = form == "train_step"
    model = wrapped(net, SGD, updates="auto") if step_form else in_a_loop(net)

    def check(way: str) -> None:
        with torch.no_grad():
            expected = in_bf16(copy.deepcopy(model.module), inputs)
            assert torch.equal(model(inputs), expected), way

    for change in WAYS:
        if change is _swapped and form == "loop":
            continue  # torch refuses it for what autograd refers to
        if form == "train_step":
            model.train_step(inputs, targets)
        else:
            token_loss(model(inputs), targets).backward()
        model.zero_grad()
        before = model.module.blocks[0].up.weight.detach().clone()
        change(model.module.blocks[0].up.weight)
        assert not torch.equal(model.module.blocks[0].up.weight, before)
        check(change.__name__)
        if change in (_kept_data, _held_array):  # whoever holds it may write at any time
            _KEPT[-1] *= 0.5
            check(f"{change.__name__}, later")
        _KEPT.clear()


def test_memory_that_nothing_tells_of_is_seen_with_updates_on_the_host(
    vgpus: VirtualGPUs,
) -> None:
    net = seeded(lambda: GPT(depth=1, dropout=0.0))
    inputs, targets = token_batch(0)
    model = wrapped(net)
    model.train_step(inputs, targets)
    model.module.head.weight.detach().numpy()[0] = 0.5
    with torch.no_grad():
        assert torch.equal(model(inputs), in_bf16(copy.deepcopy(model.module), inputs))


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_computed_with(vgpus: VirtualGPUs, assign: bool) -> None:
    net, other = seeded(Small), Small()
    inputs, _ = token_batch(0)
    model = in_a_loop(net)
    model(inputs)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    model.eval()
    other.eval()
    with torch.no_grad():
        assert torch.equal(model(inputs), in_bf16(other, inputs))
    state = model.state_dict()
    assert all(t.dtype is torch.float32 for t in state.values())
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in state.items())


def test_a_changed_step_trains_on_from_what_was_changed(vgpus: VirtualGPUs) -> None:
    net = seeded(lambda: Small(dropout=0.0))
    first = train_plain(net, tokens(2), SGD, token_loss, microbatch=2)
    model = wrapped(net, SGD)
    train_steps(model, tokens(2))
    assert_gradients(params_of(model.module), first.params)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)
    model.optimizer.state.clear()
    middle = copy.deepcopy(net)
    middle.load_state_dict(model.state_dict())
    then = train_plain(middle, tokens(2), SGD, token_loss, microbatch=2)
    train_steps(model, tokens(2))
    assert_gradients(params_of(model.module), then.params)


# Inference, checkpoints, verify


def test_inference_computes_in_bf16(vgpus: VirtualGPUs) -> None:
    net = seeded(Small).eval()
    inputs, _ = token_batch(0)
    model = in_a_loop(net)
    with torch.no_grad():
        out = model(inputs)
        assert out.dtype is BF16
        assert torch.equal(out, in_bf16(net, inputs))


def test_a_resumed_run_is_the_one_that_was_not_interrupted(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    net = seeded(Small)
    expected = train_plain(net, tokens(6), AdamW, token_loss, microbatch=2)
    model = wrapped(net, seed=0)
    train_steps(model, tokens(6)[:3])
    model.save_checkpoint(tmp_path)
    resumed = wrapped(Small())
    resumed.load_checkpoint(tmp_path)
    found = train_steps(resumed, tokens(6)[3:])
    assert_gradients(found.params, expected.params)
    assert all(torch.equal(a, b) for a, b in zip(found.losses, expected.losses[3:], strict=True))


def test_it_is_verified_against_plain_pytorch_in_bf16(vgpus: VirtualGPUs) -> None:
    model = wrapped(seeded(lambda: Small(dropout=0.0)))
    found = model.verify(*token_batch(0))
    assert found.identical, found.summary()
    loop = harmony.Harmony(
        seeded(lambda: Small(dropout=0.0)),
        devices=1,
        microbatch_size=2,
        precision="bf16",
        loss_fn=token_loss,
        device_memory="200KiB",
    )
    assert loop.verify(*token_batch(0)).ok


# What is refused, what is shown


def test_an_unknown_precision_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ConfigError, match="precision='fp8': choose one of fp32, bf16, fp16"):
        harmony.Harmony(nn.Linear(2, 2), precision="fp8")


def test_the_command_line_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_current", options.Options(precision="bf16"))
    model = harmony.Harmony(nn.Linear(24, 24), devices=1)
    assert model(torch.ones(2, 24)).dtype is BF16


def test_a_pack_with_masters_is_not_updated_on_a_device() -> None:
    graph = chain(2)
    layer = replace(graph.layers[0], master_nbytes=100)
    graph = replace(graph, layers=(layer, *graph.layers[1:]))
    assert "where their masters are" in (can_stay(graph, Pack(0, 1)) or "")
    assert can_stay(graph, Pack(1, 2)) is None
    frozen = replace(graph, layers=(replace(layer, gradient_nbytes=0), *graph.layers[1:]))
    assert can_stay(frozen, Pack(0, 1)) is None


def test_a_checkpoint_of_another_precision_is_read_with_a_warning(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    model = wrapped(nn.Linear(24, 24), SGD, loss_fn=square_loss)
    model.train_step(*vector_batch(0))
    model.save_checkpoint(tmp_path)
    other = wrapped(nn.Linear(24, 24), SGD, loss_fn=square_loss, precision="fp32")
    with pytest.warns(harmony.HarmonyWarning, match="computed with precision='bf16'"):
        other.load_checkpoint(tmp_path)


def test_the_report_says_what_a_parameter_takes_on_the_host(vgpus: VirtualGPUs) -> None:
    model = wrapped(seeded(lambda: nn.Linear(64, 64, bias=False)), loss_fn=square_loss)
    model.train_step(*vector_batch(0, width=64))
    assert model.record.facts["precision"] == (
        "bfloat16 with fp32 masters, 18 bytes a parameter on the host (weight 2, master 4, "
        "gradient 4, optimizer 8)"
    )
    assert model.plan.host_nbytes >= 18 * 64 * 64


def test_trained_parameters_in_other_types_are_refused(vgpus: VirtualGPUs) -> None:
    net = seeded(SkipMLP)
    net.layers[2].to(BF16)
    model = wrapped(net, loss_fn=square_loss)
    with pytest.raises(ConfigError, match=r"layers\.2\.weight is torch\.bfloat16"):
        model.train_step(*vector_batch(0))


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y * 2 if y.sum() > 0 else y


def test_a_forward_that_is_known_only_as_it_runs(vgpus: VirtualGPUs) -> None:
    net = seeded(Deciding)
    batches = [vector_batch(step) for step in range(5)]
    expected = train_plain(net, batches, SGD, square_loss, microbatch=4)
    with pytest.warns(harmony.HarmonyWarning, match="recorded on its way"):
        model = wrapped(net, SGD, loss_fn=square_loss, microbatch_size=4)
        found = train_steps(model, batches)
    assert model.capture_mode == "dynamic"
    assert_same(found, expected)
    with torch.no_grad():
        inputs, _ = batches[0]
        assert torch.equal(model(inputs), in_bf16(copy.deepcopy(model.module), inputs))


class Remembering(nn.Module):
    """Carries a tensor from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.last is not None:
            y = y + self.last
        self.last = y.detach()
        return y


@pytest.mark.parametrize("form", ["train_step", "loop", "inference"])
def test_what_would_run_in_fp32_is_refused(vgpus: VirtualGPUs, form: str) -> None:
    net = seeded(Remembering)
    before = params_of(net)
    train = form == "train_step"
    model = wrapped(net, loss_fn=square_loss, microbatch_size=8) if train else in_a_loop(net)
    inputs, targets = vector_batch(0)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"precision='bf16': .*with its fp32 parameters"):
            if train:
                model.train_step(inputs, targets)
            else:
                with torch.set_grad_enabled(form == "loop"):
                    model(inputs)
    assert_gradients(params_of(model.module), before)


def test_text_is_generated_in_bf16(vgpus: VirtualGPUs) -> None:
    pytest.importorskip("transformers")
    from tests.training.test_generate import llama

    net = seeded(llama).eval()
    plain = copy.deepcopy(net)
    for param in plain.parameters():
        param.data = param.data.to(BF16)
    prompt = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(1))
    asked: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    asked |= {"return_dict_in_generate": True, "pad_token_id": 0}
    expected = plain.generate(prompt, **asked)
    found = in_a_loop(net).generate(prompt, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    for one, two in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(one, two)


def test_links_carry_half_of_the_weights(vgpus: VirtualGPUs) -> None:
    net = seeded(Small)
    found = {}
    for precision in ("fp32", "bf16"):
        model = wrapped(
            net,
            precision=precision,
            activations="recompute",
            updates="host",
            device_memory="400KiB",
        )
        model.train_step(*token_batch(0))
        traffic = metrics_of(model.record).traffic_nbytes()
        found[precision] = {
            kind: sum(row.get(kind, 0) for row in traffic.values())
            for kind in ("weights", "gradients")
        }
    assert 0 < found["bf16"]["weights"] <= 0.55 * found["fp32"]["weights"]
    assert found["bf16"]["gradients"] == found["fp32"]["gradients"]


def assert_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# Modules that keep fp32


def kept(net: nn.Module, *kinds: type[nn.Module]) -> nn.Module:
    for module in [m for m in net.modules() if isinstance(m, kinds)]:
        assert harmony.keep_fp32(module, output_dtype=BF16) is module
    return net


@MAKERS
@pytest.mark.parametrize(("mode", "num_devices"), [("pp", 2), ("dp", 2)])
def test_norms_in_fp32_are_those_of_a_policy_of_their_own(
    vgpus: VirtualGPUs, make: Any, mode: str, num_devices: int
) -> None:
    plain = seeded(Small)
    net = kept(copy.deepcopy(plain), nn.LayerNorm)
    shares = num_devices if mode == "dp" else 1
    expected = train_plain(net, tokens(), make, token_loss, microbatch=2, shares=shares)
    model = wrapped(net, make, mode=mode, devices=num_devices)
    found = train_steps(model, tokens())
    assert_same(found, expected)
    assert model.capture_mode == "trace"
    sharded = {"fp32": (nn.LayerNorm,)}
    if mode == "pp":
        theirs = train_fsdp(plain, tokens(), make, token_loss, microbatch=2, **sharded)
        assert_same(found, theirs)
    alone = train_plain(plain, tokens(), make, token_loss, microbatch=2, shares=shares)
    assert any(not torch.equal(found.params[n], p) for n, p in alone.params.items())


def test_kept_modules_are_kept_in_a_loop_in_inference_and_in_fp32(vgpus: VirtualGPUs) -> None:
    net = kept(seeded(lambda: Small(dropout=0.0)), nn.LayerNorm)
    batches = tokens()
    expected = train_plain(net, batches, AdamW, token_loss, microbatch=8)
    assert_same(train_by_loop(net, batches, AdamW, microbatch_size=8), expected)
    with torch.no_grad():
        model = in_a_loop(copy.deepcopy(net))
        assert torch.equal(model(batches[0][0]), in_bf16(copy.deepcopy(net), batches[0][0]))
    assert wrapped(net).verify(*batches[0]).identical
    names = {n for n, _ in net.named_parameters() if "norm" in n}
    assert names_kept(net) == names and names


def test_any_module_can_be_kept(vgpus: VirtualGPUs) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(24, 24)
            self.kept = harmony.keep_fp32(nn.Linear(24, 24), output_dtype=BF16)
            self.last = nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.last(torch.tanh(self.kept(self.first(x))))
            return found

    net = seeded(Between)
    batches = [vector_batch(step) for step in range(3)]
    expected = train_plain(net, batches, SGD, square_loss, microbatch=4)
    model = wrapped(net, SGD, loss_fn=square_loss, microbatch_size=4)
    assert_same(train_steps(model, batches), expected)
    assert all(p.dtype is torch.float32 for p in model.parameters())
