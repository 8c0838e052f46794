"""`tokenkit eval-ensemble`: several models asked as one, token by token: on a text, on benchmarks, writing.

tokenkit eval-ensemble A B --text heldout.txt
tokenkit eval-ensemble A B --combine-strategy mean_logits --prompts "Once upon a time"
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.benchmarks import LmEval
from tokenkit.config.models import ModelSource
from tokenkit.config.paths import check_opened
from tokenkit.errors import ConfigError, at_least, blaming_data, names_a_folder
from tokenkit.evaluation.sampling import Sampling
from tokenkit.models.options import Dtype
from tokenkit.options import flat

if TYPE_CHECKING:
    from tokenkit.evaluation.ensemble import Combination, Ensemble

ALIASES = {
    "ppl_eval_data": "text",
    "max_samples": "limit",
    "combination": "combine_strategy",
    "mined_mapping_paths": "baseline_mined_mapping_paths",
    "prompt": "prompts",
}
Strategy = Literal["mean_prob", "mean_logits", "weighted", "max"]


@dataclass(frozen=True, kw_only=True)
class Combining:
    """How several models become one."""

    combine_strategy: Strategy = "mean_prob"
    """mean_prob: mean of the probabilities; weighted: the same with weights; mean_logits: mean of the logits;
    max: the largest probability of each token, over their sum."""

    weights: tuple[float, ...] | None = None
    """Of the models, in their order; only their proportions count. None: all the same."""

    baseline_mined_mapping_paths: tuple[str | None, ...] | None = None
    """For models with another tokenizer than the pivot: of each what `tokenkit mined-mapping` wrote with the
    pivot as target; null for the pivot, which may be left out, and for those that share its tokenizer."""

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if self.weights is not None and min(self.weights, default=0) <= 0:
            raise ConfigError(f"weights must be above 0, got {list(self.weights)}")
        if self.weights is not None and self.combine_strategy == "max":
            raise ConfigError("weights are of a mean, and combine_strategy is max: leave one out")
        if self.weights is None and self.combine_strategy == "weighted":
            raise ConfigError("combine_strategy weighted needs weights, one for each model")

    def mappings(self, count: int) -> list[str | None]:
        """Of each of `count` models.

        Raises:
            ConfigError: their number is not that of the models.
        """
        given = [None if _is_null(path) else path for path in self.baseline_mined_mapping_paths or ()]
        if self.baseline_mined_mapping_paths is None:
            return [None] * count
        if len(given) not in (count - 1, count) or (len(given) == count and given[0] is not None):
            raise ConfigError(
                f"baseline_mined_mapping_paths must hold a path or null for each of {count} models, null for "
                f"the first, which may be left out: got {given}"
            )
        return [None] * (count - len(given)) + given

    @property
    def combination(self) -> Combination:
        """How distributions are joined."""
        return "mean_prob" if self.combine_strategy == "weighted" else self.combine_strategy

    @property
    def shares(self) -> list[float] | None:
        """The weights, of sum 1."""
        return None if self.weights is None else [weight / sum(self.weights) for weight in self.weights]


def _is_null(path: str | None) -> bool:
    return path in (None, "null", "none", "None")


@dataclass(frozen=True, kw_only=True)
class TextScoring:
    """A text that is scored."""

    text: str | None = None
    """File, folder or hub name of documents: bits per byte of the ensemble and of each model."""

    max_length: int = 512
    """Tokens of the text that are read at once; less where a model has fewer positions."""

    stride: int | None = None
    """Tokens between the beginnings of two windows of a longer document. None: half a window."""

    batch_size: int = 8
    """Windows that are read together."""

    limit: int | None = None
    """Documents that are read, at most."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least("max_length", self.max_length, 2)
        at_least("stride", self.stride, 1, self.max_length - 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("limit", self.limit, 1)


@dataclass(frozen=True, kw_only=True)
class EvalEnsembleConfig:
    """Ask several models as one: on a text, on benchmarks of lm-eval, or writing behind prompts."""

    models: tuple[ModelSource, ...]
    """Folders in Hugging Face layout, runs, checkpoints or hub names; the first is the pivot, whose tokenizer
    cuts the text."""

    combining: Combining = flat(Combining)

    scoring: TextScoring = flat(TextScoring)

    eval: LmEval = field(default_factory=LmEval)

    prompts: tuple[str, ...] = ()
    """Beginnings of texts, which the ensemble writes on."""

    sampling: Sampling = flat(Sampling)

    output: str | None = None
    """Folder of bits_per_byte.json, results.json and texts.jsonl; it must be empty or absent. None: they are
    only shown."""

    dtype: Dtype | None = None
    """Of the weights. None: as they are stored."""

    device: str = "cpu"
    """Where the models run."""

    trust_remote_code: bool = False
    """Run code that comes with a model or tokenizer."""

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        names, weights = (
            [source.pretrained_model_name_or_path for source in self.models],
            self.combining.weights,
        )
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"models must name at least two models, each once, got {names}")
        if weights is not None and len(weights) != len(names):
            raise ConfigError(
                f"weights must hold one number for each of {len(names)} models, got {list(weights)}"
            )
        self.combining.mappings(len(names))
        if self.scoring.text is None and not self.prompts and not self.eval.tasks:
            raise ConfigError("nothing is asked of the ensemble: set text, eval.tasks or prompts")
        if self.output is not None:
            names_a_folder("output", self.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given, names = list(sys.argv[1:] if argv is None else argv), []
    while given and not re.match(r"-|\+{0,2}[A-Za-z_][\w.-]*=", given[0]):
        names.append(given.pop(0))
    words = ([f"--models={json.dumps(names, ensure_ascii=False)}"] if names else []) + given

    def asked() -> None:
        ask(parse_command_line(EvalEnsembleConfig, words, program="tokenkit eval-ensemble", aliases=ALIASES))

    return run(asked)


def ask(config: EvalEnsembleConfig) -> None:
    """Open the models, ask them as one, print and write what came.

    Raises:
        ConfigError: tokenizers that differ without a mapping.
        DataError, FileNotFoundError: models, mappings or texts that cannot be read.
        FileExistsError: the output is not empty.
    """
    from tokenkit.disk import check_vacant

    output = None if config.output is None else Path(config.output).expanduser()
    if output is not None:
        check_vacant(output)
    check_opened("models", *(source.pretrained_model_name_or_path for source in config.models))
    mappings = config.combining.mappings(len(config.models))
    for path in mappings:
        if path is not None and not Path(path).expanduser().exists():
            raise FileNotFoundError(
                f"baseline_mined_mapping_paths: {path} does not exist: `tokenkit mined-mapping` makes it"
            )
    import torch

    from tokenkit.evaluation.ensemble import Ensemble
    from tokenkit.evaluation.members import open_members
    from tokenkit.models.causal_lm import DTYPES

    tasks = []
    if config.eval.tasks:
        from tokenkit.evaluation.lm_eval_tasks import load_tasks

        tasks = load_tasks(config.eval.tasks, config.eval.task_data, allow_code=config.eval.allow_code)
    combining, files = config.combining, dict[str, str]()
    how: dict[str, Any] = {"dtype": "auto" if config.dtype is None else DTYPES[config.dtype]}
    how |= {"device": config.device, "trust_remote_code": config.trust_remote_code}
    with open_members(config.models, mappings, **how) as members:
        ensemble = Ensemble(members, combining.combination, combining.shares)
        if config.scoring.text is not None:
            files["bits_per_byte.json"] = json.dumps(scored(config, ensemble), indent=2) + "\n"
        if tasks:
            files["results.json"] = (
                json.dumps(answered(config, ensemble, tasks), indent=2, default=str) + "\n"
            )
        torch.manual_seed(config.sampling.seed)
        rows = [written(config, ensemble, prompt) for prompt in config.prompts]
        if rows:
            files["texts.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is not None:
        write(output, files)


def scored(config: EvalEnsembleConfig, ensemble: Ensemble) -> dict[str, Any]:
    """Return and print bits per byte of the ensemble, then of each member as it reads the pivot's tokens."""
    from tokenkit.commands.bits_per_byte import read_texts
    from tokenkit.evaluation.members import bits_of_ensemble
    from tokenkit.evaluation.text_bits import summary, table
    from tokenkit.tokenization.written import writable_text

    options = config.scoring
    assert options.text is not None
    with blaming_data():
        tokenizers = [ensemble.pivot.tokenizer]
        texts = [writable_text(text, tokenizers)[0] for text in read_texts(options.text, options.limit)]
        texts = [text for text in texts if text]
        window = min(options.max_length, ensemble.positions or options.max_length)
        stride = min(options.stride or max(1, window // 2), window - 1)
        bits, count = bits_of_ensemble(
            ensemble, texts, window=window, stride=stride, batch=options.batch_size
        )
        names = [
            f"ensemble ({config.combining.combine_strategy})",
            *(m.opened.name for m in ensemble.members),
        ]
        tokens = dict.fromkeys(names, count)
        found = summary(
            texts, dict(zip(names, bits, strict=True)), tokens, samples=1000, seed=config.sampling.seed
        )
    print(table(found))
    return found


def answered(config: EvalEnsembleConfig, ensemble: Ensemble, tasks: Sequence[Any]) -> dict[str, Any]:
    """Return and print what lm-eval finds: the ensemble stands where a model would."""
    import torch

    from tokenkit.evaluation.lm_eval import asking_of, language_model
    from tokenkit.evaluation.lm_eval_tasks import run_tasks
    from tokenkit.evaluation.task_scores import scores_of, table
    from tokenkit.parallel import World

    options, pivot, seed = config.eval, ensemble.pivot, config.sampling.seed
    if options.chat_template_mode == "surround_instruct" and not pivot.hf_tokenizer.chat_template:
        raise ConfigError(
            f"eval.chat_template_mode is surround_instruct, and the tokenizer of {pivot.name} has no chat "
            "template: choose direct_encode"
        )
    world = World(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    lm = language_model(ensemble, pivot.hf_tokenizer, asking_of(options, pivot.tokenizer, seed=seed), world)
    with blaming_data():
        found = run_tasks(lm, tasks, options, seed=seed)
    names = [member.opened.name for member in ensemble.members]
    found |= {"model_name": names, "combine_strategy": config.combining.combine_strategy}
    print(table({f"ensemble ({config.combining.combine_strategy})": scores_of(found)}))
    return found


def written(config: EvalEnsembleConfig, ensemble: Ensemble, prompt: str) -> dict[str, Any]:
    """Write on behind one prompt, show it as it comes, and return it as a row."""
    import torch

    from tokenkit.evaluation.generation import generate
    from tokenkit.evaluation.lockstep import Lockstep

    def show(text: str) -> None:
        print(text, end="", flush=True)

    print(f"> {prompt}")
    with blaming_data():
        ids_1T = ensemble.pivot.hf_tokenizer(prompt, return_tensors="pt").input_ids
        lockstep = Lockstep(ensemble, torch.ones_like(ids_1T))
        found = generate(ensemble.pivot, ids_1T, config.sampling, show, [lockstep], ensemble.positions)
    print(flush=True)
    return {"prompt": prompt, "text": found.text, "tokens": len(found.ids), "ended": found.ended}


def write(output: Path, files: dict[str, str]) -> None:
    """Write all files at once."""
    from tokenkit.disk import blaming_disk
    from tokenkit.run.folder import staging_folder

    with blaming_disk(output), staging_folder(output) as staging:
        for name, content in files.items():
            (staging / name).write_text(content, encoding="utf-8")
    print(f"written: {output}")


if __name__ == "__main__":
    raise SystemExit(main())
