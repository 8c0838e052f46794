"""`tokenkit generate`: what a model writes behind a prompt, or answers in a conversation.

tokenkit generate MODEL "Once upon a time" --max-new-tokens 100
tokenkit generate MODEL --chat
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.paths import check_opened
from tokenkit.errors import ConfigError, blaming_data, names_a_new_file
from tokenkit.evaluation.sampling import Sampling
from tokenkit.models.options import Dtype
from tokenkit.options import flat

if TYPE_CHECKING:
    from torch import Tensor

    from tokenkit.evaluation.generation import Generated
    from tokenkit.evaluation.opened import Opened

ALIASES = {
    "model.pretrained_model_name_or_path": "model",
    "pretrained_model_name_or_path": "model",
    "model_path": "model",
    "model.tokenizer_name": "tokenizer_name",
    "prompt": "prompts",
    "max_tokens": "max_new_tokens",
    "system_prompt": "system",
}
Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Write on behind prompts, or answer messages, piece by piece as the text comes."""

    model: str
    """Folder in Hugging Face layout, a run, one of its checkpoints, or a name on the hub."""

    prompts: tuple[str, ...] = ()
    """Beginnings of texts. None: standard input is one; with chat, a conversation on the terminal."""

    prompt_file: str | None = None
    """File with prompts: .jsonl, a field `prompt` or `text` in each line; any other file is one prompt."""

    chat: bool = False
    """Each prompt is a message, written with the tokenizer's chat template."""

    system: str | None = None
    """With chat: what the system says before the first message."""

    sampling: Sampling = flat(Sampling)

    output: str | None = None
    """JSON lines that are written beside: prompt, text, number of tokens, how it ended. It must not exist."""

    tokenizer_name: str | None = None
    """Spec of the model's tokenizer. None: the one beside it."""

    dtype: Dtype | None = None
    """Of the weights. None: as they are stored."""

    device: str = "cpu"
    """Where the model runs."""

    trust_remote_code: bool = False
    """Run code that comes with a model or tokenizer, as byte models with input-id expansion do."""

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        if self.prompts and self.prompt_file is not None:
            raise ConfigError("prompts and prompt_file both give prompts: keep one of them")
        if self.system is not None and not self.chat:
            raise ConfigError("system is what a chat begins with: set chat too")
        if self.prompt_file is not None and not Path(self.prompt_file).expanduser().is_file():
            raise FileNotFoundError(f"prompt_file {self.prompt_file} does not exist")
        names_a_new_file("output", self.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = positions(list(sys.argv[1:] if argv is None else argv))

    def written() -> None:
        write(parse_command_line(GenerateConfig, words, program="tokenkit generate", aliases=ALIASES))

    return run(written)


def positions(words: list[str]) -> list[str]:
    """The words at the front as flags: the model, then prompts, which may hold commas and brackets. Those
    behind --chat are prompts too."""
    front, rest = _loose(words)
    if front and "=" in front[0]:
        return words  # name=value throughout
    if "--chat" in rest:
        place = rest.index("--chat")
        more, behind = _loose(rest[place + 1 :])
        if more not in (["true"], ["false"]):
            front, rest = front + more, [*rest[:place], "--chat=true", *behind]
    named = [f"--model={front[0]}"] if front else []
    return named + ([f"--prompts={json.dumps(front[1:], ensure_ascii=False)}"] if front[1:] else []) + rest


def _loose(words: list[str]) -> tuple[list[str], list[str]]:
    """Cut before the first flag."""
    end = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:end], words[end:]


def write(config: GenerateConfig) -> None:
    """Load the model, write behind each prompt, and write the file.

    Raises:
        DataError, FileNotFoundError: what cannot be read; a prompt that is too long.
    """
    check_opened("model", config.model)
    is_conversation = config.chat and not config.prompts and config.prompt_file is None and sys.stdin.isatty()
    prompts = [] if is_conversation else read_prompts(config)
    import torch

    from tokenkit.disk import write_durably
    from tokenkit.evaluation.opened import open_model
    from tokenkit.models.causal_lm import DTYPES

    torch.manual_seed(config.sampling.seed)
    how: dict[str, Any] = {"tokenizer_name": config.tokenizer_name, "device": config.device}
    how |= {"dtype": "auto" if config.dtype is None else DTYPES[config.dtype]}
    with (
        open_model(config.model, trust_remote_code=config.trust_remote_code, **how) as opened,
        blaming_data(),
    ):
        if config.chat:
            check_has_template(opened)
        if is_conversation:
            converse(opened, config)
            return
        rows = [answer(opened, config, prompt, is_one=len(prompts) == 1) for prompt in prompts]
    if config.output is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_durably(Path(config.output).expanduser(), lines)


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompts of the command line, the file or standard input.

    Raises:
        ConfigError: there is none.
        DataError: the file is not what its name says.
    """
    if config.prompts:
        return list(config.prompts)
    if config.prompt_file is None:
        if sys.stdin.isatty():
            raise ConfigError("no prompt: give it behind the model, with prompt_file, or to standard input")
        return [sys.stdin.read().removesuffix("\n")]
    path = Path(config.prompt_file).expanduser()
    with blaming_data():
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return [text.removesuffix("\n")]
        found = [
            _prompt_of(line, number, path) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
        if not found:
            raise ValueError(f"prompt_file {path} holds no prompt")
        return found


def _prompt_of(line: str, number: int, path: Path) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompt_file {path}, line {number}: no JSON: {error.msg}") from error
    prompt = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f"prompt_file {path}, line {number}: expected a field `prompt` or `text` with text")
    return prompt


def check_has_template(opened: Opened) -> None:
    """Refuse a chat with a model whose tokenizer has no template.

    Raises:
        ValueError: it has none.
    """
    if not opened.hf_tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {opened.name} has no chat template: leave chat out, or name a family with "
            "--tokenizer-name NAME:target=FAMILY (docs/tokenizer_specs.md)"
        )


def answer(opened: Opened, config: GenerateConfig, prompt: str, *, is_one: bool) -> dict[str, Any]:
    """Show what the model writes behind one prompt, and return it as a row."""
    if not is_one:
        print(f"> {prompt}", flush=True)
    if config.chat:
        generated = _said(opened, config, [*_beginning(config), {"role": "user", "content": prompt}])
    else:
        generated = _written(opened, config, opened.hf_tokenizer(prompt, return_tensors="pt").input_ids)
    print(flush=True)
    row = {"prompt": prompt, "text": generated.text, "tokens": len(generated.ids), "ended": generated.ended}
    return row


def converse(opened: Opened, config: GenerateConfig, read: Callable[[str], str] = input) -> None:
    """Answer line after line on a terminal, until there is none."""
    print("a line is a message; /new begins anew, /exit or Ctrl-D ends", file=sys.stderr)
    messages = _beginning(config)
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            print()
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/new":
            messages = _beginning(config)
        elif line:
            said = [*messages, {"role": "user", "content": line}]
            try:
                generated = _said(opened, config, said)
            except ValueError as error:  # too long: all before stays said
                print(f"{error}, or begin anew with /new", file=sys.stderr)
                continue
            print(flush=True)
            messages = [*said, {"role": "assistant", "content": generated.text}]


def _beginning(config: GenerateConfig) -> Messages:
    return [] if config.system is None else [{"role": "system", "content": config.system}]


def _said(opened: Opened, config: GenerateConfig, messages: Messages) -> Generated:
    """Answer messages.

    Raises:
        ValueError: messages that the template refuses, or too many of them.
    """
    from jinja2 import TemplateError

    try:
        found = opened.hf_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        raise ValueError(f"the chat template of {opened.name} refuses the messages: {error}") from error
    return _written(opened, config, found["input_ids"])


def _written(opened: Opened, config: GenerateConfig, prompt_1T: Tensor) -> Generated:
    from tokenkit.evaluation.generation import generate

    def show(text: str) -> None:
        print(text, end="", flush=True)

    return generate(opened, prompt_1T, config.sampling, show)


if __name__ == "__main__":
    raise SystemExit(main())
