"""Refuses packs, shares and microbatch sizes that do not make a step of a model."""

from __future__ import annotations

from collections.abc import Sequence

from harmony.core.layergraph import LayerGraph
from harmony.errors import PlanError
from harmony.planner.ir.tasks import Pack, Phase, StepSpec, TaskKind


def check_spec(graph: LayerGraph, spec: StepSpec) -> None:
    """Refuse packs, shares and sizes that do not make a step of this model.

    Raises:
        PlanError: with what is wrong.
    """
    if spec.phase is Phase.TRAIN and graph.loss is None:
        raise PlanError("a training step needs a model that returns its loss; this one has none")
    for name, size in (("forward", spec.forward_size), ("backward", spec.backward_size)):
        if size < 1:
            raise PlanError(f"the {name} microbatch size must be at least 1, not {size}")
    _check_cover("shares", spec.shares, spec.minibatch)
    if spec.phase is not Phase.INFER:
        _check_packs("BACKWARD", spec.backward_packs, graph.num_layers)
    if spec.phase is Phase.TRAIN:
        _check_packs("FORWARD", spec.forward_packs, spec.backward_packs[-1].first)
    elif spec.phase is not Phase.BACKWARD:
        _check_packs("FORWARD", spec.forward_packs, graph.num_layers)
    if len(spec.shares) > 1 and graph.orders_microbatches():
        names = [layer.name for layer in graph.layers if layer.changes_state]
        raise PlanError(
            f"{len(spec.shares)} replicas, but {names[0]} changes its buffers from microbatch to"
            " microbatch, which has to happen in order. Use mode='pp'"
        )
    _check_sizes(graph, spec)
    _check_rounds(graph, spec)
    _check_saved(spec)
    _check_products(graph, spec)
    if not {*spec.late} <= {*spec.backward_packs}:
        raise PlanError(f"late={spec.late}: only BACKWARD packs are updated late")


def _check_packs(kind: str, packs: Sequence[Pack], num_layers: int) -> None:
    _check_cover(f"{kind} packs", [(p.first, p.last) for p in packs], num_layers)


def _check_cover(what: str, ranges: Sequence[tuple[int, int]], end: int) -> None:
    at = 0
    for low, high in ranges:
        if low != at or high <= low:
            raise PlanError(f"the {what} must follow each other from 0 on; {low}:{high} does not")
        at = high
    if at != end:
        raise PlanError(f"the {what} end at {at}, they must end at {end}")


def _check_rounds(graph: LayerGraph, spec: StepSpec) -> None:
    if spec.rounds == 1:
        if spec.interleaved:
            raise PlanError("one round has no other to be interleaved with. Use more rounds")
        return
    count = spec.num_microbatches(0, TaskKind.FORWARD)
    if not 1 <= spec.rounds <= count or -(-count // -(-count // spec.rounds)) != spec.rounds:
        raise PlanError(f"{count} microbatches do not make {spec.rounds} rounds")
    equal = spec.forward_size == spec.backward_size
    if (
        spec.phase is not Phase.TRAIN
        or len(spec.shares) > 1
        or not equal
        or not spec.forward_packs
    ):
        raise PlanError(
            f"{spec.rounds} rounds: only a training step of one replica with FORWARD packs and "
            "equal FORWARD and BACKWARD microbatches has several. Use rounds=1"
        )
    if graph.orders_microbatches():
        names = [layer.name for layer in graph.layers if layer.changes_state]
        raise PlanError(
            f"{spec.rounds} rounds, but {names[0]} changes its buffers from microbatch to "
            "microbatch. Use rounds=1"
        )


def _check_saved(spec: StepSpec) -> None:
    if not spec.kept:
        return
    most = min(spec.runs_of_round(r) for r in range(len(spec.shares)))
    if not 0 <= spec.saved_runs <= most:
        raise PlanError(
            f"saved_runs is between 0 (all) and {most}, the microbatches of a round, not"
            f" {spec.saved_runs}"
        )
    left = most - (spec.saved_runs if spec.saved else 0)
    if not 0 <= spec.products_runs <= left:
        raise PlanError(
            f"products_runs is between 0 (all) and {left}, the microbatches of a round of which"
            f" not everything is saved, not {spec.products_runs}"
        )
    if spec.phase is Phase.INFER or spec.forward_size != spec.backward_size:
        raise PlanError(
            "activations are kept for a backward, and only where FORWARD and BACKWARD"
            f" microbatches are equal, not {spec.forward_size} and"
            f" {spec.backward_size} samples. Leave saved= out"
        )
    both = set(spec.forward_packs).intersection(spec.backward_packs)
    wrong = [pack for pack in spec.kept if pack not in both]
    if wrong:
        raise PlanError(
            f"{wrong[0]} keeps its activations, but is not both a FORWARD and a BACKWARD pack"
        )


def _check_products(graph: LayerGraph, spec: StepSpec) -> None:
    for pack in spec.products:
        if not graph.products_nbytes(pack.first, pack.last, 1):
            raise PlanError(
                f"{pack} keeps the results of its products, but none is known. Leave it out of"
                " products="
            )


def _check_sizes(graph: LayerGraph, spec: StepSpec) -> None:
    forward, backward = spec.forward_size, spec.backward_size
    both = spec.phase in (Phase.TRAIN, Phase.FORWARD) and spec.forward_packs
    if not both or forward == backward:
        return
    sizes = f"FORWARD microbatches of {forward} and BACKWARD microbatches of {backward} samples"
    if graph.pins_microbatch():
        raise PlanError(
            f"{sizes}: a layer draws random numbers or mixes samples, so the recompute would"
            " differ. Use the same size for both"
        )
    if forward % backward:
        raise PlanError(
            f"{sizes}: each BACKWARD microbatch must lie in one FORWARD microbatch."
            f" Use a FORWARD size that is a multiple of {backward}"
        )
