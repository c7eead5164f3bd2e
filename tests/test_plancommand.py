"""`harmony-run plan`: what it shows, what it refuses, and with which exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from harmony.cli import main as cli
from harmony.cli.plan_command import write_lines
from harmony.planner.ir.plan_file import load_plan
from harmony.profiling.analytic import LayerWork, Work, WorkTable
from harmony.profiling.model_profile import ModelProfile, save_profile
from tests.toys import MIB, chain, server, uniform_costs

GRAPH = chain(12, weight=64 * MIB, per_sample=MIB)
ONE, TWO = Work({"fp32": 2e10}, 1e8, 1e8, 5), Work({"fp32": 4e10}, 1.5e8, 2e8, 5)
WORK = WorkTable(tuple({1: LayerWork(ONE, ONE + ONE), 2: LayerWork(TWO, TWO + TWO)}
                       for _ in range(12)))  # fmt: skip
GPU = ["--gpu", "RTX 3060", "--host-memory", "64GiB"]

Outcome = tuple[int, str, str]


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "toy.json"
    machine = server(2, memory=512 * MIB, rate=8e9)
    costs = uniform_costs(GRAPH)
    saved = ModelProfile(
        "Toy", GRAPH, costs, "virtual GPU", WORK, machine, 8, "2.13.0", num_params=12 * 16 * MIB
    )
    save_profile(saved, path)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> Outcome:
    code = cli.main(["plan", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_plan_for_a_machine_that_is_not_there(
    profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model-profile", profile, *GPU, "--gpus", "2", "--minibatch", "16"]
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert out.startswith("Plan · Toy on 2 x RTX 3060, minibatch 16\n")
    for shown in ("% of peak", "samples/s", "bottleneck", "runner-up", "gpu1", "compute", "h2d"):
        assert shown in out
    assert "analytic: FLOPs and bytes at the rates of a RTX 3060" in out
    again = run(capsys, *words)
    assert again == (code, out, err), "the same question gets the same answer"


def test_without_a_gpu_it_is_the_machine_of_the_profile_and_what_it_measured(
    profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "--model-profile", profile, "--json")
    data = json.loads(out)
    assert code == 0
    assert (data["minibatch"], len(data["peak_nbytes"])) == (8, 2)
    assert data["costs_from"] == "measured on virtual GPU"
    assert data["gpu_limit_nbytes"] == [512 * MIB] * 2
    words = ["--gpus", "3", "--gpu-memory", "400MiB", "--host-memory", "20GiB"]
    code, out, _ = run(capsys, "--model-profile", profile, "--json", *words)
    assert json.loads(out)["gpu_limit_nbytes"] == [400 * MIB] * 3
    assert json.loads(out)["host_limit_nbytes"] == 20 * 2**30


def test_a_plan_is_saved_shown_again_and_compared(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    common = ["--model-profile", profile, *GPU, "--gpus", "2"]
    _, first, _ = run(capsys, *common, "--mode", "pp", "--save-plan", a, "--json")
    assert load_plan(Path(a)).model == GRAPH.fingerprint
    _, again, _ = run(capsys, *common, "--plan", a, "--json")
    assert json.loads(again)["step_s"] == json.loads(first)["step_s"]
    run(capsys, *common, "--mode", "dp", "--microbatch", "1", "--save-plan", b)
    code, text, _ = run(capsys, "--compare", a, b)
    assert code == 0
    assert f"A  {a}" in text
    assert "B is predicted to take" in text
    assert "mode" in text and "dp" in text


def test_machines_are_compared_in_one_table(
    profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model-profile", profile, "--host-memory", "64GiB", "--gpu-memory", "8GiB"]
    code, out, _ = run(capsys, *words, "--compare", "T4", "2x3060", "RTX 4090")
    assert code == 0
    rows = out.splitlines()[2:5]
    assert [row[:14].strip() for row in rows] == ["T4", "2 x RTX 3060", "RTX 4090"]
    assert all(row.endswith(("GPU compute", "GPUs", "host")) for row in rows)
    one = json.loads(run(capsys, *words, "--gpu", "T4", "--json")[1])
    _, text, _ = run(capsys, *words, "--compare", "T4", "2x3060", "--json")
    found = json.loads(text)
    assert list(found) == ["T4", "2 x RTX 3060"]
    assert found["T4"]["step_s"] == one["step_s"], "the plan is the one that --gpu shows"
    code, out, _ = run(capsys, *words[:2], "--host-memory", "1GiB", "--compare", "T4")
    assert code == 0 and "T4  does not fit: " in out


def test_memory_is_told_by_kind_and_adds_up(
    profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, "--model-profile", profile, *GPU, "--json")
    data = json.loads(out)
    memory = data["memory_nbytes"]
    assert sum(memory["host"].values()) == data["host_nbytes"]
    assert [sum(kinds.values()) for kinds in memory["gpus"]] == data["peak_nbytes"]


def test_a_saved_plan_is_refused_for_another_model_minibatch_or_machine(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, other = str(tmp_path / "plan.json"), tmp_path / "other.json"
    common = [*GPU, "--gpus", "2", "--mode", "pp"]
    run(capsys, "--model-profile", profile, *common, "--save-plan", plan)
    save_profile(ModelProfile("Other", chain(12), uniform_costs(chain(12)), "", WORK), other)
    for words, message in (
        (["--model-profile", str(other), *common, "--minibatch", "8"], "another model"),
        (["--model-profile", profile, *common, "--minibatch", "4"], "minibatches of 8"),
        (["--model-profile", profile, *GPU, "--gpus", "1"], "needs 2 devices"),
        (["--model-profile", profile, *common, "--gpu-memory", "8MiB"], "has 8.00 MiB"),
    ):
        code, out, err = run(capsys, *words, "--plan", plan)
        assert (code, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1


def test_why_is_explained(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--model-profile", profile, *GPU, "--gpus", "2", "--explain")
    assert "What was decided, and what else there was:" in out
    assert "Whole plans that were looked at:" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "which model? Give --model CONFIG"),
        (["--frobnicate"], 2, "unrecognized arguments: --frobnicate"),
        (["--model-profile", "missing.json"], 2, "no such model profile: missing.json"),
        (["PROFILE", "--gpu", "RTX 4091", "--host-memory", "1GiB"], 2, "did you mean RTX 4090?"),
        (["PROFILE", "--gpu", "RTX 4090"], 2, "--host-memory: how much memory"),
        (["PROFILE", "--minibatch", "0"], 2, "--minibatch 0: it takes a whole number"),
        (["PROFILE", "--gpus", "-1"], 2, "--gpus -1: it takes a whole number"),
        (["PROFILE", "--gpu-memory", "4parsecs"], 2, "--gpu-memory: not a size"),
        (["PROFILE", "--link", "8GB"], 2, "--link: not a rate"),
        (["PROFILE", "--mode", "fast"], 2, "invalid choice"),
        (["PROFILE", *GPU, "--host", "toaster"], 2, "no host 'toaster'"),
        (["PROFILE", *GPU, "--topology", "nvlink"], 2, "RTX 3060 has no NVLink"),
        (["PROFILE", "--topology", "x8"], 2, "--gpu: which GPU?"),
        (["PROFILE", "--save-plan", "nowhere/p.json"], 2, "there is no folder nowhere"),
        (["--compare", "a.json", "b.json"], 2, "no such plan: a.json"),
        (["--compare", "a.json"], 2, "two saved plans, or names of GPUs"),
        (["PROFILE", "--compare", "T4", "Q7"], 2, "no GPU 'Q7'"),
        (["PROFILE", "--compare", "T4", "--report", "t.html"], 2, "leave --report out"),
        (["PROFILE", "--lora", "4"], 2, "--lora describes the model of --model"),
        (["PROFILE", "--save-profile", "p.json"], 2, "--save-profile describes the model"),
        (["PROFILE", "--model", "llama-7b", *GPU], 2, "--model and --model-profile"),
        (["--model", "llama-7b"], 2, "--gpu: which GPU?"),
        (["--model", "llama-7b", "--gpu", "T4"], 2, "--host-memory: how much memory"),
        (["--model", "llama-8b", *GPU], 2, "Did you mean llama3-8b"),
        (["PROFILE", "--gpu", "T4", "--host-memory", "1GiB"], 1, "1.00 GiB"),
        (["PROFILE", *GPU, "--gpu-memory", "64MiB"], 1, "layer 0 (layer0) alone needs"),
    ],
)
def test_bad_use_is_one_line_and_an_exit_code(
    profile: str,
    words: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model-profile", profile, *words[1:]] if words[:1] == ["PROFILE"] else words
    found, out, err = run(capsys, *given)
    assert (found, out) == (code, "")
    assert err.startswith("harmony: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_profile_that_is_damaged_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    path.write_text("{}")
    code, _, err = run(capsys, "--model-profile", str(path))
    assert code == 1
    assert "not a model profile" in err


def test_the_catalog_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--list-gpus")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("RTX 4090"))
    assert row.split()[2:9] == ["24.0", "GiB", "82.6", "82.6", "165.2", "165.2", "1008"]


def test_help_says_how_a_script_called_plan_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "--help"])
    assert caught.value.code == 0
    assert "harmony-run ./plan" in capsys.readouterr().out


def test_a_script_called_plan_runs_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan").write_text("print('the script')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_set_up_gpus", lambda options, progress: None)
    assert cli.main(["./plan"]) == 0
    assert capsys.readouterr().out == "the script\n"


def test_where_there_is_only_ascii_the_text_is_ascii() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    write_lines(["Plan · Toy", "0─── 1 s"], out)
    out.flush()
    assert raw.getvalue() == b"Plan . Toy\n0--- 1 s\n"


def test_planning_starts_without_torch(profile: str) -> None:
    text = (
        "import sys; from harmony.cli import main as cli; code = cli.main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    words = [sys.executable, "-c", text, "plan", "--model-profile", profile, *GPU]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Plan")


def test_further_questions_are_answered(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model-profile", profile, *GPU, "--smallest-minibatch", "--largest-model"]
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    answers = json.loads(out)["answers"]
    smallest = answers["smallest minibatch that hides the transfers"]
    largest = answers["largest model that fits"]
    assert smallest["value"] >= 1
    assert f"{smallest['value']} sample" in smallest["text"]
    # 64 GiB hold 64 MiB of weights, as many of gradients and twice that of state a layer.
    assert 200 < largest["value"] <= 256
    assert "billion parameters" in largest["text"]
    _, text, _ = run(capsys, *words)
    assert "largest model that fits: " in text


def test_a_question_without_an_answer_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.json"
    one = chain(1)
    save_profile(ModelProfile("One", one, uniform_costs(one), "T4", None, minibatch=4), path)
    words = ["--model-profile", str(path), "--gpu", "T4", "--host-memory", "1GiB"]
    code, out, _ = run(capsys, *words, "--largest-model")
    assert code == 0
    assert "largest model that fits: no part of this model repeats" in out
