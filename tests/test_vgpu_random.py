"""Random numbers on the virtual GPU are CPU's, whatever the streams do."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from harmony.vgpu import api as vgpu


@pytest.fixture(autouse=True)
def gpus():
    gc.collect()
    vgpu.virtual_gpus(count=2, memory="64MiB")


DRAWS = {
    "randn": lambda d: torch.randn(1000, device=d),
    "rand": lambda d: torch.rand(37, device=d, dtype=torch.float64),
    "randint": lambda d: torch.randint(0, 100, (50,), device=d),
    "randperm": lambda d: torch.randperm(50, device=d),
    "bernoulli": lambda d: torch.bernoulli(torch.full((50,), 0.3, device=d)),
    "bernoulli_": lambda d: torch.empty(50, device=d).bernoulli_(0.3),
    "bernoulli_tensor": lambda d: torch.empty(50, device=d).bernoulli_(
        torch.full((50,), 0.3, device=d)
    ),
    "exponential_": lambda d: torch.empty(50, device=d).exponential_(),
    "geometric_": lambda d: torch.empty(50, device=d).geometric_(0.2),
    "multinomial": lambda d: torch.multinomial(torch.ones(20, device=d), 5),
    "normal": lambda d: torch.normal(torch.zeros(20, device=d), torch.ones(20, device=d)),
    "native_dropout": lambda d: torch.native_dropout(torch.ones(50, device=d), 0.4, True)[0],
    "alpha_dropout": lambda d: F.alpha_dropout(torch.ones(50, device=d), 0.4),
    "dropout2d": lambda d: F.dropout2d(torch.ones(2, 8, 3, 3, device=d), 0.4),
    "rrelu": lambda d: F.rrelu(-torch.ones(50, device=d), training=True),
    "strided": lambda d: torch.empty(40, 40, device=d)[:, ::2].normal_(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_equal_cpu(name):
    results = []
    for device in ("cpu", "vgpu:0", "vgpu:1"):
        torch.manual_seed(7)
        first = DRAWS[name](device)
        results.append((first.cpu(), torch.randn(3, device=device).cpu()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_draws_happen_at_enqueue_time():
    torch.manual_seed(0)
    expected = [torch.randn(10) for _ in range(2)]
    torch.manual_seed(0)
    streams = [torch.Stream(device="vgpu:0") for _ in range(2)]
    drawn = []
    with vgpu.held(streams[0]):
        for stream in streams:  # the first stream runs last
            with stream:
                drawn.append(torch.randn(10, device="vgpu:0"))
        streams[1].synchronize()
    torch.accelerator.synchronize(0)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, drawn, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_gives_cpu_values_and_gradients(dtype):
    data = torch.randn(64, 33, dtype=dtype)
    results = []
    for device in ("cpu", "vgpu:0"):
        x = data.clone().to(device).requires_grad_()
        torch.manual_seed(3)
        y = F.dropout(x, 0.3)
        (y * y).sum().backward()
        results.append((y.detach().cpu(), x.grad.cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_generators_exchange_states_with_cpu():
    theirs, ours = torch.Generator().manual_seed(5), torch.Generator(device="vgpu:1")
    assert ours.device == torch.device("vgpu:1")
    torch.randn(3, generator=theirs)
    ours.set_state(theirs.get_state())
    a = torch.randn(20, generator=theirs)
    b = torch.randn(20, device="vgpu:1", generator=ours)
    assert torch.equal(a, b.cpu()) and torch.equal(theirs.get_state(), ours.get_state())
    assert ours.manual_seed(9).initial_seed() == 9
    with pytest.raises(RuntimeError, match="vgpu"):
        torch.empty(3, device="vgpu:0").normal_(generator=theirs)


def test_device_generators_are_separate_and_seeded_together():
    torch.manual_seed(11)
    a, b = torch.randn(5, device="vgpu:0"), torch.randn(5, device="vgpu:1")
    assert torch.equal(a.cpu(), b.cpu())
    state = torch.vgpu.get_rng_state("vgpu:0")
    c = torch.randn(5, device="vgpu:0")
    torch.vgpu.set_rng_state(state, "vgpu:0")
    assert torch.equal(torch.randn(5, device="vgpu:0"), c)
    with torch.random.fork_rng(devices=[0], device_type="vgpu"):
        torch.randn(5, device="vgpu:0")
    assert len(torch.vgpu.default_generators) == 2


def test_checkpoint_replays_dropout():
    x = torch.randn(100, device="vgpu:0", requires_grad=True)
    y = checkpoint(lambda t: F.dropout(t, 0.5) * 2, x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)
