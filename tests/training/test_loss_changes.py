"""A loss that becomes another between two steps: its microbatches make the batch's loss anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from harmony.engine import variant_factory

from .conftest import VirtualGPUs
from .effects import model_of, train

CLASSES = 4
# Whole batch and microbatches add the same terms in another order.
TOLERANCE = 1e-6

Loss = Callable[[Any, Any], torch.Tensor]
Change = Callable[[int], None]


def reduction() -> tuple[Loss, Change]:
    criterion = nn.CrossEntropyLoss()
    return criterion, lambda i: setattr(criterion, "reduction", ["sum", "mean"][i % 2])


def class_weights() -> tuple[Loss, Change]:
    criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))
    new = torch.tensor([1.0, 5.0, 0.1, 2.0])
    return criterion, lambda i: setattr(criterion, "weight", new * (i + 1))


def class_weights_in_place() -> tuple[Loss, Change]:
    criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))
    new = torch.tensor([1.0, 5.0, 0.1, 2.0])
    weight = criterion.weight
    assert weight is not None

    def change(index: int) -> None:
        weight.copy_(new.roll(index))

    return criterion, change


def ignored() -> tuple[Loss, Change]:
    criterion = nn.CrossEntropyLoss()
    return criterion, lambda i: setattr(criterion, "ignore_index", i)


def switch() -> tuple[Loss, Change]:
    settings = {"sum": False}

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if settings["sum"]:
            return F.cross_entropy(out, target, reduction="sum")
        return F.cross_entropy(out, target)

    return loss, lambda i: settings.update(sum=i % 2 == 0)


def from_nothing() -> tuple[Loss, Change]:
    settings = {"weight": 0.0}

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out, target) + settings["weight"] * out.pow(2).mean()

    return loss, lambda i: settings.update(weight=0.5 * (i + 1))


@pytest.mark.parametrize(
    "change",
    [reduction, class_weights, class_weights_in_place, ignored, switch, from_nothing],
    ids=lambda change: change.__name__,
)
def test_the_loss_of_two_replicas_follows_what_the_loss_reads(
    vgpus: VirtualGPUs, change: Callable[[], tuple[Loss, Change]]
) -> None:
    """Each counted by the rule of the first step: 50 % off after ``reduction`` had changed."""
    assert worst(*change(), mode="dp", devices=2) <= TOLERANCE


def test_microbatches_of_a_chosen_size_follow_it_too(vgpus: VirtualGPUs) -> None:
    assert worst(*reduction(), devices=1, microbatch_size=3) <= TOLERANCE


def test_a_part_that_mixes_samples_is_refused_from_the_step_on_that_it_counts_in(
    vgpus: VirtualGPUs,
) -> None:
    settings = {"weight": 0.0}

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mixed = (out - out.roll(1, 0)).pow(2).mean()
        return F.cross_entropy(out, target) + settings["weight"] * mixed

    torch.manual_seed(0)
    model = trained(classifier(), loss, mode="dp", devices=2)
    model.train_step(*batch(0))
    before = copy.deepcopy(model.module.state_dict())
    settings["weight"] = 1.0
    with pytest.raises(harmony.HarmonyError, match="loss"):
        model.train_step(*batch(1))
    assert all(torch.equal(v, before[n]) for n, v in model.module.state_dict().items())


def test_a_loss_that_keeps_changing_gets_the_batch_as_a_whole(vgpus: VirtualGPUs) -> None:
    vgpus(count=1, memory="2MiB")
    assert worst(*switch(), steps=5, width=64, size=96, devices=1, parted=True) <= TOLERANCE


def regularised(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, target) + 0.1 * out.pow(2).mean()


def masked(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Two means, of which one leaves out entries."""
    wanted, counts = F.one_hot(target.clamp(min=0), CLASSES), (target >= 0).float()
    gaps = (out - wanted).square().mean(1)
    return (gaps * counts).sum() / counts.sum() + 0.1 * gaps.mean()


@pytest.mark.parametrize("loss", [regularised, masked])
def test_two_means_are_parted_between_replicas_while_all_targets_count(
    vgpus: VirtualGPUs, loss: Loss
) -> None:
    assert worst(loss, lambda _: None, mode="dp", devices=2) <= TOLERANCE


@pytest.mark.parametrize("loss", [regularised, masked])
def test_two_means_get_the_batch_as_a_whole_once_targets_do_not_count(
    vgpus: VirtualGPUs, loss: Loss
) -> None:
    vgpus(count=1, memory="2MiB")
    options: Any = {"width": 64, "size": 96, "devices": 1}
    found = worst(loss, lambda _: None, ignored_from=2, parted=True, steps=4, **options)
    assert found <= TOLERANCE


def test_two_means_that_weigh_differently_are_not_parted(vgpus: VirtualGPUs) -> None:
    model = trained(classifier(), regularised, mode="dp", devices=2)
    inputs, targets = batch(0)
    targets[:4] = -100
    with pytest.raises(harmony.ConfigError, match=r"mode='dp'.*targets that count.*samples"):
        model.train_step(inputs, targets)


@pytest.mark.parametrize("writes", [False, True])
def test_a_weight_that_grows_in_every_step_costs_no_capture(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    settings, log, captures = {"weight": 0.1}, [], []
    known = variant_factory.capture

    def counted(*args: Any, **kwargs: Any) -> Any:
        captures.append(1)
        return known(*args, **kwargs)

    def plain_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return settings["weight"] * F.cross_entropy(out, target)

    def logging_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        log.append(len(out))
        return settings["weight"] * F.cross_entropy(out, target)

    monkeypatch.setattr(variant_factory, "capture", counted)

    def change(index: int) -> None:
        settings["weight"] *= 2

    loss = logging_loss if writes else plain_loss
    assert worst(loss, change, plain_loss, mode="dp", devices=2) <= TOLERANCE
    assert len(captures) == 1


def worst(
    loss: Loss,
    change: Change,
    plain_loss: Loss | None = None,
    *,
    steps: int = 3,
    width: int = 8,
    size: int = 12,
    ignored_from: int | None = None,
    parted: bool = False,
    **options: Any,
) -> float:
    """The largest difference between the losses, and parameters, of some steps of both.

    Args:
        ignored_from: the step from which on targets in the first part do not count.
        parted: whether the first batch has to be parted, for the test to say anything.
    """
    torch.manual_seed(0)
    net = classifier(width)
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    model = trained(net, loss, **options)
    found = 0.0
    for index in range(steps):
        inputs, targets = batch(index, width, size)
        if ignored_from is not None and index >= ignored_from:
            targets[: size // 3] = -100
        ours = model.train_step(inputs, targets)
        if parted and index == 0:
            assert model.plan is not None
            assert model.plan.spec.backward_size < size
        optimizer.zero_grad()
        plain = (plain_loss or loss)(twin(inputs), targets)
        plain.backward()
        optimizer.step()
        found = max(found, relative(ours, plain.detach()))
        pairs = zip(net.parameters(), twin.parameters(), strict=True)
        found = max(found, *(relative(a.detach(), b.detach()) for a, b in pairs))
        change(index)
    return found


def trained(net: nn.Module, loss: Loss, **options: Any) -> harmony.Harmony:
    given = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.05}}
    return harmony.Harmony(net, **given, loss_fn=loss, **options)


def classifier(width: int = 8) -> nn.Module:
    layers = [nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(16, CLASSES))


def batch(index: int, width: int = 8, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(size, width, generator=generator)
    return inputs, torch.randint(0, CLASSES, (size,), generator=generator)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


class Counting:
    """Mixes samples from its third call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = F.cross_entropy(out, y)
        if self.calls > 2:
            loss = loss + ((out - out.mean(0)) ** 2).sum(1).mean()
        return loss


class Annealed(Counting):
    """Weighs by how often it was called."""

    def __call__(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.cross_entropy(out, y) * (1 + 0.1 * self.calls)


@pytest.mark.parametrize("kind", [Counting, Annealed])
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_loss_that_counts_has_whole_batches(
    vgpus: VirtualGPUs, kind: type[Counting], gpus: int
) -> None:
    vgpus(count=gpus)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    batches = [(torch.randn(8, 8), torch.arange(8) % 4) for _ in range(5)]
    twin, theirs, ours = copy.deepcopy(net), kind(), kind()
    expected = train(twin, twin, batches, theirs, "plain")
    found = train(model_of(net, "step", ours), net, batches, ours, "step")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    assert ours.calls == theirs.calls == 5


def test_a_loss_that_counts_is_not_parted_between_gpus(vgpus: VirtualGPUs) -> None:
    net = nn.Linear(8, 4)
    model = model_of(net, "step", Counting(), mode="dp")
    with pytest.raises(harmony.HarmonyError, match=r"calls.*microbatch_size="):
        model.train_step(torch.randn(8, 8), torch.arange(8) % 4)


DRAWS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "rand": lambda out, g: out * torch.rand(CLASSES, generator=g),
    "randperm": lambda out, g: out * out[:, torch.randperm(CLASSES, generator=g)],
    "normal_": lambda out, g: out + torch.empty_like(out).normal_(generator=g),
}


@pytest.mark.parametrize("name", list(DRAWS))
def test_a_loss_draws_from_a_generator_of_its_own_as_in_plain_pytorch(
    vgpus: VirtualGPUs, name: str
) -> None:
    """Recording the loss drew, too, so that every step had the numbers of a later one."""

    def drawing(generator: torch.Generator) -> Loss:
        return lambda out, y: F.cross_entropy(DRAWS[name](out, generator), y)

    torch.manual_seed(0)
    net = classifier()
    twin = copy.deepcopy(net)
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    options: Any = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    model = harmony.Harmony(net, loss_fn=drawing(ours), devices=1, **options)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(3):
        inputs, targets = batch(step)
        loss = model.train_step(inputs, targets)
        optimizer.zero_grad()
        whole = drawing(theirs)(twin(inputs), targets)
        whole.backward()
        optimizer.step()
        torch.testing.assert_close(loss, whole.detach(), rtol=TOLERANCE, atol=0.0)
        assert torch.equal(ours.get_state(), theirs.get_state())
