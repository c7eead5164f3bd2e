"""`harmony-run plan --model`: a plan from a configuration, without a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harmony.cli import main as cli
from harmony.core.units import format_bytes, format_rate, format_seconds
from harmony.errors import ConfigError
from harmony.profiling.model_profile import load_profile
from harmony.profiling.plan_request import PlanRequest, machine_and_costs
from harmony.profiling.presets import PRESETS

pytest.importorskip("transformers")

from harmony.integrations.model_config import profile_of_config

HIDDEN, INNER, LAYERS, WORDS = 64, 96, 2, 128
CONFIG = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LINEAR = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INNER
NUM_PARAMS = 2 * WORDS * HIDDEN + LAYERS * (LINEAR + 2 * HIDDEN) + HIDDEN
MACHINE = ["--gpu", "3060", "--host-memory", "8GiB"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_a_folder_with_a_configuration_is_planned_kept_and_planned_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = folder / "profile.json"
    words = [*MACHINE, "--minibatch", "4", "--json"]
    code = cli.main(["plan", "--model", str(folder), *words, "--save-profile", str(kept)])
    first = json.loads(capsys.readouterr().out)
    assert code == 0
    assert first["model"] == f"{folder.name}, 32 tokens a sample, bf16"
    assert first["minibatch"] == 4
    assert first["dtypes"] == {
        "weights": "bf16", "masters": "fp32", "gradients": "fp32", "optimizer": "fp32",
    }  # fmt: skip
    assert load_profile(kept).num_params == NUM_PARAMS
    assert cli.main(["plan", "--model-profile", str(kept), *words]) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_it_is_the_model_that_a_script_would_train(folder: Path, tmp_path: Path) -> None:
    script, kept = tmp_path / "train.py", tmp_path / "script.json"
    script.write_text(
        "import sys, json, torch, transformers, harmony\n"
        "config = transformers.LlamaConfig(**json.load(open(sys.argv[1])))\n"
        "net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)\n"
        "net.config.use_cache = False\n"
        "model = harmony.Harmony(net, optimizer=torch.optim.AdamW)\n"
        "ids = torch.zeros(4, 32, dtype=torch.long)\n"
        "model.train_step({'input_ids': ids, 'labels': ids})\n"
    )
    words = ["--plan-only", *MACHINE, "--precision", "bf16", "--save-profile", str(kept)]
    assert cli.main([*words, str(script), str(folder / "config.json")]) == 0
    theirs, mine = load_profile(kept), profile_of_config(str(folder), 4)
    assert mine.fingerprint == theirs.fingerprint
    assert mine.work == theirs.work and mine.costs == theirs.costs


def test_adapters_are_all_that_is_trained_with_lora(folder: Path) -> None:
    rank = 2
    profile = profile_of_config(str(folder), 2, tokens=8, lora=rank)
    sides = 2 * 2 * HIDDEN + 2 * (HIDDEN + HIDDEN // 2) + 3 * (HIDDEN + INNER)
    adapters = LAYERS * rank * sides
    assert profile.num_params == NUM_PARAMS + adapters
    masters = profile.graph.master_nbytes()
    assert 4 * adapters <= masters < 5 * adapters, "frozen weights have none"
    assert profile.dtypes["masters"] == "fp32" and profile.dtypes["weights"] == "bf16"


def test_each_of_several_servers_keeps_and_updates_its_part_of_the_state(folder: Path) -> None:
    profile = profile_of_config(str(folder), 4)
    asked = PlanRequest(gpu="RTX 3060", host_memory_nbytes=8 << 30)
    alone = machine_and_costs(asked, profile, 4)
    all_of_it = machine_and_costs(replace(asked, servers=4), profile, 4)
    parts = replace(asked, servers=4, shard_optimizer_state=True, network_bytes_per_s=1e9)
    part = machine_and_costs(parts, profile, 4)
    state = [task.profile.graph.state_nbytes() for task in (alone, all_of_it, part)]
    assert state[0] == state[1] == 8 * NUM_PARAMS
    assert 0 <= state[2] - 2 * NUM_PARAMS < 4 * (LAYERS + 3)
    updates = [sum(r[4].update_s for r in t.costs.by_layer) for t in (alone, all_of_it, part)]
    assert updates[0] == updates[1] == pytest.approx(4 * updates[2])
    assert [t.machine.updates_wait for t in (alone, all_of_it, part)] == [False, True, True]
    nbytes = 2 * 3 * 4 * NUM_PARAMS // 4
    sent, takes = format_bytes(nbytes), format_seconds(nbytes / 1e9)
    assert f"a step sends {sent} from each" in " ".join(all_of_it.notes)
    assert f"{sent} from each, {takes} at {format_rate(1e9)}" in " ".join(part.notes)
    with pytest.raises(ConfigError, match="add --servers N"):
        machine_and_costs(replace(parts, servers=1), profile, 4)
    with pytest.raises(ConfigError, match="leave one of them out"):
        machine_and_costs(replace(parts, overlap_updates=True), profile, 4)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read"),
        ("[]", "names its model_type"),
        ('{"model_type": "toaster"}', "transformers cannot build it"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        profile_of_config(str(path), 1)


def test_more_tokens_than_the_model_takes_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tokens 64: .* takes 32 tokens at most"):
        profile_of_config(str(folder), 1, tokens=64)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt2-xl", 1.56), ("llama-7b", 6.74), ("llama-13b", 13.0), ("llama-70b", 69.0),
        ("llama3-8b", 8.03), ("llama3-70b", 70.6), ("mistral-7b", 7.24), ("qwen2.5-7b", 7.62),
        ("qwen2.5-14b", 14.8), ("qwen2.5-32b", 32.8), ("qwen2.5-72b", 72.7),
    ],
)  # fmt: skip
def test_presets_are_the_models_that_are_published(name: str, billions: float) -> None:
    import transformers

    data = dict(PRESETS[name])
    config = transformers.AutoConfig.for_model(data.pop("model_type"), **data)
    with torch.device("meta"):
        net = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(param.numel() for param in net.parameters()) / 1e9 == pytest.approx(
        billions, rel=0.01
    )


def test_a_plan_needs_no_compiler(folder: Path, tmp_path: Path) -> None:
    kept, empty = tmp_path / "kept", tmp_path / "empty"
    empty.mkdir()
    line = [sys.executable, "-m", "harmony", "plan", "--model", str(folder), *MACHINE]
    environment = {**os.environ, "HARMONY_CACHE": str(kept), "PATH": str(empty)}
    environment.pop("CXX", None)
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert folder.name in ran.stdout
    assert not list(kept.rglob("*.so"))
