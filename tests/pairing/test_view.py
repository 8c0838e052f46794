import html
import io
import re

import pytest
from hypothesis import given
from rich.console import Console

from tests.pairing.documents import document, tokens
from tokenkit.pairing.align import align
from tokenkit.pairing.view import (
    UNALIGNED,
    Cell,
    cells,
    colored,
    measure,
    print_cells,
    save_png,
    statistics,
    to_html,
    visible,
    wrapped,
)
from tokenkit.tokenization.ragged import flatten

ROW = [Cell(("<s>",), (), -1), Cell(("·the", "·c"), ("·the·c",), 0), Cell(("<b>&",), ("<b>", "&"), 1)]


@given(document())
def test_cells_hold_every_token_once_and_in_order(given_document):
    _, student, teacher = given_document
    alignment = align(flatten([student]), flatten([teacher]))
    names = [
        [f"{prefix}{i}" for i in range(len(side.ids))] for prefix, side in (("s", student), ("t", teacher))
    ]
    row = cells(*names, alignment.student_N.tolist(), alignment.teacher_M.tolist())
    assert [token for cell in row for token in cell.student] == names[0]
    assert [token for cell in row for token in cell.teacher] == names[1]
    for cell in row:
        assert cell.chunk >= 0 or not (cell.student and cell.teacher)
        for side, ids in ((cell.student, alignment.student_N), (cell.teacher, alignment.teacher_M)):
            assert {int(ids[int(token[1:])]) for token in side} <= {cell.chunk}


def test_hand_made_cells():
    row = cells(["a", "b", "c", "d"], ["x", "y"], [-1, 0, 0, -1], [0, -1])
    assert row == [
        Cell(("a",), (), -1),
        Cell(("b", "c"), ("x",), 0),
        Cell(("d",), (), -1),
        Cell((), ("y",), -1),
    ]


def test_neighbouring_chunks_differ_in_colour_and_tokens_without_partner_are_grey():
    colors = [color for _, color in colored([*ROW, *ROW[1:]])]
    assert colors[0] == UNALIGNED
    assert len({*colors[1:]}) == 4


@pytest.mark.parametrize(
    ("token", "expected"),
    [(b" a\n", "·a⏎"), (b"\xe2\x82", "<E2><82>"), ("é€".encode(), "é€"), (b"\t\r\x00", "⇥␍<00>")],
)
def test_tokens_are_visible(token, expected):
    assert visible(token) == expected


def test_lines_are_as_long_as_the_width_allows():
    row = [Cell(("abc",), ("a",), i) for i in range(7)]
    assert [len(line) for line in wrapped(row, 9)] == [2, 2, 2, 1]
    assert [len(line) for line in wrapped(row, 2)] == [1] * 7
    assert measure(Cell(("東京",), ("a", "b"), 0)) == 5


def test_the_terminal_shows_both_sides_in_colour():
    out = io.StringIO()
    print_cells(ROW, Console(file=out, width=60, force_terminal=True, color_system="truecolor"))
    lines = out.getvalue().splitlines()
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert plain[0].split() == ["student", "<s>", "·the│·c", "<b>&"]
    assert plain[1].split() == ["teacher", "·the·c", "<b>│&"]
    assert plain[0].index("·the│·c") == plain[1].index("·the·c")
    assert len(set(re.findall(r"\x1b\[30;(\d+)m", lines[0]))) == 3


def test_the_page_is_self_contained_and_escapes_tokens():
    page = to_html(ROW, "a < b", [("text bytes", "12")])
    assert "<title>a &lt; b</title>" in page
    assert "<bdi>&lt;b&gt;&amp;</bdi>" in page
    assert "<b>" not in page
    assert not re.search(r"https?://|src=|href=|<script", page)
    shown = re.findall(r"<bdi>(.*?)</bdi>", page)
    expected = [token for cell in ROW for side in (cell.student, cell.teacher) for token in side]
    assert [html.unescape(token) for token in shown] == expected


def test_the_picture_is_a_png_that_grows_with_the_text(tmp_path):
    sizes = []
    for number, row in enumerate((ROW, ROW * 40)):
        save_png(
            [*row, Cell((r"$\nothing$", "東"), ("a",), 9)], tmp_path / f"{number}.png", r"title $\nothing$"
        )
        data = (tmp_path / f"{number}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(int.from_bytes(data[20:24]))
    assert sizes[1] > 3 * sizes[0]


def test_statistics_count_text_alone():
    student = flatten([tokens([1, 4, 6, 9, 10], special=[1, 0, 0, 0, 1])])
    teacher = flatten([tokens([1, 6, 8, 9, 10], special=[1, 0, 0, 0, 1])])
    result = statistics(student, teacher, align(student, teacher))
    assert (result.documents, result.text_bytes, result.chunks) == (1, 8, 2)
    assert (result.student_tokens, result.teacher_tokens) == (3, 3)
    assert (result.student_aligned, result.teacher_aligned, result.unaligned_bytes) == (3, 3, 0)
    assert dict(result.rows())["student bytes per token"] == "2.667"
    assert dict(result.rows())["teacher tokens per chunk"] == "1.500"


def test_statistics_tell_what_does_not_align():
    student, teacher = flatten([tokens([3, 5, 9])]), flatten([tokens([3, 7])])
    result = statistics(student, teacher, align(student, teacher))
    assert (result.chunks, result.student_aligned, result.teacher_aligned, result.unaligned_bytes) == (
        1,
        1,
        1,
        6,
    )
    assert dict(result.rows())["student tokens aligned"] == "33.33 %"
