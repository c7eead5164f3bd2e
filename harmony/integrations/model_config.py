"""Profiles of language models from their configuration, for plans without a script.

A Hugging Face configuration (a file, or the folder it is in) or the name of a preset is built with
parameters that take no memory, and one training step of it is captured and counted. Nothing is
computed, and nothing is looked for on a network.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmony.core.files import is_file, is_folder
from harmony.engine.call_key import CallKind
from harmony.engine.options import EngineOptions
from harmony.engine.precision import precision_of
from harmony.engine.variant_factory import VariantFactory
from harmony.errors import ConfigError
from harmony.profiling.model_profile import ModelProfile
from harmony.profiling.presets import PRESETS
from harmony.report.session import ModelRecord
from harmony.weights.meta_init import meta_init

MOST_TOKENS = 2048
"""Tokens of a sample where nobody says how many, if the model takes as many."""


def profile_of_config(
    model: str,
    minibatch: int,
    *,
    tokens: int | None = None,
    precision: str = "bf16",
    lora: int | None = None,
) -> ModelProfile:
    """Return the profile of a causal language model that AdamW trains.

    Args:
        model: a ``config.json``, a folder that holds one, or a key of `PRESETS`.
        minibatch: samples of a step.
        tokens: of each sample; default: 2048, or the most that the model takes.
        precision: as for `harmony.Harmony`.
        lora: train adapters of this rank beside each linear layer but the last, and nothing else.

    Raises:
        ConfigError: if the configuration cannot be read or built, or does not take so many tokens.
        CaptureError: if the layers of the model are known only where it runs.
    """
    name, data = read_config(model)
    config, net = _built(name, data, None if lora is None else torch.bfloat16)
    if lora is not None:
        _add_adapters(net, lora)
    takes = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
    length = tokens or min(MOST_TOKENS, takes)
    if length > takes:
        raise ConfigError(f"--tokens {length}: {name} takes {takes} tokens at most")
    options = EngineOptions(optimizer=torch.optim.AdamW, precision=precision_of(precision))
    factory = VariantFactory(
        net, [], options, options.make_optimizer(net), ModelRecord(name=name, facts={})
    )
    ids = torch.zeros(minibatch, length, dtype=torch.long)
    what = f"{name}, {length} tokens a sample, {precision}"
    what += "" if lora is None else f", LoRA of rank {lora}"
    call = (), {"input_ids": ids, "labels": ids, "use_cache": False}, None
    return factory.unmeasured(what, CallKind.TRAIN_STEP, call, minibatch, None)


def read_config(model: str) -> tuple[str, Mapping[str, Any]]:
    """Return a model's name and its configuration.

    Raises:
        ConfigError: if there is no such file, folder or preset, or it is no configuration.
    """
    path = Path(model)
    if is_folder(path):
        path = path / "config.json"
    if not is_file(path):
        if model.lower() in PRESETS:
            return model.lower(), PRESETS[model.lower()]
        close = difflib.get_close_matches(model.lower(), PRESETS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"--model {model}: no such file, nor a preset.{hint} Presets: {', '.join(PRESETS)}"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {path}: it cannot be read: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ConfigError(f"--model {path}: a Hugging Face configuration names its model_type")
    return path.parent.resolve().name if path.name == "config.json" else path.stem, data


def _built(name: str, data: Mapping[str, Any], dtype: torch.dtype | None) -> tuple[Any, nn.Module]:
    """The configuration as an object, and its model without memory."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"--model needs transformers ({error}): pip install 'harmony-train[hf]'"
        ) from error
    rest = {key: value for key, value in data.items() if key not in ("model_type", "auto_map")}
    for key in ("torch_dtype", "dtype", "quantization_config"):
        rest.pop(key, None)
    try:
        config = transformers.AutoConfig.for_model(data["model_type"], **rest)
        with meta_init():
            make: Callable[..., nn.Module] = transformers.AutoModelForCausalLM.from_config
            net = make(config, dtype=dtype or torch.float32)
    except Exception as error:  # whatever a configuration makes of its library
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--model {name}: transformers cannot build it: {first}") from error
    config.use_cache = False
    return config, net.train()


class _Adapted(nn.Module):
    """A frozen linear layer, and the product of two trained ones beside it (LoRA, 2021)."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, torch.Tensor)
        outputs, inputs = weight.shape
        if not isinstance(base, nn.Linear):  # GPT-2's Conv1D has it the other way round
            outputs, inputs = inputs, outputs
        self.base = base
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Add what the adapter makes of the input, in its own type, as PEFT does."""
        added = self.up(self.down(hidden.to(self.down.weight.dtype)))
        out: torch.Tensor = self.base(hidden)
        return torch.add(out, added.to(out.dtype))


def _add_adapters(net: nn.Module, rank: int) -> None:
    """Freeze a model and put adapters beside its linear layers, but not the head."""
    net.requires_grad_(False)
    get_head: Any = getattr(net, "get_output_embeddings", lambda: None)
    head = get_head()
    kinds = ("Linear", "Conv1D")
    found = [
        (parent, key, child)
        for parent in net.modules()
        for key, child in parent.named_children()
        if type(child).__name__ in kinds and child is not head
    ]
    with meta_init():
        for parent, key, child in found:
            setattr(parent, key, _Adapted(child, rank))
