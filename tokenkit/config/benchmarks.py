"""Benchmarks through lm-eval: the options of `tokenkit eval`, and of a training that measures on its way."""

from dataclasses import dataclass

from tokenkit.errors import ConfigError, at_least
from tokenkit.tokenization.options import ChatTemplateMode


@dataclass(frozen=True, kw_only=True)
class LmEval:
    """Benchmarks through lm-eval."""

    tasks: tuple[str, ...] = ()
    """Names of tasks, groups or tags of lm-eval, and paths of YAML files with a task."""

    limit: int | None = None
    """Documents per task, at most. None: all."""

    num_fewshot: int | None = None
    """Examples in front of a question. None: the task's own number."""

    task_data: str | None = None
    """Folder of JSON files with the tasks' documents (docs/evaluation.md). None: from where a task says,
    which for those of lm-eval is the hub."""

    add_bos: bool | None = None
    """Begin with BOS where the tokenizer has one. None: as the tokenizer does by itself."""

    chat_template_mode: ChatTemplateMode = "direct_encode"
    """How a prompt becomes tokens. direct_encode: as text, no_force_bos: without BOS; surround_instruct: as a
    user's message in the tokenizer's template, whose answer follows."""

    batch_size: int = 8
    """Prompts per forward pass, on each process."""

    max_length: int | None = None
    """Tokens that are read at once, at most; cut on the left. None: what the model can take."""

    max_new_tokens: int | None = None
    """Tokens of an answer, at most. None: the task's own number. This and max_length are of subword tokens: a
    tokenizer of bytes gets four times as many."""

    temperature: float | None = None
    """Of drawn answers; 0: the most likely token. None: as the task says."""

    num_beams: int | None = None
    """Beams of a beam search. None: as the task says, which is mostly 1."""

    allow_code: bool = False
    """Let tasks such as humaneval run the programs that the model writes."""

    def __post_init__(self) -> None:
        at_least("limit", self.limit, 1)
        at_least("num_fewshot", self.num_fewshot, 0)
        at_least("batch_size", self.batch_size, 1)
        at_least("max_length", self.max_length, 2)
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("temperature", self.temperature, 0)
        at_least("num_beams", self.num_beams, 1)
        if self.add_bos and "no_force_bos" in self.chat_template_mode:
            raise ConfigError(
                f"chat_template_mode {self.chat_template_mode} leaves BOS out, and add_bos is true: leave one"
            )

    @property
    def forces_bos(self) -> bool | None:
        """Whether a prompt begins with BOS; None: as its tokenizer says."""
        return False if "no_force_bos" in self.chat_template_mode else self.add_bos

    @property
    def generation(self) -> dict[str, float | bool]:
        """What these options say of answers that are written, as lm-eval names it."""
        found: dict[str, float | bool] = {}
        if self.temperature is not None:
            found |= {"temperature": self.temperature, "do_sample": self.temperature > 0}
        if self.num_beams is not None:
            found["num_beams"] = self.num_beams
        if self.max_new_tokens is not None:
            found["max_gen_toks"] = self.max_new_tokens
        return found
