"""Pictures of an alignment: in the terminal, as PNG, as a self-contained HTML page, and in numbers.

A picture is a row of cells. A cell holds the tokens of one chunk, the student's above the teacher's, or
neighbouring tokens of one side that are in no chunk.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenkit.pairing.align import Alignment, token_spans
from tokenkit.tokenization.ragged import FlatTokens

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COLORS = ("#bfdbfe", "#bbf7d0", "#fde68a", "#fbcfe8", "#ddd6fe", "#a5f3fc")  # of neighbouring chunks
UNALIGNED = "#e5e7eb"
# a terminal has its own idea of these; hex colours all become white where it knows only sixteen
TERMINAL_COLORS = {
    **dict(zip(COLORS, ("cyan", "green", "yellow", "magenta", "bright_blue", "bright_cyan"), strict=True)),
    UNALIGNED: "bright_black",
}
INK = "#111827"
_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})
_SIDES = ("student", "teacher")


class Cell(NamedTuple):
    """Tokens that stand above each other."""

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    chunk: int
    """-1: in none."""


@dataclass(frozen=True)
class Statistics:
    """How well two tokenizers align on some documents. Special tokens are left out."""

    documents: int
    text_bytes: int
    student_tokens: int
    teacher_tokens: int
    chunks: int
    student_aligned: int
    """Student tokens in a chunk."""
    teacher_aligned: int
    """Teacher tokens in a chunk."""
    unaligned_bytes: int
    """Bytes of text in no chunk."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the numbers and the rates between them, as label and text."""
        for field in fields(self):
            yield field.name.replace("_", " "), f"{getattr(self, field.name):,}"
        for side, tokens, aligned in (
            ("student", self.student_tokens, self.student_aligned),
            ("teacher", self.teacher_tokens, self.teacher_aligned),
        ):
            yield f"{side} bytes per token", f"{self.text_bytes / max(tokens, 1):.3f}"
            yield f"{side} tokens per chunk", f"{aligned / max(self.chunks, 1):.3f}"
            yield f"{side} tokens aligned", f"{100 * aligned / max(tokens, 1):.2f} %"


def statistics(student: FlatTokens, teacher: FlatTokens, alignment: Alignment) -> Statistics:
    """Count over the text tokens of a batch."""
    start_N, end_N = token_spans(student)
    text_N, text_M = ~student.special_N, ~teacher.special_N
    in_chunk_N, in_chunk_M = alignment.student_N >= 0, alignment.teacher_M >= 0
    width_N = (end_N - start_N) * text_N
    return Statistics(
        documents=len(student.offset_B) - 1,
        text_bytes=int(width_N.sum()),
        student_tokens=int(text_N.sum()),
        teacher_tokens=int(text_M.sum()),
        chunks=len(set(alignment.student_N[text_N & in_chunk_N].tolist())),
        student_aligned=int((text_N & in_chunk_N).sum()),
        teacher_aligned=int((text_M & in_chunk_M).sum()),
        unaligned_bytes=int(width_N[~in_chunk_N].sum()),
    )


def visible(token: bytes) -> str:
    """Return a token as one can see it: spaces as dots, bytes that are no character as `<E2>`."""
    text = token.decode("utf-8", errors="surrogateescape").translate(_VISIBLE)
    return "".join(
        f"<{ord(c) - 0xDC00:02X}>"
        if "\udc80" <= c <= "\udcff"
        else c
        if c.isprintable()
        else f"<{ord(c):02X}>"
        for c in text
    )


def cells(
    student: Sequence[str], teacher: Sequence[str], student_chunk: Sequence[int], teacher_chunk: Sequence[int]
) -> list[Cell]:
    """Put the tokens of one document, as strings, above each other by their chunks."""
    result = []
    i = j = 0
    while i < len(student) or j < len(teacher):
        heads = [chunks[at] for chunks, at in ((student_chunk, i), (teacher_chunk, j)) if at < len(chunks)]
        chunk = min(heads)  # tokens in no chunk come first, one side after the other
        next_i = _run_end(student_chunk, i, chunk)
        next_j = _run_end(teacher_chunk, j, chunk) if chunk >= 0 or next_i == i else j
        result.append(Cell(tuple(student[i:next_i]), tuple(teacher[j:next_j]), chunk))
        i, j = next_i, next_j
    return result


def _run_end(chunks: Sequence[int], start: int, chunk: int) -> int:
    end = start
    while end < len(chunks) and chunks[end] == chunk:
        end += 1
    return end


def colored(row: Sequence[Cell]) -> Iterator[tuple[Cell, str]]:
    """Yield each cell with its background; neighbouring chunks differ."""
    number = 0
    for cell in row:
        yield cell, UNALIGNED if cell.chunk < 0 else COLORS[number % len(COLORS)]
        number += cell.chunk >= 0


def measure(cell: Cell) -> int:
    """Return how many columns of a terminal a cell takes, its gap to the next included."""
    from rich.cells import cell_len

    return max(cell_len("│".join(tokens)) for tokens in (cell.student, cell.teacher)) + 1


def wrapped(row: Sequence[Cell], width: int) -> Iterator[list[Cell]]:
    """Yield lines of cells that are at most `width` columns wide; a cell that is wider has its own line."""
    line: list[Cell] = []
    used = 0
    for cell in row:
        if line and used + measure(cell) > width:
            yield line
            line, used = [], 0
        line.append(cell)
        used += measure(cell)
    if line:
        yield line


def print_cells(row: Sequence[Cell], console: Console) -> None:
    """Write the cells to a terminal, two lines for each line of text."""
    from rich.text import Text

    color = {id(cell): background for cell, background in colored(row)}
    for line in wrapped(row, console.width - len("student ")):
        for side in _SIDES:
            text = Text.assemble((f"{side} ", "dim"))
            for cell in line:
                _append(text, getattr(cell, side), measure(cell) - 1, color[id(cell)])
            console.print(text, no_wrap=True, crop=False, overflow="ignore")
        console.print()


def _append(text: Text, tokens: Sequence[str], width: int, background: str) -> None:
    from rich.cells import cell_len

    content = "│".join(tokens)
    style = f"black on {TERMINAL_COLORS[background]}" if tokens else ""
    text.append(content + " " * (width - cell_len(content)), style=style)
    text.append(" ")


def to_html(row: Sequence[Cell], title: str, numbers: Sequence[tuple[str, str]]) -> str:
    """Return a page that needs no other file."""
    boxes = "".join(
        f'<span class="cell" style="background:{background}" title="chunk {cell.chunk}">'
        + "".join(
            '<span class="side">'
            + "".join(f"<bdi>{html.escape(token)}</bdi>" for token in getattr(cell, side))
            + "</span>"
            for side in _SIDES
        )
        + "</span>"
        for cell, background in colored(row)
    )
    table = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in numbers)
    return _PAGE.format(title=html.escape(title), boxes=boxes, table=table, unaligned=UNALIGNED, ink=INK)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: {ink}; background: #fff }}
body {{ margin: 2rem auto; max-width: 70rem }}
.cell {{ display: inline-flex; flex-direction: column; margin: 2px; border-radius: 4px; vertical-align: top }}
.side {{ min-height: 1.5em; padding: 0 2px; font-family: ui-monospace, monospace; white-space: pre }}
.side + .side {{ border-top: 1px solid #0003 }}
bdi {{ padding: 0 1px }} bdi + bdi {{ border-left: 1px solid #0006 }}
th {{ text-align: left; font-weight: normal; padding-right: 2rem }} td {{ text-align: right }}
</style></head><body><h1>{title}</h1>
<p>Student above, teacher below. A box is a chunk: both sides of it spell the same text.
<span style="background:{unaligned}">Grey</span>: no partner.</p>
<p>{boxes}</p><table>{table}</table></body></html>
"""


def save_png(row: Sequence[Cell], path: Path, title: str, columns: int = 100) -> None:
    """Draw the cells, `columns` characters wide. Characters that no installed font has become boxes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lines = list(wrapped(row, columns))
    figure = Figure(figsize=(columns * 0.105, 0.6 + 0.7 * len(lines)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0, 0.98, 1))
    axes.set_xlim(0, columns)
    axes.set_ylim(-3 * len(lines), 1.5)
    axes.axis("off")
    write = partial(axes.text, parse_math=False)  # a dollar is a dollar, not the beginning of a formula
    write(0, 0.4, title, fontsize=10)
    color = {id(cell): background for cell, background in colored(row)}
    for number, line in enumerate(lines):
        x = 0
        for cell in line:
            for depth, side in enumerate(_SIDES):
                tokens = getattr(cell, side)
                if not tokens:
                    continue
                y = -3 * number - depth - 1
                axes.add_patch(Rectangle((x, y), measure(cell) - 0.3, 0.95, color=color[id(cell)], lw=0))
                write(x + 0.2, y + 0.25, "|".join(tokens), fontsize=8, family="monospace", color=INK)
            x += measure(cell)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(path, facecolor="white")
