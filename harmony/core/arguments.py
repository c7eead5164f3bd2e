"""Arguments that a public function does not have, refused by name with the nearest that it has."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from harmony.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")


def named_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Let a call with arguments that ``function`` does not take raise `ArgumentError`.

    Python raises a plain TypeError there. The signature is shown as it is written.
    """
    signature = inspect.signature(function)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds, "it takes any name"
    names = frozenset(signature.parameters)
    most = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    least = sum(p.default is inspect.Parameter.empty for p in signature.parameters.values())

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = len(args) + len(kwargs)
        if len(args) > most or given < least or not names.issuperset(kwargs):
            _refuse(function, signature, args, kwargs)
        return function(*args, **kwargs)

    return checked


def _refuse(
    function: Callable[..., object],
    signature: inspect.Signature,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    """Say what is wrong with the arguments of a call.

    Raises:
        ArgumentError: with the names that there are.
    """
    taken = [name for name in signature.parameters if name != "self"]
    name = function.__qualname__.removesuffix(".__init__")
    unknown = [key for key in kwargs if key not in taken]
    if unknown:
        close = difflib.get_close_matches(unknown[0], taken, n=1)
        hint = f"did you mean {close[0]}=? " if close else ""
        why = f"there is no argument {unknown[0]}=; {hint}"
    else:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            why = f"{error}. "
        else:
            return
    raise ArgumentError(f"{name}: {why}It takes {', '.join(taken)}") from None
