"""The layers of docs/design.md, section 4, read off the imports of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "harmony"
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    "errors": 0,
    "files": 0,
    "units": 0,
    "layergraph": 0,
    "machine": 0,
    "timeline": 0,
    "planner": 1,
    "capture": 2,
    "profiler": 2,
    "machineprofile": 2,
    "updateprofile": 2,
    "ops": 2,
    "runtime": 2,
}
TOP = 3
"""Everything else: the wrapper and the faces."""

RUNTIME_SEES = {"tasks", "schedule", "kinds"}
"""Modules of the planner that the runtime may know: what is to be run, not why."""

Import = tuple[str, int, bool]
"""A module, the line of its import, and whether only type checkers run it."""


def imports_of(path: Path) -> list[Import]:
    """Return all modules that a file imports, with ``from x import y`` as ``x.y``."""
    package = list(path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {id(node) for block in _type_blocks(tree) for node in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, node.lineno, id(node) in for_types) for name in names]
    return found


def _type_blocks(tree: ast.Module) -> Iterator[ast.If]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield node


def layer_of(name: str) -> int:
    parts = name.split(".")
    return LAYERS.get(parts[1], TOP) if len(parts) > 1 else TOP


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_imports_from_a_higher_layer(path: Path) -> None:
    mine = layer_of(name_of(path))
    for name, line, _ in imports_of(path):
        if name.startswith("harmony."):
            theirs = layer_of(name)
            assert theirs <= mine, f"{path}:{line}: L{mine} imports {name} of L{theirs}"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if layer_of(name_of(p)) <= 1], ids=name_of
)
def test_data_and_planner_do_without_torch(path: Path) -> None:
    for name, line, _ in imports_of(path):
        assert name.split(".")[0] != "torch", f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "runtime").rglob("*.py")), ids=name_of)
def test_the_runtime_sees_of_the_planner_only_what_is_to_be_run(path: Path) -> None:
    for name, line, _ in imports_of(path):
        parts = name.split(".")
        if parts[:2] == ["harmony", "planner"]:
            assert parts[2] in RUNTIME_SEES, f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "planner").glob("verify*.py")), ids=name_of)
def test_the_checker_does_not_know_what_it_checks(path: Path) -> None:
    makers = {"passes", "place", "slots", "stays", "events", "values", "steps", "search"}
    makers |= {"resident", "candidates", "ranking", "trial"}
    for name, line, _ in imports_of(path):
        parts = name.split(".")
        if parts[:2] == ["harmony", "planner"]:
            assert parts[2] not in makers, f"{path}:{line}: imports {name}"


def test_planning_needs_no_torch() -> None:
    """Neither does the package itself: what it exports is imported on demand."""
    needed = [n for n, _, types in imports_of(PACKAGE / "__init__.py") if not types]
    assert not any(name.startswith("harmony.") for name in needed)


def test_only_the_faces_print() -> None:
    for path in MODULES:
        if name_of(path) in ("harmony.cli", "harmony.report"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            is_print = isinstance(called, ast.Name) and called.id == "print"
            assert not is_print, f"{path}:{getattr(node, 'lineno', 0)} prints"
