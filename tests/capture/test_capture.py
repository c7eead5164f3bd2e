"""Capture leaves no trace, guards what Python saw, and falls back to a real run."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harmony.capture import Captured, capture
from harmony.capture.cost.costs import costs_nbytes
from harmony.errors import CaptureError, ConfigError

from .models import CASES, GPT, ids, llama, make, token_loss, vectors

CPU = torch.device("cpu")


def snapshot(net: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, module in net.named_modules():
        for key, held in module.__dict__.items():
            state[f"{name}:{key}"] = dict(held) if isinstance(held, dict) else held
    return state


@pytest.mark.parametrize("name", CASES)
def test_capture_leaves_no_trace_on_the_module(name: str) -> None:
    net, case = make(name), CASES[name]
    values = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    args, kwargs, targets = case.batch(4)
    inputs = copy.deepcopy((args, kwargs))
    before = snapshot(net)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
    captured = capture(net, args, kwargs, targets=targets, **case.options)
    costs_nbytes(captured, 4)
    after = snapshot(net)
    assert before.keys() == after.keys()
    for key, held in before.items():
        same = held == after[key] if isinstance(held, dict) and not held else None
        assert same or held is after[key] or list(held) == list(after[key]), key
    assert all(torch.equal(values[key], tensor) for key, tensor in net.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()
    assert nn.Module.__call__ is call
    assert torch.autograd.Function.__dict__["apply"] is apply
    torch.utils._pytree.tree_map(
        lambda a, b: torch.testing.assert_close(a, b) if isinstance(a, torch.Tensor) else None,
        inputs,
        (args, kwargs),
    )


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.calls, self.last = nn.Linear(8, 8), 0, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = self.first(x)
        torch.rand(3)
        random.random()
        raise ValueError("the model's own error")


def test_a_failing_forward_leaves_no_trace_either() -> None:
    net, x = Fails(), torch.randn(4, 8)
    state, python = torch.get_rng_state(), random.getstate()
    call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
    with pytest.raises(ValueError, match="the model's own error"):
        capture(net, (x,))
    assert net.calls == 0 and not hasattr(net, "seen")
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert nn.Module.__call__ is call
    assert torch.autograd.Function.__dict__["apply"] is apply


class Branches(nn.Module):
    """Looks at its input, or at what a layer made of it."""

    def __init__(self, at_layer: bool) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))
        self.at_layer = at_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        seen = h if self.at_layer else x
        return self.left(h) if seen.sum() > 0 else self.right(h)


def run_all(net: nn.Module, captured: Captured, *args: Any) -> torch.Tensor:
    shell = captured.make_shell(CPU)
    shell.bind({**dict(net.named_parameters()), **dict(net.named_buffers())})
    inputs = captured.flatten_inputs(args, {})
    size = args[0].shape[0]
    values = captured.split(inputs, 0, size)
    graph = captured.graph
    (out,) = captured.run(
        0, graph.num_layers, shell, values, size, wanted=graph.output_ids
    ).values()
    return out


def test_a_guard_on_the_inputs_is_checked_when_they_are_split() -> None:
    net, x = Branches(at_layer=False), torch.ones(4, 8)
    captured = capture(net, (x,))
    assert [layer.name for layer in captured.graph.layers] == ["first", "left"]
    assert torch.equal(run_all(net, captured, x), net(x))
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+.*True.*False"):
        captured.split(captured.flatten_inputs((-x,), {}), 0, 4)


def test_a_guard_on_a_layer_takes_a_real_trace_and_is_checked_in_the_run() -> None:
    net = Branches(at_layer=True)
    nn.init.eye_(net.first.weight)
    nn.init.zeros_(net.first.bias)
    x = torch.ones(4, 8)
    captured = capture(net, (x,))
    assert torch.equal(run_all(net, captured, x), net(x))
    assert len(costs_nbytes(captured, 4)) == captured.graph.num_layers
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+"):
        run_all(net, captured, -x)
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+.*meta device"):
        capture(Branches(at_layer=True).to("meta"), (x,))


def test_a_model_on_the_meta_device_is_captured() -> None:
    with torch.device("meta"):
        net = GPT()
    real = capture(GPT(), (ids(4),), loss=token_loss, targets=ids(4))
    assert capture(net, (ids(4),), loss=token_loss, targets=ids(4)).graph == real.graph


def test_the_loss_may_use_the_model() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(4, 8)

    def loss_of(output: torch.Tensor, targets: Any) -> torch.Tensor:
        decay = sum(param.pow(2).sum() for param in net.parameters())
        return F.mse_loss(output, net(targets)) + 0.1 * decay

    captured = capture(net, (x,), loss=loss_of, targets=x)
    shell = captured.make_shell(CPU)
    shell.bind(dict(net.named_parameters()))
    graph = captured.graph
    values = captured.flatten_inputs((x,), {}, x)
    assert list(values) == [0, 1]
    found = captured.run(0, graph.num_layers, shell, values, 4, wanted=graph.output_ids)
    assert torch.equal(found[graph.output_ids[0]], loss_of(net(x), x))


class OwnLoss(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(8, 8), form

    def forward(self, x: torch.Tensor) -> Any:
        loss = self.inner(x).pow(2).mean()
        return {"scalar": loss, "tuple": (loss, x), "dict": {"loss": loss}, "none": x}[self.form]


@pytest.mark.parametrize("form", ["scalar", "tuple", "dict"])
def test_a_model_may_return_its_loss(form: str) -> None:
    graph = capture(OwnLoss(form), (torch.randn(4, 8),), output_loss=True).graph
    assert graph.loss == graph.output_ids[0]
    assert graph.values[graph.loss].nbytes(7) == 4
    with pytest.raises(ConfigError, match=r"\(4, 8\)"):
        capture(OwnLoss("none"), (torch.randn(4, 8),), output_loss=True)


def test_inputs_that_differ_are_named() -> None:
    captured = capture(GPT(), (ids(4),), loss=token_loss, targets=ids(4))
    values = captured.flatten_inputs((ids(10),), {}, ids(10, 1))
    assert {value: tuple(tensor.shape) for value, tensor in values.items()} == {
        0: (10, 12),
        1: (10, 12),
    }
    parts = captured.split(values, 3, 7)
    assert parts[1].data_ptr() == values[1][3:].data_ptr() and parts[0].shape == (4, 12)
    with pytest.raises(CaptureError, match=r"args\[0\] was int64\[batch, 12\]"):
        captured.flatten_inputs((ids(4)[:, :5],), {}, ids(4))
    with pytest.raises(CaptureError, match=r"targets was int64\[batch, 12\].*float32"):
        captured.flatten_inputs((ids(4),), {}, ids(4).float())
    with pytest.raises(CaptureError, match=r"captured as args\[0\], targets, now they are kwargs"):
        captured.flatten_inputs((), {"ids": ids(4)}, ids(4))
    with pytest.raises(ConfigError, match="different numbers of samples"):
        captured.flatten_inputs((ids(4),), {}, ids(3))


def test_other_arguments_are_part_of_what_was_captured() -> None:
    net, x = make("nested"), vectors(4)
    captured = capture(net, (x,), {"scale": 0.5})
    with pytest.raises(CaptureError, match=r"kwargs\['scale'\] was 0.5.*now it is 0.7"):
        captured.flatten_inputs((x,), {"scale": 0.7})


class TakesAnotherPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if x.shape[0] == 3:
            h = torch.tanh(h)
        if x.shape[0] > 4:
            return self.last(torch.tanh(h)) + x
        return self.last(h)


def test_sizes_that_take_another_path_are_refused() -> None:
    net, x = TakesAnotherPath(), torch.randn(3, 8)
    captured = capture(net, (x[:2],))
    assert torch.equal(run_all(net, captured, x), net(x))  # the layers are the same
    with pytest.raises(
        CaptureError, match=r"another path for 6 samples than for 2: step 1 is tanh"
    ):
        captured.ensure(6)


def test_one_sample_may_take_other_steps_inside_a_layer() -> None:
    net, kwargs = llama().train(), {"input_ids": ids(4), "labels": ids(4, 1)}
    captured = capture(net, (), kwargs, output_loss=True)
    captured.ensure(1)
    alone = {key: tensor[2:3] for key, tensor in kwargs.items()}
    values = captured.split(captured.flatten_inputs((), kwargs), 2, 3)
    shell = captured.make_shell(CPU)
    shell.bind({**dict(net.named_parameters()), **dict(net.named_buffers())})
    graph = captured.graph
    torch.manual_seed(1)
    found = captured.run(0, graph.num_layers, shell, values, 1, wanted=graph.output_ids)
    torch.manual_seed(1)
    assert torch.equal(found[graph.output_ids[0]], net(**alone).loss)


def test_sizes_may_be_larger_than_the_sample_batch() -> None:
    net = llama().eval()
    captured = capture(net, (), {"input_ids": ids(1)})
    batch = ids(5)
    values = captured.split(captured.flatten_inputs((), {"input_ids": batch}), 0, 5)
    shell = captured.make_shell(CPU)
    shell.bind({**dict(net.named_parameters()), **dict(net.named_buffers())})
    graph = captured.graph
    found = captured.run(0, graph.num_layers, shell, values, 5, wanted=graph.output_ids)
    assert torch.equal(found[graph.output_ids[0]], net(batch).logits)


def test_hooks_inside_layers_just_run() -> None:
    net, seen = GPT(dropout=0.0), []
    net.blocks[1].norm1.register_forward_hook(lambda m, a, out: seen.append(1) or out * 2)
    captured = capture(net, (ids(4),))
    seen.clear()
    assert torch.equal(run_all(net, captured, ids(4)), net(ids(4)))
    assert len(seen) == 2


def test_autocast_around_the_capture_is_recorded() -> None:
    net, x = GPT(dropout=0.0), ids(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture(net, (x,))
        plain = net(x)
    assert captured.graph.values[3].nbytes_per_sample == plain.shape[1] * 32 * 4
    assert torch.equal(run_all(net, captured, x), plain)


def test_a_shared_dropout_state_follows_the_layers() -> None:
    net, x = make("gpt"), ids(4)
    captured = capture(net, (x,))
    torch.manual_seed(5)
    found = run_all(net, captured, x)
    torch.manual_seed(5)
    assert torch.equal(found, net(x))
