"""Writes checkpoints: each whole or not at all, and on the disk before it has its name."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from harmony.checkpoint.checksums import CHUNK_NBYTES, Beside, Checksums
from harmony.checkpoint.store import FORMAT, MANIFEST, VERSION, digest_of, step_name
from harmony.errors import ConfigError, NotSavedError
from harmony.weights.checkpoint_files import DTYPES

SHARD_NBYTES = 4 << 30
_CHUNK_NBYTES = 1 << 24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


def check_writable(root: Path) -> None:
    """Refuse a folder, or one that is still to be made, that nothing can be written to.

    Raises:
        ConfigError: naming it and the reason.
    """
    there = next((path for path in (root, *root.absolute().parents) if path.exists()), root)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"checkpoints cannot be written to {root}: {error.strerror}. Name another folder"
        ) from None


class _File:
    """A new file whose size and checksums are known once it is on the disk."""

    def __init__(self, path: Path, beside: Beside) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0)
        self._sums, self._beside = Checksums(), beside
        self.close = self._file.close

    def add(self, part: bytes | memoryview) -> None:
        self._beside.add(self._sums, part, lambda: _write_all(self._file, part))

    def finish(self) -> dict[str, Any]:
        os.fsync(self._file.fileno())
        self.close()
        return {"nbytes": self._sums.nbytes, "crc32": self._sums.finish()}


class Writer:
    """Writes the files of one checkpoint into a folder that nobody reads yet."""

    def __init__(self, folder: Path, open_files: contextlib.ExitStack) -> None:
        """Write into ``folder``; what an error leaves open is closed with ``open_files``."""
        self._folder = folder
        self._open_files = open_files
        self._beside = Beside()
        open_files.callback(self._beside.close)
        self.files: dict[str, dict[str, Any]] = {}

    def open(self, name: str) -> _File:
        """Begin a file; it may be in a folder of its own."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _File(path, self._beside)
        self._open_files.callback(file.close)
        return file

    def write(self, name: str, data: bytes) -> None:
        """Write a file and note its size and checksum; it is on the disk afterwards."""
        file = self.open(name)
        file.add(data)
        self.files[name] = file.finish()

    def json(self, name: str, data: object) -> None:
        """Write JSON."""
        self.write(name, json.dumps(data, indent=1).encode())


class TensorFiles:
    """Safetensors files under the names that Hugging Face gives to them, written bit by bit."""

    def __init__(self, writer: Writer, stem: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Know which tensors will come, in which order; only their forms are looked at."""
        self._writer = writer
        self._shards: list[dict[str, int]] = [{}]
        self._headers: list[dict[str, Any]] = [{"__metadata__": {"format": "pt"}}]
        self._end = 0
        for name, tensor in tensors.items():
            self._plan(name, tensor)
        number = len(self._shards)
        self._names = [f"{stem}-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1)]
        if number == 1:
            self._names = [f"{stem}.safetensors"]
        self._index = f"{stem}.safetensors.index.json" if number > 1 else None
        self._left = [list(shard)[::-1] for shard in self._shards]
        self._file: _File | None = None

    def _plan(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in _NAMES:
            raise ConfigError(f"{name} is of type {tensor.dtype}, which safetensors has not")
        low, self._end = self._end, self._end + tensor.nbytes
        if low and self._end > SHARD_NBYTES:
            self._shards.append({})
            self._headers.append({"__metadata__": {"format": "pt"}})
            low, self._end = 0, tensor.nbytes
        self._shards[-1][name] = tensor.nbytes
        offsets = [low, low + tensor.nbytes]
        form = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        self._headers[-1][name] = {**form, "data_offsets": offsets}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor; one of a GPU is copied to the host first."""
        shard = len(self._shards) - len(self._left)
        wanted = self._left[0].pop()
        assert wanted == name, f"{name} came in the place of {wanted}"
        self._add(shard, _chunks(tensor))

    def _add(self, shard: int, parts: Iterable[memoryview]) -> None:
        if self._file is None:
            self._file = self._writer.open(self._names[shard])
            text = json.dumps(self._headers[shard]).encode()
            text += b" " * (-len(text) % 8)
            self._file.add(len(text).to_bytes(8, "little") + text)
        for part in parts:
            self._file.add(part)
        if not self._left[0]:
            self._writer.files[self._names[shard]] = self._file.finish()
            self._file = None
            del self._left[0]

    def finish(self) -> None:
        """Write what is left when all tensors have come."""
        if self._left:  # there are none
            self._add(0, ())
        if self._index is not None:
            named = zip(self._names, self._shards, strict=True)
            weight_map = {name: file for file, shard in named for name in shard}
            total = sum(sum(shard.values()) for shard in self._shards)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self._writer.json(self._index, index)


def _write_all(file: BinaryIO, part: bytes | memoryview) -> None:
    view = memoryview(part)
    while len(view):
        view = view[file.write(view) :]


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, without a copy if they lie in a row on the host."""
    row = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    for low in range(0, row.nbytes, _CHUNK_NBYTES):
        size = min(_CHUNK_NBYTES, row.nbytes - low)
        held = (ctypes.c_ubyte * size).from_address(row.data_ptr() + low)
        yield memoryview(held).cast("B")


@contextlib.contextmanager
def said_by_name(root: Path, step: int) -> Iterator[None]:
    """Say which checkpoint the system has not let the block make.

    Raises:
        NotSavedError: instead of an error of the system.
    """
    try:
        yield
    except OSError as error:
        raise NotSavedError(
            f"cannot write the checkpoint of step {step} to {root}: {error}. Checkpoints written "
            "before are as they were"
        ) from None


@contextlib.contextmanager
def writing(root: Path, step: int) -> Iterator[Writer]:
    """Make the block's files the checkpoint ``step-N`` of a folder, whole or not at all.

    Raises:
        NotSavedError: if it cannot be written there.
    """
    part = root / f".{step_name(step)}.{secrets.token_hex(8)}.part"
    try:
        with said_by_name(root, step):
            root.mkdir(parents=True, exist_ok=True)
            part.mkdir()
            with contextlib.ExitStack() as open_files:
                writer = Writer(part, open_files)
                yield writer
                manifest = {"format": FORMAT, "version": VERSION, "step": step}
                manifest |= {"chunk_nbytes": CHUNK_NBYTES, "files": writer.files}
                writer.json(MANIFEST, {**manifest, "sha256": digest_of(manifest)})
            for folder in {part, *((part / name).parent for name in writer.files)}:
                _sync(folder)
            _take_place(part, root / step_name(step))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _take_place(part: Path, final: Path) -> None:
    """Give a folder its name, for good; one that had it (of the same step) is then at ``part``."""
    change = _change_names if final.exists() else Path.rename
    change(part, final)
    try:
        _sync(final.parent)
    except OSError:  # it may be gone after a crash: then what was there before is better
        with contextlib.suppress(OSError):
            change(final, part)
        raise


def _change_names(one: Path, other: Path) -> None:
    """Let two folders change names; at no moment is there none, where the system can do that."""
    try:
        _exchange(one, other)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        name = max(one.name, other.name)  # of the two the one without a dot before it
        aside = one.with_name(f".{name}.{secrets.token_hex(8)}.part")
        other.rename(aside)
        try:
            one.rename(other)
            aside.rename(one)
        except OSError:
            if not one.exists():
                other.rename(one)
            aside.rename(other)
            raise


def _exchange(one: Path, other: Path) -> None:
    """Let two paths change names (Linux: ``RENAME_EXCHANGE``)."""
    rename: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
