"""Files that people give us and that we write: read within bounds, written whole, or one error.

What comes from a file is text and numbers of somebody's: it may be cut off, nested without end,
hold infinities, or control characters for a terminal. All of that ends here, so that the rest of
the program sees values of the types that it declares.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import secrets
import tempfile
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from harmony.errors import ConfigError, HarmonyError, PlanError, printable

PACKAGE = Path(__file__).parents[1]
"""The folder of Harmony's own code: frames of these files are not the user's."""

MOST_NBYTES = 1 << 28
"""The most bytes of a text that are read: plans of thousands of layers have some megabytes."""

MOST = 1e30
"""Of any number: more than there are operations in a year of training, and sums stay finite."""

MOST_DIGITS = 18
"""Of a whole number: more than any memory has bytes, and it fits 64 bits."""


def cache_folder() -> Path:
    """Where everything is kept that is made once: measurements, the virtual GPU's library.

    ``$HARMONY_CACHE``, else ``harmony`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.
    """
    chosen = os.environ.get("HARMONY_CACHE", "")
    if chosen:
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of XDG has relative paths ignored.
    if base and Path(base).is_absolute():
        return Path(base) / "harmony"
    try:
        return Path.home() / ".cache" / "harmony"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"harmony-{os.getuid()}"


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no text, or too long.
    """
    with path.open("rb") as file:
        data = file.read(MOST_NBYTES + 1)
    if len(data) > MOST_NBYTES:
        raise ValueError(f"it has more than {MOST_NBYTES} bytes")
    return data.decode("utf-8")


def parse_json(text: str) -> Any:
    """Return what JSON says, if its numbers are finite and its texts can be shown.

    Raises:
        ValueError: if it is no such JSON, and why.
    """
    try:
        found = json.loads(
            text, parse_constant=_no_number, parse_float=_finite, parse_int=_bounded
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    left = [found]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
        elif isinstance(item, str) and printable(item) != item:
            raise ValueError(f"it holds control characters ({printable(item)[:40]!r})")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) <= MOST:
        raise ValueError(f"{text[:40]} is too large")
    return value


def _bounded(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        what: the file holds, for errors.

    Raises:
        ConfigError: if there is no such file, or it cannot be read.
        PlanError: if it holds no JSON object.
    """
    try:
        data = parse_json(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"no such {what}: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the {what} {path}: {error}") from None
    except ValueError as error:
        raise PlanError(f"{path}: it is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path}: it is not a {what}")
    return data


def write_json(data: object, path: Path, what: str) -> None:
    """Write JSON to a file, as `write_text`.

    Raises:
        ConfigError, HarmonyError: as `write_text`.
    """
    write_text(json.dumps(data, indent=1) + "\n", path, what)


def write_text(text: str, path: Path, what: str) -> None:
    """Write a text to a file by way of a neighbour, so that nobody ever sees half of it.

    What is no ordinary file (a pipe, ``/dev/stdout``) is written to, not replaced. The neighbour
    is a new file of an unforeseeable name: nobody can have laid a link in its place.

    Raises:
        ConfigError: if it cannot be written there.
        HarmonyError: if it could be, were the disk not full or broken.
    """
    part: Path | None = None
    try:
        if path.is_file() or not path.exists():
            near = path.with_name(f".{path.name[:80]}.{secrets.token_hex(8)}")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(near, flags, 0o666)
            part = near
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            part.replace(path)
        else:
            path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        if part is not None:
            part.unlink(missing_ok=True)
        number = getattr(error, "errno", None)
        failed = number in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        kind = HarmonyError if failed else ConfigError
        raise kind(f"cannot write {what} to {path}: {error}") from None


DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What readers raise of data that is not what they expect."""


def amount(value: object, what: str = "an amount") -> float:
    """Return a number of bytes, seconds or the like.

    Raises:
        ValueError: if it is none, negative, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is {str(value)[:40]!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{what} is {value}")
    return float(value)


def check_types(made: object, hint: Any, trusted: tuple[type, ...] = ()) -> None:
    """Refuse a value that is not what its type says, all fields of dataclasses included.

    Args:
        trusted: classes whose instances are taken as they are.

    Raises:
        TypeError: naming the field.
    """
    wrong = _wrong(made, hint, trusted)
    if wrong is not None:
        where, value = wrong
        raise TypeError(f"{where.strip('.') or 'it'} is {str(value)[:60]!r}")


Wrong = tuple[str, object] | None


def _wrong(value: object, hint: Any, trusted: tuple[type, ...]) -> Wrong:
    """Where a value differs from a type, and what is there; None if it does not."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        found = [_wrong(value, choice, trusted) for choice in args]
        return None if None in found else found[0]
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in args)
        return None if fits else ("", value)
    if origin is tuple:
        return _wrong_items(value, args, trusted)
    if hint is Any:
        return None
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return "", value
        wrongs = (
            _wrong(key, args[0], trusted) or _wrong(item, args[1], trusted)
            for key, item in value.items()
        )
        return next(filter(None, wrongs), None)
    return _wrong_plain(value, hint, trusted)


def _wrong_items(value: object, args: tuple[Any, ...], trusted: tuple[type, ...]) -> Wrong:
    if not isinstance(value, tuple):
        return "", value
    kinds = args[:1] * len(value) if args[1:] == (...,) else args
    if len(kinds) != len(value):
        return "", value
    for index, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        wrong = _wrong(item, kind, trusted)
        if wrong is not None:
            return f"[{index}]{wrong[0]}", wrong[1]
    return None


def _wrong_plain(value: object, hint: Any, trusted: tuple[type, ...]) -> Wrong:
    if hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if fits and math.isfinite(value) else ("", value)  # type: ignore[arg-type]
    kind = NoneType if hint is None else hint
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return "", value
    if isinstance(value, Enum) or not dataclasses.is_dataclass(value) or kind in trusted:
        return None
    for name, field in _fields_of(type(value)).items():  # type: ignore[arg-type]
        wrong = _wrong(getattr(value, name), field, trusted)
        if wrong is not None:
            return f".{name}{wrong[0]}", wrong[1]
    return None


@cache
def _fields_of(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
