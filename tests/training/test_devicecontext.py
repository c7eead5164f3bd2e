"""What a thread leaves on the devices that it has worked with."""

from __future__ import annotations

import pytest
import torch

from harmony.runtime import device as device_module
from harmony.runtime.device import DeviceContext, streams_restored
from tests import devices
from tests.training.conftest import VirtualGPUs


def test_entering_a_device_again_makes_no_stream(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams come from a ring of 32 a device: the next ones would be another model's."""
    context = DeviceContext(devices.device())
    peers = [devices.device(index) for index in range(3)]
    made = []

    def counted(*args: object, **fields: object) -> torch.Stream:
        made.append(fields["device"])
        return original(*args, **fields)

    original = torch.Stream
    monkeypatch.setattr(device_module.torch, "Stream", counted)
    for _ in range(5):
        context.enter(peers)
    assert made == peers[1:]


def test_the_thread_of_the_user_gets_its_device_and_streams_back(vgpus: VirtualGPUs) -> None:
    contexts = [DeviceContext(devices.device(index)) for index in (2, 1)]
    torch.accelerator.set_device_index(3)
    mine = torch.Stream(device=devices.device(2))
    torch.accelerator.set_stream(mine)
    torch.accelerator.set_device_index(3)
    with streams_restored(contexts):
        contexts[0].enter([contexts[1].device])
        contexts[0].use("h2d")
        assert torch.accelerator.current_device_index() == 2
    assert torch.accelerator.current_device_index() == 3
    assert torch.accelerator.current_stream(devices.device(2)) == mine
    torch.accelerator.set_stream(torch.Stream(device=devices.device()))
    torch.accelerator.set_device_index(0)
