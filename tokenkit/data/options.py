"""What a user says about data and text. Nothing here loads torch: `--help` reads this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from tokenkit.options import MOST_TOKENS, OptionError, check_at_least, check_parts, option
from tokenkit.tokenization.options import SPACE_MASK_PARTS, ChatTemplateMode, LossMaskMode, SpecialTokensMode

Format = Literal["txt", "text", "jsonl", "json", "parquet", "arrow", "csv", "tsv"]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """One data set of a mix."""

    name: str | None = None
    """What messages call it; without `path`, also where it is."""
    path: str | None = None
    """Local file or folder, or a name on the Hugging Face hub."""
    subset: str | None = None
    """Configuration of a hub data set; local data has none."""
    split: str = "train"
    """Split of a hub data set; of a local folder, that which the names of its files say."""
    format: Format | None = None
    """Format of local files (`text` is `txt`); unset: by their endings."""
    streaming: bool = False
    """Read rows as they are needed, instead of holding all of them in memory."""
    weight: float = 1.0
    """Share of the documents of the mix, relative to the other weights."""
    text_field: str | None = None
    """Field that holds the text; unset: `messages`, `prompt` and `completion`, `instruction` or `text`."""
    text_template: str | None = None
    """Text made of several fields, such as `{question} {answer}`."""

    def __post_init__(self) -> None:
        """Check what does not need the data."""
        if self.name is None and self.path is None:
            raise ValueError("each of data.datasets needs a path (a file, folder or hub name): got none")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"data.datasets.weight must be positive and finite: got {self.weight}")
        if self.text_field is not None and self.text_template is not None:
            raise ValueError("give text_field or text_template, not both")
        if self.format is not None and self.format not in get_args(Format):
            raise ValueError(f"data.datasets.format must be one of {get_args(Format)}: got {self.format!r}")

    @property
    def location(self) -> str:
        """Where the data set is: a path, or a name on the hub."""
        return self.path if self.path is not None else str(self.name)


@dataclass(frozen=True, kw_only=True)
class HeldoutOptions:
    """Documents that are never trained on."""

    fraction: float = 0.01
    """Share of the documents that is held out, by a hash of their position in the data set."""
    documents: int = 200
    """How many of those are read for evaluation; the others are left alone."""
    dataset_name: str | None = None
    """Other text to measure on: a file, folder or hub name. Nothing is then held out of the training data."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.fraction < 1:
            raise ValueError(f"data.heldout.fraction must lie in [0, 1): got {self.fraction}")
        if self.documents < 0:
            raise ValueError(f"data.heldout.documents must not be negative: got {self.documents}")
        if self.dataset_name is not None and not self.documents:
            raise ValueError(
                "data.heldout.dataset_name is never read with data.heldout.documents 0: drop one of them"
            )


@dataclass(kw_only=True)
class TextOptions:
    """How documents become tokens."""

    max_length_teacher: int = 512
    """Teacher tokens of a document; the rest is cut off."""

    max_length_student: int = option(512, "max_length_new")
    """Student tokens of a document; the rest is cut off."""

    use_chat_template: bool = True
    """Write conversations with each tokenizer's own template pieces. false: as one plain text, a line or more
    for each message; no tokenizer needs a template then. Not with chat_template_mode surround_instruct."""

    chat_template_mode: ChatTemplateMode = "direct_encode"
    """What is done with a row of plain text. surround_instruct: it becomes the answer to an empty turn;
    direct_encode: BOS, text, EOS, where the names say without one of them."""

    loss_mask_mode: LossMaskMode | None = None
    """Tokens that the losses see. None or assistant: what the assistant says, the completion of a prompt, all
    of a plain text; all: every token."""

    special_tokens_mode: SpecialTokensMode = "identity"
    """Special tokens in the losses. identity: a pair of them is a chunk like any other; ignore: no
    chunk holds one; ignore_pad: padding alone is left out."""

    space_mask_mode: str = "space+tab+newline+special"
    """Tokens that count as beginning with whitespace: space, tab, newline, special, joined with `+`."""

    pack_documents: bool = False
    """Lay the documents of a micro-batch out in fewer, fuller rows for the models, the same ones in student
    and teacher; they do not see each other, and losses see each by itself. At most 5 % stays padding."""

    group_by_length: bool = False
    """Put documents of like length into one micro-batch, so that less is padding; a step keeps its own."""

    def __post_init__(self) -> None:
        """Check what does not need a tokenizer."""
        check_at_least(self, 1, "max_length_teacher", "max_length_student", largest=MOST_TOKENS)
        check_parts("space_mask_mode", self.space_mask_mode, SPACE_MASK_PARTS)
        if not self.use_chat_template and self.chat_template_mode == "surround_instruct":
            raise OptionError(
                "{chat_template_mode} surround_instruct writes a template, and {use_chat_template} is false: "
                "choose direct_encode, or leave {use_chat_template} as it is"
            )


@dataclass(frozen=True, kw_only=True)
class BadRowOptions:
    """What to do with rows that cannot be read as a document."""

    action: Literal["skip", "raise"] = "skip"
    """`skip` counts the row under its reason; `raise` stops at the first."""
    unencodable: Literal["skip", "drop", "replace"] = "skip"
    """A row with characters that a tokenizer lacks the bytes for: `skip` leaves it out, counted; `drop` and
    `replace` (by U+FFFD or `?`) change its text for both sides, counted."""
    quota: float = 0.01
    """Share of the rows read so far that may be skipped, once more than ten were; beyond it: an error."""
    max_row_bytes: int = 10_000_000
    """UTF-8 bytes of one document; a larger one is a bad row."""
    max_file_bytes: int = 64 * 2**30
    """Unpacked size of one file; a larger one is an error."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.action not in ("skip", "raise"):
            raise ValueError(f"data.bad_rows.action must be skip or raise: got {self.action!r}")
        if self.unencodable not in ("skip", "drop", "replace"):
            raise ValueError(
                f"data.bad_rows.unencodable must be skip, drop or replace: got {self.unencodable!r}"
            )
        if not 0 <= self.quota <= 1:
            raise ValueError(f"data.bad_rows.quota must lie in [0, 1]: got {self.quota}")
        if min(self.max_row_bytes, self.max_file_bytes) < 1:
            raise ValueError("data.bad_rows.max_row_bytes and max_file_bytes must be positive")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """One data set, or a mix of several by weight."""

    dataset_name: str | None = None
    """Local file or folder, or a name on the Hugging Face hub."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set; local data has none."""
    split: str = "train"
    """Split of a hub data set; of a local folder, that which the names of its files say."""
    streaming: bool = False
    """Read rows as they are needed, instead of holding all of them in memory."""
    shuffle_buffer_size: int = 10_000
    """Rows of a block: a stream is shuffled inside consecutive blocks. 1: not shuffled."""
    text_field: str | None = None
    """Field that holds the text; unset: `messages`, `prompt` and `completion`, `instruction` or `text`."""
    text_template: str | None = None
    """Text made of several fields, such as `{question} {answer}`."""
    num_workers: int = 1
    """0 tokenizes between the steps; more: in a background thread, that many steps ahead."""
    batch_size: int | None = None
    """Documents of one optimizer step over all ranks; unset: the run's `batch_size`."""
    datasets: tuple[SourceOptions, ...] = ()
    """Data sets to mix, instead of `dataset_name`."""
    heldout: HeldoutOptions = field(default_factory=HeldoutOptions)
    bad_rows: BadRowOptions = field(default_factory=BadRowOptions)

    def __post_init__(self) -> None:
        """Check what does not need the data."""
        if self.dataset_name is not None and self.datasets:
            raise ValueError("give data.dataset_name or data.datasets, not both")
        if self.text_field is not None and self.text_template is not None:
            raise ValueError("give data.text_field or data.text_template, not both")
        if self.shuffle_buffer_size < 1:
            raise ValueError(f"data.shuffle_buffer_size must be at least 1: got {self.shuffle_buffer_size}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must not be negative: got {self.num_workers}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"data.batch_size must be positive: got {self.batch_size}")
