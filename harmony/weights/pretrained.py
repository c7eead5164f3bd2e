"""`load_pretrained`: weights of a file into a model, one tensor at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import nn

from harmony.core.arguments import named_arguments
from harmony.core.units import listed
from harmony.errors import ConfigError
from harmony.weights.checkpoint_files import StoredTensor, open_checkpoint
from harmony.weights.init_log import key_of
from harmony.weights.meta_init import Given, materialise, remember


class Loaded(NamedTuple):
    """What a checkpoint did not settle.

    Attributes:
        missing: names of the model that the file does not have.
        unexpected: names of the file that the model does not have.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass
class _Match:
    """Which tensor of the model gets which of the file."""

    chosen: dict[str, StoredTensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@runtime_checkable
class _Wrapper(Protocol):
    """A `harmony.Harmony` model, which has to hear that its module has other values."""

    def _weights_loaded(self) -> None: ...


@named_arguments
def load_pretrained(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True
) -> Loaded:
    """Load weights from a file into a model, one tensor in memory at a time.

    Names, shapes and types are checked at once; nothing is loaded if they do not fit. Parameters
    without memory (see `harmony.meta_init`) of a Harmony model are read when it places them in
    host memory, at its first batch; those of a plain module get ordinary memory now. Values are
    converted to the parameter's type (a bfloat16 file into float32 parameters, say). Tied
    parameters may be in the file under one of their names or all. For Hugging Face models the
    names are adapted as ``from_pretrained`` does (the prefix of the base model, renamings);
    architectures whose tensors it would merge or transpose are refused.

    Args:
        model: a `Harmony` model or a plain module.
        path: a ``.safetensors`` file, a state dict saved with `torch.save`, or a directory with
            ``model.safetensors``, ``model.safetensors.index.json`` or their ``pytorch_model.bin``
            forms.
        strict: refuse a file that lacks tensors of the model, or has others. Else what is missing
            keeps its value, or is initialised as `meta_init` says.

    Returns:
        The names that are missing and those that were not expected; empty if ``strict``.

    Raises:
        ConfigError: if the file is damaged, or does not fit the model: with all the names.
    """
    net = cast(nn.Module, model.module) if isinstance(model, _Wrapper) else model
    checkpoint = open_checkpoint(path)
    state = {
        name: tensor
        for name, tensor in net.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }
    match = _match(net, state, checkpoint)
    _check(net, match, path, strict)
    meta = {name: stored for name, stored in match.chosen.items() if state[name].is_meta}
    remember({key_of(state[n]): Given(stored.fill, stored.origin) for n, stored in meta.items()})
    _fill_now({name: s for name, s in match.chosen.items() if name not in meta}, state)
    if isinstance(model, _Wrapper):
        model._weights_loaded()
    elif meta:
        materialise(net)
    return Loaded(tuple(match.missing), tuple(match.unexpected))


def _match(
    net: nn.Module, state: Mapping[str, torch.Tensor], checkpoint: Mapping[str, StoredTensor]
) -> _Match:
    """Find for each tensor of the model, tied ones once, its tensor in the file."""
    match = _Match()
    rename = _renaming(net, state)
    found: dict[str, tuple[str, StoredTensor]] = {}
    for key, stored in checkpoint.items():
        name = rename(key)
        if name not in state:
            match.unexpected.append(key)
        elif name in found:
            match.wrong.append(f"{found[name][0]} and {key} are both {name}")
        else:
            found[name] = (key, stored)
    for names in _tied(state):
        present = [found[name][1] for name in names if name in found]
        if not present:
            match.missing.append(names[0])
            continue
        match.wrong += _misfits(names[0], state[names[0]], present)
        # What plain PyTorch would copy last.
        match.chosen[names[0]] = present[-1]
    if not match.wrong:
        match.wrong += _untied(state, found)
    optional = getattr(net, "_keys_to_ignore_on_load_missing", None)
    match.missing = _not_ignored(match.missing, optional)
    ignored = list(getattr(net, "_keys_to_ignore_on_load_unexpected", None) or ())
    if _is_hugging_face(net):  # buffers that were saved once
        ignored += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    match.unexpected = _not_ignored(match.unexpected, ignored)
    return match


def _tied(state: Mapping[str, torch.Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _misfits(name: str, tensor: torch.Tensor, present: Iterable[StoredTensor]) -> list[str]:
    wrong = []
    for stored in present:
        if stored.shape != tuple(tensor.shape):
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, in the file {stored.shape}")
        elif _kind(stored.dtype) != _kind(tensor.dtype):
            wrong.append(f"{name} is {tensor.dtype}, in the file {stored.dtype}")
    return wrong


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "bool" if dtype is torch.bool else "integer"


def _untied(
    state: Mapping[str, torch.Tensor], found: Mapping[str, tuple[str, StoredTensor]]
) -> list[str]:
    """Name tied parameters for which the file has different values."""
    wrong = []
    for names in _tied(state):
        present = [name for name in names if name in found]
        for other in present[1:]:
            one, two = (
                torch.empty(stored.shape, dtype=stored.dtype)
                for stored in (found[present[0]][1], found[other][1])
            )
            found[present[0]][1].fill(one)
            found[other][1].fill(two)
            if not torch.equal(one, two):
                wrong.append(f"{present[0]} and {other} are tied, but differ in the file")
    return wrong


def _check(net: nn.Module, match: _Match, path: str | os.PathLike[str], strict: bool) -> None:
    problems = list(match.wrong)
    if strict and match.missing:
        problems.append(f"{len(match.missing)} missing in the file: {listed(match.missing)}")
    if strict and match.unexpected:
        problems.append(f"{len(match.unexpected)} not in the model: {listed(match.unexpected)}")
    if not match.chosen and not problems:
        problems.append("the file has nothing of the model")
    if problems:
        remedy = "strict=False loads what fits by name and shape" if not match.wrong else ""
        if _is_hugging_face(net):
            remedy += (
                f". If {type(net).__name__}.from_pretrained loads it, then that converts it: load "
                "it so, and give the loaded model to harmony.Harmony"
            )
        raise ConfigError(
            f"{os.fspath(path)} does not fit {type(net).__name__}, nothing was loaded: "
            f"{listed(problems, separator='; ')}. {remedy.lstrip('. ')}".rstrip(". ")
        )


def _fill_now(chosen: Mapping[str, StoredTensor], state: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for done, (name, stored) in enumerate(chosen.items()):
            try:
                stored.fill(state[name].detach())
            except Exception as error:
                raise ConfigError(
                    f"{name} could not be read from {stored.origin} ({error}); {done} tensors "
                    "before it hold the values of the file already: load a good file before you "
                    "go on"
                ) from error


# Hugging Face's names


def _is_hugging_face(net: nn.Module) -> bool:
    return hasattr(net, "base_model_prefix") and hasattr(net, "config")


def _renaming(net: nn.Module, state: Mapping[str, torch.Tensor]) -> Callable[[str], str]:
    """Return the map from a name in the file to the model's name."""
    if not _is_hugging_face(net):
        return lambda key: key
    prefix = f"{net.base_model_prefix}." if net.base_model_prefix else ""
    renamings, converters = _conversions(net)

    def with_prefix(key: str) -> str:
        if prefix and key.startswith(prefix) and key[len(prefix) :] in state:
            return key[len(prefix) :]
        return prefix + key if prefix and prefix + key in state else key

    def rename(key: str) -> str:
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None and (with_prefix(target) in state or key not in state):
                raise ConfigError(
                    f"{key} is stored in another form than {type(net).__name__} has it in: load "
                    "the model with its from_pretrained, which converts it, and give that to "
                    "harmony.Harmony"
                )
        name = with_prefix(name)
        return name if name in state or key not in state else key

    return rename


def _conversions(net: nn.Module) -> tuple[list[Any], list[Any]]:
    """The installed transformers' renamings and conversions of the tensors of this model."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # before version 5 there were none
        return [], []
    model: Any = net
    known = get_model_conversion_mapping(model)
    converters = [entry for entry in known if isinstance(entry, WeightConverter)]
    return [entry for entry in known if not isinstance(entry, WeightConverter)], converters


def _not_ignored(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    return [name for name in names if not any(re.search(p, name) for p in patterns or ())]
