"""Forwards in the user's own graphs: several forwards, parts of them, again and again."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, vector_batch
from tests.training.plain import gradients_of


def wrapped(net: nn.Module, **options: Any) -> harmony.Harmony:
    """Wrap a copy, cut into several packs, with the batch as one microbatch."""
    defaults = {"devices": 2, "microbatch_size": 8, "device_memory": "32KiB", "mode": "pp"}
    return harmony.Harmony(copy.deepcopy(net), **{**defaults, **options})


def same_gradients(found: nn.Module, expected: nn.Module) -> None:
    other = gradients_of(found)
    for name, gradient in gradients_of(expected).items():
        assert (gradient is None) == (other[name] is None), name
        assert gradient is None or torch.equal(other[name], gradient), name


def lanes(model: harmony.Harmony) -> list[Any]:
    found = [b.in_flight_pool._taken.values() for b in model._engine.variants]
    return [lane for per_size in found for each in per_size for lane in each]


def both(net: nn.Module, model: nn.Module, run: Callable[[nn.Module], list[torch.Tensor]]) -> None:
    """Run the same on both; losses and gradients must be the same bits."""
    expected, found = run(net), run(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    same_gradients(model, net)


# Several forwards before one backward


@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_siamese_loss_of_three_forwards(vgpus: VirtualGPUs, mode: str, num_devices: int) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net, mode=mode, devices=num_devices, microbatch_size=2)
    plain = copy.deepcopy(net)
    for step in range(2):
        a, b = vector_batch(step)
        c = vector_batch(step + 9)[0]
        loss = torch.nn.functional.triplet_margin_loss(model(a), model(b), model(c))
        expected = torch.nn.functional.triplet_margin_loss(plain(a), plain(b), plain(c))
        model.zero_grad()
        plain.zero_grad()
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            # The microbatches' gradients are added in another order.
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)
    assert len(lanes(model)) == 3


def test_forwards_with_one_microbatch_add_up_bit_for_bit(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()

    def run(module: nn.Module) -> list[torch.Tensor]:
        a, b = vector_batch(0)
        one, two = module(a), module(b)
        loss = square_loss(one, two) + square_loss(two, a)
        loss.backward()
        return [loss.detach()]

    both(net, wrapped(net), run)


def test_backwards_in_any_order_and_forwards_without_gradients_between(
    vgpus: VirtualGPUs,
) -> None:
    torch.manual_seed(0)
    net = SkipMLP()

    def run(module: nn.Module) -> list[torch.Tensor]:
        batches = [vector_batch(step) for step in range(3)]
        losses = [square_loss(module(x), y) for x, y in batches]
        for index in (1, 0, 2):
            with torch.no_grad():
                module(batches[index][1])
            losses[index].backward()
        return [loss.detach() for loss in losses]

    both(net, wrapped(net), run)


def test_dropout_of_each_forward_is_replayed_in_its_own_backward(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.2)
    model = wrapped(net, device_memory="2MiB")
    (a, y), (b, z) = token_batch(0), token_batch(1)

    def loss_of(module: Any, seeds: bool) -> torch.Tensor:
        outputs = []
        for step, x in enumerate((a, b)):
            if seeds:
                harmony.seed_microbatch(step, 0)
            outputs.append(module(x).flatten(0, 1))
        one, two = outputs
        entropy = torch.nn.functional.cross_entropy
        return entropy(one, y.flatten()) + entropy(two, z.flatten())

    loss, expected = loss_of(model, False), loss_of(net, True)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    same_gradients(model, net)


def test_forwards_of_other_shapes_and_modes_wait_together(vgpus: VirtualGPUs) -> None:
    """Each has its own layers on the devices, which the backward has to bring back."""
    torch.manual_seed(0)
    net = GPT(dropout=0.0)
    model = wrapped(net, device_memory="2MiB")
    entropy = torch.nn.functional.cross_entropy

    def run(module: nn.Module) -> list[torch.Tensor]:
        losses = []
        for time, samples, train in ((16, 8, True), (8, 8, True), (16, 3, True), (16, 8, False)):
            x, y = token_batch(time, samples, time)
            module.train(train)
            losses.append(entropy(module(x).flatten(0, 1), y.flatten()))
        module.train()
        for loss in losses:
            loss.backward()
        return [loss.detach() for loss in losses]

    both(net, model, run)


def test_dropped_forwards_leave_nothing_behind(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    model = wrapped(SkipMLP())
    x, y = vector_batch(0)
    for _ in range(20):
        loss = square_loss(model(x), y)  # the one before goes when this one is there
    assert len(lanes(model)) <= 2
    loss.backward()
    del loss
    gc.collect()
    assert not any(lane.is_taken for lane in lanes(model))
    kept = [model(x) for _ in range(4)]
    assert sum(lane.is_taken for lane in lanes(model)) == len(lanes(model)) == 4
    cycle: list[Any] = [kept[0]]
    cycle.append(cycle)
    del kept, cycle
    gc.collect()
    assert not any(lane.is_taken for lane in lanes(model))
    square_loss(model(x), y).backward()
    assert len(lanes(model)) == 4


def test_a_forward_that_fails_leaves_its_lane_to_the_next(vgpus: VirtualGPUs) -> None:
    model = wrapped(SkipMLP())
    x, y = vector_batch(0)
    model(x)
    run, model_engine = model._engine.variants.active.executor.run, model._engine
    model_engine.variants.active.executor.run = lambda *_: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        model(x)
    model_engine.variants.active.executor.run = run  # type: ignore[method-assign]
    gc.collect()
    square_loss(model(x), y).backward()
    assert len(lanes(model)) == 1


# A second backward


def test_retain_graph_gives_the_gradients_again(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()

    def run(module: nn.Module) -> list[torch.Tensor]:
        x, y = vector_batch(0)
        loss = square_loss(module(x), y)
        loss.backward(retain_graph=True)
        module(y)
        (2 * loss).backward()
        return [loss.detach()]

    both(net, wrapped(net), run)


def test_a_graph_that_was_freed_is_pytorchs_own_error(vgpus: VirtualGPUs) -> None:
    model = wrapped(SkipMLP())
    out = model(vector_batch(0)[0])
    out.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


def test_a_second_derivative_is_refused(vgpus: VirtualGPUs) -> None:
    model = wrapped(SkipMLP())
    x = vector_batch(0)[0].requires_grad_()
    with pytest.raises(harmony.HarmonyError, match="second derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    out = model(x)
    with pytest.raises(harmony.HarmonyError, match="second derivative"):
        out.sum().backward(create_graph=True)
    assert all(p.grad is None for p in model.parameters())


def test_a_forward_that_tangents_go_into_is_refused(vgpus: VirtualGPUs) -> None:
    model = wrapped(SkipMLP())
    x = vector_batch(0)[0]
    with forward_ad.dual_level():
        model(x)
        with pytest.raises(harmony.HarmonyError, match="forward_ad"):
            model(forward_ad.make_dual(x, torch.ones_like(x)))


# Parameters that change in between


def test_parameters_that_changed_before_the_backward_are_an_error(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    model = wrapped(net)
    x, y = vector_batch(0)

    def in_place(model: nn.Module) -> None:
        with torch.no_grad():
            model.layers[3].weight.mul_(1.5)

    def loaded(model: nn.Module) -> None:
        model.load_state_dict(net.state_dict())

    def stepped(**options: Any) -> Callable[[nn.Module], None]:
        def step(model: nn.Module) -> None:
            square_loss(model(x), y).backward()
            torch.optim.AdamW(model.parameters(), **options).step()

        return step

    changes = [in_place, loaded, stepped(fused=True), stepped(foreach=False), stepped()]
    for change in changes:
        model.zero_grad()
        early = square_loss(model(x), y)
        change(model)
        model.zero_grad()
        with pytest.raises(harmony.HarmonyError, match=r"parameter layers\.\d.* had been changed"):
            early.backward()
        assert all(p.grad is None for p in model.parameters())
        square_loss(model(x), y).backward()  # and it goes on


# Around the call


def test_checkpoint_and_hooks_for_saved_tensors_around_the_model(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net)
    x, y = vector_batch(0)
    around: list[Callable[..., torch.Tensor]] = [
        lambda module, v: checkpoint(module, v, use_reentrant=True),
        lambda module, v: checkpoint(module, v, use_reentrant=False),
        lambda module, v: _saved_on_cpu(module, v),
    ]
    for call in around:
        results = []
        for module in (net, model):
            leaf = x.clone().requires_grad_()
            square_loss(call(module, leaf * 1), y).backward()
            results.append(leaf.grad)
        assert torch.equal(*results)
        same_gradients(model, net)


def _saved_on_cpu(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu():
        return module(x)


def test_hooks_of_the_wrapper_are_those_of_any_module(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net)
    x, y = vector_batch(0)
    results: list[Any] = []
    for module in (net, model):
        seen: list[torch.Tensor] = []
        module.register_forward_hook(lambda _, inputs, output: output * 2)
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))
        module.register_full_backward_hook(lambda _, given, came, seen=seen: seen.extend(given))
        leaf = x.clone().requires_grad_()
        square_loss(module(leaf), y).backward()
        results.append([leaf.grad, *seen])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    same_gradients(model, net)


def test_a_model_with_a_backward_hook_can_be_let_go(vgpus: VirtualGPUs) -> None:
    model = wrapped(SkipMLP())
    model.register_full_backward_hook(lambda _, given, came: None)
    x, y = vector_batch(0)
    square_loss(model(x.clone().requires_grad_()), y).backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_outputs_may_be_changed_in_place(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()

    def run(module: nn.Module) -> list[torch.Tensor]:
        x, y = vector_batch(0)
        out = module(x)
        out += 1
        loss = square_loss(torch.relu_(out), y)
        loss.backward()
        return [loss.detach()]

    both(net, wrapped(net), run)


def test_transforms_and_batched_gradients_are_refused_by_name(vgpus: VirtualGPUs) -> None:
    model = wrapped(SkipMLP())
    x, y = vector_batch(0)
    with pytest.raises(harmony.HarmonyError, match=r"inside of torch\.func"):
        torch.func.grad(lambda v: model(v).sum())(x)
    with pytest.raises(harmony.HarmonyError, match=r"inside of torch\.func"):
        torch.func.vmap(model)(torch.stack([x, y]))
    out = model(x.requires_grad_())
    with pytest.raises(harmony.HarmonyError, match="is_grads_batched"):
        torch.autograd.grad(out, x, torch.stack([y, y]), is_grads_batched=True)


def test_tensors_that_stand_in_for_parameters_are_refused(vgpus: VirtualGPUs) -> None:
    net = SkipMLP()
    model = wrapped(net)
    x, _ = vector_batch(0)
    doubled = {name: param * 2 for name, param in net.named_parameters()}
    for _ in range(2):
        with pytest.raises(harmony.HarmonyError, match=r"layers\.0\.weight is not the model's"):
            torch.func.functional_call(model, doubled, (x,))
        model(x)


def test_threads_take_turns(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net)
    x, y = vector_batch(0)
    expected = torch.autograd.grad(square_loss(net(x), y), list(net.parameters()))
    found: list[Any] = []

    def run() -> None:
        for _ in range(4):
            found.append(torch.autograd.grad(square_loss(model(x), y), list(model.parameters())))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for gradients in found:
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
