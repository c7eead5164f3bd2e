"""A language model whose blocks hold experts, of which two answer for each token.

    harmony-run examples/mixture_of_experts.py

Memory of a mixture of experts is mostly experts; each is layers like any other here, and streams.
"""

from __future__ import annotations

import torch
from data import options, text, windows
from torch import nn

import harmony


class Experts(nn.Module):
    """A gate and its experts; all compute, and the two best of each token count."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x)
        scores = self.gate(tokens)
        share, chosen = scores.softmax(-1).topk(2)
        weights = torch.zeros_like(scores).scatter(-1, chosen, share)
        for number, expert in enumerate(self.experts):
            x = x + expert(tokens) * weights[..., number, None]
        return x


class Attention(nn.Module):
    """Causal attention beside a way around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, context, width = x.shape
        heads = self.qkv(self.norm(x)).view(batch, context, 3, 4, width // 4)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(found.transpose(1, 2).reshape(batch, context, width))


def network(tiny: bool) -> nn.Sequential:
    """Bytes in, logits of the next byte out."""
    width, depth, count = (32, 2, 4) if tiny else (192, 6, 8)
    blocks = [layer for _ in range(depth) for layer in (Attention(width), Experts(width, count))]
    return nn.Sequential(nn.Embedding(256, width), *blocks, nn.Linear(width, 256))


def next_byte(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over all places."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(argv: list[str] | None = None) -> list[float]:
    """Train, and return the losses."""
    args = options(__doc__, 100).parse_args(argv)
    torch.manual_seed(0)
    net = network(args.tiny)
    model = net if args.reference else harmony.Harmony(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data, losses = text(), []
    for step in range(args.steps):
        ids = windows(data, 33 if args.tiny else 129, 8, seed=step)
        loss = next_byte(model(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step:3d}  loss {losses[-1]:.5f}")
    return losses


if __name__ == "__main__":
    main()
