"""A recommender: which module would this file of the standard library import next?

    harmony-run examples/recommender.py

Two tables of vectors, one for files and one for modules, and a small network above. `train_step`
updates a table while the rest of the backward runs.
"""

from __future__ import annotations

import torch
from data import imports, options
from torch import nn

import harmony


class Recommender(nn.Module):
    """Scores a file and a module."""

    def __init__(self, files: int, modules: int, width: int) -> None:
        super().__init__()
        self.files = nn.Embedding(files, width)
        self.modules_ = nn.Embedding(modules, width)
        self.top = nn.Sequential(
            nn.Linear(3 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1)
        )

    def forward(self, files: torch.Tensor, modules: torch.Tensor) -> torch.Tensor:
        file, module = self.files(files), self.modules_(modules)
        return self.top(torch.cat([file, module, file * module], -1)).squeeze(-1)


def main(argv: list[str] | None = None) -> list[float]:
    """Train, print how often the right one is above a random one, and return the losses."""
    args = options(__doc__, 500).parse_args(argv)
    pairs, files, modules = imports()
    torch.manual_seed(0)
    pairs = pairs[torch.randperm(len(pairs))]
    held, pairs = pairs[:200], pairs[200:]
    net = Recommender(files, modules, 8 if args.tiny else 256)
    loss_fn, kwargs = nn.functional.binary_cross_entropy_with_logits, {"lr": 3e-3}
    if args.reference:
        model, optimizer = net, torch.optim.Adam(net.parameters(), **kwargs)
    else:
        model = harmony.Harmony(
            net, optimizer=torch.optim.Adam, optimizer_kwargs=kwargs, loss_fn=loss_fn
        )
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(args.steps):
        right = pairs[torch.randint(len(pairs), (64,), generator=generator)]
        others = torch.randint(modules, (64,), generator=generator)
        batch = right[:, 0].repeat(2), torch.cat([right[:, 1], others])
        targets = torch.arange(128).lt(64).float()
        if args.reference:
            optimizer.zero_grad()
            loss = loss_fn(model(*batch), targets)
            loss.backward()
            optimizer.step()
        else:
            loss = model.train_step(batch, targets)
        losses.append(loss.item())
        print(f"step {step:3d}  loss {losses[-1]:.5f}")
    model.eval()
    with torch.no_grad():
        found = model(held[:, 0], held[:, 1])
        other = model(held[:, 0], torch.randint(modules, (len(held),), generator=generator))
    print(f"above a random one {(found > other).float().mean():.1%}")
    return losses


if __name__ == "__main__":
    main()
