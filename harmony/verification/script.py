"""Compares the forward and backward of a script's own loop with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from harmony.capture.graph.structure import flatten
from harmony.engine.autograd import ForwardCall
from harmony.engine.engine import Engine
from harmony.reference.plain_step import PlainForward, PlainStep
from harmony.reference.snapshot import Snapshot
from harmony.report.session import Verified
from harmony.runtime.exec.stage import Values
from harmony.verification.outcome import verification_of
from harmony.verification.side import (
    Found,
    Reference,
    device_factor,
    hooks_off,
    no_gradients,
    parts_of,
    reference_device,
    untouched,
)
from harmony.verification.verification import (
    SPLIT,
    Difference,
    Verification,
    compare_all,
)


def verify_and_stop(engine: Engine) -> None:
    """Compare the script's first backward with plain PyTorch, and end the script."""

    def stop(verification: Verification) -> None:
        raise Verified(verification)

    engine.verifier = Verifier(engine, stop)


class Verifier:
    """Compares every forward and backward of an own loop with plain PyTorch."""

    def __init__(self, engine: Engine, report: Callable[[Verification], object] | None) -> None:
        """Hand every comparison to ``report``; without one, nothing is compared."""
        self._engine = engine
        self._report = report

    def before_forward(
        self, call: ForwardCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> PlainForward | None:
        """Keep what plain PyTorch has to start from."""
        if self._report is None:
            return None
        engine, options = self._engine, self._engine.options
        dims = {k: v for k, v in options.batch_dims.items() if not k.startswith("targets")}
        device = reference_device(engine)
        plain = PlainStep(
            engine.net,
            None,
            args,
            kwargs,
            None,
            dims,
            call.step,
            options.seed,
            device=device,
            dtype=options.precision.dtype,
        )
        return PlainForward(plain, Snapshot(engine.net))

    def after_backward(
        self, call: ForwardCall, given: Values, gradients: Mapping[str, torch.Tensor]
    ) -> None:
        """Run the same by plain PyTorch and compare."""
        if self._report is None or call.plain is None:
            return
        engine, net = self._engine, self._engine.net
        found = Found(
            loss=None,
            gradients={name: gradient.clone() for name, gradient in gradients.items()},
            inputs={},
            buffers={n: b.detach().clone() for n, b in net.named_buffers()},
            parts=parts_of(engine, call.planned.plan.minibatch),
        )
        number, fixed = found.num_microbatches, engine.options.microbatch_size is not None
        order = _outputs_in_order(call)
        wanted = [None if v is None else given.get(v) for v in order]
        plain, before = call.plain.step, call.plain.before
        with untouched(engine), hooks_off(net):
            before.restore()
            start = {n: b.detach().clone() for n, b in net.named_buffers()}
            no_gradients(engine)
            result, shown = plain.by_gradients(wanted)
            split = number > 1 and (fixed or result.draws)
            if split:
                before.restore()
                no_gradients(engine)
                result, shown = replace(plain, parts=found.parts).by_gradients(wanted)
        notes = ["the loss and the optimizer's step are the script's own: not compared"]
        if split and not fixed:
            notes.append(
                "not compared with the whole batch, which would draw other random numbers than "
                f"{number} microbatches"
            )
        factor = device_factor(engine) * (SPLIT if number > 1 and not split else 1.0)
        words = "the same microbatches" if split else "the whole batch"
        rows = _compare_outputs(call, order, shown, factor)
        reference = Reference(result, factor, words, engine.options.precision.dtype)
        self._report(verification_of(engine, found, reference, start, [], notes, rows))


def _outputs_in_order(call: ForwardCall) -> list[int | None]:
    """The ids of the tensors that the module returns, as its output has them; each once."""
    graph = call.variant.graph
    stand_ins = {v: torch.empty(0) for v in graph.output_ids}
    known = {id(tensor): v for v, tensor in stand_ins.items()}
    minibatch = call.planned.plan.minibatch
    leaves = flatten(call.variant.captured.unflatten_output(stand_ins, minibatch))[0]
    return [known.pop(id(x), None) for x in leaves if isinstance(x, torch.Tensor)]


def _compare_outputs(
    call: ForwardCall, order: list[int | None], shown: list[torch.Tensor], factor: float
) -> list[Difference]:
    names = {v.id: f"output {v.name}" for v in call.variant.graph.values}
    pairs = [(v, t) for v, t in zip(order, shown, strict=True) if v in call.values]
    floating = [(v, t) for v, t in pairs if v is not None and t.is_floating_point()]
    ours = {names[v]: call.values[v] for v, _ in floating}
    return compare_all(ours, {names[v]: t for v, t in floating}, factor)
