"""The rooms of docs/design.md, section 4, read off the imports of every module."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parents[1] / "harmony"
MODULES = sorted(PACKAGE.rglob("*.py"))

ROOMS = (
    "errors",
    "core",
    "planner",
    "capture",
    "vgpu",
    "runtime",
    "profiling",
    "weights",
    "reference",
    "report",
    "engine",
    "checkpoint",
    "verification",
    "module",
    "integrations",
    "doctor",
    "cli",
)
"""From the bottom to the top: a room imports from itself and from those before it."""

PLANNER_ROOMS = ("ir", "predict", "check", "lower", "search")
"""The same inside the planner."""

RUNTIME_SEES = {"tasks", "schedule", "kinds"}
"""Modules of the planner that the runtime may know: what is to be run, not why."""

CHECKER_SEES = {
    "harmony.planner.ir.tasks",
    "harmony.planner.ir.schedule",
    "harmony.planner.ir.issue",
    "harmony.planner.predict.cost",
}
"""What the checker knows of the planner: data, and the order of issue that its meaning is."""

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


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def module_of(imported: str) -> str | None:
    """The module of the package that an import loads; None if it is of another package."""
    if imported in NAMES:
        return imported
    home = imported.rpartition(".")[0]
    return home if home in NAMES else None


def room_of(name: str) -> int:
    """Height of a module's room; the package itself and ``__main__`` are the roof."""
    parts = name.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] in ROOMS else len(ROOMS)


def test_the_root_has_the_public_face_and_nothing_else() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files == {"__init__", "__main__", "errors", "module"}
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(ROOMS) - files


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_downwards(name: str) -> None:
    mine, planner = room_of(name), name.split(".")[1:2] == ["planner"]
    for imported, line, _ in imports_of(NAMES[name]):
        theirs = module_of(imported)
        if theirs is None or mine == len(ROOMS):
            continue
        assert room_of(theirs) <= mine, f"{name}:{line} imports {imported} of a higher room"
        if planner and theirs.startswith("harmony.planner.") and name.count(".") > 1:
            ours, inner = name.split(".")[2], theirs.split(".")[2]
            order = PLANNER_ROOMS.index(inner) <= PLANNER_ROOMS.index(ours)
            assert order, f"{name}:{line} imports {imported} of a higher room of the planner"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for type checkers count: a circle of types is a circle to the reader."""
    edges = defaultdict(set)
    for name, path in NAMES.items():
        for imported, _, _ in imports_of(path):
            home = module_of(imported)
            if home is not None and home != name:
                edges[name].add(home)
    graph = nx.DiGraph(dict(edges))
    circles = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert circles == []


@pytest.mark.parametrize("name", [n for n in NAMES if room_of(n) <= ROOMS.index("planner")])
def test_data_and_planner_do_without_torch(name: str) -> None:
    for imported, line, _ in imports_of(NAMES[name]):
        assert imported.split(".")[0] != "torch", f"{name}:{line}: imports {imported}"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("harmony.runtime")])
def test_the_runtime_sees_of_the_planner_only_what_is_to_be_run(name: str) -> None:
    for imported, line, _ in imports_of(NAMES[name]):
        parts = imported.split(".")
        if parts[:2] == ["harmony", "planner"]:
            assert parts[2] == "ir" and parts[3] in RUNTIME_SEES, f"{name}:{line}: {imported}"


def test_the_checker_does_not_know_what_it_checks() -> None:
    """All its modules, found by following its imports, see the data of the planner only."""
    start = "harmony.planner.check.verify"
    seen, left = set(), [start]
    while left:
        name = left.pop()
        seen.add(name)
        for imported, line, _ in imports_of(NAMES[name]):
            home = module_of(imported) or ""
            if home.startswith("harmony.planner."):
                allowed = home in CHECKER_SEES or home.startswith("harmony.planner.check.")
                assert allowed, f"{name}:{line}: imports {imported}"
                left += [] if home in CHECKER_SEES or home in seen else [home]
    assert seen >= {name for name in NAMES if name.startswith("harmony.planner.check.")}
    for name in CHECKER_SEES:
        for imported, line, _ in imports_of(NAMES[name]):
            home = module_of(imported) or ""
            is_data = not home.startswith("harmony.planner.") or home in CHECKER_SEES
            assert is_data, f"{name}:{line}: imports {imported}"


def test_planning_needs_no_torch() -> None:
    """Neither does the package itself: what it exports is imported on demand."""
    needed = [n for n, _, types in imports_of(PACKAGE / "__init__.py") if not types]
    assert not any(name.startswith("harmony.") for name in needed)


def test_only_the_faces_print() -> None:
    for name, path in NAMES.items():
        if name in ("harmony.cli.main", "harmony.report.text"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            is_print = isinstance(called, ast.Name) and called.id == "print"
            assert not is_print, f"{path}:{getattr(node, 'lineno', 0)} prints"
