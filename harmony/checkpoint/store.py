"""Folders of checkpoints: written whole or not at all, and checked before anything is read.

A checkpoint is a folder ``step-N`` with safetensors files, JSON and, written last, a manifest that
has the size and the SHA-256 of each file. It is written under another name, made durable, and only
then renamed: what was there before stays until the new one is whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from harmony.core.files import DAMAGED, check_types, parse_json, read_text
from harmony.errors import ConfigError, NotSavedError
from harmony.weights.checkpoint_files import DTYPES, StoredTensor, open_checkpoint

FORMAT, VERSION = "harmony checkpoint", 1
MANIFEST = "manifest.json"
SHARD_NBYTES = 4 << 30
_CHUNK_NBYTES = 1 << 24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STEP = re.compile(r"step-(\d{1,18})")
_PART = re.compile(r"\.step-\d+\.[0-9a-f]{16}\.part")


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


class Writer:
    """Writes the files of one checkpoint into a folder that nobody reads yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, parts: Iterator[bytes | memoryview]) -> None:
        """Write a file and note its size and checksum; it is on the disk afterwards."""
        digest, nbytes = hashlib.sha256(), 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self.folder / name, flags, 0o666), "wb", buffering=0) as file:
            for part in parts:
                digest.update(part)
                nbytes += len(part)
                _write_all(file, part)
            os.fsync(file.fileno())
        self.files[name] = {"nbytes": nbytes, "sha256": digest.hexdigest()}

    def json(self, name: str, data: object) -> None:
        """Write JSON."""
        self.write(name, iter([json.dumps(data, indent=1).encode()]))

    def tensors(self, stem: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors as safetensors under the names that Hugging Face gives to its files.

        One tensor at a time is looked at: those of a GPU are copied to the host one by one.
        """
        shards: list[dict[str, torch.Tensor]] = [{}]
        size = 0
        for name, tensor in tensors.items():
            if tensor.dtype not in _NAMES:
                raise ConfigError(f"{name} is of type {tensor.dtype}, which safetensors has not")
            if size and size + tensor.nbytes > SHARD_NBYTES:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += tensor.nbytes
        if len(shards) == 1:
            self.write(f"{stem}.safetensors", _safetensors(shards[0]))
            return
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            self.write(file, _safetensors(shard))
            weight_map.update(dict.fromkeys(shard, file))
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        self.json(f"{stem}.safetensors.index.json", index)


def _write_all(file: BinaryIO, part: bytes | memoryview) -> None:
    view = memoryview(part)
    while len(view):
        view = view[file.write(view) :]


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        low, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [low, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield from _chunks(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, without a copy."""
    for low in range(0, tensor.nbytes, _CHUNK_NBYTES):
        size = min(_CHUNK_NBYTES, tensor.nbytes - low)
        held = (ctypes.c_ubyte * size).from_address(tensor.data_ptr() + low)
        yield memoryview(held).cast("B")


@contextlib.contextmanager
def writing(root: Path, step: int) -> Iterator[Writer]:
    """Make the block's files the checkpoint ``step-N`` of a folder, whole or not at all.

    Raises:
        NotSavedError: if it cannot be written there.
    """
    part = root / f".step-{step:08}.{secrets.token_hex(8)}.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        writer = Writer(part)
        yield writer
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": writer.files}
        writer.json(MANIFEST, {**manifest, "sha256": _digest(manifest)})
        _sync(part)
        _take_place(part, root / f"step-{step:08}")
        _sync(root)
    except OSError as error:
        raise NotSavedError(
            f"cannot write the checkpoint of step {step} to {root}: {error}. Checkpoints written "
            "before are as they were"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _take_place(part: Path, final: Path) -> None:
    """Rename; one that is there already (of the same step) goes once the new one has its name."""
    old = final.with_name(f".{final.name}.{secrets.token_hex(8)}.part")
    if final.exists():
        final.rename(old)
    part.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """A checkpoint on the disk whose manifest has been read.

    Attributes:
        folder: of this checkpoint.
        step: steps trained.
        files: size and checksum of each file.
    """

    folder: Path
    step: int
    files: Mapping[str, Mapping[str, Any]]

    def check(self) -> None:
        """Read every file once and compare it with the manifest.

        Raises:
            ConfigError: naming the file that is missing, cut off or changed.
        """
        for name, known in self.files.items():
            path = self.folder / name
            try:
                with path.open("rb") as file:
                    digest, nbytes = hashlib.sha256(), 0
                    while chunk := file.read(_CHUNK_NBYTES):
                        digest.update(chunk)
                        nbytes += len(chunk)
            except OSError as error:
                raise ConfigError(f"{path}: it cannot be read ({error})") from None
            if nbytes != known["nbytes"]:
                raise ConfigError(f"{path} has {nbytes} bytes instead of {known['nbytes']}")
            if digest.hexdigest() != known["sha256"]:
                raise ConfigError(f"{path} is damaged: its checksum is another")

    def tensors(self, stem: str) -> dict[str, StoredTensor]:
        """The tensors of the files of this stem, by name."""
        names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
        file = next((name for name in names if name in self.files), None)
        if file is None:
            raise ConfigError(f"{self.folder}: it has no {names[0]}")
        return open_checkpoint(self.folder / file)

    def json(self, name: str) -> Any:
        """What a JSON file holds."""
        try:
            return parse_json(read_text(self.folder / name))
        except (OSError, *DAMAGED) as error:
            raise ConfigError(f"{self.folder / name}: it cannot be read ({error})") from None


def read_manifest(folder: Path) -> Stored:
    """Read the manifest of a checkpoint.

    Raises:
        ConfigError: if there is none, or it is damaged, foreign or of a later version.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_json(read_text(path))
        digest = manifest.pop("sha256", None)
        if manifest.get("format") != FORMAT:
            raise ValueError("it is not one of Harmony's")
        if manifest.get("version") != VERSION:
            raise ValueError(
                f"it is of version {str(manifest.get('version'))[:20]}, this Harmony reads "
                f"version {VERSION}"
            )
        if digest != _digest(manifest):
            raise ValueError("it is damaged: its checksum is another")
        check_types(manifest["step"], int)
        check_types(manifest["files"], dict[str, dict[str, Any]])
        if any(Path(name).name != name for name in manifest["files"]):
            raise ValueError("it names files outside of its folder")
    except FileNotFoundError:
        raise ConfigError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (OSError, *DAMAGED) as error:
        raise ConfigError(f"{path}: {error}") from None
    return Stored(folder, manifest["step"], manifest["files"])


def found_in(root: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first; the folder itself if it is one."""
    if (root / MANIFEST).exists():
        return [root]
    try:
        names = [path.name for path in root.iterdir()]
    except OSError as error:
        raise ConfigError(f"there are no checkpoints in {root}: {error}") from None
    steps = [(int(match[1]), name) for name in names if (match := _STEP.fullmatch(name))]
    return [root / name for _, name in sorted(steps, reverse=True)]


def keep_last(root: Path, number: int, step: int) -> None:
    """Remove all but the newest checkpoints up to a step, and what writes that ended left.

    Those of later steps stay: they are of a run that has gone back, and may be damaged.
    """
    upto = [folder for folder in found_in(root) if step_of(folder) <= step]
    for folder in upto[number:]:
        with contextlib.suppress(OSError):  # half of one is never taken for a whole
            (folder / MANIFEST).unlink()
        shutil.rmtree(folder, ignore_errors=True)
    for path in root.iterdir():
        if _PART.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def step_of(folder: Path) -> int:
    """The number in the name ``step-N`` of a checkpoint's folder."""
    match = _STEP.fullmatch(folder.name)
    return -1 if match is None else int(match[1])
