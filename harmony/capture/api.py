"""The way in: ``capture`` a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harmony.capture.graph.trace_set import first_traces
from harmony.capture.replay.captured import Captured
from harmony.capture.replay.inputs import Batch
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.trace.leaves import choose_leaves
from harmony.capture.trace.program import Program
from harmony.capture.trace.refuse import check_backward_hooks, check_module
from harmony.capture.trace.tracer import Tracer
from harmony.core.warn import warn
from harmony.errors import ConfigError


def capture(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    targets: Any = None,
    output_loss: bool = False,
    max_layer_nbytes: int | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    target: torch.device | None = None,
    known: Captured | None = None,
    param_dtype: torch.dtype | None = None,
) -> Captured:
    """Record the forward of a module and cut it into layers.

    Nothing is computed and no parameter is copied: the parameters are fake tensors meanwhile
    (unless the forward looks at values). The module, its buffers and all random states are left
    as they were.

    Without ``loss`` and ``output_loss`` the outputs of the graph are the tensors that the module
    returns; otherwise its one output is the scalar loss, which belongs to the last layer.

    Args:
        args, kwargs: a sample batch; its structure and shapes stand for all later ones.
        loss: maps ``(output, targets)`` to the loss; the tensors in ``targets`` are inputs of the
            graph too.
        output_loss: the module returns its loss itself: a scalar, an object or dict with
            ``loss``, or a tuple that begins with a scalar.
        max_layer_nbytes: open blocks with more bytes of parameters than this.
        batch_dims: the dimension that counts the samples of an input (None: it has none), by name
            (``"args[0]"``, ``"kwargs['mask']"``, ``"targets"``), where it is not dimension 0.
        target: the device that the layers will run on.
        known: a capture of the same module and loss for inputs of another length, which may spare
            half of the work.
        param_dtype: the type that parameters of floating point are computed with; None: as they
            are.

    Raises:
        CaptureError: naming what cannot be recorded, where, and what to change.
        ConfigError: if the options contradict each other.
    """
    if loss is not None and output_loss:
        raise ConfigError("give either loss or output_loss=True, not both")
    if targets is not None and loss is None:
        raise ConfigError(
            "targets are given without a loss that takes them: Harmony(module, loss_fn=...), or "
            "give none if the module returns its loss"
        )
    check_module(module)
    batch = Batch.of(args, kwargs or {}, targets, batch_dims or {}).detached()
    template = ModuleShell(module, torch.device("cpu"), param_dtype)
    _switch_off_caches(template.root)
    program = Program(loss, output_loss)
    leaves = choose_leaves(template.root, max_layer_nbytes)
    tracer = Tracer(module, template, program, batch, leaves, target or torch.device("cpu"))
    return _captured(tracer, template, program, batch, known)


def _captured(
    tracer: Tracer, template: ModuleShell, program: Program, batch: Batch, known: Captured | None
) -> Captured:
    """Trace, and undo what the traces have left in the user's objects."""
    try:
        alike = known.other_length(tracer, batch) if known is not None else None
        sizes = alike or first_traces(tracer, batch.num_samples)
        tracer.warn_of_closed()  # only now: what tries find out is not to be heard
        check_backward_hooks(template.root, tracer.leaves)
        captured = Captured(tracer, template, batch, sizes, program.has_loss)
    finally:
        tracer.outside.restore()
    if captured.eager is None:
        tracer.leave_settled()
    return captured


def _switch_off_caches(root: nn.Module) -> None:
    """Set ``use_cache`` of Hugging Face configurations of the copy to False."""
    configs: list[Any] = [getattr(module, "config", None) for module in root.modules()]
    cached = [config for config in configs if getattr(config, "use_cache", None) is True]
    for config in cached:
        config.use_cache = False
    if cached:
        warn(
            f"{type(root).__name__} is captured with use_cache=False: a KV cache is of no use in "
            "training and would be updated twice by the recompute",
        )
