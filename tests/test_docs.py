"""What the documents refer to exists."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import harmony
import harmony.integrations

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(ROOT.glob("*.md")) + sorted(
    path
    for folder in ("docs", "examples", "harmony", "kernels")
    for path in (ROOT / folder).rglob("*.md")
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


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    names = {f"harmony.{name}" for name in harmony.__all__ if name != "__version__"}
    names |= {f"harmony.integrations.{name}" for name in harmony.integrations.__all__}
    assert sorted(found) == sorted(names)
    for name in found:
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", _typed()), f"{name} is not for tools"


def _typed() -> str:
    """What type checkers and the reference see of the public names: imports that never run."""
    homes = ("harmony/__init__.py", "harmony/integrations/__init__.py")
    texts = [(ROOT / home).read_text(encoding="utf-8") for home in homes]
    return "".join(re.findall(r"if TYPE_CHECKING:\n((?:    .*\n|\n)+)", "".join(texts)))


def _said() -> Iterator[str]:
    """Every text in the code, with ... for what is filled in."""
    for path in sorted((ROOT / "harmony").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "..." for v in node.values]
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(explained) > 30
    said = list(_said())
    for message in explained:
        parts = [part.strip() for part in message.split("...")]
        pattern = re.compile(".*".join(map(re.escape, filter(None, parts))), re.DOTALL)
        assert any(map(pattern.search, said)), f"nothing says: {message}"
