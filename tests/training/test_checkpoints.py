"""Checkpoints: a resumed run is the run that was not interrupted, or loading is refused."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import shutil
import sys
import warnings
from collections import Counter, OrderedDict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR

import harmony
from harmony.checkpoint import store, training, writing
from harmony.checkpoint.tree import decode, encode
from harmony.core.files import parse_json
from harmony.engine.resumed import _joined
from harmony.errors import ConfigError, HarmonyError, NotSavedError
from harmony.planner.ir.tasks import Pack
from harmony.weights.checkpoint_files import open_checkpoint
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, square_loss, token_batch, token_loss, vector_batch

Net = nn.Module


def vectors(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = vector_batch(step, width=8)
    return x, y


def trained(net: Net, **options: Any) -> harmony.Harmony:
    settings: dict[str, Any] = {
        "optimizer": torch.optim.AdamW,
        "optimizer_kwargs": {"lr": 1e-2},
        "loss_fn": token_loss,
        "microbatch_size": 4,
        "mode": "pp",
        "devices": 2,
        # A little more goes through the kernels that CUDA has of its own.
        "device_memory": "400KiB" if devices.TYPE == "vgpu" else "480KiB",
        "seed": 5,
    }
    return harmony.Harmony(net, **{**settings, **options})


def values(net: Net) -> dict[str, torch.Tensor]:
    held = net.state_dict().items()
    return {name: value.clone() for name, value in held if isinstance(value, torch.Tensor)}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"device_memory": "8MiB"},  # other packs, other residency
        {"devices": 1, "device_memory": "8MiB"},
        {"updates": "host", "seed": None},  # the checkpoint brings its seed
    ],
    ids=["same", "more memory", "one GPU", "host updates"],
)
@pytest.mark.parametrize("clipped", [False, True])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(
    vgpus: VirtualGPUs, tmp_path: Path, other: dict[str, Any], clipped: bool
) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1)
    fresh = copy.deepcopy(net)
    clip = {"max_grad_norm": 0.5} if clipped else {}
    model = trained(net, **clip)
    scheduler = MultiStepLR(model.optimizer, [2, 4], 0.5)
    for step in range(3):
        model.train_step(*token_batch(step))
        scheduler.step()
    folder = model.save_checkpoint(tmp_path, scheduler=scheduler, extra={"epoch": (1, "a")})
    assert folder == tmp_path / "step-00000003"
    drawn = torch.rand(3), random.random()
    losses = []
    for step in range(3, 6):
        losses.append(model.train_step(*token_batch(step)))
        scheduler.step()
    resumed = trained(fresh, **clip, **other)
    again = MultiStepLR(resumed.optimizer, [2, 4], 0.5)
    restored = resumed.load_checkpoint(tmp_path, scheduler=again)
    assert (restored.step, restored.extra, restored.folder) == (3, {"epoch": (1, "a")}, folder)
    assert (resumed.num_steps, resumed.seed) == (3, 5)
    assert torch.equal(drawn[0], torch.rand(3))
    assert drawn[1] == random.random()
    for step in range(3, 6):
        assert torch.equal(resumed.train_step(*token_batch(step)), losses[step - 3])
        again.step()
    assert same(values(model.module), values(resumed.module))
    assert scheduler.get_last_lr() == again.get_last_lr()
    for param, twin in zip(model.parameters(), resumed.parameters(), strict=True):
        assert param.shape == twin.shape
        one, two = model.optimizer.state[param], resumed.optimizer.state[twin]
        assert all(torch.equal(one[key].cpu(), two[key].cpu()) for key in one)


class Counting(nn.Module):
    """Has a norm, a buffer that no state dict has, a counter, and a state of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.drop = nn.Dropout(0.2)
        self.note: Any = ("none", 0)

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.mul_(1.5)
        return self.last(self.drop(self.norm(self.first(x)).relu())) * self.scale


def test_a_loop_of_ones_own_goes_on(vgpus: VirtualGPUs, tmp_path: Path) -> None:
    def run(net: Counting, steps: range, resume: bool) -> tuple[Any, ...]:
        model = harmony.Harmony(net, devices=1, seed=3)
        groups = [{"params": [net.last.bias], "lr": 0.1}, {"params": [net.first.weight]}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        scheduler = OneCycleLR(optimizer, 0.2, total_steps=10)
        objects = {"optimizer": optimizer, "scheduler": scheduler}
        if resume:
            model.load_checkpoint(tmp_path, **objects)
        losses = []
        for step in steps:
            optimizer.zero_grad()
            x, y = vectors(step)
            loss = square_loss(model(x + 0.1 * torch.randn(x.shape)), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            if step == 1:
                net.note = ("kept", step)
                model.save_checkpoint(tmp_path, **objects)
        return losses, values(net) | {"scale": net.scale.clone()}, net.note

    torch.manual_seed(0)
    net = Counting()
    fresh = copy.deepcopy(net)
    losses, left, note = run(net, range(5), resume=False)
    torch.manual_seed(77)
    random.seed(77)
    again, left_again, note_again = run(fresh, range(2, 5), resume=True)
    assert again == losses[2:]
    assert same(left, left_again)
    assert note == note_again == ("kept", 1)


@pytest.mark.parametrize("eager", [False, True])
def test_gradients_that_wait_for_a_step_are_saved(
    vgpus: VirtualGPUs, tmp_path: Path, eager: bool
) -> None:
    """Saved between two backwards of one step: they were once lost in silence."""

    class Net(Counting):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if eager:
                self.seen = x.detach()
            return super().forward(x)

    def run(net: Net, backwards: range, resume: bool) -> dict[str, torch.Tensor]:
        model = harmony.Harmony(net, devices=1, seed=3)
        optimizer = torch.optim.AdamW([p for n, p in net.named_parameters() if n != "last.bias"])
        if resume:
            model.load_checkpoint(tmp_path, optimizer=optimizer)
        for number in backwards:
            x, y = vectors(number)
            square_loss(model(x), y).backward()
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
            if number == 4:
                model.save_checkpoint(tmp_path, optimizer=optimizer)
        found = values(net)
        return found | {
            f"d{n}": p.grad.clone() for n, p in net.named_parameters() if p.grad is not None
        }

    torch.manual_seed(0)
    net = Net()
    net.first.bias.requires_grad_(False)
    fresh = copy.deepcopy(net)
    left, again = run(net, range(8), resume=False), run(fresh, range(5, 8), resume=True)
    assert "dfirst.weight" in left
    assert "dfirst.bias" not in left
    assert same(left, again)


def test_no_gradients_of_train_step_are_saved(two_saved: tuple[harmony.Harmony, Path]) -> None:
    _, root = two_saved
    stored = json.loads((root / "step-00000002" / "state.json").read_text())
    assert stored["gradients"] == {"dict": []}


def test_a_run_that_has_gone_back_keeps_what_it_writes(
    two_saved: tuple[harmony.Harmony, Path],
) -> None:
    """With keep=1 it once removed the checkpoint that it had just written, for a damaged one."""
    model, root = two_saved
    (root / "step-00000002" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="passed over"):
        model.load_checkpoint(root, skip_damaged=True)
    model.save_checkpoint(root, keep=1, extra="again")
    names = sorted(path.name for path in root.iterdir())
    assert names == ["step-00000001", "step-00000002"]
    model.train_step(*vectors(1))
    model.save_checkpoint(root, keep=1)
    assert [path.name for path in root.iterdir()] == ["step-00000002"]
    assert model.load_checkpoint(root).step == 2


def test_tied_weights_are_stored_once_and_hugging_face_reads_the_folder(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=32,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    net = transformers.GPT2LMHeadModel(config)
    model = trained(net, loss_fn=None, device_memory=None)
    ids = torch.randint(32, (8, 8))
    model.train_step({"input_ids": ids, "labels": ids})
    folder = model.save_checkpoint(tmp_path)
    stored = open_checkpoint(folder)
    assert ("lm_head.weight" in stored) != ("transformer.wte.weight" in stored)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert same(values(net), values(loaded))
    safetensors = pytest.importorskip("safetensors.torch")
    plain = safetensors.load_file(folder / "model.safetensors")
    assert all(torch.equal(plain[name], net.state_dict()[name]) for name in plain)


@pytest.fixture
def two_saved(vgpus: VirtualGPUs, tmp_path: Path) -> tuple[harmony.Harmony, Path]:
    torch.manual_seed(0)
    model = trained(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), loss_fn=square_loss
    )
    for step in range(2):
        model.train_step(*vectors(step))
        model.save_checkpoint(tmp_path, extra=step)
    model.train_step(*vectors(2))
    return model, tmp_path


def damaged(data: bytes, how: int, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
    if how == 2:
        return data + b"\0"
    return data[:place] + draw.randbytes(8) + data[place:]


def test_a_damaged_checkpoint_is_refused_before_anything_changes(
    two_saved: tuple[harmony.Harmony, Path],
) -> None:
    model, root = two_saved
    before, draw = values(model.module), random.Random(0)
    newest = root / "step-00000002"
    files = sorted(path.name for path in newest.iterdir())
    assert files == ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]
    for number in range(200):
        path = newest / files[number % len(files)]
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, number // len(files) % 4, draw))
        with pytest.raises(ConfigError, match=r"step-00000002.*The one before is .*step-00000001"):
            model.load_checkpoint(root)
        assert same(before, values(model.module))
        assert model.num_steps == 3
        path.write_bytes(whole)
    (newest / "state.json").unlink()
    with pytest.warns(UserWarning, match=r"passed over a damaged checkpoint.*state\.json"):
        assert model.load_checkpoint(root, skip_damaged=True).extra == 0
    assert model.num_steps == 1
    shutil.rmtree(root / "step-00000001")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole"):
        model.load_checkpoint(root, skip_damaged=True)


def test_weights_that_are_damaged_between_the_check_and_their_loading_are_not_trained_on(
    two_saved: tuple[harmony.Harmony, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, root = two_saved
    path, read_again = root / "step-00000002" / "model.safetensors", store.Stored.read_again
    whole = path.read_bytes()

    def damaging(stored: store.Stored, places: Any) -> None:
        if path.name in places:
            path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        read_again(stored, places)

    monkeypatch.setattr(store.Stored, "read_again", damaging)
    state = open_checkpoint(path.parent / "state.safetensors")
    just_enough = sum(tensor.nbytes for tensor in state.values())
    monkeypatch.setattr(training, "available_host_nbytes", lambda: just_enough)
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        model.load_checkpoint(root)
    with pytest.raises(harmony.HarmonyError, match=r"load a checkpoint .*is damaged"):
        model.train_step(*vectors(2))
    monkeypatch.undo()
    assert model.load_checkpoint(root, skip_damaged=True).step == 1
    model.train_step(*vectors(1))
    path.write_bytes(whole)


def test_each_file_is_read_once_where_the_host_has_room_for_the_weights(
    two_saved: tuple[harmony.Harmony, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, root = two_saved
    newest = root / "step-00000002"
    read, preadv = Counter[str](), os.preadv

    def counting(descriptor: int, views: Any, at: int) -> int:
        count = preadv(descriptor, views, at)
        read[Path(f"/proc/self/fd/{descriptor}").readlink().name] += count
        return count

    monkeypatch.setattr(os, "preadv", counting)
    model.load_checkpoint(root)
    for name in ("model.safetensors", "state.safetensors"):
        assert read[name] == (newest / name).stat().st_size


def test_state_for_which_the_host_has_no_memory_is_not_loaded(
    two_saved: tuple[harmony.Harmony, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, root = two_saved
    before = values(model.module)
    monkeypatch.setattr(training, "available_host_nbytes", lambda: 100)
    with pytest.raises(harmony.DoesNotFitError, match="the host has 100 B free"):
        model.load_checkpoint(root, skip_damaged=True)
    assert same(before, values(model.module))


def test_a_checkpoint_of_something_else_is_refused(
    two_saved: tuple[harmony.Harmony, Path],
) -> None:
    model, root = two_saved
    scheduler = MultiStepLR(model.optimizer, [2])

    def refused(match: str, other: harmony.Harmony, **objects: Any) -> None:
        before = values(other.module)
        with pytest.raises(ConfigError, match=match):
            other.load_checkpoint(root, **objects)
        assert same(before, values(other.module))
        assert other.num_steps in (0, 3)

    refused("does not hold scheduler", model, scheduler=scheduler)
    refused("is of another model", trained(nn.Linear(8, 8), loss_fn=square_loss))
    wide = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8))
    refused("0.weight is torch.float32", trained(wide, loss_fn=square_loss))
    alike = copy.deepcopy(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    kwargs = {"lr": 1e-2}
    sgd = trained(alike, loss_fn=square_loss, optimizer=torch.optim.SGD, optimizer_kwargs=kwargs)
    refused("the optimizer was AdamW .* now it is SGD", sgd)
    groups = [{"params": [p]} for p in alike.parameters()]
    refused("other parameters or groups", trained(alike, loss_fn=square_loss, param_groups=groups))
    model.save_checkpoint(root, scheduler=scheduler)
    refused("it holds scheduler, which was not given", model)
    with pytest.raises(ConfigError, match="there are no checkpoints in"):
        model.load_checkpoint(root / "nowhere")


def test_what_cannot_be_read_back_without_running_code_is_refused(
    two_saved: tuple[harmony.Harmony, Path],
) -> None:
    model, root = two_saved
    names = sorted(path.name for path in root.iterdir())
    with pytest.raises(ConfigError, match=r"extra\.f\[0\] is a builtins\.function"):
        model.save_checkpoint(root, extra={"f": [lambda: 0]})
    with pytest.raises(ConfigError, match=r"data=int: it has no state_dict"):
        model.save_checkpoint(root, data=3)
    with pytest.raises(ConfigError, match="keep=0"):
        model.save_checkpoint(root, keep=0)
    assert names == sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_leaves_what_was_there(
    two_saved: tuple[harmony.Harmony, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    model, root = two_saved
    write, sync, calls = writing._write_all, writing.os.fsync, 0

    def failing(after: int) -> None:
        nonlocal calls
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1
            if calls == after:
                raise OSError(number, "the disk has failed")

        def written(*args: Any) -> None:
            count()
            write(*args)

        def synced(*args: Any) -> None:
            count()
            sync(*args)

        monkeypatch.setattr(writing, "_write_all", written)
        monkeypatch.setattr(writing.os, "fsync", synced)

    failing(0)
    model.save_checkpoint(root, extra="whole")
    total = calls
    shutil.rmtree(root / "step-00000003")
    assert total > 10
    for after in range(1, total + 1):
        failing(after)
        with pytest.raises(NotSavedError, match="Checkpoints written before are as they were"):
            model.save_checkpoint(root)
        assert sorted(path.name for path in root.iterdir()) == ["step-00000001", "step-00000002"]
    failing(0)
    assert model.load_checkpoint(root).step == 2


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_second_checkpoint_of_a_step_takes_the_place_of_the_first_or_leaves_it(
    two_saved: tuple[harmony.Harmony, Path], monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    """Also where a rename fails, or a sync once all is renamed; at no moment is there none."""
    model, root = two_saved
    model.save_checkpoint(root, extra="first")
    kept = sorted(path.name for path in root.iterdir())
    changes, left = {"rename": writing.os.rename, "fsync": writing.os.fsync}, 0
    exchange = writing._exchange

    def exchanged(one: Path, other: Path) -> None:
        if not can_exchange:
            raise OSError(errno.EINVAL, "not here")
        nonlocal left
        left -= 1
        if not left:
            raise OSError(errno.EIO, "the disk has failed")
        exchange(one, other)

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                raise OSError(errno.EIO, "the disk has failed")
            return changes[name](*args, **kwargs)

        return call

    monkeypatch.setattr(writing, "_exchange", exchanged)
    for name in changes:
        monkeypatch.setattr(writing.os, name, counted(name))
    failed = 0
    for call in range(1, 100):
        left = call
        try:
            model.save_checkpoint(root, extra="second")
        except NotSavedError:
            failed += 1
        else:
            break
        assert sorted(path.name for path in root.iterdir()) == kept
        assert store.read_manifest(root / "step-00000003").step == 3
        assert json.loads((root / "step-00000003" / "state.json").read_text())["extra"] == "first"
    # Python 3.10 renames by names of its own, which are not counted
    assert failed >= (6 if can_exchange or sys.version_info < (3, 11) else 8)
    assert model.load_checkpoint(root).extra == "second"
    assert sorted(path.name for path in root.iterdir()) == kept


def test_what_the_system_refuses_before_a_save_is_said_by_name(
    two_saved: tuple[harmony.Harmony, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file more may be open, for instance, and the free memory cannot be read."""
    model, root = two_saved

    def refused() -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("harmony.checkpoint.training.available_host_nbytes", refused)
    with pytest.raises(NotSavedError, match=r"step 3 to .*Too many open files"):
        model.save_checkpoint(root)


def test_the_last_few_are_kept(two_saved: tuple[harmony.Harmony, Path]) -> None:
    model, root = two_saved
    (root / ".step-00000009.0123456789abcdef.part").mkdir()  # of a process that was killed
    (root / "notes").mkdir()
    model.save_checkpoint(root, keep=2)
    model.save_checkpoint(root, keep=2, extra="again")  # of the same step
    names = sorted(path.name for path in root.iterdir())
    assert names == ["notes", "step-00000002", "step-00000003"]
    assert model.load_checkpoint(root).extra == "again"


class Fails(torch.optim.SGD):
    """Fails at the second parameter that it comes to, if told to."""

    now = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, param in enumerate(params):
            if Fails.now and number == 1:
                raise ValueError("the optimizer has failed")
            with torch.no_grad():
                param.add_(param.grad, alpha=-0.1)


def test_a_torn_model_is_not_saved_and_a_checkpoint_mends_it(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    options = {"loss_fn": square_loss, "optimizer_kwargs": {"lr": 0.1}, "updates": "host"}
    model = trained(net, optimizer=Fails, **options)
    for step in range(2):
        model.train_step(*vectors(step))
    model.save_checkpoint(tmp_path)
    Fails.now = True
    with pytest.raises(HarmonyError, match="the optimizer has failed"):
        model.train_step(*vectors(2))
    Fails.now = False
    with pytest.raises(HarmonyError, match="load a checkpoint"):
        model.save_checkpoint(tmp_path)
    model.load_checkpoint(tmp_path)
    loss = model.train_step(*vectors(2))
    assert model.num_steps == 3
    fresh = trained(copy.deepcopy(net), optimizer=Fails, **options)
    fresh.load_checkpoint(tmp_path)
    assert torch.equal(loss, fresh.train_step(*vectors(2)))
    assert same(values(net), values(fresh.module))


def test_other_microbatches_than_before_are_said(
    two_saved: tuple[harmony.Harmony, Path],
) -> None:
    model, root = two_saved
    other = trained(copy.deepcopy(model.module), loss_fn=square_loss, microbatch_size=2)
    other.load_checkpoint(root)
    with pytest.warns(UserWarning, match=r"microbatches of 2 samples .* before .* of 4.*=4"):
        other.train_step(*vectors(2))
    other.train_step(*vectors(3))  # said once: warnings are errors here


class Tied(nn.Module):
    """The last layer has the first one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(12)))
        self.layers[11].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("memory", [("16KiB", "8MiB"), ("8MiB", "16KiB")], ids=["more", "less"])
def test_a_shared_weight_adds_up_as_before_or_it_is_said(
    vgpus: VirtualGPUs, tmp_path: Path, memory: tuple[str, str]
) -> None:
    """With more memory its layers once came into one pack, which gave other bits in silence."""

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return vector_batch(step, width=16)

    def make(limit: str) -> harmony.Harmony:
        torch.manual_seed(0)
        return trained(Tied(), loss_fn=square_loss, devices=1, device_memory=limit)

    model, again = map(make, memory)
    for step in range(3):
        model.train_step(*batch(step))
    model.save_checkpoint(tmp_path)
    again.load_checkpoint(tmp_path)
    losses = [model.train_step(*batch(step)) for step in (3, 4)]
    assert model.plan is not None
    if len(model.plan.spec.backward_packs) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [again.train_step(*batch(step)) for step in (3, 4)]
        assert found == losses
        assert same(values(model.module), values(again.module))
    else:  # that pack does not fit
        with pytest.warns(UserWarning, match=r"share a weight .* the last bits may differ"):
            again.train_step(*batch(3))
    assert again.plan is not None
    assert again.plan.policy != model.plan.policy or again.plan.spec != model.plan.spec


@given(st.data())
def test_packs_are_joined_where_no_shared_weight_tells(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 10))
    layers = st.integers(0, num_layers - 1)
    cuts = sorted(data.draw(st.sets(layers)) - {0})
    packs = tuple(Pack(*pair) for pair in pairwise((0, *cuts, num_layers)))
    uses = data.draw(st.lists(st.sets(layers, min_size=1), max_size=3))
    graph: Any = SimpleNamespace(shared=[SimpleNamespace(layers=tuple(sorted(u))) for u in uses])

    def together(packs: tuple[Pack, ...]) -> list[list[list[int]]]:
        return [[[u for u in sorted(use) if u in p] for p in packs if use & {*p}] for use in uses]

    joined = _joined(packs, graph)
    assert together(joined) == together(packs)
    assert (joined[0].first, joined[-1].last) == (0, num_layers)
    assert len(joined) <= 1 + sum(len(use) - 1 for use in uses)


class Remembers(nn.Module):
    """Adds what it made of the call before, or only counts its calls."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.keeps, self.calls = keeps, 0
        self.memory: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = self.inner(x) * (1 + 0.01 * self.calls)
        if self.keeps:
            y = y if self.memory is None else y + 0.1 * self.memory
            self.memory = y.detach().mean(0)
        return y


def resumed(
    make: Any, root: Path, other: Any = None, **objects: Any
) -> tuple[harmony.Harmony, harmony.Harmony]:
    """Train six steps; resume another model after the third; return both at the end."""
    torch.manual_seed(0)
    model = make()
    for step in range(6):
        if step == 3:
            model.save_checkpoint(root)
        model.train_step(*vectors(step))
    torch.manual_seed(9)
    again = (other or make)()
    again.load_checkpoint(root)
    for step in range(3, 6):
        again.train_step(*vectors(step))
    assert same(values(model.module), values(again.module))
    return model, again


OPEN = {"loss_fn": square_loss, "mode": "auto", "microbatch_size": "auto", "seed": None}


@pytest.mark.parametrize("keeps", [False, True], ids=["counter", "memory"])
def test_attributes_that_the_forward_changes_go_along(
    vgpus: VirtualGPUs, tmp_path: Path, keeps: bool
) -> None:
    model, again = resumed(lambda: trained(Remembers(keeps), **OPEN, device_memory=None), tmp_path)
    assert again.module.calls == model.module.calls == 6
    assert model.capture_mode == ("eager" if keeps else "dynamic")


class Draws(nn.Module):
    """Draws from a generator of its own, and adds to a tensor in a list."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.bank = nn.Linear(8, 8), [torch.zeros(8)]
        self.generator = {
            "torch": lambda: torch.Generator().manual_seed(3),
            "python": lambda: random.Random(3),
            "numpy": lambda: np.random.default_rng(3),
            "old numpy": lambda: np.random.RandomState(3),
        }[kind]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.generator, torch.Generator):
            drawn = torch.rand(8, generator=self.generator)
        else:
            drawn = torch.tensor(self.generator.random())
        y = self.inner(x) + self.bank[0] + drawn
        self.bank[0].add_(y.detach().mean(0))
        return y


@pytest.mark.parametrize("kind", ["torch", "python", "numpy", "old numpy"])
def test_generators_and_tensors_in_lists_go_along(
    vgpus: VirtualGPUs, tmp_path: Path, kind: str
) -> None:
    model, again = resumed(lambda: trained(Draws(kind), **OPEN, device_memory=None), tmp_path)
    assert torch.equal(model.module.bank[0], again.module.bank[0])


def test_what_has_changed_on_a_module_and_cannot_be_saved_is_said(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    class Average:
        value = torch.zeros(())

    net = nn.Linear(8, 8)
    net.average, net.log = Average(), Average()
    net.average.value = torch.ones(())
    model = harmony.Harmony(net, devices=1)
    net.average.value.add_(1)
    with pytest.warns(
        harmony.HarmonyWarning, match="not saved, .* average is a .*Average"
    ) as said:
        model.save_checkpoint(tmp_path)
    assert len(said) == 1


def test_frozen_parameters_are_frozen_again(vgpus: VirtualGPUs, tmp_path: Path) -> None:
    def make(frozen: bool = True) -> harmony.Harmony:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        net[0].requires_grad_(not frozen)
        return trained(net, **OPEN)

    _, again = resumed(make, tmp_path, lambda: make(frozen=False))
    assert not again.module[0].weight.requires_grad


def test_batches_are_parted_as_before_where_nothing_else_is_asked_for(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    """By itself it chose two replicas once the state was there, and one before."""

    def make() -> harmony.Harmony:
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8))
        return trained(net, **OPEN, optimizer=torch.optim.RAdam, device_memory=None)

    model, again = resumed(make, tmp_path)
    assert model.plan is not None
    assert again.plan is not None
    assert model.plan.spec.shares == again.plan.spec.shares


def test_an_optimizer_of_other_modules_too_is_saved(vgpus: VirtualGPUs, tmp_path: Path) -> None:
    def run(steps: range, resume: bool) -> list[float]:
        torch.manual_seed(0)
        model, critic = harmony.Harmony(nn.Linear(8, 8), devices=1), nn.Linear(8, 1)
        params = [*model.parameters(), *critic.parameters()]
        objects = {"optimizer": torch.optim.Adam(params, lr=0.1), "critic": critic}
        if resume:
            model.load_checkpoint(tmp_path, **objects)
        losses = []
        for step in steps:
            loss = critic(model(vectors(step)[0])).mean()
            objects["optimizer"].zero_grad()
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
            if step == 1 and not resume:
                model.save_checkpoint(tmp_path, **objects)
        return losses

    assert run(range(4), resume=False)[2:] == run(range(2, 4), resume=True)


LEAVES = (
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.complex_numbers(allow_nan=False),
    st.sets(st.integers(), max_size=1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.Size([2, 3]), frozenset("a")]),
)


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> Any:
    """A value of all the kinds that a checkpoint holds, but tensors."""
    kind = draw(st.integers(0, 5 if depth else 0))
    if kind == 0:
        return draw(draw(st.sampled_from(LEAVES)))
    inner = [draw(trees(depth=depth - 1)) for _ in range(draw(st.integers(0, 3)))]
    names = draw(st.lists(st.text() | st.integers(), min_size=3, max_size=3, unique=True))
    pairs = list(zip(names, inner, strict=False))
    made = (inner, tuple(inner), dict(pairs), OrderedDict(pairs), Counter(names))
    return made[kind - 1]


@given(trees())
def test_values_come_back_as_they_were(value: Any) -> None:
    found = decode(parse_json(json.dumps(encode(value, "x", {}))), {}.__getitem__)
    assert found == value
    assert repr(found) == repr(value)
