"""`harmony-run completion`: what lets a shell complete the options, printed as a script of it.

    eval "$(harmony-run completion bash)"        in ~/.bashrc; zsh: the same in ~/.zshrc
    harmony-run completion fish > ~/.config/fish/completions/harmony-run.fish

The script is made of the parsers' own options and starts no Python when a key is pressed.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

from harmony.cli import arguments, doctor_command, plan_arguments
from harmony.cli.plan_arguments import Parser

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_harmony_run() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" options
    COMPREPLY=()
    case "${{COMP_WORDS[1]}}" in
{commands}
    esac
    if [[ "$word" == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    elif (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W {names} -- "$word"))
    fi
}}
complete -o default -o bashdefault -F _harmony_run harmony-run
"""


def run(words: Sequence[str], out: TextIO) -> int:
    """Print the script of a shell to ``out``; return the exit code.

    Raises:
        ConfigError: if the words make no sense.
        SystemExit: after ``--help`` has been printed.
    """
    parser = _parser()
    shell = parser.parse_args(list(words)).shell
    parsers = {
        "plan": plan_arguments.make_parser(),
        "doctor": doctor_command.make_parser(),
        "completion": parser,
        "": arguments.make_parser(),
    }
    out.write(_fish(parsers) if shell == "fish" else _bash(parsers, zsh=shell == "zsh"))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="harmony-run completion", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shell", choices=SHELLS, help="whose script to print")
    return parser


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options that are shown by ``--help``."""
    for action in parser._actions:
        if action.option_strings and action.help is not argparse.SUPPRESS:
            yield action


def _bash(parsers: Mapping[str, argparse.ArgumentParser], *, zsh: bool) -> str:
    """A function of bash; zsh runs it by what it has for that."""
    cases = []
    for name, parser in parsers.items():
        words = sorted(text for action in _options(parser) for text in action.option_strings)
        lines = [f"        options={shlex.quote(' '.join(words))}"]
        chosen = [
            f"            {'|'.join(action.option_strings)}) COMPREPLY=($(compgen -W "
            f'"{" ".join(map(str, action.choices))}" -- "$word")); return ;;'
            for action in _options(parser)
            if action.choices
        ]
        if chosen:
            lines += ['        case "$before" in', *chosen, "        esac"]
        cases.append("\n".join([f"    {name or '*'})", *lines, "        ;;"]))
    names = shlex.quote(" ".join(name for name in parsers if name))
    begin = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    return begin + _BASH.format(commands="\n".join(cases), names=names)


def _fish(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    commands = [name for name in parsers if name]
    first = "__fish_is_nth_token 1"
    lines = [f"complete -c harmony-run -n '{first}' -a '{' '.join(commands)}'"]
    for name, parser in parsers.items():
        seen = f"__fish_seen_subcommand_from {name or ' '.join(commands)}"
        where = seen if name else f"not {seen}"
        for action in _options(parser):
            line = f"complete -c harmony-run -n {shlex.quote(where)}"
            for text in action.option_strings:
                line += f" -l {text[2:]}" if text.startswith("--") else f" -s {text[1:]}"
            if action.choices:
                line += f" -x -a {shlex.quote(' '.join(map(str, action.choices)))}"
            elif action.nargs != 0:
                line += " -r"
            lines.append(f"{line} -d {shlex.quote((action.help or '').replace('%%', '%'))}")
    return "\n".join(lines) + "\n"
