"""Notes which Python runs while a forward is recorded: what it may have read from outside.

A profile function hears of every call. Of each function of the user, of libraries and of
``torch.nn.modules`` it keeps the code, whose names say which globals and attributes were read;
what torch does beneath those reads only arguments. Calls of C functions whose result depends on
something that nobody can look up again, such as the clock, are noted too.
"""

from __future__ import annotations

import dis
import functools
import gc
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, ParamSpec, TypeVar

import torch

from harmony.core.files import PACKAGE

_TORCH = str(Path(torch.__file__).parent) + os.sep
_READING = tuple(f"{_TORCH}nn{os.sep}{part}{os.sep}" for part in ("modules", "utils"))
_OWN = str(PACKAGE) + os.sep
_CLOCKS = frozenset({"time", "datetime", "_datetime"})
_NOW = frozenset({"now", "today", "utcnow"})
_FILES = frozenset({"open", "stat", "lstat", "listdir", "scandir", "access", "urandom", "getcwd"})
# Wherever they are: an environment's, the user's (pip install --user), a folder (--target).
_PACKAGES = tuple(os.sep + name + os.sep for name in ("site-packages", "dist-packages"))
_GLOBAL_OPS = frozenset(n for n in dis.opname if "GLOBAL" in n or n in ("LOAD_NAME", "STORE_NAME"))
_BY_TEXT = frozenset({"globals", "vars", "eval", "exec", "modules", "import_module", "__import__"})
_BY_TEXT |= {"__globals__", "__dict__", "f_globals"}
P = ParamSpec("P")
R = TypeVar("R")
_HEARS = "observing.<locals>.hear"

_PYTHONS = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))
_MACHINERY_FILES = ("/contextlib.py", "/functools.py", "/threading.py", "/abc.py", "/typing.py")


@dataclass
class Observed:
    """The Python that ran.

    Attributes:
        codes: of the functions that were called, with their globals.
        unguardable: what was read that no guard can look at, and by which line.
    """

    codes: dict[CodeType, dict[str, Any]] = field(default_factory=dict)
    unguardable: dict[str, str] = field(default_factory=dict)

    def names(self, of_torch: bool = True) -> frozenset[str]:
        """Names of attributes and globals in that code, also where they are given as texts.

        Args:
            of_torch: whether those in PyTorch's own code count.
        """
        found: set[str] = set()
        for code in self.codes:
            if not of_torch and code.co_filename.startswith(_TORCH):
                continue
            found.update(code.co_names)
            found.update(c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
        return frozenset(found)

    def merged(self, other: Observed) -> Observed:
        """Return what ran in either."""
        return Observed({**self.codes, **other.codes}, {**self.unguardable, **other.unguardable})


@contextmanager
def observing() -> Iterator[Observed]:
    """Note what runs on this thread inside the block."""
    observed = Observed()
    codes = observed.codes
    skipped: set[CodeType] = set()

    def hear(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code in codes or code in skipped:
                return
            if is_read(code):
                codes[code] = frame.f_globals
            else:
                skipped.add(code)
        elif event == "c_call" and frame.f_code in codes:
            why = _hidden_source(arg)
            if why is not None:
                where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                observed.unguardable.setdefault(why, where)

    before, collects = sys.getprofile(), gc.isenabled()
    # A collection would run callbacks and finalizers that are no part of what is observed.
    gc.disable()
    sys.setprofile(hear)
    try:
        yield observed
    finally:
        sys.setprofile(before if callable(before) else None)
        if before is not None and not callable(before):  # cProfile's, which is no function
            before.enable()
        if collects:
            gc.enable()


def unobserved(run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run what is torch's own, unheard by `observing`: to hear every call takes as long again."""
    heard = sys.getprofile()
    if getattr(heard, "__qualname__", "") != _HEARS:
        return run(*args, **kwargs)
    sys.setprofile(None)
    try:
        return run(*args, **kwargs)
    finally:
        sys.setprofile(heard)


@functools.lru_cache(maxsize=4096)
def global_names(code: CodeType) -> tuple[str, ...]:
    """Return the globals that code reads or writes.

    ``co_names`` also has the attributes that it asks for: a script's loop may call ``out`` what
    the forward knows as ``self.out``.
    """
    found = {i.argval: None for i in dis.get_instructions(code) if i.opname in _GLOBAL_OPS}
    return tuple(found)


def reads_by_text(code: CodeType) -> bool:
    """Whether code may read a global by a text: ``globals()["gain"]``, `sys.modules`, `eval`."""
    return not code.co_filename.startswith(_TORCH) and not _BY_TEXT.isdisjoint(code.co_names)


def is_read(code: CodeType) -> bool:
    """Whether the names in a function's code tell what the forward reads from outside."""
    filename = code.co_filename
    if filename.startswith(_TORCH):
        return filename.startswith(_READING)
    if filename.startswith(_OWN) or filename.endswith(_MACHINERY_FILES):
        return False
    return not filename.startswith("<frozen importlib") and code.co_name != "<module>"


def is_machinery(code: CodeType) -> bool:
    """Whether a function is of torch or of Python: what a recording itself calls is, too."""
    filename = code.co_filename
    pythons = filename.startswith(_PYTHONS) and "-packages" not in filename
    made = filename.startswith("<frozen") or (filename, code.co_name) == ("<string>", "__init__")
    return pythons or made or filename.startswith(_TORCH)


def is_users(code: CodeType) -> bool:
    """Whether a function is of the program, not of Python, torch or an installed library."""
    filename = code.co_filename
    installed = filename.startswith(_PYTHONS) or any(part in filename for part in _PACKAGES)
    return is_read(code) and not installed


def _hidden_source(function: Any) -> str | None:
    """What a C function reads that cannot be looked up again; None if it reads arguments only."""
    name = getattr(function, "__name__", "")
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or getattr(owner, "__module__", None)
    if module in _CLOCKS and (module == "time" or name in _NOW):
        return f"the clock ({name})"
    if name in _FILES and module in ("io", "_io", "posix", "nt"):
        return f"the file system ({name})"
    return None
