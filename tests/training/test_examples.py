"""The examples train what plain PyTorch trains, on their real data, in their tiny mode."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.training.conftest import VirtualGPUs

FOLDER = Path(__file__).parents[2] / "examples"
NEEDS = {
    "classify_images": ["sklearn"],
    "diffusion": ["diffusers", "sklearn"],
    "lora": ["peft", "transformers"],
    "train_lm": ["accelerate", "transformers"],
}
"""What an example imports beside torch."""

Example = Callable[[str], ModuleType]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Example:
    """Imports an example as a script of its folder."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])

    def load(name: str) -> ModuleType:
        for package in NEEDS.get(name, []):
            pytest.importorskip(package)
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    "name", ["classify_images", "diffusion", "mixture_of_experts", "own_loop", "recommender"]
)
def test_losses_are_those_of_plain_pytorch(
    vgpus: VirtualGPUs, tmp_path: Path, example: Example, name: str
) -> None:
    vgpus(count=2)
    main = example(name).main
    words = ["--tiny", "--steps", "6"]
    if name == "own_loop":
        words += ["--output", str(tmp_path)]
    found, expected = main(words), main([*words, "--reference"])
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(found) == 6 and min(found[-2:]) < found[0]


def test_a_loop_of_ones_own_goes_on_with_the_same_bits(
    vgpus: VirtualGPUs, tmp_path: Path, example: Example
) -> None:
    vgpus(count=1)
    main = example("own_loop").main
    words = ["--tiny", "--every", "2", "--output"]
    whole = main([*words, str(tmp_path / "a"), "--steps", "4"])
    first = main([*words, str(tmp_path / "b"), "--steps", "2"])
    assert [*first, *main([*words, str(tmp_path / "b"), "--steps", "4"])] == whole


def test_trainer_goes_on_and_its_model_takes_an_adapter(
    vgpus: VirtualGPUs, tmp_path: Path, example: Example
) -> None:
    vgpus(count=2)
    main = example("train_lm").main
    words = ["--tiny", "--output"]
    plain = main([*words, str(tmp_path / "plain"), "--steps", "4", "--reference"])
    found = main([*words, str(tmp_path / "lm"), "--steps", "2"])
    again = main([*words, str(tmp_path / "lm"), "--steps", "4", "--go-on"])
    assert again[:2] == found and again == pytest.approx(plain, rel=1e-5)
    words = ["--tiny", "--steps", "3", "--model", str(tmp_path / "lm"), "--output"]
    adapt = example("lora").main
    losses = adapt([*words, str(tmp_path / "adapter")])
    assert losses == pytest.approx(adapt([*words, str(tmp_path / "b"), "--reference"]), rel=1e-5)
    saved = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
