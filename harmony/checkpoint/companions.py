"""Files beside the weights of a Hugging Face model, with which its library reads the folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from harmony.errors import ConfigError, text_of

_OURS = ("manifest", "model", "state")
_CONFIGS = {"config": "config.json", "generation_config": "generation_config.json"}
_PROCESSORS = ("tokenizer", "processor", "image_processor", "feature_extractor")


def is_companion(held: Any) -> bool:
    """Whether something has files but no state, as tokenizers and processors do."""
    writes = callable(getattr(held, "save_pretrained", None))
    return writes and not callable(getattr(held, "state_dict", None))


def is_own(name: str, held: Any) -> bool:
    """Whether an attribute of a module is a tokenizer or a processor, whose files are written."""
    return name in _PROCESSORS and is_companion(held)


def files_beside(net: nn.Module, objects: Mapping[str, Any]) -> dict[str, bytes]:
    """The configuration of a module, and the files of tokenizers, by name in the folder.

    Args:
        net: which may have a ``config`` and a tokenizer of its own (``net.tokenizer``).
        objects: what a checkpoint is to hold; those that are no tokenizers are left out.

    Raises:
        ConfigError: if a tokenizer does not write its files, or writes one that is there already.
    """
    found = {}
    for attribute, file in _CONFIGS.items():
        config: Any = getattr(net, attribute, None)
        if callable(getattr(config, "to_json_string", None)):
            found[file] = config.to_json_string().encode()
    own = {name: getattr(net, name, None) for name in _PROCESSORS}
    for name, held in {**own, **objects}.items():
        if not is_companion(held):
            continue
        for file, data in _files_of(name, held).items():
            if found.setdefault(file, data) != data or file.split(".")[0] in _OURS:
                raise ConfigError(
                    f"{name}={type(held).__name__}: it writes {file}, which the checkpoint has "
                    "already with other contents. Leave it out, and save it to another folder"
                )
    return found


def _files_of(name: str, held: Any) -> dict[str, bytes]:
    """What it writes into a folder."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        try:
            held.save_pretrained(made)
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        except Exception as error:
            raise ConfigError(
                f"{name}={type(held).__name__}: its save_pretrained() fails "
                f"({type(error).__name__}: {text_of(error)}). Leave it out, or mend it"
            ) from error
