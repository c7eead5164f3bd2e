"""The loss of the whole batch, put together from microbatches whose losses count differently."""

from __future__ import annotations

import copy
import os
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.plain import gradients_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB = 67
CLASSES = 5
MODES = [("pp", 1), ("pp", 2), ("dp", 2)]

# Whole batch and microbatches add the same terms in another order.
TOLERANCE = 1e-6


def classifier() -> nn.Module:
    torch.manual_seed(0)
    widths = [12, 16, 16, 16, CLASSES]
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(*layers)


def vectors(ignored: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight samples; those at the front are ignored."""
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(0, CLASSES, (8,), generator=generator)
    targets[:ignored] = -100
    return torch.randn(8, 12, generator=generator), targets


def assert_near(found: nn.Module, loss: torch.Tensor, twin: nn.Module, whole: Any) -> None:
    """Compare with the loss that plain PyTorch computes of the whole batch, and its gradients."""
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=TOLERANCE, atol=0.0, equal_nan=True)
    expected = gradients_of(twin)
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in gradients_of(found).items():
        assert (gradient is None) is (expected[name] is None), name
        if gradient is None:
            continue
        # The bias of an attention's keys has no gradient but what rounding leaves of it.
        scale = max(float(expected[name].abs().max()), 1e-3 * largest)
        worst = float((gradient - expected[name]).abs().max())
        assert worst <= TOLERANCE * scale, (name, worst, scale)


def wrap(net: nn.Module, loss_fn: Any = None, **options: Any) -> harmony.Harmony:
    settings = {"mode": "pp", "microbatch_size": 2, "devices": 1, **options}
    return harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        updates="host",
        optimizer_kwargs={"lr": 0.1},
        loss_fn=loss_fn,
        **settings,
    )


def masked_mean(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(logits, targets, reduction="none")
    return each.sum() / (targets != -100).sum().clamp(min=1)


def weight_decay(net: nn.Module) -> Any:
    """A loss that adds the same for every microbatch, read through the model's closure."""

    def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        decay = sum((param**2).sum() for param in net.parameters())
        return F.cross_entropy(logits, targets) + 1e-2 * decay

    return loss_fn


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.25])

LOSSES = {
    "cross_entropy": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "nll": lambda logits, targets: F.nll_loss(F.log_softmax(logits, -1), targets),
    "twice": lambda logits, targets: 2 * F.cross_entropy(logits, targets) / 3,
    "sum": lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum"),
    "sum over size": lambda logits, targets: (
        F.cross_entropy(logits, targets, reduction="sum") / len(targets)
    ),
    "masked mean": masked_mean,
    "mean of all": lambda logits, targets: F.cross_entropy(
        logits, targets, reduction="none"
    ).mean(),
    "picked": lambda logits, targets: F.cross_entropy(
        logits[targets != -100], targets[targets != -100]
    ),
    "probabilities": lambda logits, targets: F.cross_entropy(
        logits, F.one_hot(targets.clamp(min=0), CLASSES).float()
    ),
    "two alike": lambda logits, targets: (
        F.cross_entropy(logits, targets) + F.nll_loss(F.log_softmax(2 * logits, -1), targets)
    ),
    "two means": lambda logits, targets: (
        F.l1_loss(logits[:, 0], targets.float() / 100) + 0.1 * logits.abs().mean()
    ),
}


@pytest.mark.parametrize("microbatch_size", [1, 2, 3])
@pytest.mark.parametrize("name", list(LOSSES))
def test_a_loss_function_of_the_whole_batch(
    vgpus: VirtualGPUs, name: str, microbatch_size: int
) -> None:
    if name == "picked" and microbatch_size != 2:
        pytest.skip("shapes that depend on the content take one path per content")
    inputs, targets = vectors()
    net = classifier()
    twin = copy.deepcopy(net)
    model = wrap(net, LOSSES[name], microbatch_size=microbatch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss = model.train_step(inputs, targets)
    assert_near(net, loss, twin, LOSSES[name](twin(inputs), targets))
    assert not model.record.warnings


@pytest.mark.parametrize(("mode", "num_devices"), MODES)
def test_what_every_microbatch_adds_in_full_counts_once(
    vgpus: VirtualGPUs, mode: str, num_devices: int
) -> None:
    inputs, targets = vectors()
    net = classifier()
    twin = copy.deepcopy(net)
    model = wrap(net, weight_decay(net), mode=mode, devices=num_devices)
    loss = model.train_step(inputs, targets)
    assert_near(net, loss, twin, weight_decay(twin)(twin(inputs), targets))


@pytest.mark.parametrize(("mode", "num_devices"), MODES)
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, LOSSES["label smoothing"]])
def test_a_microbatch_in_which_nothing_counts_poisons_nothing(
    vgpus: VirtualGPUs, loss_fn: Any, mode: str, num_devices: int
) -> None:
    inputs, targets = vectors(ignored=4)
    net = classifier()
    twin = copy.deepcopy(net)
    model = wrap(net, loss_fn, mode=mode, devices=num_devices)
    loss = model.train_step(inputs, targets)
    assert_near(net, loss, twin, loss_fn(twin(inputs), targets))


def test_a_batch_in_which_nothing_counts_gives_nan_as_plain_pytorch_does(
    vgpus: VirtualGPUs,
) -> None:
    inputs, targets = vectors(ignored=8)
    model = wrap(classifier(), F.cross_entropy)
    assert torch.isnan(F.cross_entropy(torch.randn(8, CLASSES), targets))
    assert torch.isnan(model.train_step(inputs, targets))


def test_equal_counts_weigh_exactly_as_samples_do(vgpus: VirtualGPUs) -> None:
    inputs, targets = vectors(ignored=0)
    runs = []
    for loss_fn in (F.cross_entropy, lambda o, t: F.cross_entropy(o, t, reduction="none").mean()):
        net = classifier()
        loss = wrap(net, loss_fn).train_step(inputs, targets)
        runs.append((loss, gradients_of(net)))
    (loss, gradients), (other, others) = runs
    assert torch.equal(loss, other)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def root(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(logits[:, 0], targets.float()).sqrt()


def contrastive(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)))


def mixed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets) + logits.square().mean()


class OwnLoss(nn.Module):
    """The user's own module: one opaque step."""

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets).exp()


MIXING = {"root": root, "contrastive": contrastive, "mixed": mixed, "own": OwnLoss()}


@pytest.mark.parametrize("name", list(MIXING))
def test_what_cannot_be_put_together_is_one_microbatch(vgpus: VirtualGPUs, name: str) -> None:
    inputs, targets = vectors()
    net, loss_fn = classifier(), MIXING[name]
    twin = copy.deepcopy(net)
    model = wrap(net, loss_fn, microbatch_size="auto", devices=2)
    loss = model.train_step(inputs, targets)
    assert model.plan is not None and model.plan.spec.backward_size == 8
    assert_near(net, loss, twin, loss_fn(twin(inputs), targets))


class Masked(nn.Module):
    """A mean over a mask that is drawn, as masked autoencoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mask = (torch.rand(inputs.shape, device=inputs.device) > 0.5).float()
        return ((self.layer(inputs) - inputs).square() * mask).sum() / mask.sum()


def test_a_mean_over_a_drawn_mask_is_not_taken_for_a_sum(vgpus: VirtualGPUs) -> None:
    """Its divisor does not depend on the inputs, but is no constant either."""
    inputs, _ = vectors()
    torch.manual_seed(0)
    net = Masked()
    twin = copy.deepcopy(net)
    loss = wrap(net, None, microbatch_size=4).train_step(inputs)
    parts = []
    for index in range(2):
        torch.manual_seed(harmony.microbatch_seed(0, index))
        parts.append(twin(inputs[4 * index : 4 * index + 4]) / 2)
    assert_near(net, loss, twin, parts[0] + parts[1])


@pytest.mark.parametrize("name", list(MIXING))
def test_microbatches_that_were_asked_for_count_by_their_samples(
    vgpus: VirtualGPUs, name: str
) -> None:
    """As where plain PyTorch accumulates gradients; the report says so, once."""
    inputs, targets = vectors()
    net, loss_fn = classifier(), MIXING[name]
    twin = copy.deepcopy(net)
    model = wrap(net, loss_fn)
    losses = [model.train_step(inputs, targets) for _ in range(2)]
    parts = [loss_fn(twin(inputs[i : i + 2]), targets[i : i + 2]) / 4 for i in (2, 4, 6)]
    torch.testing.assert_close(losses[0].isnan(), torch.tensor(name in ("mixed", "own")))
    if name in ("root", "contrastive"):
        parts.insert(0, loss_fn(twin(inputs[:2]), targets[:2]) / 4)
        torch.testing.assert_close(losses[0], sum(parts).detach(), rtol=TOLERANCE, atol=0.0)
    said = [text for text in model.record.warnings if "microbatch_size=2" in text]
    assert len(said) == len(model.record.warnings) == 1


@pytest.mark.parametrize("options", [{"ignored": 0}, {"microbatch_size": 8}])
def test_nothing_is_said_where_it_makes_no_difference(
    vgpus: VirtualGPUs, options: dict[str, int]
) -> None:
    inputs, targets = vectors(options.pop("ignored", 3))
    net = classifier()
    twin = copy.deepcopy(net)
    model = wrap(net, mixed, **options)
    loss = model.train_step(inputs, targets)
    assert not model.record.warnings
    assert_near(net, loss, twin, mixed(twin(inputs), targets))


# Losses inside the model


class WithLoss(nn.Module):
    """Returns its loss, of a loss module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = classifier()
        self.criterion = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS.clone(), ignore_index=4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(x)
        return {"loss": self.criterion(logits, labels), "logits": logits}


@pytest.mark.parametrize(("mode", "num_devices"), MODES)
def test_a_loss_module_inside_the_model(vgpus: VirtualGPUs, mode: str, num_devices: int) -> None:
    inputs, targets = vectors(ignored=0)
    targets[1:4] = 4
    batch = {"x": inputs, "labels": targets}
    net = WithLoss()
    twin = copy.deepcopy(net)
    model = wrap(net, mode=mode, devices=num_devices)
    assert_near(net, model.train_step(batch), twin, twin(**batch)["loss"])


class OwnCriterion(nn.Module):
    """A loss module of the user's own: one opaque step of the model that it is part of."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 2 * F.cross_entropy(logits, labels.flatten(), reduction="mean")


class HeadWithLoss(nn.Module):
    """The last layer and the loss in one module, opaque as well."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.criterion = OwnCriterion()

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.scale * logits, labels)


class WithOwnLoss(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.body = classifier()
        self.criterion = criterion

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.body(x), labels)


@pytest.mark.parametrize("criterion", [OwnCriterion, HeadWithLoss])
@pytest.mark.parametrize(("mode", "num_devices"), MODES)
def test_a_loss_module_of_the_users_own_is_looked_into(
    vgpus: VirtualGPUs, mode: str, num_devices: int, criterion: Any
) -> None:
    inputs, targets = vectors()
    batch = {"x": inputs, "labels": targets}
    net = WithOwnLoss(criterion())
    twin = copy.deepcopy(net)
    model = wrap(net, mode=mode, devices=num_devices)
    assert_near(net, model.train_step(batch), twin, twin(**batch))
    assert not model.record.warnings


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_positions=32, n_embd=32, n_layer=2, n_head=4, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, **common,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).train()  # type: ignore[no-any-return]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **common}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    if kind == "llama":
        config = transformers.LlamaConfig(use_cache=False, **sizes)
        return transformers.LlamaForCausalLM(config).train()  # type: ignore[no-any-return]
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            tie_word_embeddings=False, **sizes,
        )  # fmt: skip
        return transformers.BertForMaskedLM(config).train()  # type: ignore[no-any-return]
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, use_cache=False, tie_word_embeddings=False, **common,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).train()  # type: ignore[no-any-return]


def tokens() -> dict[str, torch.Tensor]:
    """Eight sequences; the first have few labels, the second microbatch has none."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCAB, (8, 12), generator=generator)
    labels = ids.clone()
    labels[0, 2:] = labels[1, 5:] = labels[2:4] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(("mode", "num_devices"), MODES[1:])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_ignored_labels_of_unequal_count(
    vgpus: VirtualGPUs, kind: str, mode: str, num_devices: int
) -> None:
    net = hugging_face(kind)
    twin = copy.deepcopy(net)
    model = wrap(net, mode=mode, devices=num_devices)
    batch = tokens()
    loss = model.train_step(batch)
    assert_near(net, loss, twin, twin(**batch).loss)
    assert not model.record.warnings


@pytest.mark.parametrize(("mode", "num_devices"), MODES[1:])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_num_items_in_batch(
    vgpus: VirtualGPUs, kind: str, as_tensor: bool, mode: str, num_devices: int
) -> None:
    net = hugging_face(kind)
    twin = copy.deepcopy(net)
    batch: dict[str, Any] = tokens()
    num_items = int((batch["labels"][:, 1:] != -100).sum())
    batch["num_items_in_batch"] = torch.tensor(num_items) if as_tensor else num_items
    model = wrap(net, mode=mode, devices=num_devices)
    loss = model.train_step(batch)
    assert_near(net, loss, twin, twin(**batch).loss)
    assert not model.record.warnings


@pytest.mark.parametrize(("mode", "num_devices"), MODES[1:])
@pytest.mark.parametrize("items", [False, True], ids=["mean", "num_items"])
def test_the_drop_in_form(vgpus: VirtualGPUs, items: bool, mode: str, num_devices: int) -> None:
    net = hugging_face("gpt2")
    twin = copy.deepcopy(net)
    batch: dict[str, Any] = tokens()
    if items:
        batch["num_items_in_batch"] = torch.tensor(40)
    model = harmony.Harmony(net, mode=mode, microbatch_size=2, devices=num_devices)
    with torch.no_grad():
        evaluated = model(**batch).loss
    loss = model(**batch).loss
    (3 * loss).backward()
    torch.testing.assert_close(evaluated, loss.detach(), rtol=TOLERANCE, atol=0.0)
    assert_near(net, 3 * loss.detach(), twin, 3 * twin(**batch).loss)


@pytest.mark.parametrize("path", ["planned", "dynamic", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_has_the_type_of_plain_pytorchs(
    vgpus: VirtualGPUs, path: str, dtype: torch.dtype
) -> None:
    """The sum over microbatches is in fp32, and a loss in bf16 was returned as that."""
    torch.manual_seed(0)
    seen: list[int] = []

    class Path(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.one(x)
            if path == "eager":
                seen.append(len(x))
            if path == "dynamic" and float(torch.rand(())) < 2.0:
                hidden = hidden * 2
            return self.two(hidden)

    net = Path().to(dtype)
    twin = copy.deepcopy(net)
    model = wrap(net, F.cross_entropy, microbatch_size=8)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    x, y = torch.randn(8, 8, dtype=dtype), torch.randint(0, 4, (8,))
    for _ in range(2):
        optimizer.zero_grad()
        found, expected = model.train_step(x, y), F.cross_entropy(twin(x), y)
        expected.backward()
        optimizer.step()
        assert found.dtype is expected.dtype is dtype
        assert torch.equal(found, expected)
    assert model.capture_mode == {"planned": "trace"}.get(path, path)


def test_a_loss_of_one_element_is_a_scalar(vgpus: VirtualGPUs) -> None:
    """It failed inside of the backward, by a KeyError; plain PyTorch takes it."""
    net = classifier()
    twin = copy.deepcopy(net)
    x, y = vectors(0)
    model = wrap(net, lambda out, t: F.cross_entropy(out, t).reshape(1))
    loss = model.train_step(x, y)
    assert loss.shape == ()
    assert_near(net, loss, twin, F.cross_entropy(twin(x), y))
