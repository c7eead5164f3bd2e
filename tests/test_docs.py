"""What the documents refer to exists."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").rglob("*.md")]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
COMMAND = re.compile(r"^\$? *(\./)?((?:scripts|\.ci)/[\w.-]+)", re.MULTILINE)


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_links_to_files_resolve(path: Path) -> None:
    for target, _ in LINK.findall(path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_commands_exist_and_can_be_run(path: Path) -> None:
    for _, command in COMMAND.findall(path.read_text(encoding="utf-8")):
        assert os.access(ROOT / command, os.X_OK), f"{path.name} names {command}"


def test_the_readme_has_its_two_commands_and_the_main_job() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    main_job = "harmony-run examples/pretrain_gpt.py --gpus 4"
    for command in ("scripts/demo", "scripts/test", main_job):
        assert command in text


def test_the_python_examples_of_the_readme_compile() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_every_script_says_what_it_is() -> None:
    for path in sorted((ROOT / "scripts").iterdir()):
        if path.is_file() and path.suffix in ("", ".py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            about = lines[1] if lines[0].startswith("#!") else lines[0]
            assert about.startswith(('"""', "# ")), f"{path.name} has no first line of purpose"
