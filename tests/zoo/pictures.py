"""Vision networks of our own: residual, dense, U-shaped, generative."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from tests.zoo.data import class_loss, classes, image_batch, normal, square_loss
from tests.zoo.entry import Entry


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (ResNet-18; He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x if self.shortcut is None else self.shortcut(x)
        return self.relu(y)


class ResNet18(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages = []
        for stage in range(4):
            before, after = width << max(stage - 1, 0), width << stage
            first = BasicBlock(before, after, 1 if stage == 0 else 2)
            stages.append(nn.Sequential(first, BasicBlock(after, after, 1)))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width << 3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.pool(self.relu(self.norm(self.stem(x)))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class DenseLayer(nn.Module):
    """Takes a list of all earlier feature maps (DenseNet; Huang et al., 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, 1, 1)

    def forward(self, earlier: list[torch.Tensor]) -> torch.Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(earlier, 1)), inplace=True))
        x = self.conv2(F.relu(self.norm2(x), inplace=True))
        return F.dropout(x, 0.1, self.training)


class DenseBlock(nn.Module):
    def __init__(self, inputs: int, growth: int, depth: int) -> None:
        super().__init__()
        widths = (inputs + index * growth for index in range(depth))
        self.layers = nn.ModuleList(DenseLayer(width, growth) for width in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, width: int = 8, growth: int = 4, depth: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1, bias=False)]
        for last in (False, False, True):
            parts.append(DenseBlock(width, growth, depth))
            width += growth * depth
            if not last:
                halved = nn.Conv2d(width, width // 2, 1, bias=False)
                parts.append(
                    nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), halved, nn.AvgPool2d(2))
                )
                width //= 2
        self.parts, self.norm = nn.Sequential(*parts), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.parts(x))).mean((2, 3)))


class Twice(nn.Module):
    """Two convolutions with BatchNorm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout2d(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return self.drop(F.relu(self.norm2(self.conv2(x)), inplace=True))


class UNet(nn.Module):
    """Skips from every scale down to the same scale up (Ronneberger et al., 2015)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        scales = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(
            Twice(before, after) for before, after in zip([3, *scales], scales, strict=False)
        )
        self.middle = Twice(scales[-1], scales[-1])
        self.rise = nn.ModuleList(nn.ConvTranspose2d(w, w, 2, 2) for w in reversed(scales))
        afters = [*reversed(scales[:-1]), width]
        self.up = nn.ModuleList(
            Twice(2 * before, after)
            for before, after in zip(reversed(scales), afters, strict=True)
        )
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for rise, up in zip(self.rise, self.up, strict=True):
            x = up(torch.cat([rise(x), skips.pop()], 1))
        return self.head(x)


class TimedBlock(nn.Module):
    """A residual block with GroupNorm that the time of the diffusion shifts."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(2, outputs), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.time, self.drop = nn.Linear(time, 2 * outputs), nn.Dropout(0.1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        y = self.norm2(y) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(self.drop(F.silu(y)))


class PixelAttention(nn.Module):
    """Attention between all pixels of a small picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x).flatten(2).transpose(1, 2)
        y, _ = self.attention(y, y, y, need_weights=False)
        return x + y.transpose(1, 2).reshape(x.shape)


class DiffusionUNet(nn.Module):
    """A denoiser: time embedding to all blocks, attention, skips (Ho et al., 2020)."""

    def __init__(self, width: int = 8, time: int = 16) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        self.down = nn.ModuleList(
            [TimedBlock(width, width, time), TimedBlock(width, 2 * width, time)]
        )
        self.middle1 = TimedBlock(2 * width, 2 * width, time)
        self.attention = PixelAttention(2 * width)
        self.middle2 = TimedBlock(2 * width, 2 * width, time)
        self.up = nn.ModuleList(
            [TimedBlock(4 * width, width, time), TimedBlock(2 * width, width, time)]
        )
        self.norm, self.head = nn.GroupNorm(2, width), nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(1e4) * torch.arange(half, device=when.device) / half)
        angles = when[:, None].float() * rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        x, skips = self.stem(noisy), []
        for down in self.down:
            x = down(x, time)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle2(self.attention(self.middle1(x, time)), time)
        for up in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = up(torch.cat([x, skips.pop()], 1), time)
        return self.head(F.silu(self.norm(x)))


def noisy_batch(num_samples: int, seed: int) -> Any:
    pictures = normal(num_samples, seed, 3, 16, 16)
    when = classes(num_samples, seed, 1000)
    return (pictures, when), normal(num_samples, seed + 1, 3, 16, 16)


def discriminator() -> nn.Module:
    """A discriminator whose weights have spectral norm 1 (Miyato et al., 2018)."""
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 16), (16, 32)):
        conv = nn.Conv2d(before, after, 4, 2, 1)
        layers += [parametrizations.spectral_norm(conv), nn.LeakyReLU(0.2), nn.Dropout2d(0.1)]
    head = parametrizations.spectral_norm(nn.Linear(32, 1))
    return nn.Sequential(*layers, nn.Flatten(), head, nn.Flatten(0))


def old_discriminator() -> nn.Module:
    """The same with the hooks that came before parametrizations."""
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 16), (16, 32)):
        conv = nn.Conv2d(before, after, 4, 2, 1)
        layers += [nn.utils.spectral_norm(conv), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 1), nn.Flatten(0))


def hinge_batch(num_samples: int, seed: int) -> Any:
    return normal(num_samples, seed, 3, 16, 16), classes(num_samples, seed, 2).float() * 2 - 1


def hinge_loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.relu(1 - output * targets).mean()


class NormFree(nn.Module):
    """A residual chain of 1-D convolutions with weight norm, by parametrization and by hook."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, width, 1)
        convs = [nn.Conv1d(width, width, 3, padding=2**i, dilation=2**i) for i in range(4)]
        new = [parametrizations.weight_norm(conv) for conv in convs[:2]]
        old = [nn.utils.weight_norm(conv) for conv in convs[2:]]
        self.convs, self.head = nn.ModuleList([*new, *old]), nn.Conv1d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for conv in self.convs:
            x = x + F.dropout(torch.tanh(conv(x)), 0.1, self.training)
        return self.head(x)


def sound_batch(num_samples: int, seed: int) -> Any:
    return normal(num_samples, seed, 4, 24), normal(num_samples, seed + 1, 4, 24)


class Statistics(nn.Module):
    """BatchNorm in all its forms: cumulative, without affine, without statistics, frozen."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(width, momentum=None),
                nn.BatchNorm2d(width, affine=False),
                nn.BatchNorm2d(width, track_running_stats=False),
                nn.InstanceNorm2d(width, track_running_stats=True),
                nn.BatchNorm2d(width),
            ]
        )
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.norms)
        self.flat, self.head = nn.BatchNorm1d(width), nn.Linear(width, 10)

    def train(self, mode: bool = True) -> Statistics:
        super().train(mode)
        self.norms[4].eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + torch.tanh(conv(norm(x)))
        return self.head(self.flat(x.mean((2, 3))))


FAMILY = "vision (our own code)"

ENTRIES = (
    Entry(
        "resnet18",
        FAMILY,
        "BatchNorm, ReLU and addition in place",
        ResNet18,
        image_batch(32),
        class_loss,
        num_samples=6,
        microbatch=3,
        last_samples=5,
    ),
    Entry(
        "densenet",
        FAMILY,
        "lists of tensors, BatchNorm, dropout",
        DenseNet,
        image_batch(16),
        class_loss,
    ),
    Entry(
        "unet",
        FAMILY,
        "skips over the whole depth, BatchNorm",
        UNet,
        lambda n, seed: (normal(n, seed, 3, 16, 16), normal(n, seed + 1, 3, 16, 16)),
        square_loss,
    ),
    Entry(
        "diffusion_unet",
        FAMILY,
        "time embedding to all blocks, attention, skips",
        DiffusionUNet,
        noisy_batch,
        square_loss,
    ),
    Entry(
        "spectral_norm",
        FAMILY,
        "a discriminator; power iteration changes buffers",
        discriminator,
        hinge_batch,
        hinge_loss,
    ),
    Entry(
        "spectral_norm_hook",
        FAMILY,
        "the same by forward hooks",
        old_discriminator,
        hinge_batch,
        hinge_loss,
    ),
    Entry(
        "weight_norm",
        FAMILY,
        "weight norm by parametrization and by hook",
        NormFree,
        sound_batch,
        square_loss,
    ),
    Entry(
        "statistics",
        FAMILY,
        "BatchNorm cumulative, frozen, without statistics; InstanceNorm",
        Statistics,
        image_batch(8),
        class_loss,
        num_samples=6,
    ),
)
