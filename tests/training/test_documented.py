"""What the pages for users say is run: blocks in their order, commands as a shell would."""

from __future__ import annotations

import contextlib
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
from tests import devices
from tests.training.conftest import VirtualGPUs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:<!-- file: (\S+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
PAGES = ("index", "how-to", "how-to-models", "coming-from", "checkpoints", "precision", "servers")
"""Pages whose sections run by themselves; `getting-started` is followed from top to bottom, and
`integrations` is run by tests/integrations."""

LLAMA = (
    '{"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,'
    ' "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}'
)
"""In the place of the presets, whose billions of parameters take long to count."""

SCRIPT = """
import torch
import harmony

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
loss_fn = torch.nn.functional.cross_entropy
model = harmony.Harmony(net, optimizer=torch.optim.SGD, loss_fn=loss_fn)
with harmony.Run(model) as run:
    for step in range(run.resume(), 2):
        model.train_step(torch.randn(4, 8), torch.arange(4) % 2)
        run.step()
"""


def sections(page: str) -> dict[str, str]:
    """The text below each heading of the second level; that above them has no name."""
    found = re.split(r"^## (.+?)\n", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.M)
    return {"": found[0], **dict(zip(found[1::2], found[2::2], strict=True))}


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """The file that a block is, if any; its language; what it says."""
    yield from BLOCK.findall(text)


def commands(text: str) -> Iterator[list[str]]:
    for _, language, said in blocks(text):
        if language == "console":
            yield from (shlex.split(line)[2:] for line in said.splitlines() if line[:2] == "$ ")


SECTIONS = [
    (page, title)
    for page in PAGES
    for title, text in sections(page).items()
    if "```python" in text
]
COMMANDS = [
    (path.stem, words)
    for path in sorted(DOCS.glob("*.md"))
    if path.stem != "getting-started"
    for words in commands(path.read_text(encoding="utf-8"))
    if "--config" not in words
]


def run(words: list[str], folder: Path) -> None:
    line = [sys.executable, "-m", "harmony", *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def write_files(text: str, folder: Path) -> None:
    for name, _, said in blocks(text):
        if name:
            (folder / name).write_text(said)


def test_pages_with_code_are_among_those_that_run() -> None:
    elsewhere = {"getting-started", "integrations"}
    found = {path.stem for path in DOCS.glob("*.md") if "```python" in path.read_text()}
    assert found - elsewhere - set(PAGES) <= {"virtual-gpu"}, "whose block is a session's"


@devices.virtual_only("its processes set them up")
def test_the_first_page_can_be_followed(
    vgpus: VirtualGPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    page = (DOCS / "getting-started.md").read_text(encoding="utf-8")
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


def given_names(text: str, folder: Path) -> dict[str, Any]:
    """What the blocks of a section may use without having made it."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(24, 16), torch.arange(24) % 4)
    names: dict[str, Any] = {
        "dataset": data,
        "harmony": harmony,
        "loader": torch.utils.data.DataLoader(data, 8),
        "loss_fn": torch.nn.functional.cross_entropy,
        "net": torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 4)
        ),
        "torch": torch,
    }
    for library in ("transformers", "peft", "diffusers"):
        if f"{library}." in text:
            names[library] = pytest.importorskip(library)
    if "token_batches" in text:
        from tests.integrations.common import saved_language_model, texts

        saved_language_model(folder / "checkpoint")
        rows = torch.stack([row["input_ids"] for row in texts(6)])
        names["folder"] = str(folder / "checkpoint")
        names["token_batches"] = [
            {"input_ids": part, "labels": part.clone()} for part in rows.split(2)
        ]
    return names


@pytest.mark.parametrize(("page", "title"), SECTIONS)
def test_what_a_section_says_runs(
    vgpus: VirtualGPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, title: str
) -> None:
    vgpus(count=2, memory="16MiB")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # as torchrun does
        monkeypatch.setenv(name, {"RANK": "0", "WORLD_SIZE": "1"}.get(name, "localhost"))
    monkeypatch.setenv("MASTER_PORT", "0")
    text = sections(page)[title]
    names = given_names(text, tmp_path)
    code = [said for _, language, said in blocks(text) if language == "python"]
    for said in code:
        exec(compile(said, f"{page}.md: {title}", "exec"), names)
    if title != "Compare with plain PyTorch" and "model" in names:
        trains = any(word in said for said in code for word in ("train_step", ".backward("))
        assert (names["model"].num_steps > 0) == trains, "Harmony has run it"


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: " ".join(value[:3]))
def test_what_a_page_types_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, words: list[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "config.json").write_text(LLAMA)
    model = words.index("--model") + 1 if "--model" in words else None
    words = ["config.json" if at == model else word for at, word in enumerate(words)]
    words = ["16" if at and words[at - 1] == "--tokens" else word for at, word in enumerate(words)]
    with contextlib.suppress(SystemExit):
        assert cli.main(words) in ((0, 1) if words[0] == "doctor" else (0,))


def test_options_in_a_file_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_set_up_gpus", lambda options, progress: None)
    monkeypatch.setattr(sys, "path", ["replaced", *sys.path])
    monkeypatch.chdir(tmp_path)
    text = sections("how-to")["Keep options in a file"]
    write_files(text, tmp_path)
    package = tmp_path / "package"
    package.mkdir()
    (package / "train.py").write_text(
        "import torch\nfrom harmony.core.options import current_options\n"
        "assert current_options().gpus == 2 and torch.initial_seed() == 1\n"
    )
    (words,) = commands(text)
    assert cli.main(words) == 0
