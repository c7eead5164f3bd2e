"""The command line of harmony-run: which words are ours, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmony.cli.arguments import mistyped, parse
from harmony.cli.plan_arguments import parse_plan
from harmony.core.options import Every, Options
from harmony.errors import ConfigError


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("")
    return "train.py"


def test_options_before_the_script_or_after_it_mean_the_same(script: str) -> None:
    before = parse(["--gpus", "4", "--mode=pp", script, "--epochs", "3", "data"])
    after = parse([script, "--epochs", "--gpus", "4", "3", "--mode=pp", "data"])
    assert before == after
    assert before.script_arguments == ("--epochs", "3", "data")
    assert before.options == Options(gpus=4, mode="pp", active=True)


def test_all_options(script: str) -> None:
    words = (
        f"{script} --gpus 2 --gpu-memory 64MiB --mode dp --virtual --link 8GB/s"
        " --host-memory 100GiB --plan-only --report out.json --debug --explain --json --no-cache"
        " --save-plan plan.json --save-profile profile.json --plan train.py"
        " --precision bf16"
    )
    command = parse(words.split())
    assert command.debug
    assert command.options == Options(
        gpus=2,
        gpu_memory_nbytes=64 * 2**20,
        mode="dp",
        virtual=True,
        plan_only=True,
        report=Path("out.json"),
        link="8GB/s",
        host_memory_nbytes=100 * 2**30,
        active=True,
        explain=True,
        as_json=True,
        plan=Path("train.py"),
        save_plan=Path("plan.json"),
        save_profile=Path("profile.json"),
        cache=False,
        precision="bf16",
    )


def test_checkpoints_are_asked_for(script: str, tmp_path: Path) -> None:
    words = f"{script} --checkpoint-dir runs/a --checkpoint-every 15m --keep 3 --resume auto"
    options = parse(words.split()).options
    assert options.checkpoint_dir == Path("runs/a")
    assert options.checkpoint_every == Every(seconds=900.0)
    assert (options.keep, options.resume) == (3, "auto")
    assert parse([script, "--checkpoint-every", "20"]).options.checkpoint_every == Every(steps=20)
    assert parse([script, "--resume", str(tmp_path)]).options.resume == str(tmp_path)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("--checkpoint-every often", "--checkpoint-every: 'often' is neither a number of steps"),
        ("--checkpoint-every 0", "neither"),
        ("--keep 0", "--keep 0: it takes a whole number"),
        ("--resume nowhere", "--resume nowhere: there is no such folder"),
        ("--resume train.py", "--resume train.py: that is a file"),
        ("--checkpoint-dir train.py", "--checkpoint-dir train.py: that is a file"),
    ],
)
def test_checkpoints_that_make_no_sense_are_refused(words: str, match: str, script: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse([script, *words.split()])


def test_a_machine_that_is_not_there_is_described_for_its_plan_only(script: str) -> None:
    words = f"{script} --plan-only --gpus 4 --host-memory 256GiB --host server-ddr5 --topology x8"
    options = parse([*words.split(), "--gpu", "RTX 4090"]).options
    assert (options.gpu, options.host, options.topology) == ("RTX 4090", "server-ddr5", "x8")


def test_a_double_dash_leaves_the_rest_to_the_script(script: str) -> None:
    command = parse([script, "--gpus", "2", "--", "--mode", "fast", "--", "--help"])
    assert command.script_arguments == ("--mode", "fast", "--", "--help")
    assert command.options.mode == "auto"
    assert parse(["--", script, "--gpus", "2"]).script_arguments == ("--gpus", "2")


def test_help_after_the_script_is_the_scripts(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse([script, "--help"]).script_arguments == ("--help",)
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "harmony-run (SCRIPT | -m MODULE)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "which script"),
        ("--gpus 4", "which script"),
        ("missing.py", "no such script: missing.py"),
        ("trian.py", "Did you mean train.py"),
        ("nowhere/train.py", "no folder nowhere"),
        (".", "is a folder"),
        ("train.py --gpus 0", "at least 1"),
        ("train.py --gpus -1", "at least 1"),
        ("train.py --gpus four", "whole number"),
        ("train.py --gpus", "expected one argument"),
        ("train.py --gpu-memory 64parsecs", "--gpu-memory: not a size"),
        ("train.py --gpu-memory 20", "--gpu-memory: 20: in which unit? Write it like 20GiB"),
        ("train.py --host-memory 0", "--host-memory: a size must be positive"),
        ("train.py --link 8GB", "--link: not a rate"),
        ("train.py --mode fast", "invalid choice"),
        ("train.py --virtual=yes", "ignored explicit argument"),
        ("train.py --report nowhere/out.txt", "no folder nowhere"),
        ("--gpuss 4 train.py", "no such option: --gpuss; did you mean --gpus?"),
        ("--gpsu 4 train.py", "no such option: --gpsu; did you mean --gpus?"),
        ("--gpu 4 train.py", "How many GPUs to use here is --gpus N"),
        ("train.py --gpu T4 --plan-only", "--host-memory: how much memory"),
        ("train.py --gpu T5 --plan-only --host-memory 1GiB", "did you mean T4"),
        ("train.py --gpu T4 --plan-only --host-memory 1GiB --virtual", "leave --virtual"),
        ("train.py --host server-ddr4 --plan-only", "--host describes the machine of --gpu NAME"),
        ("train.py --json", "--json shows a plan: add --plan-only"),
        ("train.py --plan missing.json", "no such plan: missing.json"),
        ("train.py --save-plan nowhere/p.json", "--save-plan nowhere/p.json: there is no folder"),
        ("train.py --save-profile .", "--save-profile .: that is a folder"),
        ("--gpus 2 plan", "The command comes first: harmony-run plan"),
        ("-m", "-m: which module?"),
        ("-m no.such.module", "-m no.such.module: no such module"),
        ("-m email", "a package without __main__"),
        ("--seed -1 train.py", "--seed -1: it takes a whole number"),
        ("--log-level loud train.py", "invalid choice"),
        ("--config missing.toml train.py", "--config missing.toml: "),
        ("train.py --report out.pdf", "the ending says what is written"),
        ("--frobnicate train.py", "see harmony-run --help"),
    ],
)
@pytest.mark.usefixtures("script")
def test_bad_use_is_refused_with_what_is_wrong(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words.split())
    assert message in str(caught.value)


def test_a_configuration_is_options_that_the_command_line_overrides(
    script: str, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(
        'gpus = 4\ngpu-memory = "20GiB"\nplan_only = true\nvirtual = false\nseed = 7\n'
    )
    command = parse(["--config", "run.toml", script, "--gpus", "2"])
    wanted = Options(gpus=2, gpu_memory_nbytes=20 * 2**30, plan_only=True, active=True)
    assert (command.options, command.seed) == (wanted, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus = ", "--config run.toml: "),
        ("gpu_memry = 4", "there is no option gpu_memry; did you mean gpu-memory?"),
        ("virtual = 1", "virtual takes true or false"),
        ("gpus = true", "gpus takes a value"),
        ('config = "other.toml"', "there is no option config"),
        ("gpus = 0", "--config run.toml, line 1: --gpus 0: it takes a whole number"),
        ('# GPUs\n\ngpus = 2\n"gpu-memory" = 64', "--config run.toml, line 4: --gpu-memory: "),
        ('seed = 1\nmode = "fast"', "--config run.toml, line 2: argument --mode: invalid choice"),
        ("seed = 1\ngpu_memry = 4", "--config run.toml, line 2: there is no option gpu_memry"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    script: str, text: str, message: str
) -> None:
    Path("run.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse(["--config", "run.toml", script])
    assert message in str(caught.value)


def test_plans_take_a_configuration_too(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(
        'model = "llama-7b"\nhost-memory = "64GiB"\ncompare = ["T4", "2xA100"]\nlora = 8\n'
    )
    request = parse_plan(["--config", str(tmp_path / "plan.toml"), "--lora", "16"])
    assert request.compare == ("T4", "2xA100")
    assert (request.model, request.lora, request.host_memory_nbytes) == ("llama-7b", 16, 2**36)


def test_what_scripts_have_too_is_ours_before_the_script_only(script: str) -> None:
    words = ["--seed", "3", "--config", "theirs.yaml", "--log-level", "loud"]
    command = parse(["--seed", "1", script, *words])
    assert command.script_arguments == tuple(words)
    assert (command.seed, command.log_level) == (1, None)


def test_an_option_that_is_almost_ours_is_noticed_among_the_scripts(script: str) -> None:
    command = parse([script, "--gpu-memry", "1GiB", "--epochs", "3"])
    hint = mistyped(command.script_arguments)
    assert hint is not None
    assert "--gpu-memry" in hint
    assert "did you mean --gpu-memory?" in hint
    assert mistyped(["--epochs", "3", "--model", "gpt"]) is None or "--mode" in str(
        mistyped(["--model"])
    )
    assert mistyped(["3", "-x"]) is None
