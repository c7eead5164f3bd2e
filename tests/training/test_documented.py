"""What the pages for users say is run: blocks in their order, commands as a shell would."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import harmony
from harmony.cli import main as cli
from tests.training.conftest import VirtualGPUs

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?:<!-- file: (\S+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
HOW_TO = (ROOT / "docs" / "how-to.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", HOW_TO, re.DOTALL | re.MULTILINE))
LLAMA = (
    '{"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,'
    ' "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}'
)
"""In the place of the preset, whose 7 billion parameters take long to count."""


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """The file that a block is, if any; its language; what it says."""
    yield from BLOCK.findall(text)


def commands(text: str) -> Iterator[list[str]]:
    for _, language, said in blocks(text):
        if language == "console":
            yield from (shlex.split(line)[2:] for line in said.splitlines() if line[:2] == "$ ")


def run(words: list[str], folder: Path) -> None:
    line = [sys.executable, "-m", "harmony", *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def write_files(text: str, folder: Path) -> None:
    for name, _, said in blocks(text):
        if name:
            (folder / name).write_text(said)


def test_the_first_page_can_be_followed(
    vgpus: VirtualGPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    write_files(page, tmp_path)
    vgpus(count=2)
    names: dict[str, Any] = {}
    for _, language, said in blocks(page):
        if language == "python":
            exec(compile(said, "getting-started.md", "exec"), names)
            assert names["model"].num_steps == 5
    given = list(commands(page))
    assert [words[0] for words in given] == ["train.py", "--verify", "plan"]
    for words in given[:2]:
        run(words, tmp_path)
    assert "gpu0.compute" in (tmp_path / "report.html").read_text(encoding="utf-8")
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(LLAMA)
    assert given[2][2] == "llama-7b"
    assert cli.main(["config.json" if word == "llama-7b" else word for word in given[2]]) == 0
    assert (tmp_path / "plan.html").exists()


@pytest.mark.parametrize("title", [name for name in SECTIONS if "```python" in SECTIONS[name]])
def test_what_a_section_says_runs(
    vgpus: VirtualGPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str
) -> None:
    vgpus(count=2, memory="16MiB")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(24, 16), torch.arange(24) % 4)
    names: dict[str, Any] = {
        "harmony": harmony,
        "loader": torch.utils.data.DataLoader(data, 8),
        "loss_fn": torch.nn.functional.cross_entropy,
        "net": torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 4)
        ),
        "torch": torch,
    }
    for _, language, said in blocks(SECTIONS[title]):
        if language == "python":
            exec(compile(said, f"how-to.md: {title}", "exec"), names)
    trained = 0 if title == "Compare with plain PyTorch" else 3
    assert names["model"].num_steps == trained


def test_options_in_a_file_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_set_up_gpus", lambda options, progress: None)
    monkeypatch.setattr(sys, "path", ["replaced", *sys.path])
    monkeypatch.chdir(tmp_path)
    text = SECTIONS["Keep options in a file"]
    write_files(text, tmp_path)
    package = tmp_path / "package"
    package.mkdir()
    (package / "train.py").write_text(
        "import torch\nfrom harmony.core.options import current_options\n"
        "assert current_options().gpus == 2 and torch.initial_seed() == 1\n"
    )
    (words,) = commands(text)
    assert cli.main(words) == 0
