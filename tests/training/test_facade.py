"""A script that does not know of the wrapper sees the module that is wrapped."""

from __future__ import annotations

import copy
import inspect
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import harmony

from .conftest import VirtualGPUs
from .models import square_loss, vector_batch


class Scaled(nn.Module):
    """Its forward reads an attribute and a flag of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)
        self.scale = 2.0
        self.origin = "here"

    def forward(self, x: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
        """Scale."""
        out = self.layer(x) * self.scale + shift
        return out if self.training else -out


def pair() -> tuple[Scaled, harmony.Harmony]:
    torch.manual_seed(0)
    net = Scaled()
    return copy.deepcopy(net), harmony.Harmony(net, devices=1, microbatch_size=64)


def compare(plain: nn.Module, model: nn.Module) -> None:
    x, y = vector_batch(0)
    for module in (plain, model):
        module.zero_grad()
        square_loss(module(x), y).backward()
    for one, two in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_it_is_an_instance_of_both_classes(vgpus: VirtualGPUs) -> None:
    _, model = pair()
    assert isinstance(model, Scaled) and isinstance(model, harmony.Harmony)
    assert model.__class__ is Scaled and type(model) is harmony.Harmony
    assert model._get_name() == "Scaled" and "scale" in dir(model)


@pytest.mark.filterwarnings("ignore:.*was called by itself")
def test_operators_are_those_of_the_module(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.Dropout(0.5), nn.Linear(24, 24))
    model = harmony.Harmony(net, devices=1)
    assert len(model) == 3 and model[1] is net[1] and list(model) == list(net)
    assert isinstance(model, harmony.Harmony) and type(copy.deepcopy(model)).__name__ == "Harmony"
    model[1] = nn.ReLU()
    inputs = torch.randn(4, 24)
    assert isinstance(net[1], nn.ReLU)
    assert torch.equal(model(inputs), model.module(inputs))
    assert bool(harmony.Harmony(Scaled(), devices=1))
    with pytest.raises(TypeError, match="no len"):
        len(harmony.Harmony(Scaled(), devices=1))


def test_forward_has_the_signature_of_the_module(vgpus: VirtualGPUs) -> None:
    plain, model = pair()
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__doc__ == "Scale."
    assert torch.equal(model.forward(torch.ones(2, 24)), plain(torch.ones(2, 24)))
    assert model.num_steps == 1


def test_attributes_are_those_of_the_module(vgpus: VirtualGPUs) -> None:
    plain, model = pair()
    compare(plain, model)
    for module in (plain, model):
        module.scale, module.training = 3.0, False
    compare(plain, model)
    assert model.module.scale == 3.0 and not model.module.training
    assert model.__dict__.get("origin") == "here"
    del model.origin
    assert not hasattr(model.module, "origin")
    model._noted = 1
    assert not hasattr(model.module, "_noted"), "a note on the object that was given"


def test_children_that_are_set_are_children_of_the_module(vgpus: VirtualGPUs) -> None:
    plain, model = pair()
    compare(plain, model)
    new = nn.Linear(24, 24)
    plain.layer, model.layer = copy.deepcopy(new), new
    assert model.module.layer is new
    compare(plain, model)


def test_a_module_around_it_loads_its_state(vgpus: VirtualGPUs) -> None:
    plain, model = pair()
    outer = nn.ModuleDict({"inside": model})
    state = {f"inside.{n}": t + 1 for n, t in plain.state_dict().items()}
    compare(plain, model)
    assert outer.state_dict().keys() == state.keys()
    outer.load_state_dict(state)
    assert torch.equal(model.module.layer.weight, plain.layer.weight + 1)
    outer.load_state_dict({"inside.layer.bias": torch.zeros(24)}, strict=False)
    assert not model.module.layer.bias.any()


def replace_by_method(model: nn.Module) -> None:
    before = model.forward

    def doubled(self: Any, x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        return before(x) * factor + self.layer.bias

    model.forward = MethodType(doubled, model)


def replace_by_function(model: nn.Module) -> None:
    before = model.forward
    model.forward = lambda x: before(x) * 2


def replace_under_autocast(model: nn.Module) -> None:
    """As accelerate does."""
    around: Any = torch.autocast("cpu", torch.bfloat16)
    model.forward = MethodType(around(model.forward.__func__), model)


@pytest.mark.parametrize(
    "replace", [replace_by_method, replace_by_function, replace_under_autocast]
)
def test_a_forward_that_is_replaced_is_run_by_harmony(vgpus: VirtualGPUs, replace: Any) -> None:
    plain, model = pair()
    compare(plain, model)
    for module in (plain, model):
        replace(module)
    compare(plain, model)
    # A function that holds a method may use the module itself: it runs as it is.
    mode = "eager" if replace is replace_by_function else "trace"
    assert model.num_steps == 2 and model.capture_mode == mode
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    copied = copy.deepcopy(model)
    if replace is replace_under_autocast:
        compare(copy.deepcopy(plain), copied)
    for module in (plain, model):
        del module.forward
    compare(plain, model)


def test_a_forward_is_put_back(vgpus: VirtualGPUs) -> None:
    plain, model = pair()
    before = model.forward
    replace_by_method(model)
    model.forward = before
    compare(plain, model)


def test_an_argument_that_there_is_not_is_refused_with_the_nearest(vgpus: VirtualGPUs) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(
        TypeError, match=r"Harmony: there is no .* max_grad=; did you mean"
    ) as said:
        harmony.Harmony(net, max_grad=1.0)  # type: ignore[call-arg]
    assert isinstance(said.value, harmony.HarmonyError)
    assert "did you mean max_grad_norm=? It takes module, optimizer, " in str(said.value)
    for wrong, message in (
        (lambda: harmony.Harmony(), "missing a required argument: 'module'"),
        (lambda: harmony.Harmony(net, None), "too many positional arguments"),
        (lambda: harmony.Harmony(net).train_step(net, target=None), "did you mean targets="),
        (lambda: harmony.Harmony(net).train_step(), "missing a required argument: 'inputs'"),
        (lambda: harmony.virtual_gpus(memry="1GiB"), "did you mean memory="),
        (lambda: harmony.load_pretrained(net, "here", stict=True), "did you mean strict="),
    ):
        with pytest.raises(harmony.ArgumentError, match=message):
            wrong()  # type: ignore[no-untyped-call]


def test_an_error_of_what_runs_inside_is_not_taken_for_one_of_the_arguments(
    vgpus: VirtualGPUs,
) -> None:
    def loss_fn(output: torch.Tensor) -> torch.Tensor:
        return output.sum()

    model = harmony.Harmony(
        nn.Linear(2, 2),
        optimizer=torch.optim.SGD,
        loss_fn=loss_fn,  # type: ignore[arg-type]
    )
    with pytest.raises(Exception, match="loss_fn") as said:
        model.train_step(torch.ones(4, 2), torch.ones(4))
    assert not isinstance(said.value, harmony.ArgumentError)


def test_the_signature_is_the_one_that_is_written() -> None:
    shown = inspect.signature(harmony.Harmony).parameters
    assert {"module", "optimizer", "max_grad_norm", "process_group"} <= shown.keys()
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in shown.values())
    assert list(inspect.signature(harmony.virtual_gpus).parameters)[:2] == ["count", "memory"]
