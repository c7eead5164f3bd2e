"""Signals during a step: all of the model's state is of one step, or it says that it is torn."""

from __future__ import annotations

import _thread
import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.engine import variant, variant_factory
from harmony.runtime import interrupts
from harmony.runtime.step.layer_state import LayerStates
from harmony.runtime.update.param_hooks import GradientSums
from tests.training.conftest import VirtualGPUs
from tests.training.models import square_loss, vector_batch

WIDTH = 24


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A shell may have started the tests with SIGINT ignored. Two signals in a row are two."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(interrupts, "SAME_S", 0.0)
    yield
    signal.signal(signal.SIGINT, before)


def make(**options: Any) -> harmony.Harmony:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    net = nn.Sequential(*layers, nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))
    given: dict[str, Any] = {
        "optimizer": torch.optim.SGD,
        "optimizer_kwargs": {"lr": 0.1, "momentum": 0.9},
        "loss_fn": square_loss,
        "mode": "pp",
        "devices": 2,
        "microbatch_size": 2,
        "device_memory": "24KiB",
        "updates": "host",
    }
    return harmony.Harmony(net, **given | options)


def pair(**options: Any) -> tuple[harmony.Harmony, harmony.Harmony]:
    """A model that has trained a step, and its twin that has trained two."""
    model, twin = make(**options), make(**options)
    for step in range(2):
        twin.train_step(*vector_batch(step))
    model.train_step(*vector_batch(0))
    return model, twin


def state_of(model: harmony.Harmony) -> list[torch.Tensor]:
    """Parameters, buffers, optimizer state, the number of steps and the last loss."""
    assert model.optimizer is not None
    states = [model.optimizer.state.get(param, {}) for param in model.parameters()]
    held = [t for state in states for t in state.values()]
    tensors = [*model.state_dict().values(), *(t for t in held if isinstance(t, torch.Tensor))]
    counted = [float(model.num_steps), float(model.record.last_loss or 0.0)]
    return [*(t.detach().clone() for t in tensors), torch.tensor(counted, dtype=torch.float64)]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


def interrupt(times: int = 1) -> None:
    """Send Ctrl-C from another thread; the next one when the main thread has heard of it."""
    for number in range(1, times + 1):
        if number % 2:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            _thread.interrupt_main()  # which wakes nobody who waits
        while interrupts._held and len(interrupts._held[0]._came) < number:
            pass


def once(call: Callable[..., Any], before: Callable[[], None]) -> Callable[..., Any]:
    """The same function, with something done before its first call."""
    left = [before]

    def wrapped(*args: Any) -> Any:
        if left:
            left.pop()()
        return call(*args)

    return wrapped


def test_one_interrupt_lets_the_step_end_and_everything_is_of_it(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers and num_steps were once of the step before."""
    model, twin = pair()
    (bound,) = model._engine.variants
    places = [
        (bound.executor._workers[0], "submit"),
        (bound.host, "update"),
        (LayerStates, "commit"),
        (model.record, "stepped"),
    ]
    for step, (owner, name) in enumerate(places, 1):
        call = once(getattr(owner, name), interrupt)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, lambda *args, call=call: call(*args))
            model.train_step(*vector_batch(step))
        assert same(state_of(model), state_of(twin))
        twin.train_step(*vector_batch(step + 1))
    model.train_step(*vector_batch(5))
    assert same(state_of(model), state_of(twin))


def test_two_interrupts_stop_the_step_and_the_model_wants_a_state(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters were once torn, and nothing said so."""
    model, twin = pair()
    assert model.optimizer is not None
    saved = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    assert twin.optimizer is not None
    moments = copy.deepcopy(twin.optimizer.state_dict())
    (bound,) = model._engine.variants
    host = bound.host
    monkeypatch.setattr(host, "update", once(host.update, lambda: interrupt(2)))
    with pytest.raises(KeyboardInterrupt, match=r"stopped the step. Parameters of U\[.*after"):
        model.train_step(*vector_batch(1))
    for _ in range(2):
        with pytest.raises(harmony.HarmonyError, match=r"load a checkpoint.*Ctrl-C twice"):
            model.train_step(*vector_batch(1))
    with pytest.raises(harmony.HarmonyError, match="load a checkpoint"):
        model(vector_batch(1)[0])
    model.load_state_dict({}, strict=False)
    with pytest.raises(harmony.HarmonyError, match=r"without 0\.weight"):
        model.train_step(*vector_batch(1))
    model.load_state_dict(saved)
    model.optimizer.load_state_dict(moments)
    model.num_steps = 2
    assert torch.equal(model.train_step(*vector_batch(2)), twin.train_step(*vector_batch(2)))
    assert same(state_of(model), state_of(twin))


def test_a_state_without_the_optimizers_is_taken_with_a_warning(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair()
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (bound,) = model._engine.variants
    monkeypatch.setattr(bound.host, "update", once(bound.host.update, lambda: interrupt(2)))
    with pytest.raises(KeyboardInterrupt):
        model.train_step(*vector_batch(1))
    model.load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"model\.optimizer\.load_state_dict"):
        model.train_step(*vector_batch(1))


def test_two_interrupts_before_the_first_update_change_nothing(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = pair()
    before = state_of(model)
    (bound,) = model._engine.variants
    worker = bound.executor._workers[0]
    held: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(worker, "submit", lambda *job: held.append(job))
        update = bound.executor._update_worker
        submit = update.submit

        def late(*job: Any) -> None:
            """Both signals are there before the first device has begun."""
            submit(*job)
            interrupt(2)
            worker.__class__.submit(worker, *held.pop())

        patch.setattr(update, "submit", late)
        with pytest.raises(KeyboardInterrupt, match="No parameter was changed"):
            model.train_step(*vector_batch(1))
    assert same(state_of(model), before)
    model.train_step(*vector_batch(1))
    assert same(state_of(model), state_of(twin))


def test_a_second_interrupt_that_comes_too_late_to_stop_anything_tears_nothing(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = pair()
    (bound,) = model._engine.variants
    issue = bound.host.update
    calls = []

    def update(pack: Any, names: Any) -> None:
        issue(pack, names)
        calls.append(pack)
        if pack.first == 0:  # the last
            interrupt(2)

    monkeypatch.setattr(bound.host, "update", update)
    with pytest.raises(KeyboardInterrupt):
        model.train_step(*vector_batch(1))
    assert calls
    assert same(state_of(model), state_of(twin))


def test_an_interrupt_while_the_first_step_is_prepared_changes_nothing(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is heard when a piece of it is done, the second at once."""
    model, twin = make(), make()
    generators = torch.get_rng_state()
    twin.train_step(*vector_batch(0))
    torch.set_rng_state(generators)
    before, heard = state_of(model), []

    def interrupted(times: int, place: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            heard.append(place)
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            assert times == 1
            return call(*args, **kwargs)

        return run

    places = [
        (variant_factory, "capture"),
        (variant, "measure_layers"),
        (variant, "choose_steadily"),
    ]
    for module, name in places:
        for times in (2, 1):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(module, name, interrupted(times, name, getattr(module, name)))
                model.train_step(*vector_batch(0))
            assert same(state_of(model), before)
            assert torch.equal(torch.get_rng_state(), generators)
    assert set(heard) == {name for _, name in places}
    model.train_step(*vector_batch(0))
    assert same(state_of(model), state_of(twin))


class Dies:
    """Sends Ctrl-C when it is let go of, where an exception would be printed and lost."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("form", ["step", "forward", "backward"])
def test_an_interrupt_in_a_destructor_is_not_lost(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    options: dict[str, Any] = {"optimizer": None, "optimizer_kwargs": None, "loss_fn": None}
    model = make() if form == "step" else make(**options)
    x, y = vector_batch(0)
    loss = model.train_step(x, y) if form == "step" else square_loss(model(x), y)
    (bound,) = model._engine.variants
    executor = bound.executor

    def dying(*args: Any) -> Any:
        timeline = type(executor).run(executor, *args)
        doomed = [Dies()]
        doomed.clear()
        return timeline

    monkeypatch.setattr(executor, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        if form == "step":
            model.train_step(x, y)
        elif form == "forward":
            model(x)
        else:
            loss.backward()
    if form == "backward":  # it is as if it had not run
        assert all(param.grad is None for param in model.parameters())
    else:
        assert model.num_steps == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_handler_of_the_users_own_is_called_when_the_step_is_over(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """It may save a checkpoint: in the middle of a step that would be of two steps."""
    model, twin = pair()
    (bound,) = model._engine.variants
    found: list[list[torch.Tensor]] = []
    send = lambda: signal.pthread_kill(threading.main_thread().ident or 0, number)  # noqa: E731
    monkeypatch.setattr(bound.host, "update", once(bound.host.update, send))
    before = signal.signal(number, lambda *_: found.append(state_of(model)))
    try:
        model.train_step(*vector_batch(1))
    finally:
        signal.signal(number, before)
    assert len(found) == 1
    assert same(found[0], state_of(twin))


def test_a_watchdog_stops_the_step_with_its_own_exception(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair()
    (bound,) = model._engine.variants

    def bark(*_: Any) -> None:
        raise TimeoutError("too long")

    def update(pack: Any, names: Any) -> None:
        os.kill(os.getpid(), signal.SIGALRM)
        while not step.signals.failure:
            pass

    class Caught:
        signals: Any

    step = Caught()
    new = interrupts.Held.stopped_by

    def stopped_by(self: Any, stop: Any) -> Any:
        step.signals = stop.func.__self__
        return new(self, stop)

    monkeypatch.setattr(interrupts.Held, "stopped_by", stopped_by)
    monkeypatch.setattr(bound.host, "update", update)
    before = signal.signal(signal.SIGALRM, bark)
    try:
        with pytest.raises(TimeoutError, match="too long"):
            model.train_step(*vector_batch(1))
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(harmony.HarmonyError, match="too long"):
        model.train_step(*vector_batch(1))


def test_an_interrupt_in_a_live_step_changes_nothing_or_all(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wanders(nn.Module):
        """Goes another way for other values, and counts."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(self.one(x))
            if h.sum() > 0:
                h = torch.tanh(h)
            return self.two(h)

    def live() -> harmony.Harmony:
        torch.manual_seed(0)
        return harmony.Harmony(
            Wanders(),
            optimizer=torch.optim.SGD,
            optimizer_kwargs={"lr": 0.1},
            loss_fn=square_loss,
            microbatch_size=4,
            devices=1,
        )

    with pytest.warns(UserWarning, match="so no recorded forward stands"):
        model, twin = live(), live()
        for step in range(2):
            twin.train_step(*vector_batch(step))
        model.train_step(*vector_batch(0))
    before = state_of(model)
    runner = model._engine.dynamic
    publish = once(GradientSums.publish, interrupt)
    monkeypatch.setattr(GradientSums, "publish", lambda *args: publish(*args))
    with pytest.raises(KeyboardInterrupt):
        model.train_step(*vector_batch(1))
    assert same(state_of(model), before)
    monkeypatch.setattr(runner, "update", once(runner.update, interrupt))
    with pytest.raises(KeyboardInterrupt):
        model.train_step(*vector_batch(1))
    assert same(state_of(model), state_of(twin))


class Interrupted(nn.Module):
    """Sends Ctrl-C in its forward, once for each byte in a pipe, which no model can put back."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self.pipe = pipe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            os.read(self.pipe, 1)
        except BlockingIOError:
            return x
        os.kill(os.getpid(), signal.SIGINT)
        return x + 0


@pytest.mark.filterwarnings("ignore:.*no recorded forward stands for the next")
@pytest.mark.parametrize("form", ["step", "own loop", "inference"])
@pytest.mark.parametrize("when", [0, 1, 2], ids=["first", "second", "third"])
def test_an_interrupt_in_a_forward_is_heard_once(vgpus: VirtualGPUs, form: str, when: int) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), Interrupted(read), nn.Linear(WIDTH, WIDTH))
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    options |= {"loss_fn": square_loss}
    model = harmony.Harmony(net, devices=2, **(options if form == "step" else {}))
    x, y = vector_batch(0)
    heard = []
    for step in range(when + 4):
        if step == when:
            os.write(write, b"1")
        try:
            if form == "step":
                model.train_step(x, y)
            elif form == "own loop":
                square_loss(model(x), y).backward()
            else:
                with torch.no_grad():
                    model(x)
        except KeyboardInterrupt:
            heard.append(step)
    os.close(read)
    os.close(write)
    assert heard == [when]
