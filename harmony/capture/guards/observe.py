"""Notes which Python runs while a forward is recorded: what it may have read from outside.

Every call is heard of. Of each function of the user, of libraries and of ``torch.nn.modules`` the
code is kept, whose names say which globals and attributes were read; what torch does beneath those
reads only arguments. Calls of C functions whose result depends on something that nobody can look
up again, such as the clock, are noted too.
"""

from __future__ import annotations

import dis
import functools
import gc
import os
import sys
import sysconfig
import threading
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
_THREAD = threading.local()  # observed: the innermost; hear: its profile function
_MONITORING: Any = getattr(sys, "monitoring", None)  # of Python 3.12
_TOOL = "harmony"

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
    _skipped: set[CodeType] = field(default_factory=set)

    def hear(self, code: CodeType, frame: FrameType) -> bool:
        """Take in that code is run; return whether it is kept, the first time."""
        if code in self.codes or code in self._skipped:
            return False
        if is_read(code):
            self.codes[code] = frame.f_globals
            return True
        self._skipped.add(code)
        return False

    def hear_c(self, function: Any, frame: FrameType) -> None:
        """Take in that code which is kept calls a function."""
        why = _hidden_source(function)
        if why is not None:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            self.unguardable.setdefault(why, where)

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
    around, _THREAD.observed = getattr(_THREAD, "observed", None), observed
    collects = gc.isenabled()
    # A collection would run callbacks and finalizers that are no part of what is observed.
    gc.disable()
    listening = _monitoring if _MONITORING is not None and _tool() is not None else _profiling
    try:
        with listening(observed, around):
            yield observed
    finally:
        _THREAD.observed = around
        if collects:
            gc.enable()


@contextmanager
def _profiling(observed: Observed, _: Observed | None) -> Iterator[None]:
    """Listen by a profile function, which hears every call; what is `unheard` switches it off."""

    def hear(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            observed.hear(frame.f_code, frame)
        elif event == "c_call" and frame.f_code in observed.codes:
            observed.hear_c(arg, frame)

    before = sys.getprofile()
    around, _THREAD.hear = getattr(_THREAD, "hear", None), hear
    sys.setprofile(hear)
    try:
        yield
    finally:
        _THREAD.hear = around
        sys.setprofile(before if callable(before) else None)
        if before is not None and not callable(before):  # cProfile's, which is no function
            before.enable()


@contextmanager
def _monitoring(observed: Observed, around: Observed | None) -> Iterator[None]:
    """Listen by ``sys.monitoring`` (Python 3.12), which hears each code once.

    To switch a profile function off and on has all code instrumented anew there.
    """
    events, tool = _MONITORING.events, _tool()

    def started(code: CodeType, _: int) -> Any:
        listens: Observed | None = getattr(_THREAD, "observed", None)
        if listens is None:  # another thread
            return None
        if listens.hear(code, sys._getframe(1)):
            _MONITORING.set_local_events(tool, code, events.CALL)
        return _MONITORING.DISABLE

    def called(code: CodeType, _: int, function: Any, __: Any) -> None:
        listens: Observed | None = getattr(_THREAD, "observed", None)
        if listens is not None and code in listens.codes:
            listens.hear_c(function, sys._getframe(1))

    heard_of = {events.PY_START: started, events.PY_RESUME: started, events.CALL: called}
    if around is None:
        _MONITORING.use_tool_id(tool, _TOOL)
        for event, function in heard_of.items():
            _MONITORING.register_callback(tool, event, function)
        _MONITORING.set_events(tool, events.PY_START | events.PY_RESUME)
    _MONITORING.restart_events()
    try:
        yield
    finally:
        for code in observed.codes:
            if around is None or code not in around.codes:
                _MONITORING.set_local_events(tool, code, 0)
        if around is None:
            _MONITORING.set_events(tool, 0)
            for event in heard_of:
                _MONITORING.register_callback(tool, event, None)
            _MONITORING.free_tool_id(tool)
        else:
            _MONITORING.restart_events()


def _tool() -> int | None:
    """The number under which nobody else monitors; None if there is none."""
    for number in (4, 3, 2, 5):
        if _MONITORING.get_tool(number) in (None, _TOOL):
            return number
    return None


def unheard(run: Callable[P, R]) -> Callable[P, R]:
    """Let a function run unheard by `observing`: to hear every call takes as long again.

    It is Harmony's own, called from what is observed. What it calls of the user's, `heard` runs.
    """

    @functools.wraps(run)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        hear = sys.getprofile()
        if hear is None or hear is not getattr(_THREAD, "hear", None):
            return run(*args, **kwargs)
        sys.setprofile(None)
        try:
            return run(*args, **kwargs)
        finally:
            sys.setprofile(hear)

    return quiet


def heard(run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call what is not Harmony's own from a function that runs unheard."""
    hear = getattr(_THREAD, "hear", None)
    if hear is None or sys.getprofile() is not None:
        return run(*args, **kwargs)
    sys.setprofile(hear)
    try:
        return run(*args, **kwargs)
    finally:
        sys.setprofile(None)


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
