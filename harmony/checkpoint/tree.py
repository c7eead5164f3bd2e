"""Python values as JSON and tensors: nothing that is read can run code.

JSON's own values stand for themselves; everything else is an object with one key that names its
kind, ``{"tuple": [...]}`` for instance.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from harmony.core.files import DAMAGED, MOST, MOST_DIGITS
from harmony.errors import ConfigError, printable

_DTYPES = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
_MAPPINGS: dict[str, Callable[[list[tuple[Any, Any]]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
}
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Size": torch.Size,
}


def encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return what JSON can hold of a value; its tensors, no copies, are added to ``tensors``.

    Raises:
        ConfigError: naming what a checkpoint cannot hold.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if len(str(abs(value))) <= MOST_DIGITS else {"int": str(value)}
    if kind is float:
        return value if math.isfinite(value) and abs(value) <= MOST else {"float": value.hex()}
    if kind is str:
        return value if printable(value) == value else {"text": value.encode().hex()}
    if kind is list:
        return [encode(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]
    if kind in (dict, OrderedDict, Counter):
        return {
            kind.__name__: [
                [encode(key, f"key of {path}", tensors), encode(item, f"{path}.{key}", tensors)]
                for key, item in value.items()
            ]
        }
    if kind in (tuple, set, frozenset, torch.Size):
        items = list(value) if kind in (tuple, torch.Size) else sorted(value, key=repr)
        return {kind.__name__: [encode(x, f"{path}[{i}]", tensors) for i, x in enumerate(items)]}
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        tensors[path] = value
        return {"tensor": path}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is torch.dtype:
        return {"dtype": str(value)}
    of_numpy = kind.__module__ == "numpy" and hasattr(value, "dtype")
    if of_numpy and value.dtype.kind in "biufc":
        shape = list(value.shape) if kind.__name__ == "ndarray" else None
        return {"array": [value.dtype.str, shape, value.tobytes().hex()]}
    raise ConfigError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint does not hold: "
        "reading it back could run code. Keep numbers, texts, tensors, and lists and dictionaries "
        "of these"
    )


def decode(data: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    """Return the value that `encode` was given.

    Args:
        tensor: returns a tensor by its path.

    Raises:
        ConfigError: if it is nothing that `encode` returns.
    """
    try:
        return _decoded(data, tensor)
    except (RecursionError, *DAMAGED) as error:
        raise ConfigError(f"it holds no value of a checkpoint ({error})") from None


def _decoded(data: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    if isinstance(data, list):
        return [_decoded(item, tensor) for item in data]
    if not isinstance(data, Mapping):
        return data
    ((kind, held),) = data.items()
    if kind in _MAPPINGS:
        return _MAPPINGS[kind]([(_decoded(k, tensor), _decoded(v, tensor)) for k, v in held])
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([_decoded(item, tensor) for item in held])
    if kind == "array":
        return _array(*held)
    simple: dict[str, Callable[[Any], Any]] = {
        "tensor": tensor,
        "int": int,
        "float": float.fromhex,
        "text": lambda text: bytes.fromhex(text).decode(),
        "bytes": bytes.fromhex,
        "complex": lambda parts: complex(*map(float.fromhex, parts)),
        "dtype": _DTYPES.__getitem__,
    }
    return simple[kind](held)


def _array(dtype: str, shape: list[int] | None, entries: str) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        raise ValueError("it holds an array of NumPy, which is not imported")
    flat = numpy.frombuffer(bytes.fromhex(entries), dtype=dtype)
    return flat[0] if shape is None else flat.reshape(shape).copy()
