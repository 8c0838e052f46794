"""`tokenkit align`: show how two tokenizers align on a text, and count over a file.

tokenkit align --student gpt2 --teacher Qwen/Qwen2.5-0.5B --text "the cats sat"
tokenkit align --student gpt2 --teacher Qwen/Qwen2.5-0.5B --file stories.txt --output pictures
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.errors import ConfigError, at_least, blaming_data

if TYPE_CHECKING:
    from tokenkit.pairing.align import Alignment
    from tokenkit.pairing.view import Cell
    from tokenkit.tokenization.chat.documents import Document
    from tokenkit.tokenization.ragged import FlatTokens
    from tokenkit.tokenization.tokenizer import Tokenizer

SHOWN_TOKENS = 400  # of the first document of a file


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """Show how two tokenizers align: in colour here, as PNG and HTML with --output."""

    student: str
    """Tokenizer spec of the student (a path, a hub name, or `byte`)."""
    teacher: str
    """Tokenizer spec of the teacher."""
    text: str | None = None
    """Text to show."""
    file: str | None = None
    """Data file or folder (txt, jsonl, json, csv, parquet): its beginning is shown, all of it counted."""
    output: str | None = None
    """Folder for alignment.png and alignment.html; files that exist are never overwritten."""
    chunks: Literal["unconstrained", "space"] = "unconstrained"
    """`space` joins the smallest chunks into whole words."""
    chat_template_mode: str = "direct_encode"
    """How plain text is written; `surround_instruct` shows the templates' special tokens."""
    limit: int = 1000
    """Most documents of a file that are read."""

    def __post_init__(self) -> None:
        at_least("limit", self.limit, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: show(parse_command_line(AlignOptions, argv, program="tokenkit align")))


def show(options: AlignOptions) -> None:
    """Print the picture and the numbers, and write them where that was asked for.

    Raises:
        ConfigError, ValueError: wrong options.
        DataError, FileNotFoundError: tokenizers or data that cannot be read.
        FileExistsError: the output exists.
    """
    from rich.console import Console
    from rich.table import Table

    from tokenkit.pairing.view import print_cells, save_png, statistics, to_html
    from tokenkit.tokenization.chat.advice import explain_one_sided_bos, explain_template
    from tokenkit.tokenization.spec import parse_spec
    from tokenkit.tokenization.tokenizer import load_tokenizer

    documents = _documents(options)
    targets = _targets(options.output)
    specs = parse_spec(options.student), parse_spec(options.teacher)
    with blaming_data():
        pair = load_tokenizer(specs[0]), load_tokenizer(specs[1])
    for note in (explain_one_sided_bos(*pair, options.chat_template_mode), explain_template(pair[0])):
        if note is not None:
            print(note, file=sys.stderr)
    student, teacher, alignment = _aligned(documents, pair, options)
    row = _first_row(pair, student, teacher, alignment)
    numbers = list(statistics(student, teacher, alignment).rows())
    title = f"{Path(options.student).name} / {Path(options.teacher).name}"

    console = Console()
    print_cells(row, console)
    table = Table(title=title, show_header=False)
    for label, value in numbers:
        table.add_row(label, value)
    console.print(table)
    if targets is not None:
        png, page = targets
        png.parent.mkdir(parents=True, exist_ok=True)
        save_png(row, png, title)
        page.write_text(to_html(row, title, numbers), encoding="utf-8")
        console.print(f"wrote {png} and {page}", soft_wrap=True)


def _documents(options: AlignOptions) -> list[Document]:
    from tokenkit.data.mix import read_documents
    from tokenkit.data.options import SourceOptions
    from tokenkit.tokenization.chat.documents import Document

    if (options.text is None) == (options.file is None):
        raise ConfigError("give --text or --file, one of them")
    if options.text is not None:
        return [Document(text=options.text)]
    with blaming_data():
        return read_documents(SourceOptions(path=options.file, streaming=True), options.limit)


def _targets(output: str | None) -> tuple[Path, Path] | None:
    if output is None:
        return None
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give --output another folder")
    targets = folder / "alignment.png", folder / "alignment.html"
    for path in targets:
        if path.exists():
            raise FileExistsError(f"{path} exists: give --output another folder, or move the file away")
    return targets


def _aligned(
    documents: list[Document], pair: tuple[Tokenizer, Tokenizer], options: AlignOptions
) -> tuple[FlatTokens, FlatTokens, Alignment]:
    from tokenkit.pairing.align import SideRules, align_kinds
    from tokenkit.tokenization.chat.encode import encode_flat

    student, teacher = encode_flat(documents, pair, mode=options.chat_template_mode)
    rules = [SideRules(t.space_mask("space+tab+newline"), t.unk_id, t.pad_id) for t in pair]
    kinds = align_kinds(student, teacher, [options.chunks], rules[0], rules[1])
    return student, teacher, kinds[options.chunks]


def _first_row(
    pair: tuple[Tokenizer, Tokenizer], student: FlatTokens, teacher: FlatTokens, alignment: Alignment
) -> list[Cell]:
    """Return the cells of the beginning of the first document."""
    from tokenkit.pairing.view import cells, visible

    strings: list[list[str]] = []
    chunks: list[list[int]] = []
    sides = zip(pair, (student, teacher), (alignment.student_N, alignment.teacher_M), strict=True)
    for tokenizer, side, chunk_N in sides:
        end = side.offset_B[1]
        strings.append([visible(tokenizer.token_bytes[i]) for i in side.ids_N[:end].tolist()])
        chunks.append(chunk_N[:end].tolist())
    row = cells(strings[0], strings[1], chunks[0], chunks[1])
    shown = 0
    for number, cell in enumerate(row):
        shown += len(cell.student)
        if shown > SHOWN_TOKENS:
            return row[:number]
    return row


if __name__ == "__main__":
    raise SystemExit(main())
