"""Batches are parted only where the parts make the whole: losses and modules that mix samples.

Each is compared with plain PyTorch on the whole batch, bit for bit where it is one microbatch of
one replica, since the same operations run then.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.plain import gradients_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SAMPLES = 12
CLASSES = 5

# Whole batch and microbatches add the same terms in another order.
TOLERANCE = 1e-6


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS = normal(SAMPLES, 16, seed=1)
LABELS = torch.randint(0, CLASSES, (SAMPLES,), generator=torch.Generator().manual_seed(2))
WANTED = normal(SAMPLES, CLASSES, seed=3)
UNEVEN = normal(SAMPLES, CLASSES, seed=4) < torch.linspace(-2, 2, SAMPLES)[:, None]
TIMES = normal(SAMPLES, seed=5).exp()
SEEN = normal(SAMPLES, seed=6) > -0.5


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES))


# Losses


def pairs(out: torch.Tensor, _: Any) -> torch.Tensor:
    """Both halves of the batch, of one shape each."""
    half = len(out) // 2
    return -F.logsigmoid((out[:half] - out[half:]).sum(-1)).mean()


def info_nce(out: torch.Tensor, _: Any) -> torch.Tensor:
    unit = F.normalize(out, dim=-1)
    return F.cross_entropy(unit @ unit.T / 0.1, torch.arange(len(out)))


def triplets(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    gaps = torch.cdist(out, out)
    same = labels[:, None] == labels
    chosen = (same[:, :, None] & ~same[:, None, :]).float()
    return (F.relu(gaps[:, :, None] - gaps[:, None, :] + 0.2) * chosen).sum() / len(out) ** 2


def flat_for_these_outputs(out: torch.Tensor, _: Any) -> torch.Tensor:
    """A hinge between samples that is 0 unless they are close, as they are not."""
    return F.relu(0.001 - torch.cdist(out, out)).sum() / len(out) + out.square().mean()


def correlation(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return 1 - torch.corrcoef(torch.stack([out[:, 0], wanted[:, 0]]))[0, 1]


def dice(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    chance, truth = out.sigmoid(), (wanted > 0).float()
    return 1 - 2 * (chance * truth).sum() / (chance.sum() + truth.sum())


def quantile(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (out - wanted).abs().flatten().quantile(0.9)


def cox(out: torch.Tensor, survival: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    times, seen = survival
    order = times.argsort(descending=True)
    hazard = out[:, 0][order]
    return -((hazard - hazard.logcumsumexp(0)) * seen[order]).sum() / len(times)


def hardest(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(out, labels, reduction="none")
    return each.topk(max(1, len(each) // 4))[0].mean()


def sorted_errors(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    errors = (out - wanted).abs().flatten().sort(descending=True)[0]
    return (errors * torch.linspace(1, 0, len(errors))).mean()


def centred(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Nothing in it has another shape than in a loss that mixes nothing."""
    gap = out - wanted
    return (gap - gap.mean(0)).square().mean()


def picked(out: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A mean over as many entries as a mask of two dimensions has."""
    wanted, mask = targets
    return ((out - wanted) ** 2)[mask].mean()


def two_means(out: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Over masked entries and over all: no weight of a part serves both."""
    wanted, mask = targets
    gaps = (out - wanted) ** 2
    return (gaps * mask).sum() / mask.sum() + gaps.mean()


class Contrast(nn.Module):
    """The same as `info_nce`, hidden in a module of the user's own."""

    def forward(self, out: torch.Tensor, targets: Any) -> torch.Tensor:
        return info_nce(out, targets)


MIXING: dict[str, tuple[Any, Any]] = {
    "pairs": (pairs, LABELS),
    "info_nce": (info_nce, LABELS),
    "triplets": (triplets, LABELS),
    "flat": (flat_for_these_outputs, LABELS),
    "correlation": (correlation, WANTED),
    "dice": (dice, WANTED),
    "quantile": (quantile, WANTED),
    "cox": (cox, (TIMES, SEEN.float())),
    "hardest": (hardest, LABELS),
    "sorted": (sorted_errors, WANTED),
    "centred": (centred, WANTED),
    "picked": (picked, (WANTED, UNEVEN)),
    "two_means": (two_means, (WANTED, UNEVEN.float())),
    "module": (Contrast(), LABELS),
    "first": (lambda o, t: F.mse_loss(o[:4], t[:4]), WANTED),
}


def wrap(net: nn.Module, loss_fn: Any = None, **options: Any) -> harmony.Harmony:
    return harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        updates="host",
        loss_fn=loss_fn,
        **{"devices": 2, **options},
    )


def assert_same(net: nn.Module, twin: nn.Module) -> None:
    wanted = gradients_of(twin)
    for name, gradient in gradients_of(net).items():
        expected = wanted[name]
        assert (gradient is None) == (expected is None), name
        assert gradient is None or torch.equal(gradient, expected), name


def assert_near(net: nn.Module, twin: nn.Module) -> None:
    wanted = gradients_of(twin)
    for name, gradient in gradients_of(net).items():
        expected = wanted[name]
        assert gradient is not None and expected is not None
        assert (gradient - expected).abs().max() <= TOLERANCE * expected.abs().max(), name


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "auto") for name in MIXING), ("pairs", "pp"), ("picked", "pp")]
)
def test_a_loss_that_mixes_samples_is_that_of_the_whole_batch(
    vgpus: VirtualGPUs, name: str, mode: str
) -> None:
    loss_fn, targets = MIXING[name]
    net = mlp()
    twin = copy.deepcopy(net)
    model = wrap(net, loss_fn, mode=mode)
    loss = model.train_step(INPUTS, targets)
    whole = loss_fn(twin(INPUTS), targets)
    whole.backward()
    assert torch.equal(loss, whole.detach())
    assert_same(net, twin)
    assert model.plan is not None
    why = {item.name: item.why for item in model.plan.decisions}
    assert "one microbatch: the loss (" in why["microbatch size"]
    assert "mixes samples" in why["microbatch size"]


@pytest.mark.parametrize("name", ["pairs", "info_nce", "picked", "module"])
def test_replicas_are_refused_for_a_loss_that_mixes_samples(vgpus: VirtualGPUs, name: str) -> None:
    loss_fn, targets = MIXING[name]
    called = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    model = wrap(mlp(), loss_fn, mode="dp")
    with pytest.raises(harmony.ConfigError, match=rf"mode='dp'.*{called}.*microbatch_size="):
        model.train_step(INPUTS, targets)


def test_a_batch_that_does_not_fit_is_refused_with_the_name_of_the_loss(
    vgpus: VirtualGPUs,
) -> None:
    net = nn.Sequential(nn.Linear(16, 512), nn.Tanh(), nn.Linear(512, 256))
    batch = normal(512, 16), torch.zeros(512)
    model = wrap(net, pairs, device_memory="800KiB", mode="pp")
    with pytest.raises(harmony.HarmonyError, match=r"loss \(pairs\).*microbatch_size="):
        model.train_step(*batch)
    asked = wrap(net, pairs, device_memory="1800KiB", mode="pp", microbatch_size=32)
    assert torch.isfinite(asked.train_step(*batch))


def own_mean(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (out - wanted).abs().mean()


FINE: dict[str, tuple[Any, Any]] = {
    "cross_entropy": (F.cross_entropy, LABELS),
    "masked": (lambda o, t: ((o - t[0]) ** 2 * t[1]).sum() / t[1].sum(), (WANTED, UNEVEN.float())),
    "sigmoid": (lambda o, t: F.binary_cross_entropy(o.sigmoid(), (t > 0).float()), WANTED),
    "batchmean": (lambda o, t: F.kl_div(o.log_softmax(1), t.softmax(1), reduction="batchmean"),
                  WANTED),
    "sum": (lambda o, t: F.mse_loss(o, t, reduction="sum"), WANTED),
    "normal": (lambda o, t: -torch.distributions.Normal(o, 1.0).log_prob(t).mean(), WANTED),
    "own": (own_mean, WANTED),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FINE))
def test_a_loss_that_mixes_nothing_is_parted_still(vgpus: VirtualGPUs, name: str) -> None:
    loss_fn, targets = FINE[name]
    net = mlp()
    twin = copy.deepcopy(net)
    model = wrap(net, loss_fn, mode="dp")
    loss = model.train_step(INPUTS, targets)
    whole = loss_fn(twin(INPUTS), targets)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=TOLERANCE, atol=0.0)
    assert_near(net, twin)
    assert model.plan is not None and len(model.plan.spec.shares) == 2


def test_a_loss_of_consecutive_pairs_is_not_parted_between_them(vgpus: VirtualGPUs) -> None:
    def ranking(out: torch.Tensor, _: Any) -> torch.Tensor:
        return F.margin_ranking_loss(out[::2, 0], out[1::2, 0], torch.ones(len(out) // 2))

    net = mlp()
    twin = copy.deepcopy(net)
    model = wrap(net, ranking, mode="pp", device_memory="12KiB")
    whole = ranking(twin(INPUTS), None)
    whole.backward()
    loss = model.train_step(INPUTS, LABELS)
    torch.testing.assert_close(loss, whole.detach(), rtol=TOLERANCE, atol=0.0)
    assert model.plan is not None and model.plan.spec.backward_size in (2, SAMPLES)


# Modules


class Mixes(nn.Module):
    """A layer between two others whose results depend on all samples of the batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.norm = nn.BatchNorm1d(16) if how == "norm" else nn.Identity()
        self.register_buffer("offsets", normal(SAMPLES, 16, seed=7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if self.how == "norm":
            h = self.norm(h)
        elif self.how == "attention":
            h = F.scaled_dot_product_attention(h[None], h[None], h[None])[0]
        elif self.how == "mean":
            h = h - h.mean(0)
        elif self.how == "neighbour":
            h = h + h.roll(1, 0)
        elif self.how == "buffer":
            h = h + self.offsets
        elif self.how == "size":
            h = h.view(SAMPLES, 4, 4).flatten(1)
        elif self.how == "many":
            h = h * (2.0 if len(h) > 8 else 1.0)
        elif self.how == "rank":
            h = h + h[:, :1].argsort(0) / len(h)
        return self.last(h.tanh())


KINDS = ["norm", "attention", "mean", "neighbour", "buffer", "size", "many", "rank"]


@pytest.mark.parametrize("form", ["step", "dropin"])
@pytest.mark.parametrize("how", KINDS)
def test_a_module_that_mixes_samples_sees_the_whole_batch(
    vgpus: VirtualGPUs, how: str, form: str
) -> None:
    torch.manual_seed(0)
    net = Mixes(how)
    twin = copy.deepcopy(net)
    whole = F.cross_entropy(twin(INPUTS), LABELS)
    whole.backward()
    if form == "step":
        model = wrap(net, F.cross_entropy)
        loss = model.train_step(INPUTS, LABELS)
    else:
        model = harmony.Harmony(net, devices=2)
        loss = F.cross_entropy(model(INPUTS), LABELS)
        loss.backward()
    assert torch.equal(loss.detach(), whole.detach())
    assert_same(net, twin)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))
    assert model.plan is not None and model.plan.spec.backward_size == SAMPLES
    refused = wrap(Mixes(how), F.cross_entropy, mode="dp")
    with pytest.raises(harmony.HarmonyError, match="mode='dp'"):
        refused.train_step(INPUTS, LABELS)


def test_a_larger_batch_that_is_another_path_is_not_parted(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    model = wrap(Mixes("many"), F.cross_entropy, mode="dp")
    model.train_step(INPUTS[:8], LABELS[:8])
    with pytest.raises(harmony.ConfigError, match=r"mode='dp'.*makes something else"):
        model.train_step(INPUTS, LABELS)


class Gated(nn.Module):
    """A branch that nothing comes through at first."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, CLASSES)
        gate = torch.full((16,), 1e-6 if how == "tiny" else 0.0)
        if how == "buffer":
            self.register_buffer("gate", gate)
        else:
            self.gate = nn.Parameter(gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).tanh()
        return self.last(h + self.gate * (h.sin() if self.how == "alone" else h.mean(0)))


def weighted(out: torch.Tensor, targets: Any) -> torch.Tensor:
    """A term between samples whose weight comes with the batch, and is 0 in the first."""
    return F.mse_loss(out, targets["y"]) + targets["weight"] * out.std()


@pytest.mark.parametrize("how", ["zero", "tiny", "buffer", "input", "alone"])
def test_what_mixes_samples_once_it_is_trained_is_seen_before(
    vgpus: VirtualGPUs, how: str
) -> None:
    torch.manual_seed(0)
    loss_fn, targets = F.cross_entropy, LABELS
    if how == "input":
        loss_fn, targets = weighted, {"y": WANTED, "weight": torch.tensor(0.0)}
    model = wrap(mlp() if how == "input" else Gated(how), loss_fn, mode="dp")
    if how == "alone":  # where no sample meets another, a gate is no reason
        model.train_step(INPUTS, targets)
        return
    with pytest.raises(harmony.ConfigError, match=r"mode='dp'.*(makes something else|mixes)"):
        model.train_step(INPUTS, targets)


class OfIds(nn.Module):
    """Ids come in, and what samples have to do with each other shows only where they differ."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.last = nn.Embedding(9, 16), nn.Linear(16, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids).mean(1)
        if self.how == "mean":
            h = h - h.mean(0)
        return self.last(h.tanh()).repeat(1 if self.how == "mean" else 2, 1)


@pytest.mark.parametrize("size", ["auto", 4])
@pytest.mark.parametrize("how", ["mean", "rows"])
def test_a_first_batch_of_the_same_samples_decides_nothing(
    vgpus: VirtualGPUs, how: str, size: Any
) -> None:
    """As of zeros, to warm up: two samples were the same together and apart, in any order."""
    torch.manual_seed(0)
    net = OfIds(how)
    twin = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2, microbatch_size=size)
    for step in range(2):
        ids = torch.randint(0, 9, (SAMPLES, 3)) * step
        for each in (model, twin):
            each.zero_grad()
        found, expected = model(ids), twin(ids)
        if how == "rows" or size == "auto":
            torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)
        found.square().sum().backward()
        expected.square().sum().backward()
        if step and (how == "rows" or size == "auto"):
            assert_near(net, twin)


class Opens(nn.Module):
    """A branch between samples that a count of steps opens, or a threshold out of reach."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).tanh()
        return self.last(LATER[self.how](h, self.steps >= 2))


def in_place(h: torch.Tensor, is_open: torch.Tensor) -> torch.Tensor:
    h = h.clone()
    h[:, :4] += is_open * h[:, :4].mean(0)
    return h


def eye(h: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(h), dtype=torch.bool, device=h.device)


def attend(h: torch.Tensor, may_meet: torch.Tensor) -> torch.Tensor:
    return h + (h @ h.T).masked_fill(~may_meet, -torch.inf).softmax(-1) @ h


def fused(h: torch.Tensor, may_meet: torch.Tensor) -> torch.Tensor:
    rows = h[None]
    return h + F.scaled_dot_product_attention(rows, rows, rows, attn_mask=may_meet[None])[0]


def along_edges(h: torch.Tensor, may_meet: torch.Tensor) -> torch.Tensor:
    target, source = may_meet.nonzero(as_tuple=True)
    return h.index_add(0, target, h[source])


def within_capacity(h: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each expert takes so many tokens at most, as at first they are."""
    chosen = F.one_hot(h[:, :3].argmax(1), 3)
    kept = chosen * (chosen.cumsum(0) <= 20)
    return h * kept.sum(1, keepdim=True)


def with_neighbours(h: torch.Tensor, is_open: torch.Tensor) -> torch.Tensor:
    h = h.clone()
    h[1:] += h[:-1].clone() * is_open
    return h


LATER: dict[str, Any] = {
    "mask": lambda h, is_open: attend(h, eye(h) | is_open),
    "fused_mask": lambda h, is_open: fused(h, eye(h) | is_open),
    "where": lambda h, is_open: h + torch.where(eye(h) | is_open, h @ h.T, 0.0) @ h,
    "similar": lambda h, _: attend(h, eye(h) | (h @ h.T > 90.0)),
    "near": lambda h, _: h + F.relu(1e-4 - torch.cdist(h, h)) @ h,
    "edges": lambda h, is_open: along_edges(h, eye(h) | is_open),
    "nearest": lambda h, _: h + h[torch.cdist(h, h).argmin(1)],
    "shift": lambda h, is_open: h + h[torch.arange(len(h), device=h.device) - 1 * is_open],
    "capacity": within_capacity,
    "neighbours": with_neighbours,
    "rank": lambda h, _: h * (1 + (torch.arange(len(h), device=h.device)[:, None] > 9)),
    "size": lambda h, is_open: h * (1 + len(h) * is_open),
    "any": lambda h, _: torch.where((h > 2).any(), h.clamp(max=9.0), h),
    "largest": lambda h, _: h * (1 + (h.argmax(1).max() > 15)),
    "count": lambda h, _: h * (1 + ((h > 2).any(1).cumsum(0) > 1)[:, None]),
    "mean": lambda h, is_open: h + torch.where(is_open, 1.0, 0.0) * h.mean(0, keepdim=True),
    "ramp": lambda h, is_open: h + (is_open / 100) * h.std(0),
    "roll": lambda h, is_open: torch.where(is_open, h.roll(1, 0), h),
    "softmax": lambda h, is_open: h + is_open * h.softmax(0),
    "product": lambda h, is_open: h + is_open * (h @ h.T @ h),
    "first": lambda h, is_open: h + is_open * h[0],
    "norm": lambda h, is_open: torch.where(is_open, F.batch_norm(h, None, None, training=True), h),
    "cumsum": lambda h, is_open: h + is_open * h.cumsum(0),
    "threshold": lambda h, _: h + F.relu(h.mean(0) - 5.0),
    "clamp": lambda h, _: h.clamp(max=h.mean() + 100.0),
    "in_place": in_place,
}


def in_halves(h: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Written to memory that holds anything at first."""
    out = torch.empty_like(h)
    out[:, :8] = h[:, 8:]
    out[:, 8:] = h[:, :8].sin()
    return out


def routed(h: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The rows of each expert one after the other, and back."""
    experts, order = h[:, :3].argmax(1).sort()
    return (h[order] * (experts + 1)[:, None])[order.argsort()]


def packed(h: torch.Tensor) -> torch.Tensor:
    """Attention over the tokens of all samples, which a mask keeps apart for good."""
    rows = h.flatten(0, 1)
    sample = torch.arange(len(rows), device=h.device) // h.shape[1]
    return attend(rows, sample[:, None] == sample).view_as(h)


APART: dict[str, Any] = {
    "halves": in_halves,
    "factor": lambda h, is_open: h * torch.where(is_open, 2.0, 1.0),
    "row": lambda h, is_open: h + is_open * h.softmax(1) * h.amax(1, keepdim=True),
    "chosen": lambda h, _: h.index_add(0, (h[:, 0] > 0).nonzero()[:, 0], h[h[:, 0] > 0]),
    "overflow": lambda h, _: torch.where(torch.isinf(h).any(), h.clamp(max=9.0), h),
    "places": lambda h, _: h * h[torch.arange(len(h), device=h.device), h.argmax(1)][:, None],
    "routed": routed,
    "tokens": lambda h, _: h * (torch.arange(h.numel(), device=h.device) % 16).view_as(h),
    "packed": lambda h, _: packed(h.view(len(h), 4, 4)).view(len(h), 16),
}
LATER.update(APART)


@pytest.mark.parametrize("how", list(LATER))
def test_what_mixes_samples_in_a_later_step_is_seen_before(vgpus: VirtualGPUs, how: str) -> None:
    torch.manual_seed(0)
    model = wrap(Opens(how), F.cross_entropy, mode="dp")
    if how in APART:
        model.train_step(INPUTS, LABELS)
        return
    with pytest.raises(harmony.ConfigError, match=r"mode='dp'.*mixes samples.*test_parts.py:\d+"):
        model.train_step(INPUTS, LABELS)


@pytest.mark.parametrize("how", ["mean", "mask", "edges", "shift"])
def test_a_branch_that_opens_later_is_trained_as_plain_pytorch_does(
    vgpus: VirtualGPUs, how: str
) -> None:
    torch.manual_seed(0)
    net = Opens(how)
    twin = copy.deepcopy(net)
    model = wrap(net, F.cross_entropy)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(4):
        for each in (net, twin):
            each.get_buffer("steps").fill_(step)
        loss = model.train_step(INPUTS, LABELS)
        optimizer.zero_grad()
        whole = F.cross_entropy(twin(INPUTS), LABELS)
        whole.backward()
        optimizer.step()
        assert torch.equal(loss, whole.detach()), step


def errors(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (out - wanted).square().mean(1)


def chosen_mean(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Over the samples with errors above a threshold, as at first all have."""
    each = errors(out, wanted)
    return each[each > 1e-6].mean()


def chosen_ratio(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    each = errors(out, wanted)
    return (each * (each > 1e-6)).sum() / (each > 1e-6).sum()


class Between(nn.Module):
    """A term between samples that comes in with a count of steps."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return errors(out, wanted).mean() + (self.steps > 2) * self.what(out)


BENDS: dict[str, Any] = {
    "threshold": lambda o, t: errors(o, t).mean() + F.relu(o.mean(0).square().sum() - 500.0),
    "other": lambda o, t: torch.where(errors(o, t).mean() > 50, o.abs().mean(), o.pow(2).mean()),
    "clamp": lambda o, t: errors(o, t).mean().clamp(max=100.0),
    "flooding": lambda o, t: (errors(o, t).mean() - 1e-3).abs() + 1e-3,
    "larger": lambda o, t: torch.maximum(errors(o, t).mean(), 1e-3 * o.abs().mean()),
    "chosen_mean": chosen_mean,
    "chosen_ratio": chosen_ratio,
    "balance": lambda o, t: (errors(o, t) / (t > 9).sum().clamp(min=3)).sum(),
    "rarity": lambda o, t: F.cross_entropy(
        o, t.argmax(1), 1 / t.argmax(1).bincount(minlength=5).clamp(min=50)
    ),
    "share": lambda o, t: (errors(o, t) * (t[:, 0] < 9) / (t[:, 0] < 9).float().mean()).mean(),
    "count": lambda o, t: (errors(o, t) * (1 + ((t[:, 0] > 9).cumsum(0) > 1))).mean(),
    "chosen": lambda o, t: errors(o, t)[t[:, 0] < 9].mean(),
    "picked": lambda o, t: errors(o, t)[(t[:, 0] < 9).nonzero()[:, 0]].mean(),
    "number": lambda o, t: errors(o, t).sum() / int((t[:, 0] < 9).sum()),
    "branch": lambda o, t: errors(o, t).mean() * (2.0 if bool((t > 9).any()) else 1.0),
    "std": Between(lambda o: o.std(0).sum()),
    "largest": Between(lambda o: o.max()),
    "gram": Between(lambda o: (o.T @ o / len(o)).square().sum()),
    "distances": Between(lambda o: torch.cdist(o, o).mean()),
}
SUMS: dict[str, Any] = {
    "mask": lambda o, t: (errors(o, t) * (o.detach().amax(1) > 0.1)).mean(),
    "weights": lambda o, t: (
        errors(o, t).mean(0) * 2.0 + 0.5 * o.square().mean(0).dot(torch.ones(5))
    ),
    "dot": lambda o, t: torch.dot(o.flatten(), t.flatten()) / len(o),
    "condition": lambda o, t: errors(o, t).mean() * torch.where((t > 9).any(), 2.0, 1.0),
    "logged": lambda o, t: (errors(o, t).mean().sqrt(), errors(o, t).mean())[1],
}


@pytest.mark.parametrize("name", [*BENDS, *SUMS])
def test_a_loss_that_bends_later_is_that_of_the_whole_batch(vgpus: VirtualGPUs, name: str) -> None:
    model = wrap(mlp(), (BENDS | SUMS)[name], mode="dp")
    if name in SUMS:
        model.train_step(INPUTS, WANTED)
        return
    why = r"loss \(.*mixes samples|loss goes by what its Python reads.*test_parts.py"
    with pytest.raises(harmony.ConfigError, match=rf"mode='dp'.*({why})"):
        model.train_step(INPUTS, WANTED)


def test_a_factor_of_the_loss_that_the_batch_decides_later_is_that_of_the_batch(
    vgpus: VirtualGPUs,
) -> None:
    net = mlp()
    twin = copy.deepcopy(net)
    model = wrap(net, SUMS["condition"], mode="dp")
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(3):
        wanted = WANTED.clone()
        wanted[-1] += 20.0 * step
        loss = model.train_step(INPUTS, wanted)
        optimizer.zero_grad()
        whole = SUMS["condition"](twin(INPUTS), wanted)
        whole.backward()
        optimizer.step()
        torch.testing.assert_close(loss, whole.detach(), rtol=TOLERANCE, atol=0.0)


def test_a_norm_over_the_batch_with_all_defaults(vgpus: VirtualGPUs) -> None:
    """A microbatch of one sample that nobody asked for, which BatchNorm1d refuses."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES))
    twin = copy.deepcopy(net)
    loss = F.cross_entropy(harmony.Harmony(net)(INPUTS), LABELS)
    loss.backward()
    whole = F.cross_entropy(twin(INPUTS), LABELS)
    whole.backward()
    assert torch.equal(loss.detach(), whole.detach())
    assert_same(net, twin)


def test_a_size_that_was_asked_for_and_fails_is_one_error(vgpus: VirtualGPUs) -> None:
    net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, CLASSES))
    model = wrap(net, F.cross_entropy, microbatch_size=1, mode="pp")
    with pytest.raises(harmony.HarmonyError, match="1 samples"):
        model.train_step(INPUTS, LABELS)


DRAWN: dict[str, Any] = {
    "normal": lambda h: torch.normal(h, 0.1),
    "poisson": lambda h: h + torch.poisson(h.abs()),
    "gumbel": lambda h: F.gumbel_softmax(h, dim=1),
    "times": lambda h: h * torch.randint(1, 10, (len(h), 1), device=h.device) / 10,
    "kept": lambda h: h * (torch.rand(len(h), 1, device=h.device) < 0.7),
    "chosen": lambda h: h.gather(1, h.softmax(1).multinomial(3)).repeat(1, 6)[:, :16],
    "gamma": lambda h: h * torch.distributions.Gamma(h.abs() + 1, 1.0).sample(),
    "dirichlet": lambda h: h * torch.distributions.Dirichlet(h.abs() + 1).sample(),
    "uniform": lambda h: h + torch.empty_like(h).uniform_(-1, 1),
}


class Draws(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(DRAWN[self.how](self.first(x)))


@pytest.mark.parametrize("how", list(DRAWN))
def test_random_numbers_mix_nothing(vgpus: VirtualGPUs, how: str) -> None:
    model = wrap(Draws(how), F.cross_entropy, mode="dp")
    model.train_step(INPUTS, LABELS)
    assert model.plan is not None and len(model.plan.spec.shares) == 2


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_mixes_nothing(vgpus: VirtualGPUs, rate: float) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Dropout(rate), nn.Linear(16, 16), nn.Dropout(rate),
                        nn.Linear(16, CLASSES))  # fmt: skip
    model = wrap(net, F.cross_entropy, mode="dp")
    model.train_step(INPUTS, LABELS)
    assert model.plan is not None and len(model.plan.spec.shares) == 2


# Graphs, whose edges count no samples


class Graph(nn.Module):
    """Edges hold numbers of nodes: half of the nodes have other edges, or none."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.a(x))
        if self.how == "adjacency":
            return self.b(edges @ h)
        source, target = edges.T if self.how == "rows" else edges
        return self.b(h.index_add(0, target, h[source]))


def edges_of(how: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    if how == "adjacency":
        return torch.rand(SAMPLES, SAMPLES, generator=generator)
    if how == "near":  # all of them fit into half of the batch, too
        return torch.randint(0, 2, (2, 30), generator=generator)
    count = SAMPLES if how == "rows" else 30
    found = torch.randint(0, SAMPLES, (2, count), generator=generator)
    return found.T.contiguous() if how == "rows" else found


@pytest.mark.parametrize("form", ["step", "dropin"])
@pytest.mark.parametrize("how", ["columns", "rows", "near", "adjacency"])
def test_a_graph_is_one_microbatch(vgpus: VirtualGPUs, how: str, form: str) -> None:
    torch.manual_seed(0)
    net = Graph(how)
    twin = copy.deepcopy(net)
    batch = INPUTS, edges_of(how)
    whole = F.cross_entropy(twin(*batch), LABELS)
    whole.backward()
    if form == "step":
        loss = wrap(net, F.cross_entropy).train_step(batch, LABELS)
    else:
        loss = F.cross_entropy(harmony.Harmony(net, devices=2)(*batch), LABELS)
        loss.backward()
    assert torch.equal(loss.detach(), whole.detach())
    assert_same(net, twin)


def test_graphs_of_other_sizes_follow(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Graph("adjacency")
    twin = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2)
    for count in (12, 9, 12):
        batch = INPUTS[:count], edges_of("adjacency")[:count, :count]
        for one in (model, twin):
            one.zero_grad()
            F.cross_entropy(one(*batch), LABELS[:count]).backward()
        assert_same(net, twin)


# Losses inside of models


class Clip(nn.Module):
    """Two towers; returns its loss over all pairs of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = mlp(), mlp()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        one, two = F.normalize(self.one(x), dim=-1), F.normalize(self.two(y), dim=-1)
        logits = self.scale.exp() * one @ two.T
        aim = torch.arange(len(x))
        loss = (F.cross_entropy(logits, aim) + F.cross_entropy(logits.T, aim)) / 2
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("form", ["step", "dropin"])
def test_a_contrastive_model_returns_the_loss_of_the_whole_batch(
    vgpus: VirtualGPUs, form: str
) -> None:
    net = Clip()
    twin = copy.deepcopy(net)
    batch = {"x": INPUTS, "y": normal(SAMPLES, 16, seed=9)}
    whole = twin(**batch)["loss"]
    whole.backward()
    if form == "step":
        loss = wrap(net).train_step(batch)
    else:
        loss = harmony.Harmony(net, devices=2)(**batch)["loss"]
        loss.backward()
    assert torch.equal(loss.detach(), whole.detach())
    assert_same(net, twin)


@pytest.mark.parametrize("form", ["step", "dropin"])
def test_hugging_face_clip(vgpus: VirtualGPUs, form: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    net = transformers.CLIPModel(config).train()
    twin = copy.deepcopy(net)
    ids = torch.randint(3, 40, (6, 8), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "pixel_values": normal(6, 3, 8, 8), "return_loss": True}
    whole = twin(**batch).loss
    whole.backward()
    if form == "step":
        loss = wrap(net).train_step(batch)
    else:
        loss = harmony.Harmony(net, devices=2)(**batch).loss
        loss.backward()
    assert torch.equal(loss.detach(), whole.detach())
    assert_same(net, twin)


def test_targets_that_are_tried_are_never_out_of_a_kernel_s_range(vgpus: VirtualGPUs) -> None:
    """The CTC loss does not check its targets: others than occur would end the process."""

    def ctc(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert int(targets.min()) > 0
        lengths = torch.full((len(output),), 10), torch.full((len(output),), 3)
        return F.ctc_loss(output.log_softmax(-1).transpose(0, 1), targets, *lengths)

    torch.manual_seed(0)
    net = nn.Linear(8, 6)
    twin = copy.deepcopy(net)
    inputs, targets = normal(4, 10, 8), 1 + torch.arange(12).view(4, 3) % 5
    whole = ctc(twin(inputs), targets)
    whole.backward()
    loss = wrap(net, ctc).train_step(inputs, targets)
    torch.testing.assert_close(loss, whole.detach())
    assert_near(net, twin)
