"""What a checkpoint holds of a training run, and how it comes back."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmony.capture.state.random_state import GeneratorStates
from harmony.checkpoint.attributes import Attributes, set_attributes
from harmony.checkpoint.companions import files_beside, is_companion
from harmony.checkpoint.module_tensors import buffers_besides, set_buffers, targets_in, weights_of
from harmony.checkpoint.optimizers import check_state, is_of, load_state, state_of
from harmony.checkpoint.random_states import RandomStates
from harmony.checkpoint.saving import STATE, VALUES, WEIGHTS, Snapshot
from harmony.checkpoint.shards import RemoteState, described
from harmony.checkpoint.store import Stored, found_in, places_of, read_manifest
from harmony.checkpoint.tree import decode, encode
from harmony.core.files import DAMAGED, check_types
from harmony.core.units import format_bytes
from harmony.core.version import __version__
from harmony.core.warn import warn
from harmony.engine.engine import Engine
from harmony.engine.precision import FP32
from harmony.engine.resumed import BitChoices
from harmony.errors import ConfigError, DoesNotFitError, HarmonyError
from harmony.runtime.host.limits import available_host_nbytes
from harmony.runtime.host.pinned_memory import new_tensor
from harmony.runtime.interrupts import held_back
from harmony.runtime.unsaved import Key, Unit, Unsaved
from harmony.weights.checkpoint_files import StoredTensor

SHARD = "shard"
"""What of `own_part` describes the optimizer's state that a process keeps."""


@dataclass(frozen=True)
class Restored:
    """What `Harmony.load_checkpoint` has read.

    Attributes:
        folder: the checkpoint.
        step: steps trained until then.
        extra: what was given to `Harmony.save_checkpoint` as ``extra``.
        skipped: why newer checkpoints were passed over.
    """

    folder: Path
    step: int
    extra: Any
    skipped: tuple[str, ...] = ()


def snapshot(
    engine: Engine,
    attributes: Attributes,
    objects: Mapping[str, Any],
    extra: Any,
    processes: Sequence[Mapping[str, Any]] = (),
    remote: RemoteState | None = None,
) -> Snapshot:
    """Note all that a run consists of; no parameter and no optimizer state is copied for it.

    Args:
        processes: what each of several processes has of its own (see `own_part`).
        remote: the optimizer's state that other processes keep.

    Raises:
        ConfigError: if something cannot be saved.
    """
    beside = files_beside(engine.net, objects)
    objects = _with_state(objects)
    weights, shared, others = weights_of(engine.net)
    choices = engine.bit_choices()
    changed, generators = attributes.changed()
    random = RandomStates.now()
    optimizer = state_of(engine.optimizer, engine.net)
    if remote is not None:
        remote.put_into(optimizer)
    held = {name: _of_object(name, held, engine.net) for name, held in objects.items()}
    data = {
        "extra": extra,
        "shared": shared,
        "module": others,
        "attributes": changed,
        "generators": generators,
        "trained": {name: p.requires_grad for name, p in engine.net.named_parameters()},
        "buffers": buffers_besides(engine.net),
        "gradients": _gradients(engine),
        "num_steps": engine.num_steps,
        "seed": engine.options.seed,
        "precision": engine.options.precision.name,
        "grad_scaler": None if engine.grad_scaler is None else engine.grad_scaler.state_dict(),
        "choices": None if choices is None else choices.as_data(),
        "optimizer": optimizer,
        "objects": held,
        "random": {"host": tuple(random.host), "cuda": random.devices},
        "processes": list(processes),
        "versions": {"harmony": __version__, "torch": str(torch.__version__)},
    }
    state: dict[str, torch.Tensor] = {}
    encoded = {name: encode(value, name, state) for name, value in data.items()}
    tensors = {(WEIGHTS, n): t for n, t in weights.items()}
    tensors.update({(STATE, n): t for n, t in state.items()})
    ours = [held[name] for name, kept in objects.items() if is_of(kept, engine.net)]
    units = _units(engine.net, tensors, [optimizer, *ours])
    for unit in units:
        for key in unit.tensors:
            del tensors[key]
    two_packs = engine.two_packs_nbytes({unit.name: unit.nbytes for unit in units})
    unsaved = Unsaved(units, min(two_packs, available_host_nbytes() // 2))
    taken = Snapshot(engine.num_steps, encoded, beside, tensors, unsaved)
    return taken if remote is None else replace(taken, fetch=remote.fetch)


def own_part(engine: Engine, objects: Mapping[str, Any], extra: Any) -> bytes:
    """What one of several processes has of its own, for the one that writes the checkpoint.

    Raises:
        ConfigError: if something cannot be saved.
    """
    random = RandomStates.now()
    held = {n: _of_object(n, h, engine.net) for n, h in _with_state(objects).items()}
    data = {
        "extra": extra,
        "objects": held,
        "random": {"host": tuple(random.host), "cuda": random.devices},
    }
    if engine.options.owners is not None:
        data[SHARD] = described(engine.optimizer, engine.net)
    tensors: dict[str, torch.Tensor] = {}
    values = json.dumps({name: encode(value, name, tensors) for name, value in data.items()})
    file = io.BytesIO()
    torch.save({"values": values, "tensors": tensors}, file)
    return file.getvalue()


def part_of(data: bytes) -> dict[str, Any]:
    """What `own_part` has made bytes of."""
    held = torch.load(io.BytesIO(data), weights_only=True)
    values, tensors = json.loads(held["values"]), held["tensors"]
    return {name: decode(value, tensors.__getitem__) for name, value in values.items()}


def _of_process(data: dict[str, Any], engine: Engine, folder: Path) -> dict[str, Any]:
    """What a checkpoint holds for this process, where several have written or read it."""
    parts = data.get("processes") or []
    check_types(parts, list)
    for part in parts:
        check_types(part, dict[str, Any])
    group = None if engine.peers is None else engine.peers.group
    now, rank = (1, 0) if group is None else (group.size, group.rank)
    if now != max(1, len(parts)) and rank == 0:
        warn(
            f"{folder} was saved by {max(1, len(parts))} processes and is loaded by {now}: "
            "parameters and optimizer are the same, but random states and the position in the "
            "data are those of processes before, taken in turn, and another number of parts is "
            "another average"
        )
    return {**data, **parts[rank % len(parts)]} if parts else data


def _units(
    net: nn.Module, tensors: Mapping[Key, torch.Tensor], optimizers: Sequence[Any]
) -> list[Unit]:
    """The parameters with their state in optimizers; about in the order of a step's updates."""
    keys: dict[int, list[Key]] = {}
    for key, tensor in tensors.items():
        keys.setdefault(id(tensor), []).append(key)
    units = []
    for name, param in reversed(list(net.named_parameters())):
        found: dict[str, torch.Tensor] = {}
        encode([o["state"].get(name) for o in optimizers if o is not None], "", found)
        held = {id(t): t for t in (param, *found.values())}
        own = {key: tensor for at, tensor in held.items() for key in keys.pop(at, ())}
        if own:
            units.append(Unit(name, param, own))
    return units


def load_training(
    engine: Engine, root: Path, objects: Mapping[str, Any], skip_damaged: bool
) -> Restored:
    """Bring a run back to a checkpoint; nothing changes unless all of it is whole and fits.

    Raises:
        ConfigError, HarmonyError: as `Harmony.load_checkpoint`.
    """
    objects = _with_state(objects)
    elsewhere = _kept_elsewhere(engine)
    read, skipped = _newest(root, skip_damaged, elsewhere)
    stored = read.stored
    data, random, choices = _decoded(read, engine)
    optimizer, saved = data["optimizer"], data["objects"]
    _check_objects(stored, objects, saved)
    targets = targets_in(engine.net, stored, read.weights, data["shared"])
    check_state(engine.optimizer, engine.net, optimizer, "the optimizer")
    for name, held in objects.items():
        if is_of(held, engine.net):
            check_state(held, engine.net, saved[name], name)
    if optimizer is not None:
        optimizer["state"] = {n: s for n, s in optimizer["state"].items() if n not in elsewhere}
    with _trying(stored):  # the one thing that can be tried first
        random.restore()
    with held_back(), engine.whole.together() as begun, _setting(stored):
        begun.append("the state of a checkpoint")
        _set_weights(read, targets)
        _set_module(engine.net, data)
        load_state(engine.optimizer, engine.net, optimizer)
        if engine.grad_scaler is not None and data.get("grad_scaler"):
            engine.grad_scaler.load_state_dict(data["grad_scaler"])
        for name, held in objects.items():
            if is_of(held, engine.net):
                load_state(held, engine.net, saved[name])
            else:
                held.load_state_dict(saved[name])
        engine.num_steps, engine.options.seed = data["num_steps"], data["seed"]
        engine.resumed = engine.variants.kept = choices
        engine.whole.is_as_before()
        engine.variants.activate(None)  # what stays on devices is of another step
    random.restore()
    before, now = data.get("precision", FP32.name), engine.options.precision.name
    if before != now:
        warn(
            f"the run of {stored.folder} computed with precision={before!r}, this one does with "
            f"{now!r}: it goes on from the same parameters, but not to the same results"
        )
    return Restored(stored.folder, stored.step, data["extra"], skipped)


def _decoded(
    read: _Read, engine: Engine
) -> tuple[dict[str, Any], RandomStates, BitChoices | None]:
    """Return what a checkpoint holds for this process beside the weights.

    Raises:
        ConfigError: if something is not of the type that it has to be.
    """
    try:
        data = {n: decode(v, read.state.__getitem__) for n, v in read.values.items()}
        data = {"gradients": {}, **_of_process(data, engine, read.stored.folder)}
        check_types((data["num_steps"], data["seed"]), tuple[int, int])
        choices = None if data["choices"] is None else BitChoices.of_data(data["choices"])
        random = RandomStates(GeneratorStates(*data["random"]["host"]), data["random"]["cuda"])
        check_types(data["trained"], dict[str, bool])
        check_types(data["gradients"], dict[str, torch.Tensor])
        for name in ("buffers", "attributes", "generators", "shared", "objects"):
            check_types(data[name], dict[Any, Any])
        _ = data["optimizer"], data["module"], data["extra"]  # they have to be there
    except DAMAGED as error:
        raise ConfigError(
            f"{read.stored.folder / VALUES}: it cannot be read ({error!r})"
        ) from None
    return data, random, choices


def _set_module(net: nn.Module, data: Mapping[str, Any]) -> None:
    """Give a module all that a checkpoint holds of it beside the weights."""
    if data["module"]:
        net.load_state_dict(data["module"], strict=False)
    set_attributes(net, data["attributes"], data["generators"])
    set_buffers(net, data["buffers"])
    for name, param in net.named_parameters():
        param.requires_grad_(data["trained"][name])
        param.grad = data["gradients"].get(name)


@contextmanager
def _trying(stored: Stored) -> Iterator[None]:
    """Take back what the block does to random states; refuse those that are none."""
    before = GeneratorStates.now()
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{stored.folder / VALUES}: it holds no random states ({why})") from None
    finally:
        before.restore()


@contextmanager
def _setting(stored: Stored) -> Iterator[None]:
    """Say what has become of a checkpoint of which not all can be set, though it is undamaged."""
    try:
        yield
    except HarmonyError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise HarmonyError(
            f"{stored.folder}: not all that it holds can be set ({why}). Load another checkpoint "
            "before training goes on"
        ) from error


@dataclass(frozen=True)
class _Read:
    """A checkpoint all of which is whole.

    Attributes:
        values: what is no tensor, as JSON.
        state: tensors that go to no tensor of the module.
        weights: the module's, which are still to be filled in.
        held: the weights' values, by name; none where the host has no memory for them.
    """

    stored: Stored
    values: dict[str, Any]
    state: dict[str, torch.Tensor]
    weights: dict[str, StoredTensor]
    held: dict[str, torch.Tensor]


def _kept_elsewhere(engine: Engine) -> frozenset[str]:
    """The parameters whose optimizer state other processes keep."""
    owners = engine.options.owners
    if owners is None:
        return frozenset()
    owners.assign(engine.net.named_parameters())
    return frozenset(n for n, _ in engine.net.named_parameters() if not owners.is_mine(n))


def _newest(
    root: Path, skip_damaged: bool, elsewhere: frozenset[str]
) -> tuple[_Read, tuple[str, ...]]:
    folders = found_in(root)
    if not folders:
        raise ConfigError(f"there are no checkpoints in {root}: no folder step-N")
    skipped: list[str] = []
    for number, folder in enumerate(folders):
        try:
            return _read(folder, elsewhere), tuple(skipped)
        except ConfigError as error:
            skipped.append(str(error))
            older = folders[number + 1 :]
            if not skip_damaged:
                hint = f". The one before is {older[0]}" if older else ""
                raise ConfigError(f"{error}{hint}") from None
    raise ConfigError(f"no checkpoint in {root} is whole. {skipped[0]}")


def _is_of(path: str, names: frozenset[str]) -> bool:
    """Whether a tensor, by its path, is of the optimizer's state of one of these parameters."""
    start = "optimizer.state."
    name = path.removeprefix(start) if path.startswith(start) else ""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return bool(name)


def _read(folder: Path, elsewhere: frozenset[str] = frozenset()) -> _Read:
    """Read all files of a checkpoint once.

    The module's weights are held beside it until all is known to be whole. Where that would take
    more than half of the host's free memory, they are compared only, and read again.

    Args:
        elsewhere: parameters whose optimizer state has no place here: it is compared only.

    Raises:
        ConfigError: naming what is damaged.
        DoesNotFitError: if the host has no memory for the optimizer's state.
    """
    stored = read_manifest(folder)
    values = stored.json(VALUES)
    if not isinstance(values, dict):
        raise ConfigError(f"{folder / VALUES}: it is no JSON object")
    every, weights = stored.tensors(STATE), stored.tensors(WEIGHTS)
    known = {n: t for n, t in every.items() if not _is_of(n, elsewhere)}
    wanted, free = sum(t.nbytes for t in known.values()), available_host_nbytes()
    if wanted > free:
        raise DoesNotFitError(
            f"{folder}: {format_bytes(wanted)} of optimizer state and other tensors are to be "
            f"read, and the host has {format_bytes(free)} free (cgroup limit included). Give "
            "memory back, or load it in a process of its own"
        )
    is_room = sum(t.nbytes for t in weights.values()) <= (free - wanted) // 2
    state = {name: new_tensor(t.shape, t.dtype) for name, t in known.items()}
    held = {name: new_tensor(t.shape, t.dtype) for name, t in weights.items() if is_room}
    stored.read({**places_of(known, state), **places_of(weights, held)})
    forms = {n: t for n, t in every.items() if n not in known}
    state |= {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in forms.items()}
    return _Read(stored, values, state, weights, held)


def _set_weights(read: _Read, targets: Mapping[str, torch.Tensor]) -> None:
    """Give the module the weights of a checkpoint, and give back what held them, one by one."""
    if not read.held:
        with torch.no_grad():
            read.stored.read_again(places_of(read.weights, targets))
    for name in list(read.held):
        with torch.inference_mode(targets[name].is_inference()), torch.no_grad():
            targets[name].copy_(read.held.pop(name))


def _gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """Gradients that a loop of the caller's own may still add to, or step by.

    Those that `train_step` leaves have been used.
    """
    if engine.optimizer is not None:
        return {}
    return {n: p.grad for n, p in engine.net.named_parameters() if p.grad is not None}


# Whatever else has a state


def _with_state(objects: Mapping[str, Any]) -> dict[str, Any]:
    """All but those of which a checkpoint holds files only, which nothing brings back."""
    return {name: held for name, held in objects.items() if not is_companion(held)}


def _of_object(name: str, held: Any, net: nn.Module) -> Any:
    if is_of(held, net):
        return state_of(held, net)
    if not callable(getattr(held, "state_dict", None)):
        raise ConfigError(
            f"{name}={type(held).__name__}: it has no state_dict(). Give what it needs as extra="
        )
    return held.state_dict()


def _check_objects(stored: Stored, objects: Mapping[str, Any], saved: Any) -> None:
    """Refuse to leave out what was saved, or to invent what was not.

    Raises:
        ConfigError: naming it.
    """
    if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
        raise ConfigError(f"{stored.folder / VALUES}: it cannot be read")
    lacking, new = sorted(saved.keys() - objects.keys()), sorted(objects.keys() - saved.keys())
    if lacking or new:
        words = [f"it holds {', '.join(lacking)}, which was not given"] if lacking else []
        words += [f"it does not hold {', '.join(new)}"] if new else []
        raise ConfigError(
            f"{stored.folder}: {'; '.join(words)}. Give load_checkpoint the same objects, by the "
            "same names, as save_checkpoint"
        )
    for name, held in objects.items():
        if not callable(getattr(held, "load_state_dict", None)):
            raise ConfigError(f"{name}={type(held).__name__}: it has no load_state_dict()")
