"""The buffers that a step takes on the host are what its plan predicts."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch

import harmony
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import Pack, StepSpec
from harmony.runtime.host import pinned_memory
from tests import devices
from tests import race_check as racecheck
from tests.training.models import GPT, token_batch, token_loss
from tests.training.test_plans import packs, use_plan


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The buffers of host memory that are made meanwhile."""
    made: list[weakref.ref[Any]] = []
    start = pinned_memory.HostBuffer.__init__

    def begin(self: pinned_memory.HostBuffer, *args: Any) -> None:
        start(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(pinned_memory.HostBuffer, "__init__", begin)
    return made


def in_parts(shares: int) -> Any:
    """A step of so many replicas; all packs keep their activations but the last."""

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        cut = packs([1, 2, 4], num_layers)
        share = minibatch // shares
        parts = tuple((at, at + share) for at in range(0, minibatch, share))
        return StepSpec(minibatch, 2, 2, cut[:-1], cut, parts, saved=cut[:-1])

    return spec_of


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("num_devices", "shares"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("offload", [False, True])
def test_host_memory_is_what_is_predicted(
    precision: str, num_devices: int, shares: int, offload: bool, buffers: list[weakref.ref[Any]]
) -> None:
    devices.provide(count=2, memory="64MiB")
    torch.manual_seed(0)
    model = harmony.Harmony(
        GPT(dropout=0.1),
        optimizer=torch.optim.AdamW,
        loss_fn=token_loss,
        microbatch_size=2,
        devices=num_devices,
        precision=precision,
    )
    cut = tuple(Pack(*pair) for pair in ((0, 1), (1, 2), (2, 4))) if offload else ()
    policy = Policy(mirror=True, boundary="swap", offload=cut)
    with racecheck.checked():
        use_plan(model, token_batch(0), in_parts(shares), policy)
        for step in range(2):
            model.train_step(*token_batch(step))
    gc.collect()
    alive = [buffer for buffer in (each() for each in buffers) if buffer is not None]
    state = [v for held in model.optimizer.state.values() for v in held.values()]
    taken = sum(buffer.tensor.numel() for buffer in alive)
    taken += sum(v.numel() * v.element_size() for v in state)
    assert model.plan is not None
    # A tensor begins at a multiple of 512 bytes, which counts in a model of 60 KB.
    assert taken == pytest.approx(model.plan.host_nbytes, rel=0.05)


_ADDRESS_SPACE = """
import resource, torch
from harmony.errors import DoesNotFitError
from harmony.runtime.host.pinned_memory import HostBuffer, new_tensor

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**26
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for take in (
    lambda: HostBuffer(2**27, None, "the arena"),
    lambda: new_tensor((2**27,), torch.uint8),
):
    try:
        take()
    except DoesNotFitError as error:
        print(error)
"""


def test_address_space_that_the_system_refuses_is_a_refusal_by_name() -> None:
    """Batch systems set `ulimit -v`, others forbid overcommit: memory is free and not given."""
    command = [sys.executable, "-c", _ADDRESS_SPACE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    arena, tensor = done.stdout.splitlines()
    assert arena.startswith("the arena needs 128 MiB of host memory, which the system refuses (")
    assert "ulimit -v unlimited" in arena
    assert tensor.startswith("a tensor of the host needs 128 MiB")
