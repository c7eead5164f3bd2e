"""Memory and threads of a model go when it goes, and what is garbage is in nobody's way."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import harmony
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, square_loss, token_batch, token_loss, vector_batch

WIDTH = 24
MIB = 2**20


class Wanders(nn.Module):
    """Goes another way for other values: it is run dynamically."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.one(x))
        return torch.tanh(h) if h.sum() > 0 else h


class Looks(nn.Module):
    """Looks up a row that is not there where an input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) + self.rows[(x[:, 0] > 100).long() * 5]


def make(form: str, **options: Any) -> harmony.Harmony:
    torch.manual_seed(0)
    if form == "gpt":
        net, loss = GPT(), token_loss
    elif form == "dynamic":
        net, loss = Wanders(), square_loss
    else:
        middle = Looks() if form == "failed" else nn.Tanh()
        layers = [nn.Linear(WIDTH, WIDTH), middle, nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)]
        net, loss = nn.Sequential(*layers), square_loss
    given: dict[str, Any] = {"devices": 2, "microbatch_size": 4, "mode": "pp"}
    if form not in ("dropin", "infer"):
        given |= {"optimizer": torch.optim.AdamW, "loss_fn": loss}
    return harmony.Harmony(net, **given | options)


def use(model: harmony.Harmony, form: str) -> None:
    x, y = token_batch(0) if form == "gpt" else vector_batch(0)
    for _ in range(2):
        if form == "infer":
            with torch.no_grad():
                model(x)
        elif form == "dropin":
            square_loss(model(x), y).backward()
            model(x)  # and one that nobody takes the backward of
        else:
            model.train_step(x, y)
    if form == "failed":
        with pytest.raises(harmony.HarmonyError, match="out of"):
            model.train_step(x * 1e6, y)


def threads() -> list[threading.Thread]:
    """The threads of models, when those that are about to end have ended."""
    found = [t for t in threading.enumerate() if t.name.startswith("harmony-")]
    for thread in found:
        thread.join(0.5)
    return [thread for thread in found if thread.is_alive()]


@pytest.mark.parametrize(
    "form",
    [
        *("step", "gpt", "dropin", "infer", "dynamic"),
        pytest.param("failed", marks=devices.virtual_only("a real GPU is lost")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*so no recorded forward stands")
def test_a_model_that_is_deleted_gives_everything_back_without_the_garbage_collector(
    vgpus: VirtualGPUs, form: str
) -> None:
    gc.collect()
    assert not threads()
    model = make(form)
    use(model, form)
    gc.collect()
    gc.disable()
    try:
        del model
        assert devices.live_nbytes() == 0
        assert not threads()
    finally:
        gc.enable()


def test_the_recording_of_a_forward_leaves_nothing(vgpus: VirtualGPUs) -> None:
    """A hook that kept what autograd saved as it was made a circle, the inputs in it."""

    def recorded() -> int:
        gc.collect()
        return sum(type(thing) is FakeTensor for thing in gc.get_objects())

    before = recorded()
    model = make("dropin")
    use(model, "dropin")
    del model
    assert recorded() == before


def test_a_closed_model_has_given_everything_back_and_its_module_is_an_ordinary_one(
    vgpus: VirtualGPUs,
) -> None:
    x, y = vector_batch(0)
    with make("step") as model:
        use(model, "step")
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert devices.live_nbytes() == 0
    assert not threads()
    for call in (lambda: model.train_step(x, y), lambda: model(x), lambda: model.verify(x, y)):
        with pytest.raises(harmony.HarmonyError, match="has been closed"):
            call()
    model.close()  # once more is nothing
    net = model.module
    assert all(torch.equal(expected[n], t) for n, t in net.state_dict().items())
    assert model.optimizer is not None
    net.zero_grad()
    square_loss(net(x), y).backward()  # plain PyTorch goes on
    model.optimizer.step()
    assert all(param.grad is not None for param in net.parameters())
    again = harmony.Harmony(
        net, devices=1, optimizer=torch.optim.SGD, loss_fn=square_loss, microbatch_size=4
    )
    again.train_step(x, y)


def test_a_backward_of_a_closed_model_is_refused(vgpus: VirtualGPUs) -> None:
    model = make("dropin")
    x, y = vector_batch(0)
    loss = square_loss(model(x), y)
    model.close()
    with pytest.raises(harmony.HarmonyError, match="has been closed"):
        loss.backward()


class Cycle:
    """Holds device memory, and itself."""

    def __init__(self, nbytes: int) -> None:
        self.held, self.me = torch.empty(nbytes, dtype=torch.uint8, device=devices.device()), self


@devices.virtual_only("they hold their limit to the byte")
@pytest.mark.parametrize("form", ["step", "dropin", "dynamic"])
@pytest.mark.filterwarnings("ignore:.*so no recorded forward stands")
def test_nothing_is_refused_for_memory_that_is_garbage(vgpus: VirtualGPUs, form: str) -> None:
    vgpus(count=2, memory=MIB)
    model = make(form, devices=1)
    for _ in range(2):
        gc.collect()
        gc.disable()
        try:
            free = MIB - devices.live_nbytes()
            Cycle(free - 4096 if form != "dynamic" else free - 512)
            use(model, form)
            model._engine.variants.activate(None)  # it has to ask for its memory again
        finally:
            gc.enable()


@devices.virtual_only("they hold their limit to the byte")
@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("form", ["step", "dropin", "dynamic"])
@pytest.mark.filterwarnings("ignore:.*so no recorded forward stands")
def test_device_memory_that_somebody_else_holds_is_one_error_with_the_bytes(
    vgpus: VirtualGPUs, form: str, when: str
) -> None:
    vgpus(count=2, memory=MIB)
    model = make(form, devices=1, device_memory=MIB)
    if when == "later":
        use(model, form)
        model._engine.variants.activate(None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    free = MIB - devices.live_nbytes()
    held = torch.empty(free - 1024, dtype=torch.uint8, device=devices.device())
    with pytest.raises(
        harmony.DoesNotFitError, match=rf"free on {devices.device()}.*microbatch_size"
    ):
        use(model, form)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    del held
    use(model, form)


@devices.virtual_only("real ones are not set up")
def test_other_virtual_gpus_may_be_set_up_while_old_tensors_are_garbage(
    vgpus: VirtualGPUs,
) -> None:
    gc.disable()
    try:
        Cycle(4096)
        harmony.virtual_gpus(count=3, memory="32MiB")
    finally:
        gc.enable()
