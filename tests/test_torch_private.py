"""Private names of torch that the package uses: each exists in the torch that is installed."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "harmony"


def private_names() -> Iterator[tuple[str, str]]:
    """Pairs of a dotted name under torch with a private part, and where it stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            else:
                continue
            for name in names:
                parts = name.split(".")
                plain = all(part.isidentifier() for part in parts)
                hidden = any(p.startswith("_") and not p.startswith("__") for p in parts)
                if parts[0] == "torch" and plain and hidden:
                    yield name, f"{path.relative_to(PACKAGE)}:{node.lineno}"


NAMES: dict[str, list[str]] = {}
for _name, _where in private_names():
    NAMES.setdefault(_name, []).append(_where)


def resolve(name: str) -> object:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_of_torch_exists(name: str) -> None:
    try:
        resolve(name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{name} is gone ({error}); used in {', '.join(NAMES[name])}")


def test_there_are_such_names() -> None:
    """The scan finds what it is to find: else the test above would pass for nothing."""
    assert len(NAMES) > 20
