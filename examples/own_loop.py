"""A loop of your own that saves, ends when it is asked to, and goes on with the same bits.

    harmony-run examples/own_loop.py --output runs/own --steps 100
    (Ctrl-C or kill it, and start it again: it goes on)

Schedule, clipping, validation, and the best loss so far are kept in the checkpoint, too.
"""

from __future__ import annotations

import torch
from data import options, text, windows
from mixture_of_experts import network, next_byte

import harmony


def main(argv: list[str] | None = None) -> list[float]:
    """Train from where it was left, and return the losses of these steps."""
    parser = options(__doc__, 100)
    parser.add_argument("--output", default="runs/own")
    parser.add_argument("--every", type=int, default=20, help="steps from save to save")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    net = network(args.tiny)
    model = net if args.reference else harmony.Harmony(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    data, context = text(), 33 if args.tiny else 129
    held = windows(data[-20_000:], context, 16, seed=0)

    def train(step: int) -> float:
        ids = windows(data[:-20_000], context, 8, seed=step)
        loss = next_byte(model(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        print(f"step {step:3d}  loss {loss.item():.5f}")
        return loss.item()

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            found = next_byte(model(held[:, :-1]), held[:, 1:]).item()
        model.train()
        return found

    if args.reference:
        return [train(step) for step in range(args.steps)]
    losses = []
    every = args.every
    with harmony.Run(
        model, args.output, every=every, keep=2, optimizer=optimizer, schedule=schedule
    ) as run:
        for step in range(run.resume(), args.steps):
            losses.append(train(step))
            if (step + 1) % every == 0:
                run.extra["best"] = min(run.extra.get("best", float("inf")), validate())
                print(f"best loss on other text so far {run.extra['best']:.5f}")
            run.step()
    return losses


if __name__ == "__main__":
    main()
