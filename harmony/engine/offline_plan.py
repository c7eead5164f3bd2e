"""Profiles of captured models, and plans for other machines.

`harmony-run --save-profile` and ``--plan-only --gpu NAME``: the layers of a model with the FLOPs
and bytes of each, counted on tensors without memory. Nothing of the model is computed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch

from harmony.capture import Captured, DynamicOnlyError, Footprint
from harmony.capture.cost.costs import costs_nbytes
from harmony.capture.cost.work import TYPE_NAMES
from harmony.core.layergraph import LayerGraph
from harmony.core.options import current_options
from harmony.engine.graph_bytes import with_saved, with_state
from harmony.engine.planned import Measured
from harmony.engine.variant import Variant
from harmony.errors import CaptureError, HarmonyError
from harmony.planner.ir.tasks import Phase
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.predict.simulate import simulate
from harmony.profiling.model_profile import ModelProfile
from harmony.profiling.plan_request import PlanRequest, chosen, machine_and_costs
from harmony.profiling.steady import count_work
from harmony.profiling.update_times import UpdateCost
from harmony.report import session
from harmony.report.metrics import forward_seconds
from harmony.report.session import ModelRecord
from harmony.runtime import native
from harmony.runtime.host.arena_layout import ArenaLayout


def profile_of(
    name: str,
    variant: Variant,
    measured: Measured,
    sizes: Sequence[int],
    minibatch: int,
    *,
    clips: bool,
) -> ModelProfile:
    """The profile of a model that was measured here.

    Args:
        sizes: microbatch sizes to count FLOPs and bytes at.
        clips: see `ModelProfile`.
    """
    return ModelProfile(
        name=name,
        graph=variant.graph,
        costs=measured.costs,
        device=native.product_name(variant.device),
        work=count_work(variant.captured, sizes),
        machine=measured.machine,
        minibatch=minibatch,
        torch_version=torch.__version__,
        phase=variant.phase,
        clips=clips,
        num_params=_num_params(variant.captured),
        dtypes=_dtypes(variant.captured),
    )


def profile_later(
    name: str, variant: Variant, sizes: Sequence[int], minibatch: int, *, clips: bool
) -> Callable[[], ModelProfile]:
    """Return what makes the profile when it is asked for; arguments as for `profile_of`.

    The record that holds it may outlive the model, and must not keep its memory, except where
    nothing but the plan is wanted.
    """
    kept = variant if current_options().plan_only else None
    alive = weakref.ref(variant)

    @functools.cache
    def profile() -> ModelProfile:
        found = kept or alive()
        if found is None or found.measured is None:
            raise HarmonyError("the model is gone, and its profile was never asked for")
        return profile_of(name, found, found.measured, sizes, minibatch, clips=clips)

    return profile


def unmeasured_profile(
    name: str,
    captured: Captured,
    sizes: Sequence[int],
    minibatch: int,
    update: UpdateCost,
    phase: Phase,
    *,
    clips: bool,
) -> ModelProfile:
    """The profile of a model that nothing has run.

    Args:
        update: what the optimizer costs.
    """
    nbytes: Mapping[int, Sequence[Footprint]] = {
        size: costs_nbytes(captured, size) for size in sizes
    }
    rows = [
        {size: LayerCost(0.0, 0.0, 0.0, *nbytes[size][index]) for size in sizes}
        for index in range(captured.graph.num_layers)
    ]
    return ModelProfile(
        name=name,
        graph=with_saved(_with_state(captured, update), nbytes),
        costs=CostTable(tuple(rows)),
        work=count_work(captured, sizes),
        minibatch=minibatch,
        torch_version=torch.__version__,
        phase=phase,
        clips=clips,
        num_params=_num_params(captured),
        dtypes=_dtypes(captured),
    )


def _num_params(captured: Captured) -> int:
    return sum(torch.Size(param.shape).numel() for param in captured.params)


def _dtypes(captured: Captured) -> dict[str, str]:
    """Types of what is kept of the parameters, by kind."""
    trained = [param for param in captured.params if param.requires_grad]
    kinds = {
        "weights": {param.dtype for param in captured.params},
        "masters": {param.master for param in captured.params if param.master is not None},
        "gradients": {param.as_master().dtype for param in trained},
    }
    names = {
        kind: " and ".join(sorted(_name_of(dtype) for dtype in dtypes))
        for kind, dtypes in kinds.items()
        if dtypes
    }
    # Optimizers keep their state in the type of what they update.
    return names | ({"optimizer": names["gradients"]} if trained else {})


def _name_of(dtype: torch.dtype) -> str:
    return TYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _with_state(captured: Captured, update: UpdateCost) -> LayerGraph:
    graph = captured.graph
    trained = [param.as_master() for param in captured.params if param.requires_grad]
    layout = ArenaLayout(trained, graph.num_layers, len(graph.shared))
    return with_state(graph, layout, update)


@contextmanager
def only_captured() -> Iterator[None]:
    """Refuse, in the block, models whose layers cannot be known without running them.

    Raises:
        CaptureError: with the reason.
    """
    try:
        yield
    except DynamicOnlyError as reason:
        raise CaptureError(
            f"{reason.reason} ({reason.where}), so the layers are known only where the model"
            " runs: plan for this machine, without --gpu"
        ) from reason


def plan_elsewhere(
    profile: ModelProfile, record: ModelRecord, mode: str, microbatch_size: int | None
) -> NoReturn:
    """Plan for the machine that the command line describes, and end the script.

    Raises:
        PlanOnly: with the plan in the record.
        DoesNotFitError: if nothing fits there.
    """
    options = current_options()
    request = PlanRequest(
        gpu=options.gpu,
        gpus=options.gpus,
        host_memory_nbytes=options.host_memory_nbytes,
        gpu_memory_nbytes=options.gpu_memory_nbytes,
        host=options.host,
        topology=options.topology,
        mode=mode,
        microbatch_size=microbatch_size,
        tf32=torch.get_float32_matmul_precision() != "highest",
        overlap_updates=options.overlap_updates,
    )
    assert profile.minibatch is not None
    task = machine_and_costs(request, profile, profile.minibatch)
    plan = chosen(request, task)
    record.profile = lambda: profile
    record.planned_for = (*task.notes, task.costs_from)
    model = profile.graph, task.costs, task.machine
    record.forward_s = forward_seconds(plan, *model)
    record.planned(plan, simulate(plan.schedule, *model), (profile.graph, task.costs))
    raise session.PlanOnly(record)
