"""The traps of docs/design.md, section 6, that concern capture and numerics: each has its test.

Under each trap are the tests that show it does not happen here: those of this file by name, the
others with their file, in tests/training if no folder is given.

- the next step's first layer read before its update
    test_exact: test_gpt_with_dropout (20 steps)
    test_races: test_every_removed_wait_is_found
- only the first microbatch's gradients kept, under accumulation and offload
    test_every_microbatch_counts_once
    test_dropin_loop: test_gradients_of_several_microbatches_add_up
- accumulation without dividing
    test_every_microbatch_counts_once
- means over unequal counts averaged as if they were equal
    test_losses: test_ignored_labels_of_unequal_count, test_num_items_in_batch
- gradients of unused parameters shift offsets, so others land in the wrong weights
    test_an_expert_that_nobody_chose_shifts_nothing
    test_state: test_unused_and_frozen_parameters
- a gradient of an earlier step, which took another path
    test_a_path_not_taken_leaves_no_old_gradient
- recompute without replaying dropout
    test_dropout_is_the_same_in_the_recompute
    test_layer_state: test_every_generator_of_the_host_follows_the_microbatch
- the recompute changes buffers once more
    test_layer_state: test_what_the_forward_changes_is_changed_once
- model left in eval mode
    test_modes_stay_as_they_were
- gradients accumulated in bf16
    test_gradients_under_autocast_add_up_in_float32
- features written into a temporary are lost
    test_what_is_written_through_a_mask_arrives
- buffers reused before their last reader ended; side streams; host copies too early
    test_races: test_every_removed_wait_is_found; the checker is on in all tests here
- blocking, pageable copies; host memory doubled
    test_state: test_arena_is_exact_and_replaces_the_old_memory
- killed instead of an error
    test_failures: test_a_layer_that_cannot_fit_is_refused_before_anything_runs
- step counters, LR or random numbers lost on resume
    test_state: test_resume_goes_on_bit_for_bit, test_lr_scheduler_on_the_full_optimizer
- bias correction that drifts between parts; moments corrupted
    test_every_pack_has_the_optimizers_state
- export aborts on tied weights
    test_tied_weights_are_saved_and_loaded
    test_plans: test_tied_weights_across_packs
- eval or generate hangs
    test_dropin: test_eval_in_the_middle_of_training
    test_generate
- a forward under no_grad in train mode corrupts state
    test_a_look_in_train_mode_changes_no_training
- clipping crashes or is wrong
    test_param_groups: test_clipping_the_norm_of_all_gradients
    test_dropin_loop: test_clipping_schedules_and_groups
- LoRA and frozen parameters ignored or trained
    test_adapters_are_trained_and_nothing_else
- parameter groups mixed up
    test_param_groups: test_groups_and_a_scheduler
- control flow frozen by one trace
    test_live: test_every_microbatch_takes_its_own_path
- tensors left on attributes lose their gradients
    test_random_modules: test_random_modules_train_as_in_plain_pytorch
- a cache of keys and values updated twice
    tests/capture/test_refuse: test_a_cache_is_switched_off_or_refused

"Auto" values that nobody can explain are the report's: tests/test_report.
"""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony

from .conftest import VirtualGPUs
from .models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch
from .plain import gradients_of, params_of, train_plain

WIDTH = 24
ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}


def wrap(net: nn.Module, **options: Any) -> harmony.Harmony:
    """Harmony's `train_step`, with several packs on two devices."""
    given = {
        "optimizer": torch.optim.AdamW,
        "optimizer_kwargs": ADAMW,
        "loss_fn": square_loss,
        "mode": "pp",
        "devices": 2,
        "microbatch_size": 2,
        "device_memory": "32KiB",
        # Most of these traps are in the recompute, and show in the gradients.
        "activations": "recompute",
        "updates": "host",
        **options,
    }
    return harmony.Harmony(net, **given)


def same_as_plain(net: nn.Module, batches: Any, **options: Any) -> harmony.Harmony:
    """Train in both ways and compare losses, gradients and parameters bit for bit."""
    loss_fn = options.get("loss_fn", square_loss)
    expected = train_plain(
        net,
        batches,
        optimizer=torch.optim.AdamW,
        options=ADAMW,
        loss_fn=loss_fn,
        microbatch=options.get("microbatch_size", 2),
    )
    model = wrap(net, **options)
    for batch, loss, gradients in zip(batches, expected.losses, expected.gradients, strict=True):
        assert torch.equal(model.train_step(*batch), loss)
        for name, found in gradients_of(net).items():
            wanted = gradients[name]
            assert (found is None) == (wanted is None), name
            assert found is None or wanted is None or torch.equal(found, wanted), name
    for name, param in params_of(net).items():
        assert torch.equal(param, expected.params[name]), name
    return model


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_microbatch_counts_once(size: int, vgpus: VirtualGPUs) -> None:
    """The gradient is that of the whole batch's mean, whatever it is cut into."""
    torch.manual_seed(0)
    net = SkipMLP()
    whole = copy.deepcopy(net)
    x, y = vector_batch(0)
    # Samples that pull apart: none of them could be left out, or stand for the others.
    y = y * torch.arange(1.0, 9.0)[:, None]
    square_loss(whole(x), y).backward()
    wrap(net, microbatch_size=size).train_step(x, y)
    for name, gradient in gradients_of(net).items():
        # Sums of another order than the whole batch's; one microbatch has the same bits.
        wanted = gradients_of(whole)[name]
        assert (gradient - wanted).abs().max() <= (1e-6 if size < 8 else 0) * wanted.abs().max()


class Experts(nn.Module):
    """A layer of experts, of which each sample takes one: some get no sample, and no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = (x[:, 0] > 0).long() + (x[:, 0] > 1e3)
        out = torch.zeros_like(x)
        for number in (2, 1, 0):
            rows = (choice == number).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, self.experts[number](x[rows]))
        return x + torch.tanh(self.after(out))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_an_expert_that_nobody_chose_shifts_nothing(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Routed()
    batches = [vector_batch(step) for step in range(3)]
    batches[0][0][:, 0] = -10.0  # at first the first expert alone; with weight decay it shows
    same_as_plain(net, batches)
    assert all(block.experts[0].weight.grad is not None for block in net.blocks)
    assert all(block.experts[2].weight.grad is None for block in net.blocks)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.branches[0 if x.sum() > 0 else 1]
        return branch(torch.tanh(self.first(x)))


def test_a_path_not_taken_leaves_no_old_gradient(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    batches = [vector_batch(step) for step in range(4)]
    batches = [((-1) ** step * x.abs(), y) for step, (x, y) in enumerate(batches)]
    model = same_as_plain(Branches(), batches)
    assert model.capture_mode == "trace"


def test_dropout_is_the_same_in_the_recompute(vgpus: VirtualGPUs) -> None:
    """Half of everything is dropped: other masks in the recompute would be far off."""
    torch.manual_seed(0)
    batches = [token_batch(step) for step in range(2)]
    model = same_as_plain(GPT(dropout=0.5), batches, loss_fn=token_loss, device_memory="300KiB")
    assert len(model.plan.spec.backward_packs) > 1


def test_modes_stay_as_they_were(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)),
        nn.Linear(WIDTH, WIDTH),
    )
    net[1].eval()  # a part that is fine-tuned with its statistics as they are
    modes = [module.training for module in net.modules()]
    statistics = net[1][1].running_mean.clone()
    model = same_as_plain(net, [vector_batch(step) for step in range(3)])
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(net[1][1].running_mean, statistics)
    model.eval(), model.train()
    assert all(module.training for module in net.modules())


def test_gradients_under_autocast_add_up_in_float32(vgpus: VirtualGPUs) -> None:
    """One large contribution, then many that bfloat16's eight bits would all round away."""
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(torch.eye(WIDTH))
            layer.bias.zero_()
    model = harmony.Harmony(net, devices=2, microbatch_size=1, device_memory="32KiB")
    x = torch.ones(64, WIDTH)
    weight = torch.full((64, 1), 0.5)
    weight[0] = 256.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    (out.float() * weight).sum().backward()
    assert net[0].bias.grad.dtype == torch.float32
    assert torch.equal(net[0].bias.grad, torch.full((WIDTH,), 256.0 + 63 * 0.5))


class Merges(nn.Module):
    """Writes features into the places of marked samples, as models of pictures and text do."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.picture = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = x > 0.5
        merged = torch.tanh(self.text(x)) * 1.0
        features = F.gelu(self.picture(x))
        merged[:, : WIDTH // 2] += features[:, WIDTH // 2 :]
        merged = merged.masked_scatter(mask, features)
        return self.out(merged)


def test_what_is_written_through_a_mask_arrives(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Merges()
    same_as_plain(net, [vector_batch(step) for step in range(3)])
    assert net.picture.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.NAdam])
def test_every_pack_has_the_optimizers_state(factory: Any, vgpus: VirtualGPUs) -> None:
    """Step counts and moments are plain PyTorch's, though each pack is updated on its own."""
    torch.manual_seed(0)
    net = SkipMLP()
    plain = copy.deepcopy(net)
    kind = {"fused": True} if factory is torch.optim.AdamW else {"foreach": False}
    options = {"lr": 1e-2, **kind}
    optimizer = factory(plain.parameters(), **options)
    model = wrap(net, optimizer=factory, optimizer_kwargs=options)
    for step in range(3):
        x, y = vector_batch(step)
        model.train_step(x, y)
        optimizer.zero_grad()
        for low in range(0, 8, 2):
            part = slice(low, low + 2)
            (square_loss(plain(x[part].clone()), y[part].clone()) * 0.25).backward()
        optimizer.step()
    found, wanted = model.optimizer.state_dict(), optimizer.state_dict()
    assert found["state"].keys() == wanted["state"].keys()
    for index, state in wanted["state"].items():
        assert float(found["state"][index]["step"]) == 3.0
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(found["state"][index][name]), value), name


def test_tied_weights_are_saved_and_loaded(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    options = {"loss_fn": token_loss, "device_memory": "300KiB"}
    model = wrap(GPT(tied=True), **options)
    model.train_step(*token_batch(0))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert torch.equal(state["head.weight"], state["tokens.weight"])
    plain, other = GPT(tied=True).eval(), wrap(GPT(tied=True), **options).eval()
    plain.load_state_dict(state)
    other.load_state_dict(state)
    ids, _ = token_batch(1)
    with torch.no_grad():
        assert torch.equal(other(ids), torch.cat([plain(part) for part in ids.split(2)]))
    assert other.module.head.weight is other.module.tokens.weight


def test_a_look_in_train_mode_changes_no_training(vgpus: VirtualGPUs) -> None:
    """A forward under no_grad between steps: dropout is on, and nothing else may notice."""
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    batches = [token_batch(step) for step in range(4)]
    expected = train_plain(
        net,
        batches,
        optimizer=torch.optim.AdamW,
        options=ADAMW,
        loss_fn=token_loss,
        microbatch=2,
    )
    model = wrap(net, loss_fn=token_loss, device_memory="400KiB")
    losses = []
    for step, batch in enumerate(batches):
        losses.append(model.train_step(*batch))
        with torch.no_grad() if step % 2 else torch.inference_mode():
            out = model(batch[0])
        assert not out.requires_grad
        assert model.num_steps == step + 1
    assert losses == expected.losses
    for name, param in params_of(net).items():
        assert torch.equal(param, expected.params[name]), name


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(self.drop(x))))


def test_adapters_are_trained_and_nothing_else(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(WIDTH, WIDTH).requires_grad_(False),
        *(Adapted() for _ in range(4)),
        nn.Linear(WIDTH, WIDTH).requires_grad_(False),
    )
    before = params_of(net)
    model = same_as_plain(net, [vector_batch(step) for step in range(3)], device_memory="24KiB")
    for name, param in net.named_parameters():
        trained = "up" in name or "down" in name
        assert torch.equal(param, before[name]) != trained, name
        assert (param in model.optimizer.state) == trained, name
        assert (param.grad is not None) == trained, name
    frozen = sum(p.nbytes for p in net.parameters() if not p.requires_grad)
    gradients = model._engine.factory.arenas[1]
    assert gradients.nbytes < frozen, "frozen parameters take no gradient memory"


def test_the_table_above_names_tests_that_there_are() -> None:
    files = list(Path(__file__).parents[1].rglob("test_*.py"))
    there = {file.stem for file in files}
    for file in files:
        there |= set(re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE))
    assert __doc__ is not None
    named = set(re.findall(r"\btest_\w+", __doc__))
    assert len(named) > 20
    assert named <= there, named - there
