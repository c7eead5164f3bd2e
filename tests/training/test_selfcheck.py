"""The self-check of the first step: layers that do not compute the same twice are named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.capture.replay import pack_steps
from harmony.planner.ir.tasks import TaskKind
from harmony.runtime.step.self_check import SelfCheck
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch
from tests.training.plain import params_of

MODES = [("pp", 1), ("pp", 2), ("dp", 2)]


class Odd:
    """Lets the first layer compute something else each time that it runs.

    A module that did so by what its Python reads would not be recorded.
    """

    def __init__(self) -> None:
        self.on, self.calls = True, 0

    def scale(self) -> float:
        self.calls += 1
        # Kernels of real GPUs may differ by a little from run to run.
        return 1.0 + (1e-6 if devices.TYPE == "vgpu" else 1e-2) * self.calls


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Odd:
    found, run_layer = Odd(), pack_steps._run_layer

    def run(pack: Any, layer: Any, shell: Any, values: Any, *args: Any) -> None:
        if layer.index == 0 and found.on:
            for number in layer.steps[0][0].inputs:
                values[number] = values[number] * found.scale()
        run_layer(pack, layer, shell, values, *args)

    monkeypatch.setattr(pack_steps, "_run_layer", run)
    return found


def layers() -> nn.Module:
    torch.manual_seed(0)
    # The odd one is in front: the last pack of a plan runs its layers once only.
    return nn.Sequential(*(nn.Linear(24, 24) for _ in range(5)))


def wrap(net: nn.Module, mode: str, num_devices: int, **options: Any) -> harmony.Harmony:
    # What is kept is not computed twice, so there would be nothing to check.
    given = {"activations": "recompute", "device_memory": "24KiB", "microbatch_size": 2, **options}
    return harmony.Harmony(net, mode=mode, devices=num_devices, **given)


SGD: dict[str, Any] = {
    "optimizer": torch.optim.SGD,
    "optimizer_kwargs": {"lr": 0.1},
    "loss_fn": square_loss,
}


@pytest.mark.parametrize(("mode", "num_devices"), MODES)
def test_a_layer_that_computes_something_else_each_time_is_named(
    vgpus: VirtualGPUs, odd: Odd, mode: str, num_devices: int
) -> None:
    net = layers()
    model = wrap(net, mode, num_devices, **SGD)
    before = params_of(net)
    for _ in range(2):  # nothing is updated, nothing hangs, and it is found again
        with pytest.raises(harmony.RecomputeError, match=r"layer.* 0.* not compute the same") as e:
            model.train_step(*vector_batch(0))
        assert "had sum" in str(e.value)
        assert "Nothing was updated" in str(e.value)
    assert model.num_steps == 0
    assert all(torch.equal(param, before[name]) for name, param in params_of(net).items())
    odd.on = False
    model.train_step(*vector_batch(0))
    assert model.num_steps == 1


@pytest.mark.parametrize(("mode", "num_devices"), MODES)
def test_the_drop_in_form_is_checked_in_its_first_backward(
    vgpus: VirtualGPUs, odd: Odd, mode: str, num_devices: int
) -> None:
    model = wrap(layers(), mode, num_devices)
    inputs, targets = vector_batch(0)
    with torch.no_grad():
        model(inputs)
    with pytest.raises(harmony.RecomputeError, match="not compute the same twice"):
        square_loss(model(inputs), targets).backward()
    assert all(param.grad is None for param in model.parameters())
    odd.on = False
    square_loss(model(inputs), targets).backward()
    assert all(param.grad is not None for param in model.parameters())
    odd.on = True  # from now on nobody looks
    square_loss(model(inputs), targets).backward()


@pytest.mark.parametrize(("mode", "num_devices"), MODES)
def test_a_healthy_model_is_checked_once(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, mode: str, num_devices: int
) -> None:
    compared: list[int] = []
    compare = SelfCheck.compare

    def counted(check: SelfCheck) -> None:
        kinds = [key[0] for key in check._recorded]
        assert kinds.count(TaskKind.BACKWARD) == sum(
            (TaskKind.FORWARD, *key[1:]) in check._recorded
            for key in check._recorded
            if key[0] is TaskKind.BACKWARD
        )
        compared.append(kinds.count(TaskKind.BACKWARD))
        compare(check)

    monkeypatch.setattr(SelfCheck, "compare", counted)
    torch.manual_seed(0)
    options = {"device_memory": "300KiB", **SGD, "loss_fn": token_loss}
    model = wrap(GPT(dropout=0.1), mode, num_devices, **options)
    for step in range(3):
        model.train_step(*token_batch(step))
    packs = model.plan.spec.backward_packs
    assert len(packs) > 1
    # Every pack but the last was recomputed, for each of the four microbatches.
    assert compared == [4 * (len(packs) - 1)]


def test_attention_with_a_learnt_mask_takes_the_same_kernels_twice(vgpus: VirtualGPUs) -> None:
    """PyTorch's fused attention has no gradient for its mask: it is not taken in training."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(24, 24) / 5)
            self.bias = nn.Parameter(torch.randn(1, 1, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = (x @ self.weight).view(len(x), 1, 8, 3)
            mask = self.bias.expand(len(x), 1, 8, 8)
            out = nn.functional.scaled_dot_product_attention(heads, heads, heads, mask)
            return x + out.reshape(len(x), 24)

    torch.manual_seed(0)
    model = wrap(nn.Sequential(*(Attention() for _ in range(4))), "pp", 2, **SGD)
    model.train_step(*vector_batch(0))
    assert len(model.plan.spec.backward_packs) > 1
    found = model.verify(*vector_batch(1))
    assert found.identical, found.summary()


def test_microbatches_of_another_size_are_compared_by_what_they_share(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    model = wrap(SkipMLP(), "pp", 1, **SGD)
    model.train_step(*vector_batch(0))
    spec = model.plan.spec
    (variant,) = model._engine.variants
    check = variant.executor.new_check(model.plan.schedule)
    assert check is not None
    assert [check._parts(s) for s in spec.microbatches(0, TaskKind.FORWARD)] == [
        [s] for s in spec.microbatches(0, TaskKind.BACKWARD)
    ]
    check._cuts = [0, 2, 3, 4, 8]
    assert check._parts((0, 4)) == [(0, 2), (2, 3), (3, 4)]


def test_eval_mode_with_gradients_takes_the_same_kernels_twice(vgpus: VirtualGPUs) -> None:
    """PyTorch has other kernels for a transformer layer where no gradient is recorded."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)
    net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    twin = copy.deepcopy(net)
    model = wrap(net, "pp", 1, device_memory="140KiB", microbatch_size=8)
    inputs = torch.randn(8, 5, 24)
    model(inputs).square().mean().backward()
    twin(inputs).square().mean().backward()
    for name, param in twin.named_parameters():
        assert torch.equal(net.get_parameter(name).grad, param.grad), name
