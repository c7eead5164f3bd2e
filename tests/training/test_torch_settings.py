"""Settings of PyTorch and replaced functions count in the step in which they are changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import harmony
from harmony.capture.guards.torch_settings import torch_settings

from .conftest import VirtualGPUs
from .effects import model_of, train
from .test_changed_arguments import vectors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Net(nn.Module):
    """Uses a factory, a function of torch, a method of tensors and a functional."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.first(x)) + torch.full((16,), 1 / 3).double().float()
        out: torch.Tensor = self.last(torch.sin(h).sigmoid())
        return out


@contextmanager
def precise() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.sin else out


def patched(owner: Any, name: str) -> Callable[[], Any]:
    @contextmanager
    def patch() -> Iterator[None]:
        own = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: own(*args, **kwargs) * 1.5)
        try:
            yield
        finally:
            setattr(owner, name, own)

    return patch


CHANGES: dict[str, Callable[[], Any]] = {
    "default dtype": precise,
    "function of torch": patched(torch, "sin"),
    "functional in C": patched(F, "linear"),
    "function mode": Doubling,
}


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("way", ["step", "loop"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_is_seen(
    vgpus: VirtualGPUs, change: str, way: str, gpus: int
) -> None:
    vgpus(count=gpus)
    torch.manual_seed(0)
    net = Net()
    twin = copy.deepcopy(net)
    model = model_of(net, way, F.cross_entropy)
    for index, batch in enumerate(vectors(4)):
        with CHANGES[change]() if index % 2 else torch.enable_grad():
            expected = train(twin, twin, [batch], F.cross_entropy, "plain")
            found = train(model, net, [batch], F.cross_entropy, way)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["step", "loop"])
@pytest.mark.parametrize(
    ("owner", "name"), [(torch.Tensor, "sigmoid"), (torch.Tensor, "double"), (F, "relu")]
)
def test_another_method_of_tensors_is_refused(
    vgpus: VirtualGPUs, owner: Any, name: str, way: str
) -> None:
    net = Net()
    model = model_of(net, way, F.cross_entropy)
    train(model, net, vectors(1), F.cross_entropy, way)
    with (
        patched(owner, name)(),
        pytest.raises(harmony.HarmonyError, match=rf"{name} was replaced at .*settings"),
    ):
        train(model, net, vectors(1), F.cross_entropy, way)
    train(model, net, vectors(1), F.cross_entropy, way)


@pytest.mark.parametrize("way", ["step", "loop"])
def test_kept_parametrizations_are_refused(vgpus: VirtualGPUs, way: str) -> None:
    net = Net()
    nn.utils.parametrizations.weight_norm(net.first)
    twin = copy.deepcopy(net)
    model = model_of(net, way, F.cross_entropy)
    with nn.utils.parametrize.cached(), pytest.raises(harmony.ConfigError, match="outside of it"):
        train(model, net, vectors(1), F.cross_entropy, way)
    found = train(model, net, vectors(1), F.cross_entropy, way)
    expected = train(twin, twin, vectors(1), F.cross_entropy, "plain")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def toggled(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Any:
    @contextmanager
    def change() -> Iterator[None]:
        before = read()
        write(value)
        try:
            yield
        finally:
            write(before)

    return change


@pytest.mark.parametrize(
    "change",
    [
        toggled(
            lambda: torch.backends.cuda.matmul.allow_tf32,
            lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
            True,
        ),
        toggled(
            torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
        ),
        toggled(
            torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False
        ),
        lambda: torch.backends.mkldnn.flags(enabled=False),
        lambda: sdpa_kernel(SDPBackend.MATH),
        lambda: torch.device("meta"),
        precise,
    ],
)
def test_a_setting_is_part_of_the_key(change: Callable[[], Any]) -> None:
    with change():  # some settings have another word for the default, once they were set
        pass
    before = torch_settings()
    with change():
        assert torch_settings() != before
    assert torch_settings() == before
