"""`scripts/mutate`: which changes it makes, which tests it runs, and what it says of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "mutate"


def _loaded() -> ModuleType:
    spec = spec_from_loader("mutate", SourceFileLoader("mutate", str(SCRIPT)))
    module = module_from_spec(spec)
    sys.modules["mutate"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


mutate = _loaded()


def changes(source: str) -> set[str]:
    """The mutants of a source, each as the whole changed text."""
    raw = source.encode()
    return {mutant.applied(raw).decode() for mutant in mutate.mutants_of("x.py", source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b <= c", {"(a <= b <= c)", "(a < b < c)"}),
        ("a is None and b", {"(a is None or b)", "(a is not None) and b"}),
        ("x = a + 1", {"x = (a - 1)", "x = a + 2"}),
        ("x += y", {"x -= y", "pass"}),
        ("x = True", {"x = False"}),
        ("x = 0.0", {"x = 1.0"}),
        ("x = not a", {"x = a"}),
        ("min(a, b)", {"(max(a, b))", "pass"}),
        ("x = a if b else c", {"x = (c if b else a)", "x = a if (not b) else c"}),
        ("if done:\n    f()", {"if (not done):\n    f()", "if done:\n    pass"}),
        ("x = [y for y in z if y]", {"x = [y for y in z if (not y)]"}),
        ("self.x = y", {"pass"}),
        ("for x in y:\n    break", {"for x in y:\n    pass"}),
        ("raise E(1)", {"pass"}),
        ("é = 1", {"é = 2"}),
    ],
)
def test_each_operator_condition_constant_and_statement_is_changed_once(
    source: str, expected: set[str]
) -> None:
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A text."""',
        "x: Pair[1]",
        "@d(1)\nclass A: ...",
        "assert x > 1",
        "x = f'{y + 1}'",
        "if TYPE_CHECKING:\n    x = 1",
        "x = zip(y, strict=True)",
    ],
)
def test_what_does_not_change_a_result_is_left_alone(source: str) -> None:
    assert changes(source) == set()


def test_every_mutant_of_a_real_file_is_python_and_differs() -> None:
    source = SCRIPT.read_bytes()
    same = ast.unparse(ast.parse(source))
    mutants = mutate.mutants_of("mutate", source.decode())
    assert len(mutants) > 100
    for mutant in mutants[::5]:
        assert ast.unparse(ast.parse(mutant.applied(source))) != same, mutant


PROJECT = {
    "harmony/__init__.py": "",
    "harmony/low.py": "def larger(a, b):\n    return a > b\n\n\ndef half(a):\n    return a // 2\n",
    "harmony/loop.py": "def count(n):\n    while n > 0:\n        n -= 1\n    return n\n",
    "harmony/high.py": "from harmony.low import larger\n",
    "tests/test_low.py": "from harmony import low\n\ndef test_a():\n    assert low.larger(2, 1)\n",
    "tests/test_high.py": "from harmony.high import larger\n\ndef test_it():\n    larger(1, 1)\n",
    "tests/test_loop.py": "from harmony import loop\n\ndef test_it():\n    loop.count(2)\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package with its tests under version control, as the script expects to find one."""
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m first"):
        subprocess.run(["git", "-C", tmp_path, *command.split()], check=True)
    return tmp_path


def test_the_tests_nearest_to_a_module_come_first(project: Path) -> None:
    related = mutate.Imports(project).related("harmony/low.py")
    assert related == ["tests/test_low.py", "tests/test_high.py"]
    assert mutate.Imports(project).related("harmony/high.py") == ["tests/test_high.py"]


def test_only_lines_that_changed_are_mutated(project: Path) -> None:
    (project / "harmony" / "low.py").write_text(PROJECT["harmony/low.py"].replace("2", "3"))
    mutants = mutate.changed_since(project, "HEAD")
    assert [mutant.change for mutant in mutants] == ["a // 3 -> (a * 3)", "3 -> 4"]
    assert mutate.chosen(project, "harmony/low.py:5-6") == mutants


def test_a_mutant_is_caught_survives_or_runs_out_of_time(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutate, "ROOT", project)
    copy = tmp_path_factory.mktemp("copy")
    mutate.copy_tree(project, copy)
    bench = mutate.Bench(copy, limit_s=60, test_limit_s=2)

    def verdict(path: str, change: str, *tests: str) -> str:
        mutants = [m for m in mutate.chosen(project, path) if m.change == change]
        return bench.try_out(mutants[0], tests).verdict

    assert verdict("harmony/low.py", "a > b -> (a >= b)", "tests/test_low.py") == "survived"
    assert verdict("harmony/loop.py", "n -= 1 -> n += 1", "tests/test_loop.py") == "undecided"
    assert verdict("harmony/loop.py", "0 -> 1") == "untested"
    (copy / "tests/test_low.py").write_text(
        "from harmony import low\n\ndef test_it():\n    assert not low.larger(1, 1)\n"
    )
    assert verdict("harmony/low.py", "a > b -> (a >= b)", "tests/test_low.py") == "caught"
    # The copy is as it was.
    assert (copy / "harmony/low.py").read_text() == PROJECT["harmony/low.py"]


def test_a_test_that_fails_without_a_change_catches_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "tests/test_low.py").write_text("def test_it():\n    assert False\n")
    bench = mutate.Bench(project, limit_s=60, test_limit_s=20)
    mutant = mutate.chosen(project, "harmony/low.py")[0]
    assert bench.try_out(mutant, ["tests/test_low.py"]).verdict == "untested"
    assert "tests/test_low.py fails: tests/test_low.py::test_it" in capsys.readouterr().out


def test_the_table_lists_what_was_missed_and_counts_all() -> None:
    first, second = mutate.mutants_of("x.py", "y = 1\nz = 2\n")
    text = mutate.table([mutate.Outcome(first, "caught", "t"), mutate.Outcome(second, "survived")])
    assert text == "survived  x.py:2  2 -> 3\n2 mutants: 1 caught, 1 survived"
