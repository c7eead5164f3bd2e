"""What a plan is asked for, and the machine and costs that the request names.

Serves ``harmony-run plan`` and ``harmony-run --plan-only --gpu NAME``; needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from harmony.core.machine import Machine
from harmony.core.units import format_bytes, format_rate, format_seconds
from harmony.errors import ConfigError
from harmony.planner.ir.plan import Plan
from harmony.planner.predict.cost import CostTable
from harmony.planner.search.search import choose
from harmony.profiling.catalog import (
    Gpu,
    HostKind,
    find_gpu,
    find_host,
    known_gpu,
    machine_of,
    usual_host,
)
from harmony.profiling.model_profile import ModelProfile


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned, as the words say; None where they do not.

    Attributes:
        model_profile: the model's layers and costs.
        model: or its configuration (see `harmony.integrations.model_config`), with
        tokens, precision, lora: what it says of a training.
        gpu: the name of a GPU of the catalog; None for the machine of the profile.
        gpus: how many.
        host_memory_nbytes, gpu_memory_nbytes: limits.
        host, topology: names of the catalog.
        link_bytes_per_s: of each GPU's link to the host.
        minibatch: samples of a step.
        mode, microbatch_size: as for `harmony.planner.search.search.choose`.
        tf32: whether products of fp32 may run as TF32.
        clips: whether gradients are clipped by their norm, also where the profile does not say so.
        overlap_updates: whether updates may run into the next step.
        servers: how many train together, each such a machine with its part of the batch.
        shard_optimizer_state: whether each of them keeps its part of the optimizer's state.
        network_bytes_per_s: of each server's network, each way.
        plan: a saved plan to show instead of searching for one.
        save_plan, save_profile: where to keep the plan, and what was counted of the model.
        report: a file that shows the plan as well.
        compare: two saved plans, or names of GPUs, to compare.
        as_json, explain: how much to show, and how.
        smallest_minibatch, largest_model: further questions.
        list_gpus: show the catalog.
        debug: whether errors of Harmony show their traceback.
    """

    model_profile: Path | None = None
    model: str | None = None
    tokens: int | None = None
    precision: str | None = None
    lora: int | None = None
    gpu: str | None = None
    gpus: int | None = None
    host_memory_nbytes: int | None = None
    gpu_memory_nbytes: int | None = None
    host: str | None = None
    topology: str | None = None
    link_bytes_per_s: float | None = None
    minibatch: int | None = None
    mode: str = "auto"
    microbatch_size: int | None = None
    tf32: bool = False
    clips: bool = False
    overlap_updates: bool = False
    servers: int = 1
    shard_optimizer_state: bool = False
    network_bytes_per_s: float | None = None
    plan: Path | None = None
    save_plan: Path | None = None
    save_profile: Path | None = None
    report: Path | None = None
    compare: tuple[str, ...] = ()
    as_json: bool = False
    explain: bool = False
    smallest_minibatch: bool = False
    largest_model: bool = False
    list_gpus: bool = False
    debug: bool = False


@dataclass(frozen=True)
class Task:
    """What is to be planned, once all words of the command line have been understood.

    Attributes:
        costs_from: in words where the costs come from.
        notes: what was assumed of the machine.
    """

    profile: ModelProfile
    costs: CostTable
    machine: Machine
    minibatch: int
    costs_from: str
    notes: tuple[str, ...]


def chosen(request: PlanRequest, task: Task) -> Plan:
    """The fastest plan that fits.

    Raises:
        DoesNotFitError: if none does.
    """
    return choose(
        task.profile.graph,
        task.costs,
        task.machine,
        task.minibatch,
        mode=request.mode,
        microbatch_size=request.microbatch_size or "auto",
        phase=task.profile.phase,
    )


def machine_and_costs(request: PlanRequest, profile: ModelProfile, minibatch: int) -> Task:
    """Describe the machine of a request, and find the costs of a model on it.

    Raises:
        ConfigError: if something is missing or unknown.
        PlanError: if the profile says nothing about the machine.
    """
    check_servers(request)
    gpu = _gpu_of(request, profile)
    if gpu is None:
        machine, notes = _measured_machine(request, profile)
        machine = _with_updates(machine, request, profile)
        source = f"measured on {profile.device}"
        return _of_server(request, profile, profile.costs, machine, minibatch, source, notes)
    if request.host_memory_nbytes is None:
        raise ConfigError(
            "--host-memory: how much memory has the host of that machine? E.g. 256GiB"
        )
    count = request.gpus or 1
    host = usual_host(gpu, count) if request.host is None else find_host(request.host)
    machine = machine_of(
        gpu,
        count,
        request.host_memory_nbytes,
        topology=request.topology,
        host=host,
        gpu_memory_nbytes=request.gpu_memory_nbytes,
        link_bytes_per_s=request.link_bytes_per_s,
    )
    costs, source = profile.costs_on(gpu, host.bytes_per_s, minibatch, tf32=request.tf32)
    notes = _notes(gpu, host, machine)
    machine = _with_updates(machine, request, profile)
    return _of_server(request, profile, costs, machine, minibatch, source, notes)


def check_servers(request: PlanRequest) -> None:
    """Refuse what several servers cannot do, or one does not have.

    Raises:
        ConfigError: naming the option.
    """
    for name in ("shard_optimizer_state", "network_bytes_per_s"):
        if request.servers == 1 and getattr(request, name):
            option = name.removesuffix("_bytes_per_s").replace("_", "-")
            raise ConfigError(f"--{option} is about several servers: add --servers N")
    if request.shard_optimizer_state and request.overlap_updates:
        raise ConfigError("--shard-optimizer-state and --overlap-updates: leave one of them out")


def _of_server(
    request: PlanRequest,
    profile: ModelProfile,
    costs: CostTable,
    machine: Machine,
    minibatch: int,
    source: str,
    notes: tuple[str, ...],
) -> Task:
    """What one of several servers is to do: its host keeps and updates its part of the state."""
    if request.shard_optimizer_state:
        parts, graph = request.servers, profile.graph
        layers = tuple(replace(x, state_nbytes=-(-x.state_nbytes // parts)) for x in graph.layers)
        shared = tuple(replace(x, state_nbytes=-(-x.state_nbytes // parts)) for x in graph.shared)
        profile = replace(profile, graph=replace(graph, layers=layers, shared=shared))
        rows = (
            {size: replace(cost, update_s=cost.update_s / parts) for size, cost in row.items()}
            for row in costs.by_layer
        )
        costs = CostTable(tuple(rows))
    if request.servers > 1:
        notes = (*notes, _network_note(request, profile))
    return Task(profile, costs, machine, minibatch, source, (*notes, *profile.host_notes))


def _network_note(request: PlanRequest, profile: ModelProfile) -> str:
    """What a server sends in a step: gradients, or half of that in gradients, half in weights."""
    count = request.servers
    nbytes = 2 * (count - 1) * profile.graph.gradient_nbytes() // count
    takes = ""
    if request.network_bytes_per_s is not None:
        rate = request.network_bytes_per_s
        takes = f", {format_seconds(nbytes / rate)} at {format_rate(rate)} (not in the step time)"
    state = ""
    if request.shard_optimizer_state:
        state = f"; each keeps 1/{count} of the optimizer's state"
    return (
        f"{count} servers like this one, each with a batch of its own: a step sends "
        f"{format_bytes(nbytes)} from each{takes}{state}"
    )


def _with_updates(machine: Machine, request: PlanRequest, profile: ModelProfile) -> Machine:
    """The machine, without updates on its GPUs where they have to wait for all gradients."""
    machine = replace(machine, updates_overlap=request.overlap_updates)
    if not (profile.clips or request.clips or request.servers > 1):
        return machine
    devices = tuple(replace(device, update_bytes_per_s=0.0) for device in machine.devices)
    return replace(machine, devices=devices, updates_wait=True)


def _gpu_of(request: PlanRequest, profile: ModelProfile) -> Gpu | None:
    """The GPU to plan for; None for the machine that the profile was measured on."""
    if request.gpu is not None:
        return find_gpu(request.gpu)
    if profile.machine is not None and not (request.host or request.topology or request.tf32):
        return None
    measured = known_gpu(profile.device) if profile.device else None
    if measured is None:
        raise ConfigError(
            '--gpu: which GPU? E.g. --gpu "RTX 4090"; harmony-run plan --list-gpus shows all'
        )
    return measured


def _measured_machine(
    request: PlanRequest, profile: ModelProfile
) -> tuple[Machine, tuple[str, ...]]:
    """The machine that a profile was measured on, with what the request changes of it."""
    machine = profile.machine
    assert machine is not None
    devices = machine.devices
    notes = ["as measured when the profile was saved"]
    if request.gpus is not None and request.gpus != len(devices):
        if request.gpus > len(devices):
            notes.append(f"it had {len(devices)} GPUs: the others are taken to be like the first")
        devices = tuple(devices[min(i, len(devices) - 1)] for i in range(request.gpus))
    if request.gpu_memory_nbytes is not None:
        devices = tuple(replace(d, memory_nbytes=request.gpu_memory_nbytes) for d in devices)
    if request.link_bytes_per_s is not None:
        rate = request.link_bytes_per_s
        devices = tuple(replace(d, h2d_bytes_per_s=rate, d2h_bytes_per_s=rate) for d in devices)
    host = machine.host
    if request.host_memory_nbytes is not None:
        host = replace(host, memory_nbytes=request.host_memory_nbytes)
    kept = range(len(devices))
    switches = tuple(
        replace(switch, devices=tuple(i for i in switch.devices if i in kept))
        for switch in machine.switches
        if any(i in kept for i in switch.devices)
    )
    return replace(machine, devices=devices, host=host, switches=switches), (", ".join(notes),)


def _notes(gpu: Gpu, host: HostKind, machine: Machine) -> tuple[str, ...]:
    first = machine.devices[0]
    peers = "NVLink" if machine.peer_links == "direct" else "the host's links"
    between = ""
    if machine.num_devices > 1:
        between = f", {format_rate(first.p2p_bytes_per_s)} between GPUs over {peers}"
    shared = ", two GPUs share one link" if machine.switches else ""
    return (
        f"{format_rate(first.h2d_bytes_per_s)} each way between host and GPU{shared}{between};"
        f" host {host.name}, {host.about}: {format_rate(host.bytes_per_s)};"
        f" {format_bytes(first.memory_nbytes)} usable of each GPU",
        f"{gpu.name} after {gpu.source}",
    )
