"""Folders of checkpoints: what is in one, and that it is whole before anything of it is used.

A checkpoint is a folder ``step-N`` with safetensors files, JSON and, written last, a manifest that
has the size and the checksums of each file. It is written under another name, made durable, and
only then renamed: what was there before stays until the new one is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from harmony.checkpoint.checksums import (
    CHUNK_NBYTES,
    FileSums,
    Place,
    read_files,
)
from harmony.core.files import DAMAGED, MOST_NBYTES, check_types, parse_json, read_text
from harmony.errors import ConfigError
from harmony.weights.checkpoint_files import StoredTensor, open_checkpoint

FORMAT, VERSION = "harmony checkpoint", 2
READS = (1, VERSION)
"""Versions that are read. The first had one SHA-256 a file in the place of checksums of chunks."""

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{1,18})")
_PART = re.compile(r"\.step-\d+\.[0-9a-f]{16}\.part")


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The checksum of a manifest, which is part of it."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """A checkpoint on the disk whose manifest has been read.

    Attributes:
        folder: of this checkpoint.
        step: steps trained.
        files: size and checksums of each file.
    """

    folder: Path
    step: int
    files: Mapping[str, FileSums]

    def read(self, places: Mapping[str, Sequence[Place]]) -> None:
        """Read every file once, compare it with the manifest, and put tensors in place.

        Args:
            places: where what goes, by file (`places_of`).

        Raises:
            ConfigError: naming the file that is missing, cut off or changed.
        """
        read_files(self.folder, self.files, places)

    def read_again(self, places: Mapping[str, Sequence[Place]]) -> None:
        """Read files of a checkpoint that is known to be whole, and compare them once more."""
        read_files(self.folder, {name: self.files[name] for name in places}, places)

    def tensors(self, stem: str) -> dict[str, StoredTensor]:
        """The tensors of the files of this stem, by name."""
        names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
        file = next((name for name in names if name in self.files), None)
        if file is None:
            raise ConfigError(f"{self.folder}: it has no {names[0]}")
        found = open_checkpoint(self.folder / file)
        for tensor in found.values():
            if tensor.place[0].parent != self.folder or tensor.place[0].name not in self.files:
                raise ConfigError(f"{self.folder / file} names files that {MANIFEST} does not")
        return found

    def json(self, name: str) -> Any:
        """What a JSON file holds; it is compared with the manifest first.

        Raises:
            ConfigError: if there is none, or it is damaged.
        """
        if name not in self.files:
            raise ConfigError(f"{self.folder}: it has no {name}")
        size = min(self.files[name].nbytes, MOST_NBYTES)
        text = torch.empty(size, dtype=torch.uint8)
        self.read_again({name: [(0, text)]})
        try:
            return parse_json(text.numpy().tobytes().decode())
        except DAMAGED as error:
            raise ConfigError(f"{self.folder / name}: it cannot be read ({error})") from None


def places_of(
    stored: Mapping[str, StoredTensor], targets: Mapping[str, torch.Tensor]
) -> dict[str, list[Place]]:
    """Where in which file the tensors for these targets are."""
    found: dict[str, list[Place]] = {}
    for name, target in targets.items():
        path, offset = stored[name].place
        found.setdefault(path.name, []).append((offset, target))
    return found


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
        if manifest.get("version") not in READS:
            raise ValueError(
                f"it is of version {str(manifest.get('version'))[:20]}, this Harmony reads "
                f"versions up to {VERSION}"
            )
        if digest != digest_of(manifest):
            raise ValueError("it is damaged: its checksum is another")
        check_types(manifest["step"], int)
        check_types(manifest["files"], dict[str, dict[str, Any]])
        if not all(_is_inside(name) for name in manifest["files"]):
            raise ValueError("it names files outside of its folder")
        if manifest.get("chunk_nbytes", CHUNK_NBYTES) != CHUNK_NBYTES:
            raise ValueError(f"its checksums are not of chunks of {CHUNK_NBYTES} bytes")
        files = {name: FileSums.of_data(known) for name, known in manifest["files"].items()}
    except FileNotFoundError:
        raise ConfigError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (OSError, *DAMAGED) as error:
        raise ConfigError(f"{path}: {error}") from None
    return Stored(folder, manifest["step"], files)


def _is_inside(name: str) -> bool:
    """Whether a name is of a file in the folder, or in a folder in it."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name != "."


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


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08}"


def step_of(folder: Path) -> int:
    """The number in the name ``step-N`` of a checkpoint's folder."""
    match = _STEP.fullmatch(folder.name)
    return -1 if match is None else int(match[1])
