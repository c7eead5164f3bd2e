"""Compares Harmony with plain PyTorch on the user's own model and batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from harmony import session
from harmony.binding import Binding
from harmony.capture import GuardError, LiveOnlyError
from harmony.capture.isolation import undisturbed
from harmony.capture.trace import Program
from harmony.dropin import ForwardCall
from harmony.engine import Engine
from harmony.errors import CaptureError, ConfigError
from harmony.plainstep import Gradients, PlainStep, restored
from harmony.planner.plan import Plan
from harmony.planner.tasks import TaskKind
from harmony.runtime import native
from harmony.runtime.stage import Values
from harmony.units import format_bytes

SHOWN = 20
"""Rows of the table; the rest is in its last line."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest relative difference that counts as the same, by type; for others `LOW_PRECISION`."""

LOW_PRECISION = 2e-2

OTHER_DEVICE = 100.0
"""Factor on the tolerance where plain PyTorch ran on another kind of device: other kernels."""

NOISE = 1e-6
"""A gradient below this part of the model's largest is what rounding left of a zero."""


@dataclass(frozen=True)
class Difference:
    """How far one tensor of Harmony's is from plain PyTorch's.

    Attributes:
        absolute: the largest difference of two entries.
        relative: that, divided by the largest entry of plain PyTorch's tensor, but at least
            ``NOISE`` of the largest of all gradients; infinite if only one of the two has it.
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
        gradients: of every parameter that has one, the worst first.
        others: of the loss or the outputs, and the buffers that the forward changed.
        loss, plain_loss: of the whole batch; None where the script computes it itself.
        num_microbatches: of the step.
        reference: where plain PyTorch ran.
    """

    gradients: tuple[Difference, ...]
    others: tuple[Difference, ...]
    loss: float | None
    plain_loss: float | None
    num_microbatches: int
    reference: str

    @property
    def ok(self) -> bool:
        """Whether everything is the same, up to rounding."""
        return all(difference.ok for difference in (*self.gradients, *self.others))

    @property
    def identical(self) -> bool:
        """Whether everything is the same bit for bit."""
        return all(d.absolute == 0.0 for d in (*self.gradients, *self.others))

    def summary(self) -> str:
        """One line: how many parameters were compared, and the largest difference."""
        compared = f"{len(self.gradients)} gradients, {self.num_microbatches} microbatches"
        if self.loss is not None and self.plain_loss is not None:
            compared += f", loss {self.loss:.6g} (plain PyTorch {self.plain_loss:.6g})"
        if self.identical:
            found = "identical to plain PyTorch bit for bit"
        else:
            worst = max((*self.gradients, *self.others), key=_badness)
            kind = "the same as plain PyTorch up to rounding" if self.ok else "DIFFERENT"
            found = (
                f"{kind}: largest relative difference {worst.relative:.3g} ({worst.name}), "
                f"tolerance {worst.tolerance:.3g}"
            )
        return f"{compared}, reference on {self.reference}: {found}"

    def table(self) -> Table:
        """The parameters with the largest differences, for a terminal."""
        table = Table(box=box.SIMPLE, title="Harmony and plain PyTorch, one step", expand=False)
        table.add_column("gradient of", overflow="fold")
        for heading in ("largest difference", "relative", "tolerance"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for row in (*self.others, *self.gradients[:SHOWN]):
            verdict = "same" if row.absolute == 0.0 else "ok" if row.ok else "DIFFERENT"
            numbers = (row.absolute, row.relative, row.tolerance)
            table.add_row(row.name, *(f"{number:.3g}" for number in numbers), verdict)
        hidden = len(self.gradients) - SHOWN
        if hidden > 0:
            most = self.gradients[SHOWN].relative
            table.add_row(f"{hidden} more", "", f"<= {most:.3g}", "", "")
        return table


def verify(
    engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any
) -> Verification:
    """Run one step in both ways; nothing of the model, the optimizer or the process changes.

    Raises:
        ConfigError: if there is no loss, or the two would draw other random numbers.
    """
    steps, timeline = engine.num_steps, engine.last_timeline
    with undisturbed(engine.devices[0]):
        try:
            if engine.options.optimizer is not None:
                return _verify_step(engine, args, kwargs, targets)
            return _verify_forward_and_backward(engine, args, kwargs, targets)
        except (LiveOnlyError, GuardError) as reason:
            raise ConfigError(
                f"verify compares planned steps, and this model runs live: {reason}"
            ) from reason
        finally:
            engine.num_steps, engine.last_timeline = steps, timeline


def verify_and_stop(engine: Engine) -> None:
    """Compare the script's first backward with plain PyTorch, and end the script."""

    def stop(verification: Verification) -> None:
        raise session.Verified(verification)

    engine.verifier = Verifier(engine, stop)


def _verify_step(
    engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any
) -> Verification:
    """The step form: a training step up to the gradients."""
    net, loss_fn = engine.net, engine.options.loss_fn
    ready = engine.ready("step", args, kwargs, targets)
    binding, plan = ready.binding, ready.plan
    device = _reference_device(engine, binding)
    with restored(net, _attributes(binding)):
        plain = _plain_step(engine, binding, plan, ready.weights, device, (args, kwargs, targets))
        step = engine.run_step(ready, apply_updates=False)
        host = binding.host
        host.publish_all()
        found = {n: p.grad.clone() for n, p in host.params.items() if p.grad is not None}
        step.recall.states.commit()
        found_buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    expected = plain.by_loss(Program(loss_fn, output_loss=loss_fn is None))
    assert plain.loss is not None
    others = {"the loss": (step.loss, plain.loss), **_buffers(found_buffers, plain)}
    return _verification(engine, plain, found, expected, others, (step.loss, plain.loss))


def _verify_forward_and_backward(
    engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any
) -> Verification:
    """The drop-in form: a forward, and a backward from the loss."""
    net, loss_fn = engine.net, engine.options.loss_fn
    ready = engine.ready("dropin", args, kwargs, None)
    found: list[Verification] = []
    with restored(net, _attributes(ready.binding)), torch.enable_grad():
        engine.verifier = Verifier(engine, found.append)
        try:
            program = Program(loss_fn, output_loss=loss_fn is None)
            forward: Any = lambda *a, **k: engine.forward(a, k)  # noqa: E731
            loss = program(forward, args, kwargs, targets)
            params = [p for p in net.parameters() if p.requires_grad]
            torch.autograd.grad(loss, params, allow_unused=True)
        except CaptureError as error:
            raise ConfigError(
                f"verify needs a loss to begin the backward with ({error}). Give Harmony(..., "
                "loss_fn=) and targets, or a batch for which the module returns its loss"
            ) from error
        finally:
            engine.verifier = None
    return found[0]


class Verifier:
    """Compares every forward and backward of the drop-in form with plain PyTorch."""

    def __init__(self, engine: Engine, report: Callable[[Verification], object]) -> None:
        """Hand every comparison to ``report``."""
        self._engine = engine
        self._report = report

    def before_forward(
        self, call: ForwardCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> PlainStep:
        """Keep what plain PyTorch has to start from."""
        engine, binding = self._engine, call.binding
        device = _reference_device(engine, binding)
        batch = (args, kwargs, None)
        return _plain_step(engine, binding, call.plan, call.weights, device, batch, call.step)

    def after_backward(
        self, call: ForwardCall, given: Values, gradients: Mapping[str, torch.Tensor]
    ) -> None:
        """Run the same by plain PyTorch and compare."""
        plain = call.plain
        assert plain is not None, "a verifier sees every forward"
        found = {name: gradient.clone() for name, gradient in gradients.items()}
        expected = plain.by_gradients({v: g.detach() for v, g in given.items()})
        names = {v.id: v.name for v in call.binding.graph.values}
        outputs = {
            f"output {names[v]}": (call.values[v], tensor)
            for v, tensor in plain.outputs.items()
            if tensor.is_floating_point()
        }
        buffers = {name: b.clone() for name, b in self._engine.net.named_buffers()}
        others = {**outputs, **_buffers(buffers, plain)}
        self._report(_verification(self._engine, plain, found, expected, others, (None, None)))


def _plain_step(
    engine: Engine,
    binding: Binding,
    plan: Plan,
    weights: Any,
    device: torch.device,
    batch: tuple[tuple[Any, ...], dict[str, Any], Any],
    step: int | None = None,
) -> PlainStep:
    number = engine.num_steps if step is None else step
    seed = engine.options.seed
    return PlainStep(engine.net, binding, plan, weights, number, seed, *batch, device=device)


def _attributes(binding: Binding) -> list[tuple[str, str]]:
    return [a for change in binding.captured.changes.values() for a in change.attributes]


def _reference_device(engine: Engine, binding: Binding) -> torch.device:
    """Where plain PyTorch runs: on the host for virtual GPUs, else on the GPU if it fits."""
    device, cpu = engine.devices[0], torch.device("cpu")
    if native.is_virtual(device):
        return cpu
    free, _ = native.memory_info(device)
    need = 3 * sum(p.nbytes for p in engine.net.parameters())  # with gradients, and activations
    if need < free:
        return device
    if any(layer.uses_rng for layer in binding.graph.layers):
        raise ConfigError(
            f"the model draws random numbers, and plain PyTorch needs {format_bytes(need)} to run "
            f"on {device}, which has {format_bytes(free)} free; on the CPU it would draw others. "
            "Verify with dropout 0, or call model.eval()"
        )
    return cpu


def _buffers(
    found: Mapping[str, torch.Tensor], plain: PlainStep
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of the buffers that the forward changed, Harmony's and plain PyTorch's."""
    before = dict(plain.net.named_buffers())
    after = {name: b.cpu() for name, b in plain.twin.named_buffers()}
    changed = {n for c in plain.binding.captured.changes.values() for n in c.buffers}
    return {f"buffer {name}": (found[name], after[name]) for name in before if name in changed}


def _verification(
    engine: Engine,
    plain: PlainStep,
    found: Gradients,
    expected: Gradients,
    others: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    losses: tuple[torch.Tensor | None, torch.Tensor | None],
) -> Verification:
    elsewhere = plain.device.type == "cpu" and not native.is_virtual(engine.devices[0])
    factor = OTHER_DEVICE if elsewhere else 1.0
    largest = max((_largest(gradient) for gradient in expected.values()), default=0.0)
    names = dict.fromkeys((*expected, *found))
    gradients = [
        _difference(name, found.get(name), expected.get(name), NOISE * largest, factor)
        for name in names
    ]
    spec = plain.plan.spec
    sizes = [spec.num_microbatches(r, TaskKind.BACKWARD) for r in range(len(spec.shares))]
    return Verification(
        gradients=tuple(sorted(gradients, key=_badness, reverse=True)),
        others=tuple(_difference(n, a, b, 0.0, factor) for n, (a, b) in others.items()),
        loss=None if losses[0] is None else float(losses[0]),
        plain_loss=None if losses[1] is None else float(losses[1]),
        num_microbatches=sum(sizes),
        reference="the CPU" if plain.device.type == "cpu" else str(plain.device),
    )


def _difference(
    name: str,
    found: torch.Tensor | None,
    expected: torch.Tensor | None,
    floor: float,
    factor: float,
) -> Difference:
    if found is None or expected is None:
        whose = "plain PyTorch" if found is None else "Harmony"
        return Difference(f"{name} (only {whose} has one)", float("inf"), float("inf"), 0.0)
    tolerance = factor * TOLERANCE.get(expected.dtype, LOW_PRECISION)
    if bool(((found == expected) | (found.isnan() & expected.isnan())).all()):
        return Difference(name, 0.0, 0.0, tolerance)
    absolute = _largest(found.double() - expected.double())
    scale = max(_largest(expected), floor)
    relative = absolute / scale if scale else float("inf")
    return Difference(name, absolute, relative, tolerance)


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def _badness(difference: Difference) -> float:
    """How far beyond its tolerance; NaN beyond everything."""
    relative = difference.relative
    return float("inf") if relative != relative else relative
