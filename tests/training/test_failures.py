"""What a user sees when something goes wrong: one clear error, nothing lost, nothing hanging."""

from __future__ import annotations

import copy
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

import harmony
from harmony.capture.replay import pack_steps
from harmony.engine.call_key import CallKind
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import StepSpec
from harmony.runtime.step import layer_state as layerstate
from tests import devices
from tests.cuda import standin
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, SkipMLP, square_loss, token_batch, token_loss, vector_batch
from tests.training.plain import params_of
from tests.training.test_plans import packs, use_plan


class Switch:
    """Raises in a chosen call."""

    def __init__(self) -> None:
        self.calls, self.fail_at = 0, -1

    def __call__(self) -> None:
        if self.fail_at >= 0:
            self.calls += 1
            if self.calls == self.fail_at:
                raise ValueError("the user's own mistake")

    def set(self, calls: int, fail_at: int) -> None:
        self.calls, self.fail_at = calls, fail_at


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Raises where the second layer runs: a module that counts its calls would run as it is."""
    found, run_layer = Switch(), pack_steps._run_layer

    def run(pack: Any, layer: Any, *args: Any) -> None:
        if layer.index == 1:
            found()
        run_layer(pack, layer, *args)

    monkeypatch.setattr(pack_steps, "_run_layer", run)
    return found


def model_of_packs(**options: Any) -> harmony.Harmony:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(24, 24) for _ in range(4)])
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=square_loss,
        mode="pp",
        microbatch_size=2,
        devices=2,
        device_memory="24KiB",
        activations="recompute",
        updates="host",
        **options,
    )

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        """A pack a layer: the second one runs forward, and again in its backward."""
        last = packs([*range(1, num_layers)], num_layers)
        return StepSpec(minibatch, 2, 2, last[:-1], last, ((0, minibatch),))

    use_plan(model, vector_batch(0), spec_of, Policy(1, 1, 1))
    return model


def test_error_in_a_forward_names_the_task_and_changes_nothing(
    vgpus: VirtualGPUs, switch: Switch
) -> None:
    model = model_of_packs()
    model.train_step(*vector_batch(0))
    before = params_of(model.module)
    switch.set(0, 2)
    with pytest.raises(harmony.ExecutionError, match="the user's own mistake") as caught:
        model.train_step(*vector_batch(1))
    assert "F[" in caught.value.task
    assert isinstance(caught.value.__cause__, ValueError)
    assert "all are of the step before" in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    switch.set(0, -1)
    model.train_step(*vector_batch(1))  # and it goes on


def test_error_after_updates_says_so_and_wants_a_checkpoint(
    vgpus: VirtualGPUs, switch: Switch
) -> None:
    model = model_of_packs()
    model.train_step(*vector_batch(0))
    checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switch.set(0, 8)  # the last recompute: later packs are updated by then
    with pytest.raises(harmony.ExecutionError) as caught:
        model.train_step(*vector_batch(1))
    assert "B[" in caught.value.task
    if caught.value.torn:
        switch.set(0, -1)
        with pytest.raises(harmony.HarmonyError, match="load a checkpoint"):
            model.train_step(*vector_batch(2))
        model.load_state_dict(checkpoint)
    switch.set(0, -1)
    model.train_step(*vector_batch(1))


def test_first_step_is_all_or_nothing(vgpus: VirtualGPUs, switch: Switch) -> None:
    model = model_of_packs()
    before = params_of(model.module)
    switch.set(-1000, 1)  # past capture and measuring
    x, y = vector_batch(0)
    model._engine.variants.ready(CallKind.TRAIN_STEP, ((x,), {}, y))
    switch.set(0, 8)
    with pytest.raises(harmony.ExecutionError) as caught:
        model.train_step(x, y)
    assert not caught.value.torn
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_layer_that_cannot_fit_is_refused_before_anything_runs(vgpus: VirtualGPUs) -> None:
    net = GPT(width=64, depth=2)
    before = params_of(net)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=token_loss,
        devices=2,
        device_memory="100KiB",
    )
    with pytest.raises(harmony.DoesNotFitError, match=r"blocks\.") as caught:
        model.train_step(*token_batch(0))
    assert "100 KiB" in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


class Clumsy(torch.optim.SGD):
    """Fails at the second parameter that it comes to, if told to."""

    fail: BaseException | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, param in enumerate(params):
            if Clumsy.fail is not None and number == 1:
                raise Clumsy.fail
            with torch.no_grad():
                param.add_(param.grad, alpha=-0.1)


class UnspeakableError(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("kind", [ValueError, UnspeakableError, SystemExit])
def test_an_optimizer_that_fails_inside_of_a_pack_leaves_a_model_that_says_so(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """It once said "No parameter was changed" although one was."""
    error = kind(3)  # not a parameter of the test: its frames would keep the model
    torch.manual_seed(0)
    net = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(24, 24), nn.Tanh())])
    model = harmony.Harmony(
        net,
        optimizer=Clumsy,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=square_loss,
        mode="pp",
        microbatch_size=4,
        devices=1,
        updates="host",
    )
    model.train_step(*vector_batch(0))
    before = params_of(net)
    monkeypatch.setattr(Clumsy, "fail", error)
    if isinstance(error, Exception):
        with pytest.raises(harmony.ExecutionError, match=r"U\[.*may be of the step") as caught:
            model.train_step(*vector_batch(1))
        assert caught.value.torn
    else:
        with pytest.raises(SystemExit):
            model.train_step(*vector_batch(1))
    assert any(not torch.equal(p, before[n]) for n, p in net.named_parameters())
    monkeypatch.setattr(Clumsy, "fail", None)
    with pytest.raises(harmony.HarmonyError, match="load a checkpoint"):
        model.train_step(*vector_batch(1))
    model.load_state_dict(before)
    model.train_step(*vector_batch(1))


@pytest.mark.parametrize("form", ["step", "forward", "infer"])
def test_a_failure_while_buffers_are_committed_is_all_or_nothing(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 24))
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "loss_fn": square_loss}
    trained = options if form == "step" else {}
    model = harmony.Harmony(net, devices=1, microbatch_size=4, **trained)
    x, y = vector_batch(0)

    def run() -> None:
        if form == "step":
            model.train_step(x, y)
        else:
            with torch.set_grad_enabled(form == "forward"):
                model(x)

    run()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no copy")

    with monkeypatch.context() as patch:
        members = {**vars(layerstate.native), "trace_host_access": fail}
        patch.setattr(layerstate, "native", SimpleNamespace(**members))
        with pytest.raises(RuntimeError, match="no copy"):
            run()
    with pytest.raises(harmony.HarmonyError, match=r"load a checkpoint.*no copy"):
        run()
    model.load_state_dict(before)
    run()


def test_a_user_s_hook_that_fails_in_a_forward_changes_nothing(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 24))
    model = harmony.Harmony(net, devices=1, microbatch_size=4)
    x, _ = vector_batch(0)
    model(x)
    before, steps = copy.deepcopy(model.state_dict()), model.num_steps
    switch = Switch()
    net[2].register_forward_hook(lambda *_: switch())
    switch.set(0, 1)
    with pytest.raises((harmony.HarmonyError, ValueError), match="the user's own mistake"):
        model(x)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.num_steps == steps
    switch.set(0, -1)
    model(x)
    assert model.num_steps == steps + 1


def test_a_forked_child_gets_an_error_and_the_parent_goes_on(vgpus: VirtualGPUs) -> None:
    """It once waited for ever for threads that only the parent has."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    model = harmony.Harmony(
        net, devices=1, microbatch_size=4, optimizer=torch.optim.SGD, loss_fn=square_loss
    )
    x, y = vector_batch(0)
    model.train_step(x, y)
    calls: list[Callable[[], Any]] = [
        lambda: model.train_step(x, y),
        lambda: model(x),
        lambda: model.verify(x, y),
    ]
    expected = sum(range(len(calls)))

    def refused(number: int, call: Callable[[], Any]) -> int:
        try:
            call()
        except BaseException as error:
            return number if "was forked" in str(error) else 50
        return 50

    def forked() -> int:
        """Exit code of a child that tries all of them."""
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = 99
        signal.alarm(60)
        try:
            with torch.no_grad():
                # Plain PyTorch works in the child, unless parameters are pinned for a real GPU.
                works = devices.TYPE != "vgpu" or net(x).shape == y.shape
            found = sum(map(refused, range(len(calls)), calls)) if works else 98
        finally:
            os._exit(found)

    assert forked() == expected
    model.train_step(x, y)


FORKS = """
import os, torch
torch.set_num_threads(1)
import harmony
from torch import nn

if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
calls, settle = [], torch.set_num_threads
torch.set_num_threads = lambda count: (calls.append(count), settle(count))
harmony.virtual_gpus(count=2, memory="8MiB")
net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
model = harmony.Harmony(net, optimizer=torch.optim.SGD, loss_fn=nn.MSELoss(), mode="dp")
model.train_step(torch.ones(4, 8), torch.ones(4, 8))
os._exit(0 if calls == [1] else 7)
"""


def test_a_forked_process_makes_the_pool_of_threads_anew_before_autograd_does() -> None:
    """Else two threads of autograd make it at once, now and then, and PyTorch aborts."""
    done = subprocess.run([sys.executable, "-c", FORKS], timeout=120)
    assert done.returncode == 0


def test_workers_of_a_data_loader_may_be_forked_from_a_model_that_trains(
    vgpus: VirtualGPUs,
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    model = harmony.Harmony(
        net, devices=1, microbatch_size=4, optimizer=torch.optim.SGD, loss_fn=square_loss
    )
    model.train_step(*vector_batch(0))
    x, y = vector_batch(1)
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, num_workers=1, multiprocessing_context="fork"
    )
    for batch in loader:
        model.train_step(*batch)
    assert model.num_steps == 1 + len(x) // 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "zp"}, "choose one of auto, pp, dp"),
        ({"microbatch_size": 0}, "positive number"),
        ({"devices": 0}, "at least one device"),
        ({"devices": 99}, "99 devices asked for"),
        ({"device_memory": "much"}, "not a size"),
        ({"device_memory": "-2GiB"}, "must be positive"),
        ({"devices": [0, "vgpu:0"]}, "named twice"),
        ({"optimizer_kwargs": {"lr": 1.0}}, "without an optimizer"),
        ({"device_memory": "64"}, "device_memory: 64: in which unit"),
        ({"loss_fn": nn.CrossEntropyLoss}, r"give an object of it: loss_fn=CrossEntropyLoss\(\)"),
        ({"loss_fn": 3}, "a function of the output and the targets"),
        ({"optimizer": "adamw"}, "give the class, as optimizer=torch.optim.AdamW"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"optimizer": torch.optim.SGD, "optimizer_kwargs": {"speed": 1}}, "speed"),
    ],
)
def test_bad_options(vgpus: VirtualGPUs, options: dict[str, Any], message: str) -> None:
    with pytest.raises(harmony.ConfigError, match=message):
        harmony.Harmony(SkipMLP(), **options)


def test_a_module_that_is_wrapped_otherwise_is_refused() -> None:
    with pytest.raises(harmony.ConfigError, match="which hides its layers"):
        harmony.Harmony(cast(nn.Module, torch.compile(SkipMLP())))
    with pytest.raises(harmony.ConfigError, match="a Harmony model already: wrap it once"):
        harmony.Harmony(harmony.Harmony(SkipMLP(), devices=1))


def test_links_are_measured_where_there_is_hardly_any_memory(vgpus: VirtualGPUs) -> None:
    vgpus(count=1, memory="64KiB")
    model = harmony.Harmony(
        nn.Linear(8, 8),
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=nn.functional.mse_loss,
    )
    assert model.train_step(torch.zeros(4, 8), torch.zeros(4, 8)) >= 0


def test_a_module_on_a_gpu_is_refused_with_the_way_back(vgpus: VirtualGPUs) -> None:
    vgpus(count=1, memory="1MiB")
    model = harmony.Harmony(SkipMLP().to(devices.device()), devices=1)
    with pytest.raises(harmony.HarmonyError, match=r"leave \.to\(\) and \.cuda\(\) out"):
        model(vector_batch(0)[0])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, y: (out.sum(), out), r"a tuple of 2 \(return the loss alone\)"),
        (lambda out, y: out.sum(1), r"shape \(8,\) \(take its mean\(\)\)"),
    ],
)
def test_a_loss_that_is_none_is_refused_at_once(
    loss: Any, message: str, vgpus: VirtualGPUs
) -> None:
    vgpus(count=1, memory="1MiB")
    model = harmony.Harmony(SkipMLP(), optimizer=torch.optim.SGD, loss_fn=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error", harmony.HarmonyWarning)
        with pytest.raises(harmony.ConfigError, match=message):
            model.train_step(*vector_batch(0))


@pytest.mark.skipif(standin.is_loaded(), reason="wrong shapes take the stand-in's GPU with them")
@pytest.mark.parametrize("steps", [False, True])
def test_an_error_of_the_callers_own_comes_alone(
    steps: bool,
    vgpus: VirtualGPUs,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vgpus(count=1, memory="1MiB")
    log = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "loss_fn": square_loss}
    model = harmony.Harmony(SkipMLP(), **(options if steps else {}))
    x, y = vector_batch(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", harmony.HarmonyWarning)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model.train_step(x[:, 1:], y) if steps else model(x[:, 1:])
        assert not caplog.records
        if steps:
            model.train_step(x, y)


def test_bad_batches(vgpus: VirtualGPUs) -> None:
    model = harmony.Harmony(SkipMLP(), devices=1)
    with pytest.raises(harmony.ConfigError, match="needs an optimizer"):
        model.train_step(*vector_batch(0))
    with pytest.raises(harmony.ConfigError, match="batch is empty"):
        model(torch.zeros(0, 24))
    with pytest.raises(harmony.ConfigError, match="dimension 0"):
        model(3)


@devices.virtual_only("it is about a process that has them")
def test_real_gpus_beside_virtual_ones_are_refused(vgpus: VirtualGPUs) -> None:
    with pytest.raises(harmony.ConfigError, match="one kind of device in a process"):
        harmony.Harmony(SkipMLP(), devices=["cuda:0"])
    with pytest.raises(harmony.ConfigError, match="one kind of device in a process"):
        harmony.Harmony(SkipMLP(), devices=torch.device("cuda:0"))


@pytest.mark.parametrize("mode", ["pp", "dp"])
@devices.virtual_only("a real one is lost: tests/cuda/test_faults.py")
def test_a_wrong_id_is_one_error_whatever_the_kernels_raise_besides(
    vgpus: VirtualGPUs, mode: str
) -> None:
    """Kernels raise when they run, several of them before anybody looks, and no RuntimeError."""
    torch.manual_seed(0)
    model = harmony.Harmony(
        GPT(dropout=0.0),
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=token_loss,
        mode=mode,
        microbatch_size=1,
        devices=2,
    )
    tokens, targets = token_batch(0)
    wrong = torch.full_like(tokens, 10**6)
    before = params_of(model.module)
    for _ in range(3):
        with pytest.raises(harmony.ExecutionError, match="index out of range"):
            model.train_step(wrong, targets)
    after = params_of(model.module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    first = model.train_step(tokens, targets)
    # From now on updates begin before the backward is over: a failure may come too late.
    saved = copy.deepcopy(model.state_dict())
    for _ in range(3):
        with pytest.raises(harmony.ExecutionError, match="index out of range"):
            model.train_step(wrong, targets)
        model.load_state_dict(saved)
    assert model.train_step(tokens, targets) != first
