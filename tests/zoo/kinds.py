"""Kinds of models in plain PyTorch that the rest of the zoo does not have: graphs, detection, CTC,
memories, flows, hypernetworks, preferences, quantisation, scripts, physics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.control import Chain, Feed
from tests.zoo.data import (
    VOCAB,
    WIDTH,
    class_loss,
    classes,
    ids,
    image_batch,
    normal,
    row_batch,
    square_loss,
    token_batch,
    token_loss,
    vector_batch,
)
from tests.zoo.entry import LAYOUT, TIED, Batch, Entry

FAMILY = "further kinds (our own code)"
WHOLE: dict[str, Any] = {"microbatch": 4}
"""The model or its loss looks at all samples: one microbatch."""


# Graphs


class EdgeNetwork(nn.Module):
    """Messages along edges that index nodes: nothing counts samples but the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.messages = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(3))
        self.updates = nn.ModuleList(nn.GRUCell(WIDTH, WIDTH) for _ in range(3))

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        h = self.stem(nodes)
        source, target = edges.unbind(1)
        for message, update in zip(self.messages, self.updates, strict=True):
            sent = torch.relu(message(torch.cat([h[source], h[target]], -1)))
            h = update(torch.zeros_like(h).index_add(0, target, sent), h)
        return self.head(h)


def edge_batch(num_samples: int, seed: int) -> Batch:
    edges = ids(9, seed, 2, num_samples)
    return (normal(num_samples, seed, WIDTH), edges), classes(num_samples, seed)


class Adjacency(nn.Module):
    """Graph attention over dense adjacency matrices, one graph a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.scores = nn.ModuleList(nn.Linear(2 * WIDTH, 1) for _ in range(4))

    def forward(self, nodes: torch.Tensor, linked: torch.Tensor) -> torch.Tensor:
        h, count = self.stem(nodes), nodes.shape[1]
        for layer, score in zip(self.layers, self.scores, strict=True):
            z = layer(h)
            pairs = torch.cat([z.unsqueeze(2).expand(-1, -1, count, -1),
                               z.unsqueeze(1).expand(-1, count, -1, -1)], -1)  # fmt: skip
            attention = F.leaky_relu(score(pairs).squeeze(-1)).masked_fill(~linked, -1e9)
            h = h + attention.softmax(-1) @ z
        return self.head(h.mean(1))


def adjacency_batch(num_samples: int, seed: int) -> Batch:
    linked = normal(num_samples, seed + 1, 6, 6) > 0
    linked = linked | torch.eye(6, dtype=torch.bool)
    return (normal(num_samples, seed, 6, WIDTH), linked), classes(num_samples, seed)


# Detection


class Detector(nn.Module):
    """Boxes and classes of queries, matched to lists of targets of other lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.queries = nn.Parameter(torch.randn(5, WIDTH))
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 64, 0.1, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 3)
        self.boxes, self.kinds = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 11)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.stem(pictures).flatten(2).mT
        h = self.decoder(self.queries.expand(len(pictures), -1, -1), memory)
        return self.boxes(h).sigmoid(), self.kinds(h)


def detection_batch(num_samples: int, seed: int) -> Batch:
    targets = [
        {"boxes": normal(1 + row % 3, seed + row, 4).sigmoid(), "kinds": classes(1 + row % 3, row)}
        for row in range(num_samples)
    ]
    return normal(num_samples, seed, 3, 32, 32), targets


def detection_loss(output: Any, targets: Any) -> torch.Tensor:
    boxes, kinds = output
    total = boxes.new_zeros(())
    for row, target in enumerate(targets):
        count = len(target["kinds"])
        total = total + F.l1_loss(boxes[row, :count], target["boxes"].to(boxes.device))
        total = total + F.cross_entropy(kinds[row, :count], target["kinds"].to(boxes.device))
    return total / len(targets)


# Sequences


class Recogniser(nn.Module):
    """Convolutions and a recurrent network for a CTC loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, WIDTH, 5, 2, 2)
        self.norm = nn.LayerNorm(WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, 12)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.conv(waves).mT))
        return self.head(self.lstm(h)[0]).log_softmax(-1)


def ctc_batch(num_samples: int, seed: int) -> Batch:
    letters = ids(num_samples, seed, 4, 11) + 1
    lengths = torch.arange(num_samples) % 3 + 2
    return normal(num_samples, seed, 8, 24), (letters, lengths)


def ctc_loss(output: torch.Tensor, targets: Any) -> torch.Tensor:
    letters, lengths = targets
    times = torch.full((len(output),), output.shape[1], dtype=torch.long)
    return F.ctc_loss(output.transpose(0, 1), letters, times, lengths)


class Memory(Chain):
    """Attends to what it computed for the batch before, as Transformer-XL does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.memory: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        past = h if self.memory is None else torch.cat([self.memory.to(h.device), h], 1)
        self.memory = h.detach()
        h = h + self.attention(h, past, past, need_weights=False)[0]
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class Pointer(nn.Module):
    """Decodes step by step with attention over the source, fed with the right answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.encoder = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.cell = nn.LSTMCell(2 * WIDTH, WIDTH)
        self.query, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, VOCAB)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen, last = self.encoder(self.embed(source))
        h, c, outs = last[0], torch.zeros_like(last[0]), []
        context = seen.mean(1)
        for step in range(4):
            h, c = self.cell(torch.cat([self.embed(target[:, step]), context], -1), (h, c))
            scores = (seen @ self.query(h).unsqueeze(-1)).squeeze(-1).softmax(-1)
            context = (scores.unsqueeze(1) @ seen).squeeze(1)
            outs.append(self.head(torch.cat([h, context], -1)))
        return torch.stack(outs, 1)


def pointer_batch(num_samples: int, seed: int) -> Batch:
    target = ids(num_samples, seed + 1, 4)
    return (ids(num_samples, seed), target), target.roll(1, 1)


class WaveNet(nn.Module):
    """Gated dilated convolutions; every layer adds to one sum of skips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(WIDTH, WIDTH, 1)
        self.gates = nn.ModuleList(nn.Conv1d(WIDTH, 2 * WIDTH, 2, dilation=2**i) for i in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(4))
        self.head = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, total = self.stem(x.mT), 0.0
        for index, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            a, b = gate(F.pad(h, (2**index, 0))).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            total, h = total + skip(y), h + y
        return self.head(torch.relu(total)).mT


# Generators


class DiffusionTransformer(nn.Module):
    """Blocks that are scaled, shifted and gated by the time; the noise is drawn in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.Embedding(10, WIDTH)
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Feed() for _ in range(4))
        self.modulations = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(4))

    def forward(self, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        time = torch.randint(0, 10, (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        level = (time.float() / 10).view(-1, 1, 1)
        h, c = self.stem(clean * (1 - level) + noise * level), F.silu(self.times(time))
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            scale, shift, gate = modulation(c).unsqueeze(1).chunk(3, -1)
            h = h + gate * block(h * (1 + scale) + shift)
        return self.head(h), noise - clean


def velocity_loss(output: Any, _: Any) -> torch.Tensor:
    return F.mse_loss(*output)


class Autoencoder(nn.Module):
    """A variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 64), nn.ELU(), nn.Linear(64, 32))
        self.decoder = nn.Sequential(nn.Linear(16, 64), nn.ELU(), nn.Linear(64, WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, spread = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * spread).exp()
        return self.decoder(z), mean, spread


def elbo(output: Any, targets: torch.Tensor) -> torch.Tensor:
    shown, mean, spread = output
    kl = -0.5 * (1 + spread - mean.pow(2) - spread.exp()).sum(-1).mean()
    return F.mse_loss(shown, targets) + 0.1 * kl


class Flow(nn.Module):
    """Coupling layers with the logarithm of their determinant."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(half, 32), nn.Tanh(), nn.Linear(32, WIDTH)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x.new_zeros(len(x))
        for net in self.nets:
            a, b = x.chunk(2, -1)
            scale, shift = net(a).chunk(2, -1)
            scale = torch.tanh(scale)
            x = torch.cat([b * scale.exp() + shift, a], -1)
            total = total + scale.sum(-1)
        return x, total


def likelihood(output: Any, _: Any) -> torch.Tensor:
    z, logdet = output
    return (0.5 * z.pow(2).sum(-1) - logdet).mean()


class Mixture(nn.Module):
    """A mixture of normal distributions whose parts depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.parts, self.means, self.spreads = (nn.Linear(64, 5) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = self.trunk(x)
        return self.parts(h).log_softmax(-1), self.means(h), self.spreads(h).clamp(-3, 3)


def mixture_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    parts, means, spreads = output
    normal_ = torch.distributions.Normal(means, spreads.exp())
    return -torch.logsumexp(parts + normal_.log_prob(targets.float().unsqueeze(-1)), -1).mean()


class Hypernetwork(nn.Module):
    """Makes the weights of another network from what it is to do."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = nn.Parameter(torch.randn(3, 16))
        self.makers = nn.ModuleList(nn.Linear(16, WIDTH * WIDTH + WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for task, maker in zip(self.tasks, self.makers, strict=True):
            made = maker(torch.tanh(task)) * 0.1
            x = x + torch.tanh(F.linear(x, made[:-WIDTH].view(WIDTH, WIDTH), made[-WIDTH:]))
        return self.head(x)


class MadeWeights(nn.Module):
    """The same by `torch.func.functional_call` of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.task = nn.Parameter(torch.randn(16))
        self.maker = nn.Linear(16, WIDTH * WIDTH)
        self.target = nn.Linear(WIDTH, WIDTH)
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.maker(self.task).view(WIDTH, WIDTH) * 0.1 + self.target.weight
        made = {"weight": weight, "bias": self.target.bias}
        h = torch.func.functional_call(self.target, made, (torch.relu(self.stem(x)),))
        return self.head(torch.relu(h))


# Preferences


class Scorer(nn.Module):
    """A small decoder with the log probability of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Feed() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens[:, :-1])
        for block in self.blocks:
            h = block(h)
        chances = self.head(h).log_softmax(-1)
        return chances.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1).sum(-1)


class Preference(nn.Module):
    """DPO: a policy against a frozen reference, on pairs of answers."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.reference = Scorer(), Scorer()
        self.reference.requires_grad_(False)

    def forward(self, better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
        policy = self.policy(better) - self.policy(worse)
        with torch.no_grad():
            reference = self.reference(better) - self.reference(worse)
        return policy - reference


def preference_batch(num_samples: int, seed: int) -> Batch:
    return (ids(num_samples, seed), ids(num_samples, seed + 1)), None


def dpo_loss(output: torch.Tensor, _: Any) -> torch.Tensor:
    return -F.logsigmoid(0.1 * output).mean()


class Reward(nn.Module):
    """A reward for each of two answers, in one batch of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scorer, self.head = Chain(), nn.Linear(WIDTH, 1)

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        rewards = self.head(self.scorer(pair.flatten(0, 1))).squeeze(-1)
        return rewards.view(-1, 2)


def pair_batch(num_samples: int, seed: int) -> Batch:
    return normal(num_samples, seed, 2, WIDTH), None


def ranking_loss(output: torch.Tensor, _: Any) -> torch.Tensor:
    return -F.logsigmoid(output[:, 0] - output[:, 1]).mean() + 0.01 * output.pow(2).mean()


def in_batch_loss(output: torch.Tensor, _: Any) -> torch.Tensor:
    """Contrastive: every row against all others."""
    first, second = (F.normalize(part, dim=-1) for part in output.chunk(2, -1))
    scores = first @ second.mT / 0.1
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def advantage_loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """PPO: clipped ratios with advantages that are normalised over the batch, entropy, values."""
    logits, values = output[:, :-1], output[:, -1]
    chances = logits.log_softmax(-1)
    taken = chances.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    returns = targets.float() / 5
    advantages = returns - values.detach()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = (taken - taken.detach()).exp()
    clipped = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    entropy = -(chances.exp() * chances).sum(-1).mean()
    return -clipped.mean() + 0.5 * F.mse_loss(values, returns) - 0.01 * entropy


class ActorCritic(Chain):
    """Logits of actions and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(super().forward(x))


# Quantisation, scripts, functions


class Quantised(nn.Module):
    """Layers whose weights and activations are quantised in training, with observers."""

    def __init__(self) -> None:
        super().__init__()
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

        def fake(dtype: torch.dtype, low: int, high: int) -> nn.Module:
            observer = MovingAverageMinMaxObserver
            return FakeQuantize(observer, quant_min=low, quant_max=high, dtype=dtype)

        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.inputs = nn.ModuleList(fake(torch.quint8, 0, 255) for _ in range(4))
        self.weights = nn.ModuleList(fake(torch.qint8, -128, 127) for _ in range(4))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, inputs, weights in zip(self.layers, self.inputs, self.weights, strict=True):
            x = torch.relu(F.linear(inputs(x), weights(layer.weight), layer.bias))
        return self.head(x)


class ScriptBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


@torch.jit.script
def gated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(y) + torch.tanh(y)


class Scripted(nn.Module):
    """A `torch.jit` module, or only a function, between ordinary layers."""

    def __init__(self, module: bool = True) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.block = torch.jit.script(ScriptBlock()) if module else ScriptBlock()
        self.others = nn.ModuleList(Feed() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.stem(x))
        for other in self.others:
            x = gated(other(x), x)
        return self.head(x)


class Reversal(torch.autograd.Function):
    """Turn the gradient round."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -0.3 * gradient


class Adversarial(nn.Module):
    """Two heads, one of which the trunk works against."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Chain()
        self.label, self.domain = nn.Linear(WIDTH, 10), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.trunk(x)
        return self.label(h), self.domain(Reversal.apply(h))


def domain_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    label, domain = output
    return F.cross_entropy(label, targets) + F.cross_entropy(domain, targets % 2)


class Ensemble(nn.Module):
    """Members whose stacked weights are mapped over."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 4, WIDTH, WIDTH) * 0.1)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.weights.unbind(0):
            x = torch.vmap(lambda w, x=x: torch.tanh(x @ w))(layer).mean(0) + x
        return self.head(x)


# Physics, pictures


class Fields(nn.Module):
    """Spectral convolutions with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(WIDTH, WIDTH, 5, dtype=torch.cfloat) * 0.1) for _ in range(3)
        )
        self.skips = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        for weight, skip in zip(self.weights, self.skips, strict=True):
            spectrum = torch.fft.rfft(h.mT)[..., :5]
            mixed = torch.einsum("bit,iot->bot", spectrum, weight)
            h = F.gelu(torch.fft.irfft(mixed, n=h.shape[1]).mT + skip(h))
        return self.head(h)


class Rendering(nn.Module):
    """Densities and colours along rays, made transparent one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.density, self.colour = nn.Linear(64, 1), nn.Linear(64, 3)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        angles = points.unsqueeze(-1) * 2.0 ** torch.arange(6, device=points.device)
        h = self.net(torch.cat([angles.sin(), angles.cos()], -1).flatten(-2))
        opaque = 1 - torch.exp(-F.softplus(self.density(h)).squeeze(-1) * 0.2)
        left = torch.cumprod(1 - opaque + 1e-6, -1)
        weights = opaque * torch.cat([torch.ones_like(left[:, :1]), left[:, :-1]], -1)
        return (weights.unsqueeze(-1) * self.colour(h).sigmoid()).sum(1)


def ray_batch(num_samples: int, seed: int) -> Batch:
    return normal(num_samples, seed, 8, 3), normal(num_samples, seed + 1, 3).sigmoid()


class SpatialTransformer(nn.Module):
    """Straightens a picture by a grid that it predicts, then looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Flatten())
        self.affine = nn.Linear(8 * 7 * 7, 6)
        self.look = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        theta = self.affine(self.where(x)).view(-1, 2, 3) * 0.1
        theta = theta + torch.eye(2, 3, device=x.device)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        y = self.look(F.grid_sample(x, grid, align_corners=False))
        return self.head(torch.relu(y).mean((2, 3)))


class Upscaler(nn.Module):
    """Residual convolutions and a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.up = nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        for conv in self.body:
            h = h + F.prelu(conv(h), torch.full((1,), 0.2, device=h.device))
        return F.pixel_shuffle(self.up(h), 2)


def upscale_batch(num_samples: int, seed: int) -> Batch:
    return normal(num_samples, seed, 3, 8, 8), normal(num_samples, seed + 1, 3, 16, 16)


class Dynamics(nn.Module):
    """A differential equation, integrated with the same network four times a step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.field = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, dt = self.stem(x), 0.25
        for _ in range(2):
            k1 = self.field(h)
            k2 = self.field(h + dt / 2 * k1)
            k3 = self.field(h + dt / 2 * k2)
            k4 = self.field(h + dt * k3)
            h = h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.head(h)


class Forces(nn.Module):
    """An energy, and forces that are its gradient: a derivative inside of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.net(x).sum()
            (forces,) = torch.autograd.grad(energy, x, create_graph=True)
        return -forces


def force_batch(num_samples: int, seed: int) -> Batch:
    return normal(num_samples, seed, WIDTH), normal(num_samples, seed + 1, WIDTH)


class Capsules(nn.Module):
    """Routing by agreement, three rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, 8 * 8)
        self.weight = nn.Parameter(torch.randn(10, 8, 8, 8) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.stem(x).view(len(x), 8, 8)
        votes = torch.einsum("bpi,cpio->bcpo", parts, self.weight)
        logits = torch.zeros_like(votes[..., :1])
        for _ in range(3):
            whole = (logits.softmax(1) * votes).sum(2, keepdim=True)
            norm = whole.pow(2).sum(-1, keepdim=True)
            whole = whole * norm.sqrt() / (1 + norm)
            logits = logits + (votes * whole).sum(-1, keepdim=True)
        return whole.squeeze(2).norm(dim=-1)


class Latents(nn.Module):
    """A few learned latents that look at a long input again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, WIDTH))
        self.looks = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True) for _ in range(3)
        )
        self.blocks = nn.ModuleList(Feed() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.latents.expand(len(x), -1, -1)
        for look, block in zip(self.looks, self.blocks, strict=True):
            h = block(h + look(h, x, x, need_weights=False)[0])
        return self.head(h.mean(1, keepdim=True) + x)


class Teacher(nn.Module):
    """A teacher that follows the student by a moving average, in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Chain(2), Chain(2)
        self.predictor = nn.Linear(WIDTH, WIDTH)
        self.teacher.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.predictor(self.student(x))
        with torch.no_grad():
            target = self.teacher(x + 0.1)
        return out, target


def teacher_loss(output: Any, _: Any) -> torch.Tensor:
    return (2 - 2 * F.cosine_similarity(*output, dim=-1)).mean()


class Chooser(nn.Module):
    """Draws one of several branches for each sample, with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 10)
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = F.gumbel_softmax(self.gate(x), tau=0.7, hard=True)
        outs = torch.stack([branch(x) for branch in self.branches], -1)
        return self.head(torch.tanh((outs * chosen.unsqueeze(1)).sum(-1)))


class Sparse(nn.Module):
    """A table of embeddings whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, sparse=True)
        self.chain, self.head = Chain(), nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.chain(self.embed(tokens)))


class Equilibrium(nn.Module):
    """Iterates until it hardly moves: how often depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.cell = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = start = self.stem(x)
        for _ in range(6):
            after = torch.tanh(0.5 * self.cell(h) + start)
            if float((after - h).detach().norm()) < 1e-1 * math.sqrt(h.numel()):
                break
            h = after
        return self.head(h)


ENTRIES = (
    Entry("graph_edges", FAMILY, "messages along edges between nodes", EdgeNetwork,
          edge_batch, class_loss, **WHOLE),
    Entry("graph_dense", FAMILY, "graph attention, one adjacency matrix a sample", Adjacency,
          adjacency_batch, class_loss),
    Entry("detection", FAMILY, "lists of boxes of unequal lengths as targets", Detector,
          detection_batch, detection_loss, **WHOLE),
    Entry("ctc", FAMILY, "a CTC loss with lengths", Recogniser, ctc_batch, ctc_loss),
    Entry("memory", FAMILY, "attends to the batch before (Transformer-XL)", Memory,
          vector_batch, square_loss, **WHOLE),
    Entry("pointer", FAMILY, "a decoder with attention, step by step", Pointer,
          pointer_batch, token_loss, tolerance=2e-7, reason=TIED),
    Entry("wavenet", FAMILY, "gated dilated convolutions, a sum of skips", WaveNet,
          vector_batch, square_loss),
    Entry("dit", FAMILY, "a diffusion transformer, noise drawn in the forward",
          DiffusionTransformer, vector_batch, velocity_loss),
    Entry("vae", FAMILY, "draws its latents", Autoencoder, vector_batch, elbo),
    Entry("flow", FAMILY, "coupling layers, log determinants", Flow, force_batch, likelihood),
    Entry("mixture_density", FAMILY, "a likelihood from torch.distributions", Mixture,
          row_batch, mixture_loss),
    Entry("hypernetwork", FAMILY, "weights made by other weights", Hypernetwork,
          row_batch, class_loss),
    Entry("functional_call", FAMILY, "a module called with made weights", MadeWeights,
          row_batch, class_loss),
    Entry("dpo", FAMILY, "preferences against a frozen reference", Preference,
          preference_batch, dpo_loss, tolerance=2e-7, reason=TIED),
    Entry("reward", FAMILY, "rewards of pairs, flattened into rows", Reward,
          pair_batch, ranking_loss),
    Entry("contrastive", FAMILY, "every row against all others", Chain,
          lambda n, seed: (normal(n, seed, WIDTH), None), in_batch_loss, **WHOLE),
    Entry("ppo", FAMILY, "clipped ratios, advantages normalised over the batch", ActorCritic,
          row_batch, advantage_loss, **WHOLE),
    Entry("qat", FAMILY, "quantised in training, observers that follow", Quantised,
          row_batch, class_loss),
    Entry("script_module", FAMILY, "a ScriptModule with parameters", Scripted,
          row_batch, class_loss, tolerance=4e-7,
          reason="first runs of TorchScript have other last bits than later ones"),
    Entry("script_function", FAMILY, "a script function", lambda: Scripted(False),
          row_batch, class_loss),
    Entry("reversal", FAMILY, "a gradient that is turned round", Adversarial,
          row_batch, domain_loss),
    Entry("ensemble", FAMILY, "vmap over stacked weights", Ensemble, row_batch, class_loss),
    Entry("fourier", FAMILY, "complex weights in the spectrum", Fields,
          vector_batch, square_loss, tolerance=1e-6, reason=LAYOUT),
    Entry("rendering", FAMILY, "products along rays", Rendering, ray_batch, square_loss),
    Entry("spatial_transformer", FAMILY, "a grid that the model predicts", SpatialTransformer,
          image_batch(32), class_loss),
    Entry("upscaler", FAMILY, "pixel shuffle", Upscaler, upscale_batch, square_loss),
    Entry("dynamics", FAMILY, "one network, eight times (Runge-Kutta)", Dynamics,
          row_batch, class_loss, tolerance=2e-7, reason=TIED),
    Entry("forces", FAMILY, "a derivative inside of the forward", Forces,
          force_batch, square_loss),
    Entry("capsules", FAMILY, "routing by agreement", Capsules, row_batch, class_loss),
    Entry("latents", FAMILY, "latents that read a long input", Latents, vector_batch, square_loss),
    Entry("teacher", FAMILY, "a frozen teacher", Teacher, vector_batch, teacher_loss),
    Entry("gumbel", FAMILY, "branches drawn with straight-through gradients", Chooser,
          row_batch, class_loss),
    Entry("sparse", FAMILY, "sparse gradients of embeddings", Sparse,
          token_batch, token_loss, tolerance=2e-7,
          reason="plain PyTorch adds the rows of a sparse gradient one by one"),
    Entry("equilibrium", FAMILY, "stops when it hardly moves", Equilibrium,
          row_batch, class_loss, tolerance=2e-7, reason=TIED),
)  # fmt: skip
