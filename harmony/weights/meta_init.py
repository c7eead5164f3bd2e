"""Models without the memory: built with parameters on meta, given values where they will live."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harmony.capture.replay.shell import plain_tensors
from harmony.core.units import listed
from harmony.core.warn import warn
from harmony.errors import ConfigError
from harmony.weights.init_log import (
    InitLog,
    StorageKey,
    TensorRef,
    current_log,
    is_gone,
    is_plain,
    key_of,
    reference_to,
)
from harmony.weights.init_modes import MARK, recording, replace, watching
from harmony.weights.init_replay import Target, replay


@dataclass(frozen=True)
class Recipe:
    """The parameter gets what the noted construction would have given it."""

    log: InitLog
    number: int


@dataclass(frozen=True)
class Given:
    """The parameter gets a value that is read when it is needed.

    Attributes:
        fill: writes it into a tensor of the parameter's shape.
        origin: where from, for errors.
    """

    fill: Callable[[torch.Tensor], None]
    origin: str


Source = Recipe | Given

# By the meta storage that stands for a parameter: that survives `nn.Module._apply` of nothing,
# tying, and whatever else keeps the parameter what it is, and goes when the parameter goes.
_SOURCES: dict[StorageKey, Source] = {}
_LOCK = threading.Lock()


@contextmanager
def meta_init() -> Iterator[None]:
    """Build models whose parameters take no memory::

        with harmony.meta_init():
            net = LlamaForCausalLM(config)
        model = harmony.Harmony(net, ...)

    Parameters are on the meta device from the moment a module registers them; buffers and all
    other tensors are real. What the construction does to the parameters (``torch.nn.init``,
    ``reset_parameters``, Hugging Face's ``_init_weights``, code of your own) is noted, and is done
    when Harmony places the parameters in host memory at the first batch, or by `materialise`:
    beside the parameters themselves, one tensor is in memory at a time.

    The values are, bit for bit, those of the same construction without this context and with the
    same seed (if the context builds one model, on one thread). Random numbers drawn inside the
    context for other tensors (a buffer, say) are others than without it, as is the state of
    torch's generator after it; both follow from the seed.

    Raises:
        ConfigError: inside, if the construction needs values of parameters, or for parameters
            that are not ordinary tensors (lazy, quantised, sparse).
    """
    if current_log() is not None:
        yield
        return
    log = InitLog()
    with recording(log):
        yield
    remember({key: Recipe(log, number) for key, number in log.finish().items()})


def materialise(module: nn.Module, views: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Give every parameter on the meta device its memory and value; it stays the same object.

    The values come from `harmony.load_pretrained`, or are what the construction inside `meta_init`
    would have computed. Parameters that were put on the meta device in another way are initialised
    by Hugging Face's ``_init_weights`` or by their module's ``reset_parameters``, with a warning.
    If anything fails, the module is as before.

    Args:
        views: the memory to use, by canonical name of the parameter; default: new tensors.

    Returns:
        The module.

    Raises:
        ConfigError: naming the parameters that nothing gives a value.
    """
    params = {name: p for name, p in module.named_parameters() if p.is_meta}
    _check_others(module)
    if not params:
        return module
    sources = _resolve(module, params)
    memory = {
        name: torch.empty_like(param, device="cpu") if views is None else views[name]
        for name, param in params.items()
    }
    with torch.no_grad():
        _fill(sources, params, memory)
    for name, param in params.items():
        param.__dict__.pop(MARK, None)
        fresh = nn.Parameter(memory[name], requires_grad=param.requires_grad)
        try:
            replace(param, fresh)
        except RuntimeError as error:
            raise ConfigError(
                f"parameter {name} cannot get its memory, something holds on to it as it is "
                f"({error}): drop weak references to it, and graphs of an earlier forward"
            ) from error
    return module


def make_room(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give the parameters on the meta device that a state dict holds ordinary memory.

    For ``load_state_dict``, which does nothing for a parameter on meta; it copies the values.
    """
    held = module.state_dict(keep_vars=True)
    for name, value in state.items():
        param = held.get(name)
        if isinstance(param, nn.Parameter) and param.is_meta and _fits(value, param):
            fresh = torch.empty_like(param, device="cpu")
            replace(param, nn.Parameter(fresh, requires_grad=param.requires_grad))


def _fits(value: Any, param: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == param.shape and not value.is_meta


def check_values(module: nn.Module) -> None:
    """Refuse a module with parameters, buffers or other tensors that nothing gives a value.

    Raises:
        ConfigError: naming them.
    """
    _check_others(module)
    _resolve(module, {name: p for name, p in module.named_parameters() if p.is_meta})


def remember(sources: Mapping[StorageKey, Source]) -> None:
    """Note where the values of meta storages come from; forget those that are gone."""
    with _LOCK:
        for key in [key for key in _SOURCES if is_gone(key)]:
            del _SOURCES[key]
        _SOURCES.update(sources)


def _resolve(module: nn.Module, params: Mapping[str, nn.Parameter]) -> dict[str, Source]:
    """Find where each parameter's value comes from, or refuse."""
    with _LOCK:
        found = {name: _SOURCES.get(key_of(param)) for name, param in params.items()}
    unknown = {name: params[name] for name, source in found.items() if source is None}
    for name, param in unknown.items():
        if not is_plain(param):
            raise ConfigError(f"parameter {name} is a {type(param).__name__} on the meta device")
        if MARK in param.__dict__:
            raise ConfigError(
                f"parameter {name} was changed after harmony.meta_init() (to another dtype, say), "
                "so its value is not known any more: change it inside the context"
            )
    if unknown:
        recipes = _by_convention(module, unknown)
        found |= recipes
        remember({key_of(params[name]): recipe for name, recipe in recipes.items()})
    sources = {name: source for name, source in found.items() if source is not None}
    missing = [name for name in params if not _has_value(sources.get(name))]
    if missing:
        raise ConfigError(
            f"nothing gives a value to {listed(missing)}: neither the module's construction "
            "inside harmony.meta_init() nor a reset_parameters() or _init_weights() of it writes "
            "to it. Initialise it in the module's __init__, or harmony.load_pretrained(model, "
            "path) before the first batch. (A change of dtype or a copy belongs inside the "
            "context too.)"
        )
    if unknown:
        warn(
            f"{listed(list(unknown))} came to the meta device outside of harmony.meta_init(): "
            "initialised by reset_parameters() or _init_weights() of the modules. What __init__ "
            "would have done beside that is lost",
        )
    return sources


def _has_value(source: Source | None) -> bool:
    if isinstance(source, Recipe):
        return source.log.storages[source.number].written
    return source is not None


def _by_convention(module: nn.Module, params: Mapping[str, nn.Parameter]) -> dict[str, Source]:
    """Note what the modules' own initialisers do to parameters nobody knows the making of."""
    log = InitLog()
    wanted = {id(param): name for name, param in params.items()}
    numbers = {name: log.add(param) for name, param in params.items()}
    with watching(log), torch.no_grad():
        for owner, initialise in _initialisers(module, None):
            own = [*owner.parameters(recurse=False), *owner.buffers(recurse=False)]
            if not any(id(tensor) in wanted for tensor in own):
                continue
            real = [(tensor, tensor.detach().clone()) for tensor in own if not tensor.is_meta]
            initialise()
            for tensor, value in real:  # only what has no value is to be initialised
                tensor.copy_(value)
    log.finish()
    return {name: Recipe(log, number) for name, number in numbers.items()}


def _initialisers(
    module: nn.Module, init_weights: Callable[[nn.Module], Any] | None
) -> Iterator[tuple[nn.Module, Callable[[], Any]]]:
    """Yield each module with what initialises it, children first, as both conventions do."""
    if hasattr(module, "_init_weights") and hasattr(module, "config"):
        init_weights = getattr(module, "_init_weights")  # noqa: B009
    for child in module.children():
        yield from _initialisers(child, init_weights)
    own: Any = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
    if init_weights is not None:
        chosen = init_weights
        yield module, lambda: chosen(module)
    elif callable(own):
        yield module, own


def _fill(
    sources: Mapping[str, Source],
    params: Mapping[str, nn.Parameter],
    memory: Mapping[str, torch.Tensor],
) -> None:
    """Compute or read every value into its memory."""
    targets: dict[int, list[Target]] = {}
    logs: dict[int, InitLog] = {}
    for name, source in sources.items():
        if isinstance(source, Given):
            _read(name, source, memory[name])
            continue
        logs[id(source.log)] = source.log
        ref: TensorRef = reference_to(params[name], source.number)
        targets.setdefault(id(source.log), []).append(Target(name, ref, memory[name]))
    for key, log in logs.items():
        wanted = {target.source.number for target in targets[key]}
        replay(log, targets[key], complete=wanted >= _alive(log))


def _read(name: str, source: Given, memory: torch.Tensor) -> None:
    try:
        source.fill(memory)
    except Exception as error:
        raise ConfigError(
            f"{name} could not be read from {source.origin} ({error}): no parameter has been "
            "changed. Repair the file and call harmony.load_pretrained(model, path) again"
        ) from error


def _alive(log: InitLog) -> set[int]:
    """Numbers of all parameters of the notes that are still to be had."""
    with _LOCK:
        return {
            source.number
            for key, source in _SOURCES.items()
            if isinstance(source, Recipe) and source.log is log and not is_gone(key)
        }


def _check_others(module: nn.Module) -> None:
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if lost:
        raise ConfigError(
            f"buffer {listed(lost)} is on the meta device and has lost its values: build the "
            "model inside harmony.meta_init(), not torch.device('meta'), and buffers stay real"
        )
    computed = [
        f"{name}.{attribute}".lstrip(".")
        for name, owner in module.named_modules()
        for attribute, tensor in plain_tensors(owner)
        if tensor.is_meta and not isinstance(tensor, nn.Parameter)
    ]
    if computed:
        raise ConfigError(
            f"{listed(computed)} is a tensor computed from parameters that have no values yet: "
            "build this model outside of harmony.meta_init(). (Where it comes from the hooks of "
            "torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm needs none)"
        )
