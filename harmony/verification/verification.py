"""What a comparison with plain PyTorch has found, and how far two tensors may be apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from harmony.reference.snapshot import same_bits

SHOWN = 20
"""Rows of the table; the rest is in its last line."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest relative difference that counts as the same, by type; for others `LOW_PRECISION`."""

LOW_PRECISION = 2e-2

SPLIT = 10.0
"""Factor on the tolerance where plain PyTorch ran the batch at once and Harmony in microbatches:
sums of another order."""

OTHER_DEVICE = 100.0
"""Factor on the tolerance where plain PyTorch ran on another kind of device: other kernels."""

NOISE = 0.1
"""A gradient below this part of the tolerance of the model's largest is what rounding left of a
zero."""


@dataclass(frozen=True)
class Difference:
    """How far one tensor of Harmony's is from plain PyTorch's.

    Attributes:
        absolute: the largest difference of two entries.
        relative: that, divided by the largest entry of plain PyTorch's tensor, but at least
            ``NOISE`` of what the largest of all gradients may be off by; for a parameter, what is
            beyond one unit in the last place, divided by the largest change that the step made in
            it; infinite if only one of the two has it.
        tolerance: what ``relative`` may be.
    """

    name: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """One step in both ways.

    Attributes:
        gradients: of every parameter and input that has one, the worst first.
        others: of the loss or the outputs, and the buffers that the step changed.
        loss, plain_loss: of the whole batch; None where the script computes it itself.
        num_microbatches: of Harmony's step.
        reference: where plain PyTorch ran, and on what: the whole batch, or microbatches.
        updates: of every parameter and all optimizer state after the step, the worst first; empty
            in a loop whose optimizer is the script's own.
        notes: what could not be compared, and why.
    """

    gradients: tuple[Difference, ...]
    others: tuple[Difference, ...]
    loss: float | None
    plain_loss: float | None
    num_microbatches: int
    reference: str
    updates: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def _all(self) -> tuple[Difference, ...]:
        return (*self.gradients, *self.others, *self.updates)

    @property
    def ok(self) -> bool:
        """Whether everything is the same, up to rounding."""
        return all(difference.ok for difference in self._all)

    @property
    def identical(self) -> bool:
        """Whether everything is the same bit for bit."""
        return all(d.absolute == 0.0 for d in self._all)

    def summary(self) -> str:
        """One line: what was compared, the largest difference, and what was not compared."""
        compared = f"{len(self.gradients)} gradients, {self.num_microbatches} microbatches"
        if self.updates:
            compared = f"{len(self.updates)} parameters and states after the step, {compared}"
        if self.loss is not None and self.plain_loss is not None:
            compared += f", loss {self.loss:.6g} (plain PyTorch {self.plain_loss:.6g})"
        if self.identical:
            found = "identical to plain PyTorch bit for bit"
        else:
            worst = max(self._all, key=_badness)
            kind = "the same as plain PyTorch up to rounding" if self.ok else "DIFFERENT"
            found = (
                f"{kind}: largest relative difference {worst.relative:.3g} ({worst.name}), "
                f"tolerance {worst.tolerance:.3g}"
            )
        line = f"{compared}, reference on {self.reference}: {found}"
        return "; ".join([line, *self.notes])

    def table(self) -> Table:
        """What has the largest differences, for a terminal."""
        table = Table(box=box.SIMPLE, title="Harmony and plain PyTorch, one step", expand=False)
        table.add_column("gradient of", overflow="fold")
        for heading in ("largest difference", "relative", "tolerance"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for row in self.others:
            _add_row(table, row)
        for rows in (self.gradients, self.updates):
            for row in rows[:SHOWN]:
                _add_row(table, row)
            hidden = len(rows) - SHOWN
            if hidden > 0:
                table.add_row(f"{hidden} more", "", f"<= {rows[SHOWN].relative:.3g}", "", "")
        return table


def _add_row(table: Table, row: Difference) -> None:
    verdict = "same" if row.absolute == 0.0 else "ok" if row.ok else "DIFFERENT"
    numbers = (row.absolute, row.relative, row.tolerance)
    table.add_row(row.name, *(f"{number:.3g}" for number in numbers), verdict)


def worst_first(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """Sort by how far each is from what it may be."""
    return tuple(sorted(differences, key=_badness, reverse=True))


def compare_all(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    factor: float,
    floor: float = 0.0,
    computed: torch.dtype | None = None,
) -> list[Difference]:
    """Compare tensors by name; one that only one side has is a difference.

    Args:
        factor: on the tolerance.
        floor: the least that a difference is divided by.
        computed: the type that the model computes in, if that is not the tensors' own.
    """
    names = dict.fromkeys((*expected, *found))
    return [
        _by_name(name, found.get(name), expected.get(name), factor, floor, computed)
        for name in names
    ]


def tolerance_of(dtype: torch.dtype, computed: torch.dtype | None = None) -> float:
    """The tolerance of a type, or of the one that was computed in, if that is narrower."""
    return max(TOLERANCE.get(kind, LOW_PRECISION) for kind in (dtype, computed or dtype))


def _by_name(
    name: str,
    found: torch.Tensor | None,
    expected: torch.Tensor | None,
    factor: float,
    floor: float,
    computed: torch.dtype | None = None,
) -> Difference:
    if found is None or expected is None:
        whose = "plain PyTorch" if found is None else "Harmony"
        return Difference(f"{name} (only {whose} has one)", float("inf"), float("inf"), 0.0)
    scale = max(largest(expected), floor)
    return difference(name, found, expected, factor, scale, computed=computed)


def difference(
    name: str,
    found: torch.Tensor,
    expected: torch.Tensor,
    factor: float,
    scale: float,
    slack: torch.Tensor | None = None,
    computed: torch.dtype | None = None,
) -> Difference:
    """Compare two tensors.

    Args:
        factor: on the tolerance of the type.
        scale: what a difference is divided by.
        slack: what each entry may differ by before that.
        computed: as for `compare_all`.
    """
    tolerance = factor * tolerance_of(expected.dtype, computed)
    found, expected = found.detach().cpu(), expected.detach().cpu()
    if found.is_sparse:
        found = found.to_dense()
    if expected.is_sparse:
        expected = expected.to_dense()
    if found.shape != expected.shape:
        return Difference(
            f"{name} (shape {tuple(found.shape)} instead of {tuple(expected.shape)})",
            float("inf"), float("inf"), 0.0,
        )  # fmt: skip
    found = found.to(expected.dtype) if found.dtype != expected.dtype else found
    if same_bits(found, expected):
        return Difference(name, 0.0, 0.0, tolerance)
    kind = torch.complex128 if expected.is_complex() else torch.float64
    apart = (found.to(kind) - expected.to(kind)).abs()
    absolute = largest(apart)
    beyond = absolute if slack is None else largest((apart - slack).clamp_min(0.0))
    relative = beyond / scale if scale else (0.0 if beyond == 0.0 else float("inf"))
    return Difference(name, absolute, relative, tolerance)


def compare_updates(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
    factor: float,
) -> list[Difference]:
    """Compare parameters after a step, relative to how far the step moved them."""
    rows = []
    for name, after in expected.items():
        exact = not (after.is_floating_point() or after.is_complex())
        slack = after.abs().double() * (0.0 if exact else torch.finfo(after.dtype).eps)
        shown, moved = f"{name} after the step", largest(after - start[name])
        rows.append(difference(shown, found[name], after, factor, moved, slack))
    return rows


def compare_states(
    found: Mapping[str, Any], expected: Mapping[str, Any], factor: float
) -> list[Difference]:
    """Compare what an optimizer keeps: tensors and numbers, by name."""
    rows = []
    for name in dict.fromkeys((*expected, *found)):
        ours, theirs = (
            held if isinstance(held, torch.Tensor) or held is None else torch.tensor(float(held))
            for held in (found.get(name), expected.get(name))
        )
        rows.append(_by_name(name, ours, theirs, factor, 0.0))
    return rows


def compare_left(
    found: Mapping[str, Any], expected: Mapping[str, Any], factor: float
) -> list[Difference]:
    """Compare what is on attributes of modules after the step; what is the same has no row.

    Numbers of Python are compared like tensors, and anything else has to be equal.
    """
    rows = []
    for name in dict.fromkeys((*expected, *found)):
        shown, ours, theirs = f"attribute {name}", found.get(name), expected.get(name)
        if isinstance(ours, float) and isinstance(theirs, float):
            ours, theirs = torch.tensor(ours), torch.tensor(theirs)
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
            row = difference(shown, ours, theirs, factor, largest(theirs))
            rows += [] if row.absolute == 0.0 else [row]
        elif type(ours) is not type(theirs) or ours != theirs:
            text = f"{shown} (Harmony {_short(ours)}, plain PyTorch {_short(theirs)})"
            rows.append(Difference(text, float("inf"), float("inf"), 0.0))
    return rows


def _short(held: Any) -> str:
    text = "a tensor" if isinstance(held, torch.Tensor) else repr(held)
    return text if len(text) < 40 else f"{text[:37]}..."


def largest(tensor: torch.Tensor) -> float:
    """The largest absolute entry."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if not tensor.numel():
        return 0.0
    if tensor.dtype is torch.bool:
        return float(tensor.any())
    return float(tensor.detach().abs().max())


def _badness(found: Difference) -> float:
    """How far beyond its tolerance; NaN beyond everything."""
    relative = found.relative
    if relative != relative:
        return float("inf")
    return relative / found.tolerance if found.tolerance else relative
