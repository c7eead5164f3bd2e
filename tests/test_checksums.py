"""Files are compared by chunks, by several threads, while tensors are read to their places."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from isal import isal_zlib

from harmony.checkpoint import checksums
from harmony.checkpoint.checksums import Beside, Checksums, FileSums, read_files
from harmony.errors import ConfigError

CHUNK = 64


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "CHUNK_NBYTES", CHUNK)
    monkeypatch.setattr(checksums, "_FEW_NBYTES", 40)
    monkeypatch.setattr(checksums, "_MOST_VIEWS", 3)
    monkeypatch.setattr(checksums, "_READERS", 2)


def written(path: Path, data: bytes, draw: random.Random) -> FileSums:
    """Write a file in parts of any size; return what a manifest would say of it."""
    sums, beside, low = Checksums(), Beside(), 0
    with path.open("wb") as file:
        while low < len(data):
            part = data[low : low + draw.randrange(1, 150)]
            beside.add(sums, part, lambda part=part: file.write(part))  # type: ignore[misc]
            low += len(part)
    beside.close()
    return FileSums.of_data({"nbytes": sums.nbytes, "crc32": sums.finish()})


def tensors(data: bytes, draw: random.Random) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Where tensors that do not overlap begin, room for each, and what it has to be."""
    found, low = [], draw.randrange(40)
    while (size := draw.choice([0, 2, 4, 20, 200])) + low <= len(data):
        values = torch.frombuffer(
            bytearray(data[low : low + size]) or bytearray(2), dtype=torch.int16
        )
        values = values[: size // 2]
        room = torch.zeros_like(values)
        if size >= 8 and draw.random() < 0.3:  # one that does not lie in a row
            values, room = values.view(2, -1), torch.zeros(size // 4, 2, dtype=torch.int16).T
        found.append((low, room, values))
        low += size + draw.choice([0, 0, 6])
    return found


@pytest.mark.parametrize("seed", range(30))
def test_tensors_come_to_their_places_and_any_damage_is_found(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    data = {f"file{i}": draw.randbytes(draw.choice([0, 1, 63, 64, 65, 700])) for i in range(3)}
    sums = {name: written(tmp_path / name, held, draw) for name, held in data.items()}
    expected = {name: tensors(held, draw) for name, held in data.items()}
    places = {name: [(at, room) for at, room, _ in held] for name, held in expected.items()}
    for held in places.values():
        draw.shuffle(held)
    versions = {id(room): room._version for held in places.values() for _, room in held}
    read_files(tmp_path, sums, places)
    for _, room, values in (x for held in expected.values() for x in held):
        assert torch.equal(room, values)
        assert room._version > versions[id(room)]
    for name, held in data.items():
        for _ in range(8 if held else 0):
            at = draw.randrange(len(held))
            bit = bytes([held[at] ^ (1 << draw.randrange(8))])
            (tmp_path / name).write_bytes(held[:at] + bit + held[at + 1 :])
            with pytest.raises(ConfigError, match=f"{name} is damaged"):
                read_files(tmp_path, sums, {})
        (tmp_path / name).write_bytes(held + b"x")
        with pytest.raises(ConfigError, match=f"{name} has {len(held) + 1} bytes instead of"):
            read_files(tmp_path, sums, {})
        (tmp_path / name).write_bytes(held)


@pytest.mark.parametrize("by", [zlib.crc32, checksums.crc32])
def test_either_library_reads_what_the_other_has_written(
    by: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    monkeypatch.setattr(checksums, "crc32", by)
    sums = written(tmp_path / "file", draw.randbytes(1000), draw)
    for reads in (zlib.crc32, isal_zlib.crc32):
        monkeypatch.setattr(checksums, "crc32", reads)
        read_files(tmp_path, {"file": sums}, {})


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    sums = {"file": written(tmp_path / "file", bytes(100), random.Random(0))}
    for places in (
        [(0, torch.zeros(4)), (8, torch.zeros(1))],
        [(92, torch.zeros(3))],
    ):
        with pytest.raises(ConfigError, match="tensors that overlap, or end behind it"):
            read_files(tmp_path, sums, {"file": places})


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    sums = {"file": written(path, bytes(300), random.Random(0))}
    read = checksums._Reading.read

    def cut(reading: Any, work: Any) -> None:
        path.write_bytes(bytes(100))
        read(reading, work)

    monkeypatch.setattr(checksums._Reading, "read", cut)
    with pytest.raises(ConfigError, match=r"file: it cannot be read \(it was cut off\)"):
        read_files(tmp_path, sums, {})


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"nbytes": 3},
        {"nbytes": "3", "crc32": "00000000"},
        {"nbytes": True, "crc32": "00000000"},
        {"nbytes": -1, "crc32": ""},
        {"nbytes": 65, "crc32": "00000000"},
        {"nbytes": 3, "crc32": 7},
        {"nbytes": 3, "sha256": "00"},
        {"nbytes": 3, "crc32": "00000000", "sha256": "0" * 64},
        {"nbytes": 10**40, "crc32": ""},
    ],
)
def test_what_says_nothing_of_a_file_is_refused(known: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it has a file"):
        FileSums.of_data(known)
