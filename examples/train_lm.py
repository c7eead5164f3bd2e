"""A language model with Hugging Face's Trainer, that can be stopped and goes on.

    harmony-run examples/train_lm.py --output runs/lm
    harmony-run examples/train_lm.py --output runs/lm --steps 400 --go-on

One line is Harmony's. Needs `pip install 'harmony-train[hf]'`.
"""

from __future__ import annotations

import transformers
from data import options, text, windows

import harmony


def config(tiny: bool) -> transformers.LlamaConfig:
    """A Llama that reads bytes."""
    width, layers, context = (32, 2, 32) if tiny else (256, 8, 256)
    return transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )


def main(argv: list[str] | None = None) -> list[float]:
    """Train, save, and return the losses."""
    parser = options(__doc__, 200)
    parser.add_argument("--output", default="runs/lm")
    parser.add_argument("--go-on", action="store_true", help="from the newest save in --output")
    args = parser.parse_args(argv)
    transformers.set_seed(0)
    net = transformers.LlamaForCausalLM(config(args.tiny))
    rows = windows(text(), net.config.max_position_embeddings, 8 * 500, seed=0)
    trainer = transformers.Trainer(
        model=net if args.reference else harmony.Harmony(net),
        args=transformers.TrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1 if args.tiny else 10,
            save_steps=2 if args.tiny else 50,
            report_to=[],
            use_cpu=args.reference,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    trainer.train(resume_from_checkpoint=args.go_on)
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
