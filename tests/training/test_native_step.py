"""Updates by kernels of our own: the bits of the class's default form, whatever runs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.core.compiled import Compiled
from harmony.runtime.update import native_step
from harmony.runtime.update.clipping import clip_factor, norm_of, total_norm
from harmony.runtime.update.native_step import Kernels, kernels, own_step, take_step
from tests.training.conftest import VirtualGPUs
from tests.training.models import SkipMLP, square_loss, vector_batch

Adam, AdamW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, {}),
    "adamw, no decay, slow first moment": (AdamW, {"weight_decay": 0.0, "betas": (0.2, 0.9)}),
    "adamw, amsgrad, maximized": (AdamW, {"amsgrad": True, "maximize": True, "eps": 0.0}),
    "adam": (Adam, {"betas": (0.0, 0.0)}),
    "adam, decayed": (Adam, {"weight_decay": 0.3, "amsgrad": True}),
    "sgd": (SGD, {}),
    "sgd, momentum": (SGD, {"momentum": 0.8, "dampening": 0.3, "maximize": True}),
    "sgd, nesterov, decayed": (SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
}


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    found = kernels()
    assert isinstance(found, Kernels), found
    return found


@pytest.fixture(params=range(3), ids=native_step.FORMS)
def form(
    request: pytest.FixtureRequest, compiled: Kernels, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Each form that this processor has, in place of the best."""
    if request.param > compiled.form:
        pytest.skip("this processor does not have it")
    chosen = dataclasses.replace(compiled, form=request.param)
    monkeypatch.setattr(native_step, "kernels", lambda: chosen)
    return int(request.param)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    whole = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    equal = a.detach().view(whole) == b.detach().view(whole)
    return bool((equal | (a.isnan() & b.isnan())).all())


def pairs_of(kind: Any, options: Any, sizes: Any) -> tuple[Any, Any, list[torch.Tensor]]:
    """An optimizer, its twin, and a bf16 copy of each parameter at an odd place."""
    made = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        flat = [torch.randn(n + 3, generator=generator)[3:] for n in sizes]
        made.append(kind([nn.Parameter(values) for values in flat], lr=0.013, **options))
    return *made, [torch.zeros(n + 1, dtype=torch.bfloat16)[1:] for n in sizes]


def gradients(step: int, sizes: Any) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    for n in sizes:
        powers = torch.rand(n, generator=generator) * 50 - 30
        values = torch.randn(n, generator=generator) * 10**powers
        if step == 4 and n > 6:
            values[2], values[3], values[4:6] = float("nan"), float("-inf"), 0.0
        yield values


@pytest.mark.parametrize("name", KINDS)
def test_steps_have_the_bits_of_the_class_and_copies_those_of_a_cast(name: str, form: int) -> None:
    """Of any length and alignment; gradients and moments subnormal, infinite, no numbers."""
    sizes = [*range(1, 36), 255, 256, 257, 5000, 70001]
    ours, theirs, copies = pairs_of(*KINDS[name], sizes)
    params, twins = (o.param_groups[0]["params"] for o in (ours, theirs))
    for step in range(5):
        for param, twin, values in zip(params, twins, gradients(step, sizes), strict=True):
            param.grad, twin.grad = values.clone(), values
        own_step(theirs)
        made = {id(param): held for param, held in zip(params, copies, strict=True)}
        copied, left = take_step(ours, made)
        assert left == (step == 0 and bool(native_step._state_names(theirs.param_groups[0])))
        if left:
            own_step(ours)
            continue
        ours.param_groups[0]["params"] = params
        assert copied == set(made)
        for param, twin, held in zip(params, twins, copies, strict=True):
            assert same_bits(param, twin) and same_bits(held, twin.bfloat16())
            for key, value in theirs.state.get(twin, {}).items():
                assert same_bits(ours.state[param][key], value)


def test_every_mantissa_has_torchs_square_root(compiled: Kernels) -> None:
    """A root's bits follow from those of the mantissa and the parity of the exponent."""
    assert compiled.root is not None
    values = torch.arange(0x3F800000, 0x40800000, 257, dtype=torch.int32).view(torch.float32)
    values = values[: len(values) // 256 * 256]
    for start in range(0, len(values), 1 << 14):
        part = values[start : start + (1 << 14)]
        found = part.clone()
        for at in range(0, len(part), 256):
            place = native_step.ctypes.c_void_p(found[at:].data_ptr())
            root = native_step.ctypes.byref(compiled.root)
            compiled.library.harmony_roots(
                place, native_step.ctypes.c_int64(256), root, compiled.form
            )
        assert same_bits(found, part.sqrt())


def test_gradients_in_bf16_count_as_they_are(form: int) -> None:
    sizes = [1, 33, 1000]
    ours, theirs, _ = pairs_of(AdamW, {}, sizes)
    params, twins = (o.param_groups[0]["params"] for o in (ours, theirs))
    for step in range(3):
        for param, twin, values in zip(params, twins, gradients(step, sizes), strict=True):
            param.grad_dtype, twin.grad = None, values.bfloat16().float()
            param.grad = values.bfloat16() if step else twin.grad.clone()
        own_step(theirs)
        if step == 0:
            own_step(ours)
            continue
        assert take_step(ours, {}) == (set(), False)
        ours.param_groups[0]["params"] = params
    assert all(map(same_bits, params, twins))


@pytest.mark.parametrize("name", ["adamw, amsgrad, maximized", "sgd, nesterov, decayed", "sgd"])
def test_gradients_are_clipped_in_the_pass_of_the_update(name: str, form: int) -> None:
    """And left as clipped; what is in bf16, and rounded after the product, is left to torch."""
    sizes = [1, 33, 1000]
    ours, theirs, copies = pairs_of(*KINDS[name], sizes)
    params, twins = (o.param_groups[0]["params"] for o in (ours, theirs))
    for step in range(5):
        for param, twin, values in zip(params, twins, gradients(step, sizes), strict=True):
            param.grad, twin.grad = values.clone(), values
        factor = clip_factor(0.1, nn.utils.clip_grad_norm_(twins, 0.1))
        own_step(theirs)
        if step == 0:
            for param in params:
                param.grad.mul_(factor)
            own_step(ours)
            continue
        made = {id(param): held for param, held in zip(params, copies, strict=True)}
        versions = [param.grad._version for param in params]
        assert take_step(ours, made, factor) == (set(made), False)
        ours.param_groups[0]["params"] = params
        assert all(param.grad._version > v for param, v in zip(params, versions, strict=True))
        for param, twin, held in zip(params, twins, copies, strict=True):
            assert same_bits(param, twin) and same_bits(held, twin.bfloat16())
            assert same_bits(param.grad, twin.grad)
    params[0].grad_dtype, params[0].grad = None, torch.ones(1).bfloat16()
    assert take_step(ours, {}, 0.5) == (set(), True)
    assert ours.param_groups[0]["params"] == params[:1]


@pytest.mark.parametrize("kinds", [(torch.float32,), (torch.float32, torch.float64)], ids=str)
def test_the_norm_of_norms_is_torchs(kinds: tuple[torch.dtype, ...]) -> None:
    sizes = [(), (1,), (7, 5), (1000,), (33, 4, 7), (300, 301)]
    params = [nn.Parameter(torch.zeros(size)) for size in (*sizes, (5,))]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for index, param in enumerate(params[:-1]):
            param.grad_dtype = None
            drawn = torch.randn(param.shape, generator=generator) * 10**step
            param.grad = drawn.to(kinds[index % len(kinds)])
        params[3].grad = params[3].grad * float("nan") if step == 3 else params[3].grad
        known = {id(p): norm_of(p.grad) for p in params[1:4] if p.grad is not None}
        found = total_norm(params, known)
        expected = nn.utils.clip_grad_norm_(params, 1.0)
        assert torch.equal(found, expected) or (found.isnan() and expected.isnan())
    assert torch.equal(total_norm(params[-1:], {}), torch.tensor(0.0))


def test_threads_change_nothing(compiled: Kernels) -> None:
    sizes, found = [3, 200_001, 70_000], []
    before = torch.get_num_threads()
    for count in (1, 3):
        ours, _, copies = pairs_of(AdamW, {}, sizes)
        params = ours.param_groups[0]["params"]
        try:
            torch.set_num_threads(count)
            for step in range(3):
                for param, values in zip(params, gradients(step, sizes), strict=True):
                    param.grad = values
                if take_step(ours, dict(zip(map(id, params), copies, strict=True)))[1]:
                    own_step(ours)
                ours.param_groups[0]["params"] = params
        finally:
            torch.set_num_threads(before)
        found.append([*params, *copies])
    assert all(map(same_bits, *found))


@pytest.mark.parametrize(
    "options",
    [{"fused": True}, {"foreach": True}, {"differentiable": True}, {"lr": torch.tensor(0.1)}],
    ids=str,
)
def test_other_forms_of_the_class_are_left_to_it(options: dict[str, Any]) -> None:
    param = nn.Parameter(torch.ones(5))
    optimizer = AdamW([param], **options)
    optimizer.state[param] = {"step": torch.tensor(1.0)} | {
        key: torch.ones(5) for key in ("exp_avg", "exp_avg_sq")
    }
    param.grad = torch.ones(5)
    assert take_step(optimizer, {}) == (set(), True)
    assert native_step.describe(optimizer) == ""


class Own(AdamW):
    """Somebody's own class."""


class Marked(nn.Parameter):
    """A parameter that notices what is done to it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_what_is_no_range_of_fp32_numbers_is_left_to_the_class() -> None:
    strided = nn.Parameter(torch.ones(4, 4).t()[:, :2])
    params = [
        strided,
        nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(3, dtype=torch.float64)),
        Marked(torch.ones(3)),
        nn.Parameter(torch.ones(3)),
    ]
    optimizer = SGD(params, lr=0.5)
    for param in params:
        param.grad = torch.ones_like(param)
    assert take_step(optimizer, {}) == (set(), True)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in params[:4]]
    assert torch.equal(params[4], torch.full((3,), 0.5))
    assert take_step(Own(params), {}) == (set(), True)


# Whole runs


def trained(kind: Any, options: Any, precision: str = "fp32", **given: Any) -> harmony.Harmony:
    torch.manual_seed(0)
    model = harmony.Harmony(
        SkipMLP(),
        optimizer=kind,
        optimizer_kwargs={"lr": 0.013, **options},
        loss_fn=square_loss,
        microbatch_size=4,
        precision=precision,
        **given,
    )
    for step in range(4):
        model.train_step(*vector_batch(step))
    return model


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine without a compiler."""

    def nothing(self: Compiled) -> str:
        raise self.error("no C++ compiler was found")

    monkeypatch.setattr(Compiled, "compiler", nothing)
    monkeypatch.setattr(native_step, "kernels", native_step.kernels.__wrapped__)


def states_of(model: harmony.Harmony) -> list[torch.Tensor]:
    held = [model.optimizer.state[p].values() for p in model.parameters()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [
        *model.parameters(),
        *gradients,
        *(v for values in held for v in values if v is not None),
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "sgd, nesterov, decayed"])
def test_a_run_is_the_same_with_and_without_kernels(
    vgpus: VirtualGPUs,
    name: str,
    precision: str,
    compiled: Kernels,
    request: pytest.FixtureRequest,
) -> None:
    with_kernels = trained(*KINDS[name], precision, max_grad_norm=0.1)
    assert "kernel)" in with_kernels.record.facts["optimizer"]
    request.getfixturevalue("without_kernels")
    plain = trained(*KINDS[name], precision, max_grad_norm=0.1)
    assert "PyTorch's loop: no C++ compiler was found" in plain.record.facts["optimizer"]
    assert all(map(torch.equal, states_of(with_kernels), states_of(plain)))


def test_the_working_copy_is_written_in_the_pass_of_the_update(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, compiled: Kernels
) -> None:
    """And is what a cast of the master would be, also after somebody has written to it."""
    made: list[int] = []

    def noted(optimizer: Any, copies: Any, scale: float) -> Any:
        copied, left = take_step(optimizer, copies, scale)
        made.append(len(copied))
        return copied, left

    monkeypatch.setattr("harmony.runtime.update.part_step.take_step", noted)
    model = trained(AdamW, {}, "bf16")
    assert sum(made) >= 3 * len(list(model.parameters()))
    twin = copy.deepcopy(SkipMLP())
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)
    twin.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    inputs, _ = vector_batch(9)
    expected = twin.bfloat16()(inputs.bfloat16())
    with torch.no_grad():
        assert torch.equal(model(inputs).cpu(), expected)


def test_a_graph_of_the_users_notices_that_a_parameter_has_changed(
    vgpus: VirtualGPUs, compiled: Kernels
) -> None:
    model = trained(AdamW, {})
    before = [param._version for param in model.parameters()]
    model.train_step(*vector_batch(5))
    assert all(p._version > old for p, old in zip(model.parameters(), before, strict=True))


def test_all_kinds_compute_the_same_on_this_machine(compiled: Kernels) -> None:
    options = itertools.product((0.9, 0.3), (False, True), (False, True), (0.0, 0.1))
    for beta1, amsgrad, maximize, decay in options:
        kind = partial(AdamW, betas=(beta1, 0.9), amsgrad=amsgrad, maximize=maximize)
        optimizer = kind([nn.Parameter(torch.ones(1))], weight_decay=decay)
        assert native_step.takes_all(optimizer)
        assert native_step.describe(optimizer).endswith("kernel")
