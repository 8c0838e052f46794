"""`tokenkit completion bash|zsh|fish`: commands, flags and their values, for the shell to offer.

eval "$(tokenkit completion bash)"
"""

from __future__ import annotations

import importlib
import sys
import typing
from collections.abc import Sequence
from typing import Any

from tokenkit.cli import DOORS, run
from tokenkit.config import ConfigError
from tokenkit.config.forms import short_forms
from tokenkit.config.schema import leaves, options
from tokenkit.config.shipped import shipped_names
from tokenkit.errors import nearest

USAGE = """usage: tokenkit completion bash|zsh|fish

bash  eval "$(tokenkit completion bash)"     in ~/.bashrc
zsh   eval "$(tokenkit completion zsh)"      in ~/.zshrc
fish  tokenkit completion fish > ~/.config/fish/completions/tokenkit.fish
"""

CONFIGURED = {
    "train": "tokenkit.config.train:TrainConfig",
    "align": "tokenkit.commands.align:AlignOptions",
    "ablate": "tokenkit.commands.ablate:AblateConfig",
    "pretrain": "tokenkit.config.pretrain:PretrainConfig",
    "pair-stats": "tokenkit.commands.pair_stats:PairStatsConfig",
    "zett": "tokenkit.commands.zett:ZettConfig",
    "export": "tokenkit.commands.export:ExportConfig",
    "report": "tokenkit.commands.report:ReportConfig",
    "merge-lora": "tokenkit.commands.merge_lora:MergeLoraConfig",
    "analyze-model": "tokenkit.commands.analyze_model:AnalyzeModelConfig",
    "bits-per-byte": "tokenkit.commands.bits_per_byte:BitsPerByteConfig",
    "eval": "tokenkit.commands.eval:EvalConfig",
    "eval-ensemble": "tokenkit.commands.eval_ensemble:EvalEnsembleConfig",
    "draft": "tokenkit.commands.draft:DraftConfig",
    "generate": "tokenkit.commands.generate:GenerateConfig",
    "mined-mapping": "tokenkit.commands.mined_mapping:MinedMappingConfig",
    "train-hypernet": "tokenkit.config.hypernet:TrainHypernetConfig",
}
"""The configuration of each command that has one."""

WORDS = {
    "configs": ("list", "show", "copy", "convert"),
    "completion": ("bash", "zsh", "fish"),
    "sweep": (),
    "estimate": (),
    "doctor": (),
}
OWN = {
    "sweep": ("--jobs", "--launch", "--slurm", "--slurm-options", "--metrics", "--list", "--table"),
    "estimate": ("--gpus", "--gpu", "--mfu", "--output"),
    "doctor": ("--documents", "--no-weights", "--json"),
}
"""Of commands that take the fields of training, what they take beside."""

Flags = dict[str, tuple[tuple[str, ...], str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: print(script(list(sys.argv[1:] if argv is None else argv)), end=""))


def script(arguments: list[str]) -> str:
    """The completion of a shell.

    Raises:
        ConfigError: no shell, or one that is not known.
    """
    shells = {"bash": bash, "zsh": zsh, "fish": fish}
    if {"-h", "--help"} & set(arguments):
        return USAGE
    if len(arguments) != 1 or arguments[0] not in shells:
        written = " ".join(arguments)
        raise ConfigError(
            f"completion takes one of bash, zsh, fish, got {written!r}{nearest(written, shells)}"
        )
    return shells[arguments[0]]()


def flags(command: str) -> Flags:
    """Flag: (its values, what it means) of a command."""
    place = CONFIGURED.get("train" if command in OWN else command)
    if place is None:
        return {}
    module, _, name = place.partition(":")
    schema: Any = getattr(importlib.import_module(module), name)
    found: Flags = {"--config": (tuple(shipped_names()), "YAML files"), "--help": ((), "list the options")}
    found |= {f"--{short.replace('_', '-')}": ((), name) for short, name in short_forms(schema).items()}
    for leaf in leaves(schema):
        found[f"--{leaf.name.replace('_', '-')}"] = (_values(leaf.type), leaf.help)
    own = {flag: ((), "") for flag in OWN.get(command, ())}
    found |= own or {"--print-config": ((), "show and stop")}
    return found


def _values(hint: Any) -> tuple[str, ...]:
    """What a field may be, where that is a list of words."""
    if bool in options(hint):
        return ("true", "false")
    inner = [
        typing.get_args(option)[0] if str(option).startswith("tuple") else option for option in options(hint)
    ]
    return tuple(
        str(word)
        for option in inner
        if typing.get_origin(option) is typing.Literal
        for word in option.__args__
    )


def bash() -> str:
    """For bash, and for zsh in its manner."""
    values, all_flags = [], []
    for command in DOORS:
        known = flags(command)
        all_flags.append(f"    {command}) words='{' '.join(known or WORDS[command])}' ;;")
        values += [
            f"    '{command} {flag}') words='{' '.join(choices)}' ;;"
            for flag, (choices, _) in known.items()
            if choices
        ]
    values.append(f"    'configs show' | 'configs copy') words='{' '.join(shipped_names())}' ;;")
    lines = [
        "_tokenkit() {",
        '  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" words=',
        "  COMPREPLY=()",
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f"    COMPREPLY=($(compgen -W '{' '.join(DOORS)}' -- \"$current\"))",
        "    return",
        "  fi",
        '  case "${COMP_WORDS[1]} $previous" in',
        *values,
        "  esac",
        '  if [ -z "$words" ]; then case "${COMP_WORDS[1]}" in',
        *all_flags,
        "  esac; fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o default -F _tokenkit tokenkit",
    ]
    return "\n".join(lines) + "\n"


def zsh() -> str:
    """For zsh, which reads what bash reads."""
    return f"autoload -Uz compinit bashcompinit && compinit && bashcompinit\n{bash()}"


def fish() -> str:
    """For fish, with what each flag means."""
    lines = ["complete -c tokenkit -f -n __fish_use_subcommand -a help -d 'list the commands'"]
    for command, (_, about) in DOORS.items():
        lines.append(f"complete -c tokenkit -f -n __fish_use_subcommand -a {command} -d {_quoted(about)}")
        seen = f"complete -c tokenkit -n '__fish_seen_subcommand_from {command}'"
        lines += [f"{seen} -f -a '{' '.join(WORDS[command])}'"] if WORDS.get(command) else []
        for flag, (choices, meaning) in flags(command).items():
            offered = f" -a '{' '.join(choices)}'" if choices else ""
            only = "-x" if choices and flag != "--config" else "-r"  # no files where the values are known
            lines.append(f"{seen} {only} -l {flag[2:]}{offered} -d {_quoted(meaning.partition('. ')[0])}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    raise SystemExit(main())
