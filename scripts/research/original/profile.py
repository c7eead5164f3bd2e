"""The original's profiles as its estimator and search read them: as sums over the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from harmony.core.files import parse_json, read_text
from harmony.errors import PlanError
from harmony.profiling import original_format
from harmony.profiling.original_format import OriginalProfile


@dataclass(frozen=True)
class Sized:
    """A profile at one microbatch size; entry ``l`` of a column sums the layers before ``l``.

    Attributes:
        num_samples: the microbatch size.
        forward_s: seconds of the forward.
        backward_s: seconds of the backward, the recompute not included.
        forward_nbytes, backward_nbytes: peak bytes of the layers run alone, as measured.
    """

    num_samples: int
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    forward_nbytes: tuple[float, ...]
    backward_nbytes: tuple[float, ...]


@dataclass(frozen=True)
class PaperProfile(OriginalProfile):
    """One model's profile, with sums over its layers."""

    _sized: dict[int, Sized] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def moved_nbytes(self) -> tuple[int, ...]:
        """Per place, bytes of weights and buffers of all layers before it."""
        pairs = zip(self.weight_nbytes, self.buffer_nbytes, strict=True)
        return (0, *accumulate(w + b for w, b in pairs))

    @cached_property
    def updated_s(self) -> tuple[float, ...]:
        """Per place, seconds of the updates of all layers before it."""
        return (0.0, *accumulate(self.update_s))

    @cached_property
    def entered_nbytes(self) -> tuple[int, ...]:
        """Per place, bytes for a sample of the inputs of all layers before it."""
        return (0, *accumulate(self.input_nbytes))

    @cached_property
    def max_forward_size(self) -> int:
        """The largest microbatch whose forward was measured."""
        return min(max(self.columns[name]) for name in ("time_s_FWD", "mem_bytes_FWD"))

    def sized(self, num_samples: int, *, backward: bool = True) -> Sized:
        """The profile at a microbatch size; without its backward if only FORWARD uses the size.

        Raises:
            PlanError: if the size is outside of those that were measured.
        """
        key = num_samples if backward else -num_samples
        if key not in self._sized:
            forward = self.column("time_s_FWD", num_samples)
            sums = [forward, (), self.column("mem_bytes_FWD", num_samples), ()]
            if backward:
                both = self.column("time_s_BWD", num_samples)
                sums[1] = tuple(b - f for f, b in zip(forward, both, strict=True))
                sums[3] = self.column("mem_bytes_BWD", num_samples)
            self._sized[key] = Sized(num_samples, *((0.0, *accumulate(column)) for column in sums))
        return self._sized[key]


def parse_profile(data: Any) -> PaperProfile:
    """Return the profile that decoded JSON describes.

    Raises:
        PlanError: as `harmony.profiling.original_format.parse_profile`.
    """
    found = original_format.parse_profile(data)
    held: Mapping[str, Any] = {f.name: getattr(found, f.name) for f in fields(found)}
    return PaperProfile(**held)


def read_profile(path: str | Path) -> PaperProfile:
    """Read a profile.

    Raises:
        PlanError: if the file is missing, is not JSON, or lacks a column, or if a column has
            another number of layers than `R` or a number that is negative or not finite.
    """
    path = Path(path)
    try:
        data = parse_json(read_text(path))
    except FileNotFoundError:
        raise PlanError(f"no profile {path}. Name a folder that has it") from None
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} is not a profile: {error}") from None
    try:
        return parse_profile(data)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
