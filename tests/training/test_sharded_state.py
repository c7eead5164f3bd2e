"""Optimizer state shared out over processes: the bits of one that has all of it, in a part of the
memory, by the same traffic."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.engine.peers import HEADER_NBYTES
from harmony.runtime.peers.chunks import cut_by_owner
from harmony.runtime.peers.exchange import MARK_NBYTES, TEXT_NBYTES
from harmony.runtime.peers.owners import Owners
from harmony.runtime.update.clipping import norm_of, norm_of_norms
from harmony.runtime.update.loss_scaling import LossScaling
from harmony.runtime.update.optimizer import PackOptimizer
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, square_loss, token_batch, vector_batch
from tests.training.optimizers import NormSGD
from tests.training.plain import params_of
from tests.training.servers import ENDED, on_servers
from tests.training.test_servers import (
    ADAMW,
    Halving,
    Normed,
    batches_for,
    error_of,
    no_text,
    other,
    plain_step,
)
from tests.training.test_servers import model_of as plain_model_of

pytestmark = devices.virtual_only("its processes set them up")


def model_of(net: nn.Module, **options: Any) -> harmony.Harmony:
    return plain_model_of(net, **{"shard_optimizer_state": True, **options})


def state_nbytes(model: harmony.Harmony) -> int:
    assert model.optimizer is not None
    held = (t for state in model.optimizer.state.values() for t in state.values())
    return sum(t.nbytes for t in held if t.dim())


# What runs in each process


def steps(rank: int, size: int) -> Any:
    """Clipped steps with dropout in two microbatches, from process 0's values, by two groups of
    parameters, a scheduler and small chunks; a layer is unfrozen on the way."""
    torch.manual_seed(0)
    expected, batches = GPT(dropout=0.1, depth=2), batches_for(size, 3)
    net = copy.deepcopy(expected)
    if rank:
        torch.nn.init.ones_(net.head.weight)
    opts, schedulers = [], []
    frozen = [next(n.parameters()) for n in (net, expected)]
    for param in frozen:
        param.requires_grad_(False)
    model = model_of(
        net,
        microbatch_size=2,
        devices=2 if size == 2 else 1,
        device_memory="300KiB",
        max_grad_norm=0.5,
        param_groups=groups_of,
    )
    opts = [model.optimizer, torch.optim.AdamW(groups_of(expected), **ADAMW)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in opts]
    for step, parts in enumerate(batches):
        if step == 2:
            for param in frozen:
                param.requires_grad_()
        model.train_step(*parts[rank])
        plain_step(expected, parts, step, 2)
        norm = nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        opts[1].step()
        assert torch.equal(norm, model.last_grad_norm)
        for scheduler in schedulers:
            scheduler.step()
    counted = sent_by(model, parts[rank]), state_nbytes(model)
    kept = [p.grad is not None for n, p in net.named_parameters()]
    owners = model._engine.peers.owners
    assert kept == [owners.is_mine(n) for n, _ in net.named_parameters()]
    own = sum(8 * p.numel() for n, p in net.named_parameters() if owners.is_mine(n))
    assert 0 <= model.record.graph.state_nbytes() - own <= 8 * len(kept), "the plan counts it"
    plain_step(expected, parts, 3, 2)
    nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
    opts[1].step()
    return other(params_of(net), params_of(expected)), *counted


def groups_of(net: nn.Module) -> Any:
    params = list(net.parameters())
    return [{"params": params[:3], "lr": 3e-3}, {"params": params[3:], "weight_decay": 0.0}]


def sent_by(model: harmony.Harmony, batch: Any) -> tuple[int, int]:
    """Bytes that a step sends, and what it should send: gradients and weights of its share."""
    peers = model._engine.peers
    params = dict(model.module.named_parameters())
    trained = [(n, p.numel(), p.dtype) for n, p in reversed(params.items())]
    peers._owned = tuple(trained), cut_by_owner(trained, peers.owners.of, peers.group.size, 20000)
    size, before, chunks = peers.group.size, peers.group.sent_nbytes, peers._owned[1]
    assert len(chunks) > 5
    model.train_step(*batch)
    own = sum(p.nbytes for n, p in params.items() if peers.owners.is_mine(n))
    whole = sum(p.nbytes for p in params.values())
    marks = 2 * (size - 1) * MARK_NBYTES * len(chunks)
    row = TEXT_NBYTES + 2 * len(params) + 8 * (2 + len(params))
    said = (size - 1) * (HEADER_NBYTES + 4 * row)
    return peers.group.sent_nbytes - before, (whole - own) + (size - 1) * own + marks + said


def fp16(rank: int, size: int) -> Any:
    """Scaled losses with fp32 masters: the first steps are skipped, in all processes."""
    found = []
    for shards in (False, True):
        torch.manual_seed(0)
        net = GPT(dropout=0.1, depth=1)
        model = model_of(net, precision="fp16", max_grad_norm=0.5, shard_optimizer_state=shards)
        model.grad_scaler._init_scale = 2.0**18
        scales = []
        for parts in batches_for(size, 4):
            model.train_step(*parts[rank])
            scales.append(model.grad_scaler.get_scale())
        found.append((params_of(net), scales, float(model.last_grad_norm)))
        model.close()
    (plain, *rest), (shared, *rest_too) = found
    assert scales[0] > scales[-1], "a step was skipped"
    return other(shared, plain) if rest == rest_too else (rest, rest_too)


def low_precision(rank: int, size: int) -> Any:
    """One microbatch in each process, in bf16, saved on the way: one process has the same bits."""
    torch.manual_seed(0)
    net = GPT(dropout=0.1, depth=1)
    model = model_of(net, precision="bf16", max_grad_norm=0.5)
    for step, parts in enumerate(batches_for(size, 3)):
        if step == 2:
            model.save_checkpoint(os.environ["SHARED_FOLDER"])
        model.train_step(*parts[rank])
    return params_of(net)


def only_one_uses_it(rank: int, size: int) -> Any:
    """A layer that only one process uses, in one of the steps: its momentum is made by that."""
    torch.manual_seed(0)
    net = Normed().eval()
    expected = copy.deepcopy(net)
    sgd = {"lr": 0.1, "momentum": 0.9, "foreach": False}
    model = model_of(net, optimizer=torch.optim.SGD, optimizer_kwargs=sgd, loss_fn=square_loss)
    opt = torch.optim.SGD(expected.parameters(), **sgd)
    for step in range(3):
        batches = [vector_batch(10 * step + r, 4) for r in range(size)]
        opt.zero_grad()
        for r, (x, y) in enumerate(batches):
            (square_loss(expected(x, more=r == step == 1), y) / size).backward()
        opt.step()
        x, y = batches[rank]
        model.train_step({"x": x, "more": rank == step == 1}, y)
    found = params_of(net)
    return [n for n, p in params_of(expected).items() if not torch.allclose(found[n], p)]


def tied(rank: int, size: int) -> Any:
    """A tied weight, by an optimizer that makes its state beforehand."""
    torch.manual_seed(0)
    net = GPT(depth=1, tied=True)
    expected = copy.deepcopy(net)
    adagrad = {"lr": 0.01, "foreach": False}
    model = model_of(net, optimizer=torch.optim.Adagrad, optimizer_kwargs=adagrad)
    opt = torch.optim.Adagrad(expected.parameters(), **adagrad)
    for step, parts in enumerate(batches_for(size, 2)):
        model.train_step(*parts[rank])
        plain_step(expected, parts, step, 4)
        opt.step()
    assert state_nbytes(model) < 0.6 * sum(p.nbytes for p in net.parameters())
    return other(params_of(net), params_of(expected))


def not_planned(rank: int, size: int) -> Any:
    """A forward that is known only as it runs, and hooks on parameters, clipped."""
    found: list[str] = []
    for mode in ("dynamic", "trace"):
        torch.manual_seed(0)
        layers = [nn.Linear(24, 24), nn.Dropout(0.5), nn.Linear(24, 24)]
        net = Halving(*layers) if mode == "dynamic" else nn.Sequential(*layers)
        expected = copy.deepcopy(net)
        model = model_of(net, microbatch_size=2, loss_fn=square_loss, max_grad_norm=0.1)
        opt = torch.optim.AdamW(expected.parameters(), **ADAMW)
        for n in (net, expected) if mode == "trace" else ():
            next(n.parameters()).register_hook(lambda gradient: gradient * 2)
        for step in range(2):
            parts = [vector_batch(10 * step + r, 4) for r in range(size)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.train_step(*parts[rank])
            plain_step(expected, parts, step, 2, square_loss)
            nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
            opt.step()
        assert model.capture_mode == mode
        found += other(params_of(net), params_of(expected))
        model.close()
    return found


def saved(rank: int, size: int) -> Any:
    """A run is saved, and goes on from it with the state shared out, and without."""
    folder = Path(os.environ["TESTS_FOLDER"], "shared")
    torch.manual_seed(0)
    net = GPT(dropout=0.1, depth=1)
    model, batches = model_of(net), batches_for(size, 3)
    model.train_step(*batches[0][rank])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_checkpoint(folder, async_save=True)
    for parts in batches[1:]:
        model.train_step(*parts[rank])
    model.close()
    differ, counted = [], []
    for shards in (True, False):
        again = GPT(dropout=0.1, depth=1)
        resumed = model_of(again, seed=3, shard_optimizer_state=shards)
        resumed.load_checkpoint(folder)
        counted.append(state_nbytes(resumed))
        for parts in batches[1:]:
            resumed.train_step(*parts[rank])
        differ += other(params_of(again), params_of(net))
        resumed.close()
    said = [str(w.message) for w in caught if "shared out" in str(w.message)]
    return differ, counted, len(said)


def refused(rank: int, size: int) -> Any:
    """What cannot be shared out is refused by name, and changes nothing."""
    net = GPT(depth=1)
    own = {"optimizer": None, "optimizer_kwargs": None}
    coupled = {"optimizer": NormSGD, "optimizer_kwargs": {}}
    said = {
        "late": error_of(lambda: model_of(net, overlap_updates=True)),
        "own": error_of(lambda: model_of(net, **own)),
        "coupled": error_of(lambda: model_of(net, **coupled)),
    }
    model = model_of(net)
    x, y = token_batch(rank, 4)
    model.train_step(x, y)
    before = params_of(net)
    hook = model.optimizer.register_step_post_hook(lambda *_: None)
    said["hooked"] = error_of(lambda: model.train_step(x, y))
    hook.remove()
    said["step"] = error_of(model.optimizer.step)
    kept = model.optimizer.state_dict()
    if rank:
        model.optimizer.load_state_dict(kept)
        model.optimizer.state.update({p: {"step": torch.ones(())} for p in net.parameters()})
    said["state"] = error_of(lambda: model.train_step(x, y))
    model.optimizer.load_state_dict(kept)
    assert not other(params_of(net), before)
    model.train_step(x, y)
    return said, params_of(net)


def not_finite(rank: int, size: int) -> Any:
    """What one process makes infinite updates nothing in any, wherever it is added up."""
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    model = model_of(net, loss_fn=square_loss, detect_nonfinite=True)
    x, y = vector_batch(rank, 4)
    model.train_step(x, y)
    before = params_of(net)
    said = error_of(lambda: model.train_step(x / (1 - rank), y))
    unchanged = not other(params_of(net), before)
    model.train_step(x, y)
    return said, unchanged, params_of(net)


def broken(rank: int, size: int) -> Any:
    """A process that fails in the middle of its updates tears all; a checkpoint mends all."""
    folder = Path(os.environ["TESTS_FOLDER"], "broken")
    torch.manual_seed(0)
    net = GPT(depth=1)
    model = model_of(net)
    x, y = token_batch(rank, 4)
    model.train_step(x, y)
    model.save_checkpoint(folder)
    model.train_step(x, y)
    expected, kept = params_of(net), PackOptimizer.update

    def fails(*_: Any) -> Any:
        raise RuntimeError("a disk caught fire")

    model.load_checkpoint(folder)
    if rank:
        PackOptimizer.update = fails  # type: ignore[assignment]
    said = error_of(lambda: model.train_step(x, y))
    PackOptimizer.update = kept  # type: ignore[method-assign]
    again = error_of(lambda: model.train_step(x, y))
    model.load_checkpoint(folder)
    model.train_step(x, y)
    return said, again, other(params_of(net), expected)


def lost(rank: int, size: int) -> Any:
    """Process 1 ends in the middle of its updates."""
    model = model_of(GPT(depth=1))
    x, y = token_batch(rank, 4)
    model.train_step(x, y)
    if rank == 1:
        PackOptimizer.update = lambda *_: os._exit(0)  # type: ignore[assignment]
    return error_of(lambda: model.train_step(x, y)), error_of(lambda: model.train_step(x, y))


# What is asked of that


HERE = "tests.training.test_sharded_state:"
EXACT = ("fp16", "only_one_uses_it", "tied", "not_planned")
IN_TWO = ("steps", "low_precision", *EXACT, "saved", "refused", "not_finite", "broken")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARED_FOLDER", str(folder))
        return on_servers(2, *(HERE + name for name in IN_TWO))


@pytest.fixture(scope="module")
def four() -> dict[str, list[Any]]:
    return on_servers(4, HERE + "steps", HERE + "lost")


@pytest.mark.parametrize("size", ["two", "four"])
def test_shared_out_state_computes_what_plain_pytorch_does_in_a_part_of_its_memory(
    size: str, request: pytest.FixtureRequest
) -> None:
    found = no_text(request.getfixturevalue(size)["steps"])
    whole = sum(8 * p.numel() for p in GPT(depth=2).parameters())
    assert [differ for differ, *_ in found] == [[]] * len(found)
    assert sum(nbytes for *_, nbytes in found) == whole
    for _, (sent, formula), nbytes in found:
        assert sent == formula
        assert abs(nbytes - whole / len(found)) < 0.05 * whole


@pytest.mark.parametrize("name", EXACT)
def test_the_same_bits_in(two: dict[str, list[Any]], name: str) -> None:
    assert no_text(two[name]) == [[], []]


def test_one_process_has_the_same_bits_and_goes_on_from_what_several_have_saved(
    two: dict[str, list[Any]], folder: Path, vgpus: VirtualGPUs
) -> None:
    expected = no_text(two["low_precision"])
    alone = {"process_group": None, "shard_optimizer_state": False, "microbatch_size": 4}
    batches = [
        tuple(torch.cat(both) for both in zip(*parts, strict=True)) for parts in batches_for(2, 3)
    ]
    for resumes in (False, True):
        torch.manual_seed(resumes)
        net = GPT(dropout=0.1, depth=1)
        model = model_of(net, precision="bf16", max_grad_norm=0.5, **alone)
        if resumes:
            with pytest.warns(harmony.HarmonyWarning, match="saved by 2 processes"):
                model.load_checkpoint(folder)
        for batch in batches[2 if resumes else 0 :]:
            model.train_step(*batch)
        assert [other(found, params_of(net)) for found in expected] == [[], []]


def test_a_saved_run_goes_on_with_the_state_shared_out_or_whole(
    two: dict[str, list[Any]],
) -> None:
    found = no_text(two["saved"])
    whole = sum(8 * p.numel() for p in GPT(depth=1).parameters())
    assert [differ for differ, *_ in found] == [[], []]
    assert [counted[1] for _, counted, _ in found] == [whole, whole]
    assert sum(counted[0] for _, counted, _ in found) == whole
    assert [warned for *_, warned in found] == [1, 0]


def test_what_cannot_be_shared_out_is_refused_by_name(two: dict[str, list[Any]]) -> None:
    (first, left), (second, right) = no_text(two["refused"])
    assert not other(left, right)
    for said in (first, second):
        assert "shard_optimizer_state=True with overlap_updates=True" in said["late"]
        assert "ZeroRedundancyOptimizer" in said["own"]
        assert "with NormSGD, whose step is one of all parameters" in said["coupled"]
        assert "hooks are called with its step" in said["hooked"]
        assert "AdamW.step() with shard_optimizer_state=True" in said["step"]
        assert "have another state of the optimizer" in said["state"]
    with pytest.raises(harmony.ConfigError, match="without process_group="):
        model_of(GPT(depth=1), process_group=None)


def test_what_is_not_finite_in_one_process_updates_nothing_in_any(
    two: dict[str, list[Any]],
) -> None:
    (first, kept, left), (second, kept_too, right) = no_text(two["not_finite"])
    assert kept and kept_too and not other(left, right)
    assert first.startswith("NonFiniteError: step 1") and "comes from another process" in first
    assert second.startswith("NonFiniteError: step 1")


def test_a_failure_in_the_middle_of_the_updates_is_heard_by_all_and_mended_by_a_checkpoint(
    two: dict[str, list[Any]],
) -> None:
    (first, again, differ), (second, again_too, differ_too) = no_text(two["broken"])
    assert first.startswith("PeerError: process 1 of 2 failed in this step: ExecutionError")
    assert "was in the middle of the updates: go back to a checkpoint" in first
    assert "a disk caught fire. Parameters of" in second
    assert again.startswith("HarmonyError: an earlier step failed after some")
    assert again_too.startswith("HarmonyError: an earlier step failed after some")
    assert not differ and not differ_too


def test_a_process_lost_in_the_middle_of_the_updates_ends_the_others(
    four: dict[str, list[Any]],
) -> None:
    assert four["lost"][1] == ENDED
    for rank in (0, 2, 3):
        said, again = four["lost"][rank]
        assert said.startswith(f"PeerError: process {rank} of 4 has lost the others (")
        assert "Some parameters are of this step, others of the step before. Start all" in said
        assert again == said


@pytest.mark.parametrize("has_some", [True, False])
def test_a_process_whose_own_gradients_are_finite_skips_the_step_with_the_others(
    has_some: bool,
) -> None:
    scaling, param = LossScaling(), nn.Parameter(torch.ones(2))
    before = scaling.scale()
    param.grad = torch.ones(2) if has_some else None
    scaling.unscale([param])
    assert not scaling.skips
    scaling.hear(looked=True, skips=True)
    assert scaling.skips
    scaling.update()
    assert scaling.scale() == before / 2


def test_norms_of_gradients_of_several_types_are_put_together_as_pytorch_does() -> None:
    torch.manual_seed(0)
    types = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16]
    gradients = [torch.randn(50).to(dtype) for dtype in types]
    expected = nn.utils.get_total_norm(gradients)
    assert torch.equal(norm_of_norms([norm_of(g) for g in gradients]), expected)


def test_every_process_has_about_as_many_bytes_and_some_of_every_part() -> None:
    net = GPT(depth=6)
    owners = Owners(0, 4)
    owners.assign(net.named_parameters())
    shares = [
        sum(p.nbytes for n, p in net.named_parameters() if owners.of[n] == rank)
        for rank in range(4)
    ]
    assert max(shares) - min(shares) <= 0.02 * sum(shares)
    given = [(n, p.numel(), p.dtype) for n, p in net.named_parameters()]
    chunks = cut_by_owner(given, owners.of, 4, 4000)
    assert sum(c.nbytes_of(rank) for c in chunks for rank in range(4)) == sum(shares)
    assert all(c.nbytes_of(rank) <= 1000 for c in chunks for rank in range(4))
    full = [c for c in chunks if min(c.nbytes_of(rank) for rank in range(4)) == 1000]
    assert len(full) > 0.9 * len(chunks)
