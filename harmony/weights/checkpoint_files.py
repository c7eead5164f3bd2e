"""Files of weights, read one tensor at a time: safetensors and torch's, whole or in shards.

Safetensors files are read here and not by the library of that name, which maps the whole file and
hands out copies: this reads straight into the memory where a value is to live.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.autograd.graph import increment_version

from harmony.core.files import DAMAGED, check_types, is_file, is_folder, parse_json, read_json
from harmony.errors import ConfigError, HarmonyError

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_CHUNK_NBYTES = 1 << 24
_MOST_HEADER_NBYTES = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
"""Types of safetensors by their names there."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        fill: copies it into a tensor of its shape, converting to that one's dtype.
        origin: file and name, for errors.
        place: of safetensors: the file, and the byte of it at which the tensor begins.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Callable[[torch.Tensor], None]
    origin: str
    place: tuple[Path, int] = (Path(), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_checkpoint(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint by name; their values stay in the files until filled in.

    Args:
        path: a ``.safetensors`` file, a state dict saved by `torch.save`, an index of shards
            (``.index.json``), or a directory with one of these under the names of Hugging Face.

    Raises:
        ConfigError: if there is no such file, or it is damaged or of another kind.
    """
    try:
        path = Path(path)
    except TypeError:
        raise ConfigError(f"{str(path)[:80]!r} is no path of a file or a folder") from None
    if is_folder(path):
        path = _in_directory(path)
    if not is_file(path):
        raise ConfigError(f"there is no file {str(path)[:400]}")
    if path.suffix == ".json":
        return _shards(path)
    return _one_file(path)


def _in_directory(directory: Path) -> Path:
    for name in _WHOLE:
        for candidate in (directory / name, directory / f"{name}.index.json"):
            if is_file(candidate):
                return candidate
    known = ", ".join(f"{name} or {name}.index.json" for name in _WHOLE)
    raise ConfigError(f"{directory} has none of {known}: give the file itself")


def _shards(index: Path) -> dict[str, StoredTensor]:
    try:
        where: dict[str, str] = read_json(index, "index")["weight_map"]
        check_types(where, dict[str, str])
    except (HarmonyError, *DAMAGED) as error:
        raise ConfigError(f"{index} is not an index of shards ({error})") from None
    files = sorted(set(where.values()))
    away = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if away:
        raise ConfigError(f"{index} names files outside of its folder: {_few(away)}")
    lost = [name for name in files if not is_file(index.parent / name)]
    if lost:
        raise ConfigError(f"{index} names {len(lost)} files that are not there: {_few(lost)}")
    found = {name: _one_file(index.parent / name) for name in files}
    absent = [name for name, file in where.items() if name not in found[file]]
    if absent:
        raise ConfigError(f"{index} names tensors that are in no file: {_few(absent)}")
    return {name: found[file][name] for name, file in where.items()}


def _few(names: list[str]) -> list[str]:
    return [name[:80] for name in names[:4]]


def _one_file(path: Path) -> dict[str, StoredTensor]:
    return _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)


# safetensors: 8 bytes with the length of a JSON header, the header, the bytes of the tensors


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            header, start = _header(file)
            end = os.fstat(file.fileno()).st_size
        header.pop("__metadata__", None)
        return {name: _entry(path, name, header[name], start, end) for name in header}
    except (OSError, *DAMAGED) as error:
        raise ConfigError(
            f"{path} is damaged, or not a safetensors file ({error}): fetch it again"
        ) from None


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= _MOST_HEADER_NBYTES:
        raise ValueError(f"its header has {length} bytes")
    text = file.read(length)
    if len(text) < length:
        raise ValueError(f"it ends inside its header of {length} bytes")
    header = parse_json(text.decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, 8 + length


def _entry(path: Path, name: str, known: Mapping[str, Any], start: int, end: int) -> StoredTensor:
    shape, (low, high) = tuple(known["shape"]), known["data_offsets"]
    check_types((*shape, low, high), tuple[int, ...])
    if min((*shape, 0)) < 0:
        raise ValueError(f"{name} of shape {shape}")
    if known["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of type {known['dtype']}, which is not known")
    dtype = DTYPES[known["dtype"]]
    if not 0 <= low <= high or high - low != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} and type {dtype} has bytes {low} to {high}")
    if start + high > end:
        raise ValueError(f"it has {end} bytes, and {name} would end at {start + high}")
    origin, seen = f"{path} ({name})", _identity(path)

    def fill(target: torch.Tensor) -> None:
        with _reading(origin):
            now = _identity(path)
        if now != seen:
            raise ConfigError(f"{path} has been changed since it was opened")
        with _reading(origin), path.open("rb", buffering=0) as file:
            file.seek(start + low)
            _read_into(file, target, dtype)

    return StoredTensor(shape, dtype, fill, origin, (path, start + low))


@contextmanager
def _reading(origin: str) -> Iterator[None]:
    """Say what it was that could not be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{origin} cannot be read: {error}") from None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read_into(file: BinaryIO, target: torch.Tensor, dtype: torch.dtype) -> None:
    """Read the next bytes of a file as a tensor of this type into ``target``, by chunks."""
    if not target.is_contiguous():
        whole = torch.empty(target.shape, dtype=dtype)
        _read_into(file, whole, dtype)
        target.copy_(whole)
        return
    flat = target.detach().view(-1)
    direct = flat.dtype is dtype and flat.device.type == "cpu"
    step = _CHUNK_NBYTES // dtype.itemsize
    for low in range(0, flat.numel(), step):
        part = flat[low : low + step]
        read = part if direct else torch.empty(part.numel(), dtype=dtype)
        _read_whole(file, read.view(torch.uint8).numpy().data)
        if not direct:
            part.copy_(read)
    if direct and not target.is_inference():
        increment_version(target)  # as `copy_` does: copies of it elsewhere are no longer its own


def _read_whole(file: BinaryIO, into: memoryview) -> None:
    while len(into):
        count = file.readinto(into)  # type: ignore[attr-defined]
        if not count:
            raise ValueError("the file ends inside the tensor")
        into = into[count:]


# torch.save


def _torch_file(path: Path) -> dict[str, StoredTensor]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"{path} holds more than tensors, which is not loaded because it could run code: save "
            "the state_dict() alone"
        ) from None
    except Exception as error:  # what PyTorch raises of a damaged file has no end of kinds
        raise ConfigError(
            f"{path} is damaged, or not a file of torch.save ({str(error)[:400]}). A file in the "
            "format before PyTorch 1.6 has to be loaded and saved again"
        ) from None
    if not isinstance(state, Mapping) or not _are_tensors(state):
        kind = f"a dict of {sorted(map(str, state))[:6]}" if isinstance(state, Mapping) else state
        raise ConfigError(
            f"{path} holds {kind if isinstance(kind, str) else type(state).__name__}, not a state "
            "dict of tensors: save model.state_dict() by itself"
        )
    return {name: _loaded(path, name, tensor) for name, tensor in state.items()}


def _are_tensors(state: Mapping[Any, Any]) -> bool:
    return all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in state.items())


def _loaded(path: Path, name: str, tensor: torch.Tensor) -> StoredTensor:
    def fill(target: torch.Tensor) -> None:
        target.copy_(tensor)

    return StoredTensor(tuple(tensor.shape), tensor.dtype, fill, f"{path} ({name})")
