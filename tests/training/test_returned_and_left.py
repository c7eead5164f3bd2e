"""What a forward returns that is no tensor, and what it leaves on modules beside numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.side_by_side import assert_same_training

WIDTH = 8


class Two(nn.Module):
    """Two linear layers; what is between them is a test's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)


class ADistribution(Two):
    def forward(self, x: torch.Tensor) -> Any:
        h = self.first(x)
        return torch.distributions.Normal(self.last(h), self.last(h.tanh()).exp())


class AnObject(Two):
    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=[self.last(self.first(x))], count=len(x))


class ANumber(Two):
    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.first(x)), len(x)


class AFunction(Two):
    def forward(self, x: torch.Tensor) -> Any:
        out = self.last(self.first(x))
        return lambda y: F.cross_entropy(out, y)


def _likelihood(out: Any, y: torch.Tensor) -> torch.Tensor:
    return -out.log_prob(y.float()[:, None]).mean()


def _of_object(out: Any, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out.logits[0], y, reduction="sum") / out.count


def _of_pair(out: Any, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out[0], y, reduction="sum") / out[1]


def _batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, WIDTH), torch.randint(0, 4, (size,))


@pytest.mark.parametrize(
    ("net", "loss"),
    [(ADistribution(), _likelihood), (AnObject(), _of_object), (ANumber(), _of_pair)],
    ids=["distribution", "object", "number"],
)
def test_what_a_forward_returns_is_of_its_own_call(
    vgpus: VirtualGPUs, net: nn.Module, loss: Callable[[Any, Any], torch.Tensor]
) -> None:
    """A recording has only the objects of its own run, and counts only its own samples."""
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1)
    for size in (8, 3, 8):
        x, y = _batch(size)
        found, expected = loss(model(x), y), loss(plain(x), y)
        found.backward()
        expected.backward()
        assert torch.equal(found, expected)
    for one, two in zip(net.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        assert torch.equal(one.grad, two.grad)


def test_a_function_that_a_forward_returns_is_refused_by_name(vgpus: VirtualGPUs) -> None:
    with (
        pytest.warns(UserWarning),
        pytest.raises(harmony.HarmonyError, match="returns a function"),
    ):
        harmony.Harmony(AFunction(), devices=1)(_batch(4)[0])


class Listed(Two):
    """Runs as it is, since it keeps a list; with a layer that a test gives it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.means = layer, list[torch.Tensor]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.means.append(x.mean())
        return self.last(self.layer(self.first(x)))


class Observed(nn.Module):
    """Quantises what goes through, by statistics that one kernel changes without a sign."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("low", float("inf")), ("high", -float("inf")), ("scale", 1.0)):
            self.register_buffer(name, torch.tensor([value]))
        self.register_buffer("zero", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("on", torch.ones(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = (self.on, self.on, self.low, self.high, self.scale, self.zero)
        return torch.fused_moving_avg_obs_fake_quant(x, *state, 0.1, 0, 255, -1)


def test_statistics_that_a_kernel_changes_unseen_are_changed(vgpus: VirtualGPUs) -> None:
    batches = [((x,), y) for x, y in (_batch(8) for _ in range(3))]
    model = assert_same_training(Listed(Observed()), batches)
    assert model.capture_mode == "eager"


class Rows(nn.Module):
    """Adds rows of a table whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, WIDTH, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table(x[:, :4].argmax(1))


def test_sparse_gradients_of_a_model_that_runs_as_it_is(vgpus: VirtualGPUs) -> None:
    net = Listed(Rows())
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1)
    x, y = _batch(8)
    with pytest.warns(UserWarning):
        F.cross_entropy(model(x), y).backward()
    F.cross_entropy(plain(x), y).backward()
    found, expected = (m.layer.table.weight.grad for m in (net, plain))
    assert found is not None and torch.equal(found, expected.to_dense())


def test_a_new_head_of_a_model_that_runs_as_it_is_is_not_left_out(vgpus: VirtualGPUs) -> None:
    net = Listed(nn.Tanh())
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        loss_fn=F.cross_entropy,
        devices=1,
    )
    with pytest.warns(UserWarning):
        model.train_step(*_batch(8))
    net.last = nn.Linear(WIDTH, 4)
    with pytest.raises(harmony.ConfigError, match=r"last\.weight, last\.bias"):
        model.train_step(*_batch(8))


class Normed(Two):
    """Uses a norm in one of several ways that show what it keeps."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.how = nn.BatchNorm1d(WIDTH), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if self.how == "frozen":
            self.norm.eval()
            return self.last(self.norm(h))
        if self.how == "both":
            self.norm.eval()
            frozen = self.norm(h.detach())
            self.norm.train()
            return self.last(self.norm(h) + frozen)
        return self.last(self.norm(h) * self.norm.running_var)


@pytest.mark.parametrize(
    ("how", "activations"), [("frozen", "auto"), ("both", "recompute"), ("read", "recompute")]
)
def test_a_norm_whose_mode_and_statistics_the_forward_uses(
    vgpus: VirtualGPUs, how: str, activations: str
) -> None:
    """The recompute starts from the statistics that the forward found; the mode stays."""
    batches = [((x,), y) for x, y in (_batch(8) for _ in range(3))]
    net = Normed(how)
    assert_same_training(net, batches, activations=activations)
    assert net.norm.training is (how != "frozen")


def test_a_model_in_eval_mode_trains_as_in_plain_pytorch(vgpus: VirtualGPUs) -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(), Two().last)
    batches = [((x,), y) for x, y in (_batch(8) for _ in range(3))]
    assert_same_training(net.eval(), batches)


class FirstTime(Two):
    """Does more the first time, by the table that it has not set up yet."""

    def __init__(self, grows: bool = False) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None
        self.tables: dict[int, torch.Tensor] = {}
        self.grows = grows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.ones(WIDTH) / 2
            x = x * 2
        elif self.grows:
            self.table = self.table + 0.25
        count = x.shape[0]
        if count not in self.tables:
            self.tables[count] = torch.linspace(0, 1, count)
        rows = self.tables[count].to(x.device)[:, None]
        return self.last(self.first(x) + self.table.to(x.device) + rows)


@pytest.mark.parametrize("grows", [False, True])
def test_tables_are_left_for_the_next_forward(vgpus: VirtualGPUs, grows: bool) -> None:
    net = FirstTime(grows)
    plain = copy.deepcopy(net)
    batches = [((x,), y) for x, y in (_batch(8) for _ in range(3))]
    assert_same_training(net, batches, plain=plain)
    assert net.table is not None and plain.table is not None
    assert torch.equal(net.table, plain.table) and list(net.tables) == [8]
    model = harmony.Harmony(net, devices=1)
    with torch.no_grad():
        for size in (3, 8):
            x = torch.randn(size, WIDTH)
            assert torch.equal(model(x), plain(x))
    assert torch.equal(net.table, plain.table) and list(net.tables) == [8, 3]


class MaskOfItsOwn(Two):
    """Sets up its mask anew in each forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mask = torch.ones(x.shape[1], x.shape[1]).tril()
        return self.last((self.mask.to(x.device) @ self.first(x)).mean(1))


def test_a_mask_that_each_forward_sets_up_does_not_end_the_recording(vgpus: VirtualGPUs) -> None:
    net = MaskOfItsOwn()
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1)
    with torch.no_grad():
        for length in (3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4):
            x = torch.randn(4, length, WIDTH)
            assert torch.equal(model(x), plain(x))
            assert torch.equal(net.mask, plain.mask)
    assert model.capture_mode == "trace"


class ByChance(Two):
    """Goes by a random number, so that each microbatch is recorded on its way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(h.relu() if torch.rand(()) < 2 else h.tanh())


def test_a_hook_and_a_frozen_weight_of_a_model_that_is_recorded_on_its_way(
    vgpus: VirtualGPUs,
) -> None:
    net = ByChance()
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1)
    x, y = _batch(8)
    hooks = list[Any]()

    def hook() -> None:
        hooks.extend(m.first.register_forward_hook(lambda m, i, out: out * 2) for m in both)

    def freeze() -> None:
        for m in both:
            m.first.weight.requires_grad_(False)

    both = (net, plain)
    changes = (lambda: None, hook, freeze, lambda: [held.remove() for held in hooks])
    for change in changes:
        change()
        for m in (model, plain):
            m.zero_grad()
            F.cross_entropy(m(x), y).backward()
        for one, two in zip(net.parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None)
            assert one.grad is None or two.grad is None or torch.equal(one.grad, two.grad)
    assert model.capture_mode == "dynamic"


class Cast(Listed):
    """Computes some of it in bf16, and some inside of that not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.means.append(x.mean())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.first(x)
            with torch.autocast(h.device.type, enabled=False):
                return self.last(self.layer(h.float()))


def test_autocast_inside_of_a_model_that_runs_as_it_is(vgpus: VirtualGPUs) -> None:
    batches = [((x,), y) for x, y in (_batch(8) for _ in range(2))]
    assert_same_training(Cast(nn.Linear(WIDTH, WIDTH)), batches)


class Mapped(Listed):
    """Maps a function over rows, and packs sequences whose lengths are an input."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        self.means.append(x.mean())
        h = torch.vmap(lambda row: row @ self.first.weight)(x)
        packed = nn.utils.rnn.pack_padded_sequence(
            h[:, None].expand(-1, 3, -1), lengths, batch_first=True, enforce_sorted=False
        )
        return self.last(self.layer(packed)[1][0])


def test_vmap_and_packed_sequences_in_a_model_that_runs_as_it_is(vgpus: VirtualGPUs) -> None:
    layer = nn.GRU(WIDTH, WIDTH, batch_first=True)
    batches = [((x, 1 + y.clamp(max=2)), y) for x, y in (_batch(8) for _ in range(2))]
    assert_same_training(Mapped(layer), batches)


class Settings:
    """Of a forward; all look alike."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __repr__(self) -> str:
        return "Settings()"


class Scaled(Two):
    def forward(self, x: torch.Tensor, settings: Settings) -> torch.Tensor:
        return self.last(self.first(x) * settings.scale)


def test_an_argument_that_is_an_object_is_read_anew(vgpus: VirtualGPUs) -> None:
    """Whether it is another one that looks the same, or the same one with another value."""
    net = Scaled()
    plain = copy.deepcopy(net)
    model, kept = harmony.Harmony(net, devices=1), Settings(1.0)
    x, _ = _batch(8)
    with torch.no_grad():
        for settings in (kept, Settings(2.0), kept):
            assert torch.equal(model(x, settings), plain(x, settings))
            settings.scale *= 3
            assert torch.equal(model(x, settings), plain(x, settings))


def test_a_forward_in_whose_place_a_function_calls_it(vgpus: VirtualGPUs) -> None:
    """The function has the method of the user's module, not that of a copy on a GPU."""
    net, plain = Two(), Two()
    for module in (net, plain):
        called = module.first.forward
        module.forward = lambda x, m=module: m.last(m.first(x))  # type: ignore[method-assign]
        module.first.forward = lambda x, f=called: f(x) * 2  # type: ignore[method-assign]
    batches = [((x,), y) for x, y in (_batch(8) for _ in range(2))]
    assert_same_training(net, batches, plain=plain)


class Twice(Two):
    """Goes by a random number, and uses each weight twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(self.first(x))
        return self.last(h.relu() if torch.rand(()) < 2 else h.tanh()) + self.last(x)


def test_a_model_recorded_on_its_way_that_uses_each_weight_twice(vgpus: VirtualGPUs) -> None:
    """No layer has a gradient of its own then, that a GPU could give the host."""
    net = Twice()
    plain = copy.deepcopy(net)
    options: Any = {"optimizer": torch.optim.SGD, "loss_fn": F.cross_entropy, "devices": 1}
    model = harmony.Harmony(net, optimizer_kwargs={"lr": 0.1}, **options)
    x, y = _batch(8)
    with pytest.warns(UserWarning):
        model.train_step(x, y)
    F.cross_entropy(plain(x), y).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for one, two in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two)


class PicksAndDraws(Two):
    """Picks by values, so that its recording runs it, and draws what to leave out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        picked = (h > 0).nonzero().sum() * 0
        return self.last(F.dropout(h, 0.5, self.training) + picked)


def test_no_random_number_of_the_caller_is_drawn(vgpus: VirtualGPUs) -> None:
    """Not even where the layers run to count what they cost."""
    model = harmony.Harmony(PicksAndDraws(), devices=1)
    x, _ = _batch(8)
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.capture_mode == "real-run trace"


class Switched(Two):
    """Goes by what a buffer and a frozen parameter hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("on", torch.tensor(True))
        self.slope = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(h.relu() if self.on else h.tanh()) * float(self.slope)


def test_a_forward_that_goes_by_a_buffer_sees_its_value_of_now(vgpus: VirtualGPUs) -> None:
    net = Switched()
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1)
    x, _ = _batch(8)
    with torch.no_grad():
        for on, slope in ((True, 1.0), (False, 1.0), (True, 2.0), (False, 2.0)):
            for module in (net, plain):
                module.on.fill_(on)
                module.slope.fill_(slope)
            assert torch.equal(model(x), plain(x))


class Failing(Listed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.means.append(x.mean())
        self.layer.eval()
        if len(x) == 3:
            raise ValueError("three samples")
        return self.last(self.first(x))


def test_modes_are_as_before_a_forward_that_fails(vgpus: VirtualGPUs) -> None:
    net = Failing(nn.Dropout())
    model = harmony.Harmony(net, devices=1)
    with pytest.raises(ValueError, match="three samples"):
        model(_batch(3)[0])
    assert net.layer.training and not net.means
    with pytest.warns(harmony.HarmonyWarning):
        model(_batch(4)[0])
    assert not net.layer.training and len(net.means) == 1


class Hooking(ByChance):
    """Gives a layer a hook the first time."""

    def __init__(self, by_chance: bool) -> None:
        super().__init__()
        self.by_chance = by_chance

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.first._forward_hooks:
            self.first.register_forward_hook(lambda module, given, out: out * 2)
        return super().forward(x) if self.by_chance else self.last(self.first(x))


@pytest.mark.filterwarnings("ignore:.*so no recorded forward")
@pytest.mark.parametrize("by_chance", [False, True])
def test_a_hook_that_a_forward_registers_stays(vgpus: VirtualGPUs, by_chance: bool) -> None:
    net = Hooking(by_chance)
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1)
    x, _ = _batch(8)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), plain(x))
    assert len(net.first._forward_hooks) == 1
