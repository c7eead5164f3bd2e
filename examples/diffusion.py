"""A diffusion transformer of diffusers that learns to draw digits.

    harmony-run examples/diffusion.py

Any model of diffusers is trained so: a loop of your own, and one line that wraps the model. The
model forgets some labels at random; `seed_microbatch` gives plain PyTorch the same random numbers.
Needs diffusers and scikit-learn.
"""

from __future__ import annotations

import diffusers
import torch
from data import digits, options

import harmony


def transformer(tiny: bool) -> diffusers.DiTTransformer2DModel:
    """A DiT for pictures of 8 x 8 points and ten classes."""
    heads, layers = (2, 2) if tiny else (6, 8)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=16,
        in_channels=1,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        dropout=0.0,
    )


def main(argv: list[str] | None = None) -> list[float]:
    """Train, and return the losses."""
    args = options(__doc__, 300).parse_args(argv)
    torch.manual_seed(0)
    net = transformer(args.tiny)
    noise_steps = diffusers.DDPMScheduler()
    pictures, labels = digits()
    model = net if args.reference else harmony.Harmony(net, seed=0, microbatch_size=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(args.steps):
        chosen = torch.randint(len(pictures), (16,), generator=generator)
        noise = torch.randn(16, 1, 8, 8, generator=generator)
        times = torch.randint(1000, (16,), generator=generator)
        noisy = noise_steps.add_noise(pictures[chosen], noise, times)
        if args.reference:
            harmony.seed_microbatch(step, 0, 0)
        found = model(noisy, timestep=times, class_labels=labels[chosen]).sample[:, :1]
        loss = torch.nn.functional.mse_loss(found, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step:3d}  loss {losses[-1]:.5f}")
    return losses


if __name__ == "__main__":
    main()
