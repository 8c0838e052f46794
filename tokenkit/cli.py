"""The command `tokenkit`: a list of doors, and what every door says when something goes wrong."""

from __future__ import annotations

import importlib
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from tokenkit.errors import (
    MEMORY_REMEDY,
    ExitCode,
    OtherRankError,
    exit_code,
    is_out_of_memory,
    leave_code,
    nearest,
)
from tokenkit.run.redaction import complain, redact_logs, shortened

try:
    from tokenkit.config import ConfigError
except ModuleNotFoundError as missing:  # installed for the losses alone, with torch and triton
    raise SystemExit(
        f"tokenkit: the commands need the package {missing.name}: pip install 'tokenkit-torch[train]'"
    ) from missing

DOORS = {
    "train": ("tokenkit.train:main", "move a model to another tokenizer: distil a teacher into a student"),
    "pretrain": (
        "tokenkit.commands.pretrain:main",
        "train a language model from nothing: PEER and MLA layers, or any of transformers",
    ),
    "estimate": (
        "tokenkit.commands.estimate:main",
        "say what memory, communication and time a training will take",
    ),
    "doctor": (
        "tokenkit.commands.doctor:main",
        "list all that would stop or spoil a training, and what to change",
    ),
    "align": ("tokenkit.commands.align:main", "show where two tokenizers cut the same text alike"),
    "pair-stats": (
        "tokenkit.commands.pair_stats:main",
        "measure the tokenization biases of a pair of tokenizers",
    ),
    "zett": (
        "tokenkit.commands.zett:main",
        "move a model to another tokenizer without training, or compare the ways",
    ),
    "export": (
        "tokenkit.commands.export:main",
        "write the model of a run or checkpoint in Hugging Face layout, or any model in another format",
    ),
    "merge-lora": ("tokenkit.commands.merge_lora:main", "merge a folder of adapters into its base model"),
    "eval": ("tokenkit.commands.eval:main", "run benchmarks of lm-eval on models"),
    "bits-per-byte": (
        "tokenkit.commands.bits_per_byte:main",
        "compare models with any tokenizers on a text, over the very same bytes",
    ),
    "eval-ensemble": (
        "tokenkit.commands.eval_ensemble:main",
        "ask several models as one, token by token: bits per byte, texts",
    ),
    "draft": (
        "tokenkit.commands.draft:main",
        "measure a small model as the draft of a larger one, and give it that one's tokenizer",
    ),
    "generate": (
        "tokenkit.commands.generate:main",
        "write on behind prompts, or answer in a conversation, as the text comes",
    ),
    "report": (
        "tokenkit.commands.report:main",
        "write one page about one or several runs: figures, curves, alignments, samples",
    ),
    "analyze-model": (
        "tokenkit.commands.analyze_model:main",
        "count a model's parameters by part, and those that a token meets",
    ),
    "mined-mapping": (
        "tokenkit.commands.mined_mapping:main",
        "find the nearest teacher token of every student token",
    ),
    "train-hypernet": (
        "tokenkit.train_hypernet:main",
        "train a network that writes embeddings for new tokens",
    ),
    "sweep": (
        "tokenkit.commands.sweep:main",
        "train with all combinations of several values, and compare them",
    ),
    "ablate": (
        "tokenkit.commands.ablate:main",
        "train a language model with all combinations of data mixes, experts and heads, and compare",
    ),
    "configs": ("tokenkit.commands.config_files:main", "list, show, copy and convert configuration files"),
    "completion": ("tokenkit.commands.completion:main", "write the completion of a shell: bash, zsh or fish"),
}
"""Name: (module:function taking the arguments and returning an exit code, one line about it)."""

SCRIPTS = {
    "cross_tokenizer_distill": "train",
    "compute_tokenizer_info": "pair-stats",
    "compute_mined_mapping": "mined-mapping",
    "eval_lockstep": "eval-ensemble",
}
"""Commands by the names of other programs' scripts. Each begins with the shipped file of that name."""

ABSENT = {
    "push_flax_version_to_hub": "nothing here needs weights of Flax: name the original model",
}
"""Scripts of other programs that have no command here, and why."""

OTHER_NAMES = {
    "analyze_model": "analyze-model",
    "export_model": "export",
    "export_checkpoint": "export",
    "export_to_onnx": "export",
    "merge_lora": "merge-lora",
    "run_ablations": "ablate",
    "optimize_for_inference": "export",
}
"""Scripts of other programs that are a command here, without a file of settings."""

FORMATS = {"export_to_onnx": "onnx", "optimize_for_inference": "int8"}
"""What some of these scripts write where no format is named."""

_MULTIRUN = {"-m", "--multirun"}
_FILES = ("--config", "--config-name")

STDOUT = 1
LONGEST_LINE = 2000  # characters of an error; a value may have millions
PATIENCE = (
    2.0  # seconds: torchrun ends all processes once one is gone, and the one that speaks needs a moment
)
EXIT_PIPE = 141  # what a shell calls the end of a process by SIGPIPE

EXTRAS = {
    "wandb": "track",
    "tensorboard": "track",
    "lm_eval": "eval",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "gguf": "export",
    "torchao": "quantize",
    "flash_attn": "flash",
}
"""Which extra brings a package that is missing; any other comes with `train`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Open the door that the first argument names, and return its exit code."""
    return run(lambda: _open(argv))


def _open(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from tokenkit import __version__

        print(f"tokenkit {__version__}")
        return 0
    name, rest = door(arguments)
    if name not in DOORS:
        script = name.replace("-", "_")
        known = ", ".join(DOORS)
        why = ABSENT.get(script, "")
        words = f"{name} is no command: {why}" if why else f"{name!r} is no command{nearest(name, DOORS)}"
        print(f"tokenkit: {words}{'' if why else f'; commands: {known}'}", file=sys.stderr)
        return ExitCode.CONFIG
    module, function = DOORS[name][0].split(":")
    return int(getattr(importlib.import_module(module), function)(rest) or 0)


def door(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command that the first word means, and the words behind it: scripts of others name theirs too."""
    name, *rest = arguments
    script = name.replace("-", "_")
    name = OTHER_NAMES.get(script, name)
    said = {word.partition("=")[0].lstrip("-+") for word in rest}
    if script in FORMATS and not said & {"format", "quantization"}:
        rest = [*rest, f"--format={FORMATS[script]}"]
    if script in SCRIPTS:
        name = SCRIPTS[script]
        names_files = any(word.partition("=")[0].replace("_", "-") in _FILES for word in rest)
        rest = rest if names_files else [*rest, "--config", script]
    if name == "train" and set(rest) & _MULTIRUN:
        return "sweep", [word for word in rest if word not in _MULTIRUN]
    return name, rest


def usage() -> str:
    """What `tokenkit --help` prints."""
    width = max(map(len, DOORS))
    doors = [f"  {name.ljust(width)}  {about}" for name, (_, about) in DOORS.items()]
    return "\n".join(
        [
            "usage: tokenkit COMMAND [OPTIONS]",
            "",
            *doors,
            "",
            "tokenkit COMMAND --help lists the options of a command.",
        ]
    )


def run(door: Callable[[], object], *, debug: bool = False) -> int:
    """Run a door; show an error that has a remedy as one line, and return the exit code of its kind.

    Errors that name no remedy are faults of tokenkit: they keep their traceback, and exit with 1.

    Args:
        door: does the work; an int that it returns is the exit code.
        debug: show the traceback of every error.
    """
    redact_logs()
    if os.environ.pop("HF_TRUST_REMOTE_CODE", "").lower() in ("1", "true", "yes", "on"):
        complain(
            "tokenkit: HF_TRUST_REMOTE_CODE has no effect here: only trust_remote_code runs a model's code"
        )
    try:
        try:
            result = door()
        finally:
            sys.stdout.flush()  # here, not at the interpreter's end, where nobody catches what it raises
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt as error:
        complain(f"tokenkit: {str(error) or 'interrupted'}")
        return exit_code(error)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return EXIT_PIPE
        code = exit_code(error)
        if _is_said_by_another(error):
            time.sleep(PATIENCE)
            return code
        leave_code(code)
        is_told = code != 1 or getattr(error, "is_told", False)
        if debug or not is_told:
            complain(traceback.format_exc().rstrip())
        if is_told:
            complain(f"tokenkit: {one_line(error)}")
        return code


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, with its rank where several processes run."""
    text = shortened(" ".join(str(error).split()), LONGEST_LINE) or type(error).__name__
    if is_out_of_memory(error):
        text = f"out of memory: {text.partition('. If reserved but')[0]}: {MEMORY_REMEDY}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        text += f": pip install 'tokenkit-torch[{EXTRAS.get(package, 'train')}]'"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    names_rank = world_size > 1 and not _is_on_every_rank(error)
    return f"rank {os.environ.get('RANK', '0')}: {text}" if names_rank else text


def _nobody_reads() -> bool:
    """Whether the reader of standard output has gone, as in `tokenkit --help | head`; then write nowhere."""
    output = select.poll()
    output.register(STDOUT, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return True


def _is_said_by_another(error: BaseException) -> bool:
    """Whether another rank of this machine says the same, or on another machine the one that failed.

    Of what one rank has, the first rank of every other machine repeats the words: each has a log of its own.
    """
    if _is_on_every_rank(error):
        return os.environ.get("RANK", "0") != "0"
    failed = getattr(error, "rank", None)
    if not isinstance(error, OtherRankError) or not isinstance(failed, int):
        return False
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    return rank % here != 0 or rank // here == failed // here


def _is_on_every_rank(error: BaseException) -> bool:
    """Whether all ranks have this error: they read the same configuration, or `parallel.together` says so."""
    return isinstance(error, ConfigError) or bool(getattr(error, "is_on_every_rank", False))


if __name__ == "__main__":
    raise SystemExit(main())
