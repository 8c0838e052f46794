"""`tokenkit draft`: a small model as the draft of a larger one, before and after it has that one's tokenizer.

tokenkit draft TARGET DRAFT --text heldout.txt --output moved
tokenkit draft TARGET MOVED --text heldout.txt
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.forms import with_positions
from tokenkit.config.paths import check_opened
from tokenkit.errors import ConfigError, ExitCode, at_least, blaming_data, names_a_new_file
from tokenkit.evaluation.sampling import Sampling
from tokenkit.models.options import Dtype
from tokenkit.options import flat

if TYPE_CHECKING:
    from torch import Tensor

    from tokenkit.evaluation.drafts import Assistance
    from tokenkit.evaluation.opened import Opened

ALIASES = {
    "assistant_model": "draft",
    "target.pretrained_model_name_or_path": "target_model",
    "draft.pretrained_model_name_or_path": "draft",
}


@dataclass(frozen=True, kw_only=True)
class Move:
    """How the draft gets the target's tokenizer."""

    output: str | None = None
    """Folder of the moved draft; it must be empty or absent. None: nothing is moved, the draft is measured as
    it is."""

    steps: int = 0
    """Steps of training behind the move, each of 8 documents: `tokenkit train` with CLM and ALM, the draft
    under its old tokenizer as teacher. 0: rows by FVT alone."""

    data: str | None = None
    """Text of that training: file, folder or hub name."""

    learning_rate: float = 5e-4
    """Of that training, every weight."""

    def __post_init__(self) -> None:
        """Check what belongs together."""
        at_least("steps", self.steps, 0)
        if self.steps and (self.data is None or self.output is None):
            raise ConfigError("steps trains the moved draft: give it data, and output")
        if not self.steps and self.data is not None:
            raise ConfigError("data is what steps trains on, and steps is 0: set both, or leave data out")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is written on."""

    limit: int = 16
    """Documents that are read, at most."""

    prompt_tokens: int = 32
    """Tokens of a beginning, of the target."""

    num_assistant_tokens: int | None = None
    """Tokens that the draft proposes at once. None: as transformers has it: up to 20, fewer where the draft
    is not sure."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least("limit", self.limit, 1)
        at_least("prompt_tokens", self.prompt_tokens, 1)
        at_least("num_assistant_tokens", self.num_assistant_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Measure a draft model in transformers' assisted generation, and move it to the target's tokenizer."""

    target_model: str
    """The model that is helped: a folder in Hugging Face layout, a run, a checkpoint, or a hub name."""

    draft: str
    """The model that helps: the same. With output, one that is no run."""

    text: str
    """File, folder or hub name of documents, whose beginnings are the prompts."""

    prompts: Prompts = flat(Prompts)
    move: Move = flat(Move)
    sampling: Sampling = flat(Sampling)

    scores: str | None = None
    """JSON file of the figures; it must not exist."""

    dtype: Dtype | None = None
    """Of the weights. None: as they are stored."""

    device: str = "cpu"
    """Where the models run."""

    trust_remote_code: bool = False
    """Run code that comes with a model or tokenizer."""

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        if self.sampling.num_beams > 1 or self.sampling.stop:
            raise ConfigError("num_beams and stop are not for assisted generation: leave them out")
        names_a_new_file("scores", self.scores)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = with_positions(sys.argv[1:] if argv is None else argv, "target-model", "draft")

    def measured() -> None:
        measure(parse_command_line(DraftConfig, words, program="tokenkit draft", aliases=ALIASES))

    return run(measured)


def measure(config: DraftConfig) -> None:
    """Measure the target alone and with the draft; move the draft and measure again; print the table.

    Raises:
        DataError, FileNotFoundError: models or texts that cannot be read.
        FileExistsError: the output is not empty.
    """
    from tokenkit.disk import check_vacant, write_durably

    if config.move.output is not None:
        check_vacant(Path(config.move.output).expanduser())
    check_opened("target_model", config.target_model)
    check_opened("draft", config.draft)
    from tokenkit.evaluation.drafts import assist, padding_to, table
    from tokenkit.evaluation.members import same_ids
    from tokenkit.evaluation.opened import open_model
    from tokenkit.models.causal_lm import DTYPES

    how: dict[str, Any] = {"dtype": "auto" if config.dtype is None else DTYPES[config.dtype]}
    how |= {"device": config.device, "trust_remote_code": config.trust_remote_code}
    found: dict[str, Assistance] = {}

    def measured(name: str, target: Opened, draft: Opened | None) -> None:
        number = config.prompts.num_assistant_tokens
        found[name] = assist(target, draft, prompts, config.sampling, number)

    with open_model(config.target_model, **how) as target, blaming_data():
        with open_model(config.draft, **how) as draft:
            is_moved = same_ids(target.tokenizer, draft.tokenizer)
            if is_moved and config.move.output is not None:
                raise ConfigError(f"{config.draft} has the target's tokenizer already: leave output out")
            prompts = beginnings(config, target, draft)
            measured("target alone", target, None)
            try:
                measured("draft" if is_moved else "draft with its own tokenizer", target, draft)
            except ValueError as error:
                if config.move.output is None:
                    raise
                print(f"{error}; the move is measured alone", file=sys.stderr)
        if config.move.output is not None:
            rows = padding_to(target.causal.config.vocab_size, target.tokenizer.vocab_size)
            move(config, target.tokenizer_spec, rows)
            with open_model(config.move.output, **how) as draft:
                measured("draft with the target's", target, draft)
    alone = found["target alone"]
    figures = {name: one.summary(alone) for name, one in found.items()}
    print(table(figures))
    if config.scores is not None:
        write_durably(Path(config.scores).expanduser(), json.dumps(figures, indent=2) + "\n")


def beginnings(config: DraftConfig, target: Opened, draft: Opened) -> list[Tensor]:
    """Return the prompts, ids of the target.

    Raises:
        ValueError: no document is long enough, or the models have too few positions.
    """
    from tokenkit.commands.bits_per_byte import read_texts

    wanted = config.prompts.prompt_tokens
    for opened in (target, draft):
        if opened.positions is not None and wanted >= opened.positions:
            raise ValueError(
                f"prompt_tokens {wanted} leaves none of the {opened.positions} positions of {opened.name} to "
                "write: lower it"
            )
    texts = read_texts(config.text, config.prompts.limit)
    found = [
        target.hf_tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :wanted] for text in texts
    ]
    found = [ids_1T for ids_1T in found if ids_1T.shape[1] == wanted]
    if not found:
        raise ValueError(f"no document of {config.text} has {wanted} tokens: lower prompt_tokens")
    return found


def move(config: DraftConfig, tokenizer: str, padding: int) -> None:
    """Give the draft the target's tokenizer and number of rows, by the doors that do so alone.

    Raises:
        ConfigError: what that door says.
    """
    from tokenkit.train import main as train

    output, options = str(config.move.output), config.move
    words = ["--target-tokenizer-name", tokenizer, "--pad-to-multiple-of", str(padding), "--output", output]
    words += ["--trust-remote-code"] if config.trust_remote_code else []
    if not options.steps:
        from tokenkit.commands.zett import main as zett

        code = zett(["--model.pretrained-model-name-or-path", config.draft, *words])
    else:
        words += [
            "--student.pretrained-model-name-or-path",
            config.draft,
            "--losses",
            "clm",
            "alm_unconstrained",
        ]
        words += [
            "--data.dataset-name",
            str(options.data),
            "--steps",
            str(options.steps),
            "--batch-size",
            "8",
        ]
        words += ["--warmup-steps", str(min(10, options.steps // 4)), "--train-model-mode", "full"]
        code = train([*words, "--optimizer.learning-rate", str(options.learning_rate)])
    if code != ExitCode.DONE:
        raise ConfigError(f"{config.draft} could not be moved: see above")


if __name__ == "__main__":
    raise SystemExit(main())
