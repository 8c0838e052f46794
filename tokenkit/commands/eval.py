"""`tokenkit eval`: benchmarks of lm-eval, for any model that another command writes.

tokenkit eval MODEL --tasks arc_easy piqa --output FOLDER
tokenkit eval A B --tasks arc_easy --task-data DIR --limit 100 --output FOLDER
torchrun --nproc-per-node 2 -m tokenkit.commands.eval MODEL --tasks arc_easy --output FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.benchmarks import LmEval
from tokenkit.config.paths import check_opened
from tokenkit.errors import ConfigError, at_least, blaming_data, names_a_folder
from tokenkit.models.options import Dtype
from tokenkit.options import flat

if TYPE_CHECKING:
    from tokenkit.parallel import World

ALIASES = {
    "model.pretrained_model_name_or_path": "models",
    "model.tokenizer_name": "tokenizer_name",
    "expand_model.pretrained_model_name_or_path": "base_model",
    "expand_model.tokenizer_name": "base_tokenizer",
    "max_samples": "limit",
    "confirm_run_unsafe_code": "allow_code",
} | {f"eval.{field.name}": field.name for field in fields(LmEval)}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Run benchmarks of lm-eval on models."""

    models: tuple[str, ...]
    """Folders, runs, checkpoints or hub names; one after the other."""

    output: str
    """Folder of results.json, scores.md and scores.png; it must be empty or absent."""

    tokenizer_name: str | None = None
    """Spec of the tokenizer of all of them. None: the one that lies beside each."""

    base_model: str | None = None
    """Where the model that a run began with lies now. None: where the run found it."""

    base_tokenizer: str | None = None
    """Spec of the tokenizer of that model. None: as in the run."""

    benchmarks: LmEval = flat(LmEval)

    log_samples: bool = False
    """Write every question with its answers too, to samples_TASK.jsonl."""

    seed: int = 1234
    """Of drawn answers, and of the examples in front of a question; lm-eval's own by default."""

    device: str | None = None
    """cpu, cuda or cuda:N. None: cuda where there is a GPU."""

    dtype: Dtype | None = None
    """Of the weights. None: as they are stored."""

    trust_remote_code: bool = False
    """Run code that comes with a model or tokenizer."""

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        names_a_folder("output", self.output)
        at_least("seed", self.seed, 0)
        if not self.benchmarks.tasks:
            raise ConfigError("tasks is empty: name tasks of lm-eval, as in --tasks arc_easy piqa")
        if not self.models or len(set(self.models)) < len(self.models):
            raise ConfigError(f"models must name each model once, got {list(self.models)}")
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device must be cpu, cuda or cuda:N, got {self.device!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    names = []
    while given and not re.match(r"-|\+{0,2}[A-Za-z_][\w.-]*=", given[0]):
        names.append(given.pop(0))
    words = [*given, "--models", *names] if names else given
    return run(
        lambda: evaluate(parse_command_line(EvalConfig, words, program="tokenkit eval", aliases=ALIASES))
    )


def evaluate(config: EvalConfig) -> None:
    """Load the tasks, run them on each model, write and print the scores.

    Raises:
        ConfigError: an unknown task, or one that is not allowed to run code.
        DataError: documents of a task that cannot be had, a model or tokenizer that cannot be read.
        FileExistsError: the output is not empty.
    """
    from tokenkit.disk import check_vacant

    output = Path(config.output).expanduser()
    check_vacant(output)
    check_opened("models", *config.models)

    from tokenkit.evaluation.lm_eval_tasks import load_tasks
    from tokenkit.parallel import start, stop

    world = start(backend="gloo" if config.device == "cpu" else None)
    try:
        options = config.benchmarks
        with world.together("load the tasks"):
            tasks = load_tasks(options.tasks, options.task_data, allow_code=options.allow_code)
        results = {name: _results(config, name, tasks, world) for name in config.models}
        if world.is_main:
            _write(output, results)
    finally:
        stop(world)


def _results(config: EvalConfig, name: str, tasks: Sequence[Any], world: World) -> dict[str, Any]:
    """Open one model and ask it everything."""
    from tokenkit.evaluation.lm_eval import asking_of, language_model
    from tokenkit.evaluation.lm_eval_tasks import run_tasks
    from tokenkit.evaluation.opened import open_model
    from tokenkit.evaluation.scorer import ModelScorer
    from tokenkit.models.causal_lm import DTYPES
    from tokenkit.training.exporting import Places

    options = config.benchmarks
    opening = open_model(
        name,
        dtype="auto" if config.dtype is None else DTYPES[config.dtype],
        tokenizer_name=config.tokenizer_name,
        trust_remote_code=config.trust_remote_code,
        device=_device(config, world),
        places=Places(base_model=config.base_model, base_tokenizer=config.base_tokenizer),
    )
    with opening as opened:
        if options.chat_template_mode == "surround_instruct" and not opened.hf_tokenizer.chat_template:
            raise ConfigError(
                f"chat_template_mode is surround_instruct, and the tokenizer of {name} has no chat template: "
                "choose direct_encode"
            )
        asking = asking_of(options, opened.tokenizer, seed=config.seed)
        lm = language_model(ModelScorer(opened), opened.hf_tokenizer, asking, world)
        with blaming_data():
            found = run_tasks(lm, tasks, options, seed=config.seed, samples=config.log_samples)
    return found | {"model_name": name}


def _device(config: EvalConfig, world: World) -> str:
    import torch

    if config.device in (None, "cuda"):
        if config.device is not None and world.device.type != "cuda":
            raise ConfigError("device is cuda, and this machine shows no GPU: set it to cpu")
        return str(world.device)
    assert config.device is not None
    if config.device != "cpu" and int(config.device.partition(":")[2]) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {config.device}, and this machine shows {torch.cuda.device_count()} GPUs: choose cpu"
        )
    return config.device


def _write(output: Path, results: Mapping[str, dict[str, Any]]) -> None:
    """Write all files at once, and print the table."""
    from tokenkit.disk import blaming_disk
    from tokenkit.evaluation.task_scores import labels, picture, scores_of, table
    from tokenkit.run.folder import staging_folder

    named = labels(results)
    scores = {named[name]: scores_of(found) for name, found in results.items()}
    text = table(scores)
    with blaming_disk(output), staging_folder(output) as staging:
        for name, found in results.items():
            folder = staging if len(results) == 1 else staging / named[name]
            folder.mkdir(exist_ok=True)
            for task, samples in found.pop("samples", {}).items():
                lines = "".join(json.dumps(sample, default=str) + "\n" for sample in samples)
                (folder / f"samples_{task}.jsonl").write_text(lines, encoding="utf-8")
            (folder / "results.json").write_text(
                json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8"
            )
        (staging / "scores.md").write_text(text + "\n", encoding="utf-8")
        (staging / "scores.png").write_bytes(picture(scores))
    print(text)
    print(f"written: {output}")


if __name__ == "__main__":
    raise SystemExit(main())
