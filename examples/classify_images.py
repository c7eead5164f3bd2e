"""A residual network with BatchNorm that reads digits, with its accuracy on others.

    harmony-run examples/classify_images.py

BatchNorm mixes the samples of its batch, so Harmony keeps the batch whole. Needs scikit-learn.
"""

from __future__ import annotations

import torch
from data import digits, options
from torch import nn

import harmony


class Residual(nn.Module):
    """Two convolutions, each behind a BatchNorm, beside a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def network(tiny: bool) -> nn.Sequential:
    """Layers in a row; the wrapper would take any module."""
    width, depth = (16, 2) if tiny else (64, 8)
    first = nn.Conv2d(1, width, 3, padding=1)
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(first, *(Residual(width) for _ in range(depth)), *last)


def main(argv: list[str] | None = None) -> list[float]:
    """Train, print the accuracy, and return the losses."""
    args = options(__doc__, 200).parse_args(argv)
    torch.manual_seed(0)
    net = network(args.tiny)
    pictures, labels = digits()
    model = net if args.reference else harmony.Harmony(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(args.steps):
        chosen = torch.randint(1500, (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(pictures[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        print(f"step {step:3d}  loss {losses[-1]:.5f}")
    model.eval()
    with torch.no_grad():
        right = (model(pictures[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"accuracy on the 297 others {right:.1%}")
    return losses


if __name__ == "__main__":
    main()
