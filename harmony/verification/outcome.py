"""Makes a verification of what the two sides have left."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmony.engine.engine import Engine
from harmony.reference.plain_step import Result, Tensors
from harmony.reference.snapshot import same_bits
from harmony.verification.side import Found, Reference, reference_device
from harmony.verification.verification import (
    NOISE,
    Difference,
    Verification,
    compare_all,
    compare_left,
    difference,
    largest,
    tolerance_of,
    worst_first,
)


def verification_of(
    engine: Engine,
    found: Found,
    reference: Reference,
    buffers: Tensors,
    updates: list[Difference],
    notes: Sequence[str],
    more: Sequence[Difference] = (),
) -> Verification:
    """Compare what both sides have left.

    Args:
        buffers: all of them before the step.
        updates: rows of the parameters and the optimizer's state.
        more: rows of other things.
    """
    loss, plain_loss = found.loss, reference.result.loss
    gradients, others = rows_of(found, reference, buffers)
    if found.left:
        others += compare_left(found.left, reference.result.left, reference.factor)
    device = reference_device(engine)
    where = "the CPU" if device.type == "cpu" else str(device)
    return Verification(
        gradients=worst_first(gradients),
        others=(*more, *others),
        loss=None if loss is None else float(loss),
        plain_loss=None if plain_loss is None else float(plain_loss),
        num_microbatches=found.num_microbatches,
        reference=f"{where}, {reference.words}",
        updates=worst_first(updates),
        notes=tuple(notes),
    )


def rows_of(
    found: Result, reference: Reference, buffers: Tensors
) -> tuple[list[Difference], list[Difference]]:
    """Compare gradients, and, apart, the loss and the buffers that either side has changed."""
    expected, factor, computed = reference.result, reference.factor, reference.computed
    most = max((largest(g) for g in expected.gradients.values()), default=0.0)
    floor = NOISE * tolerance_of(torch.float32, computed) * most
    gradients = compare_all(found.gradients, expected.gradients, factor, floor, computed)
    inputs = compare_all(found.inputs, expected.inputs, factor, floor, computed)
    others = []
    if found.loss is not None and expected.loss is not None:
        scale = largest(expected.loss)
        loss = difference("the loss", found.loss, expected.loss, factor, scale, computed=computed)
        others.append(loss)
    changed = [
        f"buffer {name}"
        for name in dict.fromkeys((*found.buffers, *expected.buffers))
        if not all(
            name in held and name in buffers and same_bits(held[name], buffers[name])
            for held in (found.buffers, expected.buffers)
        )
    ]
    ours, theirs = (
        {f"buffer {n}": b for n, b in held.items() if f"buffer {n}" in changed}
        for held in (found.buffers, expected.buffers)
    )
    others += compare_all(ours, theirs, factor, computed=computed)
    if found.given and expected.given:
        apart = {
            name: held
            for name, held in expected.given.items()
            if name not in found.given or not same_bits(found.given[name], held)
        }
        others += compare_all(
            {n: found.given[n] for n in apart if n in found.given}, apart, factor
        )
    return [*gradients, *inputs], others


def agree(found: Result, reference: Reference) -> bool:
    """Whether loss, gradients and buffers are within the tolerance."""
    rows = rows_of(found, reference, found.buffers)
    return all(row.ok for part in rows for row in part)
