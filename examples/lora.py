"""Adapters (LoRA) with PEFT, on the model that train_lm.py has made.

    harmony-run examples/train_lm.py --output runs/lm
    harmony-run examples/lora.py --model runs/lm

The weights stay frozen, in bf16 with `--bf16`; the adapter learns another text, Python's own
source. `--model` may be any causal language model whose vocabulary has the 256 bytes.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import peft
import torch
import transformers
from data import options, windows

import harmony


def source() -> torch.Tensor:
    """The bytes of some modules of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    joined = b"".join(path.read_bytes() for path in sorted(folder.glob("a*.py")))
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def main(argv: list[str] | None = None) -> list[float]:
    """Train the adapter, save it, and return the losses."""
    parser = options(__doc__, 100)
    parser.add_argument("--model", default="runs/lm")
    parser.add_argument("--output", default="runs/adapter")
    parser.add_argument("--bf16", action="store_true", help="frozen weights of 2 bytes")
    args = parser.parse_args(argv)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    net = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(net, lora)
    model = adapted if args.reference else harmony.Harmony(adapted)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    data, losses = source(), []
    for step in range(args.steps):
        ids = windows(data, net.config.max_position_embeddings, 8, seed=step)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step:3d}  loss {losses[-1]:.5f}")
    model.save_pretrained(args.output)
    return losses


if __name__ == "__main__":
    main()
