"""Pretrain a byte-level GPT on text that every machine has: Python's own standard library.

    harmony-run examples/pretrain_gpt.py --gpus 4          # Harmony, on real or virtual GPUs
    python examples/pretrain_gpt.py --reference            # plain PyTorch, the same losses

At the default size its weights, gradients and AdamW states take 770 MiB: three times the memory
of four virtual GPUs of 64 MiB together.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import harmony

VOCABULARY = 256
Batch = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """A pre-norm transformer block: causal attention, then an MLP four times as wide."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, context, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = self.out(attended.transpose(1, 2).reshape(batch, context, width))
        x = x + F.dropout(attended, self.dropout, self.training)
        hidden = self.down(F.gelu(self.up(self.norm2(x))))
        return x + F.dropout(hidden, self.dropout, self.training)


class GPT(nn.Module):
    """Bytes in, logits of the next byte out; the head shares the embedding's weights if tied."""

    def __init__(
        self, width: int, depth: int, heads: int, context: int, dropout: float, *, tied: bool
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(self._init)
        for block in self.blocks:
            assert isinstance(block, Block)
            for last in (block.out, block.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * depth))
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def make_model(
    width: int = 512,
    depth: int = 16,
    heads: int = 8,
    context: int = 64,
    dropout: float = 0.1,
    seed: int = 0,
    *,
    tied: bool = True,
) -> GPT:
    """Make the model with weights that depend on ``seed`` only."""
    torch.manual_seed(seed)
    return GPT(width, depth, heads, context, dropout, tied=tied)


def load_text() -> torch.Tensor:
    """Load the source files of the standard library's top folder as bytes, one after another."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def batches(steps: int, batch: int, context: int, seed: int = 0) -> Iterator[Batch]:
    """Yield a minibatch a step: bytes at random places of the text, and the bytes that follow."""
    text = load_text().long()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - context - 1, (batch,), generator=generator)
        rows = torch.stack([text[at : at + context + 1] for at in starts.tolist()])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of a microbatch's bytes."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(args: argparse.Namespace) -> None:
    """Train with Harmony."""
    model = harmony.Harmony(
        model_of(args),
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": args.lr, "fused": True},
        loss_fn=loss_fn,
        microbatch_size=args.microbatch,
        seed=args.seed,
    )
    for step, (inputs, targets) in enumerate(data_of(args)):
        loss = model.train_step(inputs, targets)
        print(f"step {step:3d}  loss {loss.item():.5f}", flush=True)


def train_reference(args: argparse.Namespace) -> None:
    """Train with plain PyTorch, on the same microbatches with the same random numbers."""
    model = model_of(args)
    if args.device.startswith("vgpu"):
        harmony.virtual_gpus(count=1, memory=args.memory)
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    for step, (inputs, targets) in enumerate(data_of(args)):
        optimizer.zero_grad()
        total = torch.zeros(())
        for index, at in enumerate(range(0, args.batch, args.microbatch)):
            torch.manual_seed(harmony.microbatch_seed(step, index, seed=args.seed))
            rows = slice(at, at + args.microbatch)
            x, y = inputs[rows].to(args.device), targets[rows].to(args.device)
            share = len(x) / args.batch
            loss = loss_fn(model(x), y)
            (loss * share).backward()
            total += loss.detach().cpu() * share
        optimizer.step()
        print(f"step {step:3d}  loss {total.item():.5f}", flush=True)


def model_of(args: argparse.Namespace) -> GPT:
    """Make the model that the command line describes."""
    sizes = (args.width, args.depth, args.heads, args.context)
    return make_model(*sizes, args.dropout, args.seed, tied=not args.untied)


def data_of(args: argparse.Namespace) -> Iterator[Batch]:
    """Yield the minibatches that the command line describes."""
    return batches(args.steps, args.batch, args.context, args.seed)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=20)
    add("--width", type=int, default=512)
    add("--depth", type=int, default=16, help="number of blocks")
    add("--heads", type=int, default=8)
    add("--context", type=int, default=64, help="bytes of a sample")
    add("--batch", type=int, default=8, help="samples of a step")
    add("--microbatch", type=int, default=2, help="samples that go through the model together")
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=1e-4)
    add("--seed", type=int, default=0)
    add("--untied", action="store_true", help="give the head weights of its own")
    add("--reference", action="store_true", help="plain PyTorch instead of Harmony")
    add("--device", default="cpu", help="where the reference runs: cpu, cuda or vgpu:0")
    add("--memory", default="64MiB", help="memory of the reference's virtual GPU")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    if arguments.reference:
        train_reference(arguments)
    else:
        train(arguments)
