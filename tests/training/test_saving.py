"""Parameters, buffers and gradients look like any others to what saves, copies or shares them.

Whatever saves tensors takes those of one storage for views of each other.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

import harmony
from tests import devices

from .conftest import VirtualGPUs
from .models import GPT, square_loss, token_batch, token_loss, vector_batch
from .test_residents import resident_model


class Net(GPT):
    """Has buffers, tied weights, and a parameter whose memory is permuted."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, depth=2, tied=True)
        self.register_buffer("ones", torch.ones(32))
        self.norm = nn.Sequential(nn.BatchNorm1d(16), self.norm)
        self.blocks[0].up.weight = nn.Parameter(torch.randn(32, 128).mul(0.1).T)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.ones.mean()


def trained(form: str = "dropin", **settings: Any) -> harmony.Harmony:
    torch.manual_seed(0)
    optimizer = {"optimizer": torch.optim.AdamW, "loss_fn": token_loss} if form == "step" else {}
    model = harmony.Harmony(Net(), devices=2, microbatch_size=8, **optimizer, **settings)
    ids, targets = token_batch(0)
    if form == "step":
        model.train_step(ids, targets)
    else:
        token_loss(model(ids), targets).backward()
    return model


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def saved_nbytes(held: object) -> int:
    file = io.BytesIO()
    torch.save(held, file)
    return len(file.getvalue())


@pytest.mark.parametrize("form", ["dropin", "step"])
def test_each_tensor_has_a_storage_of_its_own(vgpus: VirtualGPUs, form: str) -> None:
    model = trained(form, updates="host")
    tensors = dict(model.state_dict(keep_vars=True))
    tensors |= {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(tensors) > len(model.state_dict())
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors) - 1, (
        "tied weights are one"
    )
    for name, tensor in tensors.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        assert tensor.storage_offset() == 0 and tensor._base is None, name
        assert tensor.is_pinned(), name
    weight = model.blocks[0].up.weight
    assert not weight.is_contiguous() and weight.T.is_contiguous()


def test_what_is_saved_has_its_own_bytes(vgpus: VirtualGPUs) -> None:
    plain = Net().state_dict()
    state = trained().state_dict()
    some = ("ones", "blocks.1.qkv.bias", "positions.weight")
    for names in ([some[0]], some, list(plain)):
        expected = saved_nbytes({name: plain[name] for name in names})
        assert saved_nbytes({name: state[name] for name in names}) == expected
    copied = copy.deepcopy(state)
    assert_equal(copied, state)
    ones = copied["ones"].untyped_storage()
    assert ones.nbytes() == 128 and ones.data_ptr() != state["ones"].data_ptr()
    assert len(pickle.dumps(state["ones"])) < 1000


def test_the_module_may_be_copied_and_pickled(vgpus: VirtualGPUs) -> None:
    model = trained()
    by_pickle = pickle.loads(pickle.dumps(model.module))
    for other in (copy.deepcopy(model.module), by_pickle):
        assert other.head.weight is other.tokens.weight
        assert_equal(other.state_dict(), model.state_dict())
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert next(model.parameters()).any()
    token_loss(model(token_batch(1)[0]), token_batch(1)[1]).backward()


def test_safetensors_keep_every_tensor(vgpus: VirtualGPUs, tmp_path: Path) -> None:
    model = trained()
    save_model(model, str(tmp_path / "model.safetensors"))
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict()) - 1
    fresh = Net()
    assert load_model(fresh, str(tmp_path / "model.safetensors")) == (set(), [])
    assert_equal(fresh.state_dict(), model.state_dict())
    assert load_model(model, str(tmp_path / "model.safetensors")) == (set(), [])
    some = {n: t for n, t in model.state_dict().items() if "qkv" in n}
    save_file(some, tmp_path / "some.safetensors")
    assert_equal(load_file(tmp_path / "some.safetensors"), some)


def test_accelerate_saves_and_loads(vgpus: VirtualGPUs, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    net = Net()
    prepared = accelerator.prepare(harmony.Harmony(net, devices=2, microbatch_size=8))
    optimizer = accelerator.prepare(torch.optim.AdamW(prepared.parameters()))
    ids, targets = token_batch(0)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = token_loss(prepared(ids), targets)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    step()
    accelerator.save_model(prepared, str(tmp_path / "model"))
    fresh = Net()
    load_model(fresh, str(tmp_path / "model" / "model.safetensors"))
    assert_equal(fresh.state_dict(), net.state_dict())
    accelerator.save_state(str(tmp_path / "state"))
    losses = [step(), step()]
    accelerator.load_state(str(tmp_path / "state"))
    assert [step(), step()] == losses


def test_memory_outlives_the_model(vgpus: VirtualGPUs) -> None:
    model = trained()
    held = {**model.state_dict(), "grad": model.tokens.weight.grad}
    expected = {name: tensor.clone() for name, tensor in held.items()}
    del model
    gc.collect()
    assert_equal(held, expected)
    for tensor in held.values():
        tensor.zero_()


def test_a_gradient_that_somebody_keeps_stays_what_it_is(vgpus: VirtualGPUs) -> None:
    model = trained("step", updates="host")
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: grad.clone() for name, grad in grads.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            model.train_step(*token_batch(step + 1))
    assert_equal(grads, expected)
    view = model.positions.weight.grad.flatten()
    with pytest.warns(UserWarning, match=r"a view of the gradient of positions\.weight"):
        model.train_step(*token_batch(3))
    assert view is not None


def test_shared_memory_is_left_with_a_warning(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 24))
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1, microbatch_size=8)
    theirs, own = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model))
    for step in range(4):
        x, y = vector_batch(step)
        for module, optimizer in ((plain, theirs), (model, own)):
            optimizer.zero_grad()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                square_loss(module(x), y).backward()
            optimizer.step()
            shared = [str(w.message) for w in said if "share_memory" in str(w.message)]
            assert len(shared) == (1 if module is model and step == 2 else 0)
        assert_equal(net.state_dict(), plain.state_dict())
        if step == 1:
            for module in (model, plain):
                module.share_memory()
                assert all(tensor.is_shared() for tensor in module.state_dict().values())


def test_the_state_of_the_optimizer_is_saved_where_the_parameters_are(vgpus: VirtualGPUs) -> None:
    model = resident_model(GPT(dropout=0.0))
    optimizer = model.optimizer
    for step in range(2):
        model.train_step(*token_batch(step))
    held = [v.device.type for state in optimizer.state.values() for v in state.values()]
    assert devices.TYPE in held, "it is about state on a device"
    saved = optimizer.state_dict()["state"]
    kinds = {v.device.type for state in saved.values() for v in state.values()}
    assert kinds == {"cpu"}, "so that it can be loaded where there is no such device"
    whole = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    losses = [model.train_step(*token_batch(step)) for step in range(2, 4)]
    model.load_state_dict(whole["model"])
    optimizer.load_state_dict(whole["optimizer"])
    model.num_steps = 2
    assert [model.train_step(*token_batch(step)) for step in range(2, 4)] == losses


def test_a_distributed_checkpoint_keeps_every_tensor(vgpus: VirtualGPUs, tmp_path: Path) -> None:
    state = trained().state_dict()
    checkpoint.save({"model": state}, checkpoint_id=tmp_path, no_dist=True)
    loaded = {"model": {name: torch.zeros_like(tensor) for name, tensor in state.items()}}
    checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert_equal(loaded["model"], state)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed", "ignore::FutureWarning")
def test_a_run_goes_on_from_a_distributed_checkpoint_of_the_model_itself(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    """It is Stateful, and is loaded into the memory that it has; its optimizer likewise."""
    model, fresh = trained("step"), trained("step")
    assert isinstance(model, Stateful)
    model.train_step(*token_batch(1))
    names = {"model": model, "optimizer": get_optimizer_state_dict(model, model.optimizer)}
    checkpoint.save(names, checkpoint_id=tmp_path, no_dist=True)
    places = [p.data_ptr() for p in fresh.parameters()]
    states = get_optimizer_state_dict(fresh, fresh.optimizer)
    checkpoint.load({"model": fresh, "optimizer": states}, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(fresh, fresh.optimizer, states)
    fresh.num_steps = model.num_steps
    assert places == [p.data_ptr() for p in fresh.parameters()]
    assert_equal(fresh.state_dict(), model.state_dict())
    assert torch.equal(fresh.train_step(*token_batch(2)), model.train_step(*token_batch(2)))
    assert_equal(fresh.state_dict(), model.state_dict())
