"""Saved profiles of models: layers, costs, FLOPs and where they were measured, in one JSON file.

Written by `harmony-run --save-profile FILE train.py`, read by `harmony-run plan`. Profiles in the
format of the original Harmony's published ones are read too (`harmony.profiling.original_format`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harmony.core.files import DAMAGED, check_types, read_json, write_json
from harmony.core.layergraph import Layer, LayerGraph, SharedParam, Value, check_graph
from harmony.core.machine import Machine
from harmony.errors import PlanError
from harmony.planner.ir.tasks import Phase
from harmony.planner.predict.cost import CostTable
from harmony.profiling.analytic import WorkTable, analytic_costs, scaled_costs
from harmony.profiling.catalog import Gpu, known_gpu

FORMAT = "harmony-model-profile"
VERSION = 1

PAPER_GPU = "GTX 1080 Ti"
"""What the original Harmony's published profiles were measured on."""


@dataclass(frozen=True)
class ModelProfile:
    """A model and what its layers cost, as far as it is known.

    Attributes:
        name: of the model, for people.
        graph: its layers, optimizer state included.
        costs: bytes of layers; seconds where they were measured.
        device: the name of the GPU whose seconds those are; empty if none has run the layers.
        work: FLOPs and bytes of layers; None where nobody counted them.
        machine: the server that it was measured on, if any.
        minibatch: samples of the batch that it was captured with; None if unknown.
        torch_version: of PyTorch then.
        phase: ``TRAIN`` where Harmony trains whole steps, ``BACKWARD`` where the loop is the
            script's own.
        clips: whether the norm of all gradients is needed before the first update, which then
            cannot be on a GPU.
        num_params: elements of all parameters; 0 if unknown.
        dtypes: of weights, masters, gradients and the optimizer's state; none where unknown.
    """

    name: str
    graph: LayerGraph
    costs: CostTable
    device: str = ""
    work: WorkTable | None = None
    machine: Machine | None = None
    minibatch: int | None = None
    torch_version: str = ""
    phase: Phase = Phase.TRAIN
    clips: bool = False
    num_params: int = 0
    dtypes: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """What plans for the model carry (`LayerGraph.fingerprint`)."""
        return self.graph.fingerprint

    @property
    def host_notes(self) -> tuple[str, ...]:
        """What a parameter takes on the host, in words; nothing where nobody counted them."""
        if not self.num_params:
            return ()
        parts = state_nbytes(self.graph)
        shown = [
            f"{name} {nbytes / self.num_params:.3g}{self._dtype_of(name)}"
            for name, nbytes in parts.items()
        ]
        total = sum(parts.values()) / self.num_params
        return (
            f"{_counted(self.num_params)} parameters, {total:.3g} bytes each on the host: "
            f"{', '.join(shown)}",
        )

    def _dtype_of(self, kind: str) -> str:
        return f" ({self.dtypes[kind]})" if self.dtypes.get(kind) else ""

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that ``from_json`` reads back."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "device": self.device,
            "minibatch": self.minibatch,
            "torch_version": self.torch_version,
            "phase": self.phase.value,
            "clips": self.clips,
            "num_params": self.num_params,
            "dtypes": dict(self.dtypes),
            "graph": graph_to_json(self.graph),
            "costs": self.costs.to_json(),
            "work": None if self.work is None else self.work.to_json(),
            "machine": None if self.machine is None else self.machine.to_json(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ModelProfile:
        """Read what ``to_json`` wrote.

        Raises:
            PlanError: if it is no profile, of another version, or damaged.
        """
        if data.get("format") != FORMAT:
            raise PlanError("it is not a model profile of Harmony")
        if data.get("version") != VERSION:
            raise PlanError(
                f"it is of version {data.get('version')}, this Harmony reads {VERSION}: save it"
                " again with harmony-run --save-profile"
            )
        try:
            profile = _read(data)
        except DAMAGED as error:
            raise PlanError(f"it is damaged: {error!r}") from None
        if data.get("fingerprint") != profile.fingerprint:
            raise PlanError("it was changed after it was saved: its fingerprint does not match")
        return profile

    def costs_on(
        self, gpu: Gpu, host_bytes_per_s: float, minibatch: int, *, tf32: bool = False
    ) -> tuple[CostTable, str]:
        """Return the costs of the layers on a GPU, and in words where they come from.

        Measured ones if it is the GPU that was measured; else the roofline of FLOPs and bytes;
        else measured ones scaled by the ratio of fp32 rates.

        Args:
            host_bytes_per_s: memory bandwidth of the host that updates run on.
            tf32: whether products of fp32 may run as TF32.

        Raises:
            PlanError: if neither is known.
        """
        measured = known_gpu(self.device) if self.device else None
        if measured is gpu and not tf32:
            return self.costs, f"measured on {self.device}"
        if self.work is not None:
            costs = analytic_costs(
                self.graph, self.work, self.costs, gpu, host_bytes_per_s, minibatch, tf32=tf32
            )
            source = f"analytic: FLOPs and bytes at the rates of a {gpu.name}, nothing measured"
            return costs, source
        if measured is not None:
            factor = gpu.achievable("fp32") / measured.achievable("fp32")
            return scaled_costs(self.costs, measured, gpu), (
                f"measured on {measured.name}, {factor:.2g} times as fast here by fp32 rates"
            )
        raise PlanError(
            f"the profile of {self.name} has no FLOPs, and its times are of"
            f" {self.device or 'no GPU'}, which is not in the catalog: they say nothing about a"
            f" {gpu.name}. Save the profile again with harmony-run --save-profile"
        )


def _read(data: Mapping[str, Any]) -> ModelProfile:
    work, machine = data["work"], data["machine"]
    graph = graph_from_json(data["graph"])
    costs = CostTable.from_json(data["costs"])
    if len(costs.by_layer) != graph.num_layers:
        raise ValueError(f"{graph.num_layers} layers, costs of {len(costs.by_layer)}")
    profile = ModelProfile(
        name=str(data["name"]),
        graph=graph,
        costs=costs,
        device=str(data["device"]),
        work=None if work is None else WorkTable.from_json(work),
        machine=None if machine is None else Machine.from_json(machine),
        minibatch=data["minibatch"],
        torch_version=str(data["torch_version"]),
        phase=Phase(data["phase"]),
        clips=data["clips"],
        num_params=data["num_params"],
        dtypes={str(kind): str(name) for kind, name in data.get("dtypes", {}).items()},
    )
    check_types(profile, ModelProfile)
    counted = graph.num_layers if profile.work is None else len(profile.work.by_layer)
    if counted != graph.num_layers:
        raise ValueError(f"{graph.num_layers} layers, work of {counted}")
    if profile.num_params < 0 or (profile.minibatch or 1) < 1:
        raise ValueError(f"{profile.num_params} parameters, minibatch {profile.minibatch}")
    return profile


def _counted(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def state_nbytes(graph: LayerGraph) -> dict[str, int]:
    """Bytes that training keeps on the host from step to step, by kind; those there are."""
    parts = {
        "weights": graph.weight_nbytes(),
        "masters": graph.master_nbytes(),
        "gradients": graph.gradient_nbytes(),
        "optimizer": graph.state_nbytes(),
    }
    return {kind: nbytes for kind, nbytes in parts.items() if nbytes}


def graph_to_json(graph: LayerGraph) -> dict[str, Any]:
    """A plain dictionary that `graph_from_json` reads back."""
    return asdict(graph)


def graph_from_json(data: Mapping[str, Any]) -> LayerGraph:
    """Read what `graph_to_json` wrote.

    Raises:
        TypeError, ValueError: if something is of another type, or makes no sense.
    """
    graph = LayerGraph(
        tuple(Layer(**_tuples(layer)) for layer in data["layers"]),
        tuple(Value(**_tuples(value)) for value in data["values"]),
        tuple(SharedParam(**_tuples(param)) for param in data["shared"]),
        data["loss"],
        str(data.get("whole_batch", "")),
        tuple(data.get("sizes", ())),
    )
    check_types(graph, LayerGraph)
    check_graph(graph)
    return graph


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


def save_profile(profile: ModelProfile, path: Path) -> None:
    """Write a profile, so that nobody ever sees half of one.

    Raises:
        ConfigError: if it cannot be written.
    """
    write_json(profile.to_json(), path, "the profile")


def load_profile(path: Path) -> ModelProfile:
    """Read a profile: ours, or one of the original Harmony.

    Raises:
        ConfigError: if there is no such file.
        PlanError: if it cannot be read.
    """
    data = read_json(path, "model profile")
    try:
        if "time_s_FWD" in data:
            return _of_the_paper(data, path)
        return ModelProfile.from_json(data)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def _of_the_paper(data: Mapping[str, Any], path: Path) -> ModelProfile:
    from harmony.profiling.original_format import parse_profile, to_layers

    graph, costs = to_layers(parse_profile(data))
    elements = sum(int(nbytes) for nbytes in data["W"]) // 4  # theirs are fp32 throughout
    return ModelProfile(
        str(data.get("model", path.stem)), graph, costs, PAPER_GPU, num_params=elements
    )
