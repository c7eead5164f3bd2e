"""What shells complete of `harmony-run`."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from harmony.cli import main as cli
from harmony.cli.arguments import make_parser


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("harmony-run p", ["plan"]),
        ("harmony-run train.py --gpu", ["--gpu", "--gpu-memory", "--gpus"]),
        ("harmony-run train.py --mode ", ["auto", "pp", "dp"]),
        ("harmony-run --precision b", ["bf16"]),
        ("harmony-run plan --lo", ["--lora"]),
        ("harmony-run doctor --j", ["--json"]),
        ("harmony-run train.py x", []),
    ],
)
def test_bash_completes(
    line: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.split(" ")
    asked = f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}"
    program = (
        f"{script('bash', capsys)}\n{asked}; _harmony_run; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected and not done.stderr


def test_zsh_and_fish_get_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    zsh, fish = script("zsh", capsys), script("fish", capsys)
    assert zsh.startswith("autoload -U +X bashcompinit && bashcompinit\n")
    for action in make_parser()._actions:
        for text in action.option_strings:
            assert text in zsh
            assert f" -l {text[2:]} " in fish or not text.startswith("--")


def test_a_shell_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err
