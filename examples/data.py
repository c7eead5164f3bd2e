"""What the examples train on: real data that Python or a package ships, and their options.

Text is the language reference that Python carries for `help()`; pictures are the 1,797 scanned
digits of scikit-learn; ratings are which file of the standard library imports what.
"""

from __future__ import annotations

import argparse
import ast
import pydoc_data.topics
import sysconfig
from pathlib import Path

import torch


def options(about: str, steps: int) -> argparse.ArgumentParser:
    """The options that all examples have; ``--tiny`` is what the tests run."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU, to see it run")
    parser.add_argument("--reference", action="store_true", help="plain PyTorch, without Harmony")
    return parser


def text() -> torch.Tensor:
    """The bytes of Python's language reference, half a million of them."""
    topics = pydoc_data.topics.topics
    joined = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


def windows(data: torch.Tensor, context: int, count: int, seed: int) -> torch.Tensor:
    """Windows of the text at random places, ``(count, context)``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - context, (count,), generator=generator)
    return torch.stack([data[start : start + context] for start in starts.tolist()])


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of 8 x 8 points from -1 to 1, ``(1797, 1, 8, 8)``, and what they show."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("the pictures are scikit-learn's: pip install scikit-learn") from None
    pictures, labels = load_digits(return_X_y=True)
    scaled = torch.tensor(pictures, dtype=torch.float32) / 8 - 1
    order = torch.randperm(len(scaled), generator=torch.Generator().manual_seed(0))
    return scaled.view(-1, 1, 8, 8)[order], torch.tensor(labels, dtype=torch.long)[order]


def imports() -> tuple[torch.Tensor, int, int]:
    """Which file imports which module: pairs ``(n, 2)``, the number of files and of modules."""
    pairs: list[tuple[int, int]] = []
    modules: dict[str, int] = {}
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for number, path in enumerate(files):
        names = set()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
        pairs += [(number, modules.setdefault(name, len(modules))) for name in sorted(names)]
    return torch.tensor(pairs), len(files), len(modules)
