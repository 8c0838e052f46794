import gzip
import json

import pytest

from tokenkit.data.files import BadRow, data_files, read_rows
from tokenkit.data.options import BadRowOptions

LIMITS = BadRowOptions(max_row_bytes=1000)


def rows(path, format_name=None, limits=LIMITS):
    return list(read_rows(path, format_name, limits))


def texts(path, **options):
    return [row.reason if isinstance(row, BadRow) else row["text"] for row in rows(path, **options)]


def test_text_files_are_cut_at_end_of_text_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(
        "one\n\nstill one\n<|endoftext|>\n two\r\n<|endoftext|>\r\n\n<|endoftext|>\nthree <|endoftext|>\n"
    )
    assert texts(path) == ["one\n\nstill one", " two", "three <|endoftext|>"]


def test_text_files_without_a_marker_are_cut_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\nstill one\n\n \t\n\ntwo\r\nstill two\r\n\r\nthree")
    assert texts(path) == ["one\nstill one", "two\r\nstill two", "three"]


def test_text_after_the_last_line_break_belongs_to_the_last_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>\nonly")
    assert texts(path) == ["only"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_json_lines_that_cannot_be_read_keep_their_place(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    lines = [
        b'{"text": "a"}',
        b"",
        b"{broken",
        b'["list"]',
        b'{"text": "' + b"x" * 20_000 + b'"}',
        b'{"text": "b"}',
    ]
    path.write_bytes(gzip.compress(b"\n".join(lines)) if ending.endswith("gz") else b"\n".join(lines))
    assert texts(path) == ["a", "not JSON", "not a JSON object", "too long", "b"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '{"data": [{"text": "a"}, {"text": "b"}]}',
        '{"text": "a"}\n{"text": "b"}\n',
    ],
    ids=["list", "under data", "one per line"],
)
def test_json_files_hold_a_list_or_one_object_per_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert texts(path) == ["a", "b"]


@pytest.mark.parametrize("content", ["{", "[", "{\n{", "", '{"text": "a"'])
def test_a_json_file_without_an_object_is_no_json(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(
        ValueError, match=r"a\.json is not JSON, nor does it hold a JSON object on some line: "
    ):
        rows(path)


def test_csv_rows_are_mappings_and_ragged_rows_are_bad(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext,label\n"two\nlines, one field",1\nshort\nmore,2,3\n', encoding="utf-8")
    assert rows(path) == [
        {"text": "two\nlines, one field", "label": "1"},
        {"text": "short", "label": None},
        BadRow("more fields than the header"),
    ]


def test_parquet_rows_are_mappings(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), path)
    assert rows(path) == [{"text": "a", "n": 1}, {"text": None, "n": 2}]


def test_bytes_that_are_not_utf8_do_not_end_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": "b"}\n')
    first, second = texts(path)
    with pytest.raises(UnicodeEncodeError):
        first.encode()
    assert second == "b"


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl.gz", "a.txt.gz"])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / name
    whole = gzip.compress(json.dumps({"text": "a" * 100}).encode())
    path.write_bytes(whole[: len(whole) // 2] if name.endswith("gz") else b"PAR1 not really")
    with pytest.raises(ValueError, match=f"{name} is (damaged|not)"):
        rows(path)


def test_a_small_archive_of_a_huge_file_is_refused(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"\0" * 2**25))
    with pytest.raises(ValueError, match="max_file_bytes"):
        rows(path)


def test_a_file_above_the_cap_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 100)
    with pytest.raises(ValueError, match="more than 99 bytes"):
        rows(path, limits=BadRowOptions(max_file_bytes=99))


def test_a_long_document_is_bad_and_the_next_one_is_not(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 600 + "\n" + "x" * 600 + "\n\nshort\n\n" + "y" * 2500 + "\n\nlast\n")
    assert texts(path) == ["too long", "short", "too long", "last"]


def test_a_line_that_is_exactly_as_long_as_allowed_is_kept(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 999 + "\n\n" + "y" * 5)
    assert texts(path) == ["x" * 999, "y" * 5]


def test_unknown_formats_name_the_known_ones(tmp_path):
    path = tmp_path / "a.docx"
    path.write_text("x")
    with pytest.raises(ValueError, match=r"no known format: expected an ending of \.txt, \.jsonl"):
        rows(path)
    assert texts(path, format_name="txt") == ["x"]


def test_a_folder_gives_its_data_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.jsonl", "README.md", "sub/c.parquet", ".hidden/d.txt"):
        (tmp_path / name).touch()
    assert [file.relative_to(tmp_path).as_posix() for file in data_files(tmp_path)] == [
        "a.jsonl",
        "b.txt",
        "sub/c.parquet",
    ]


def test_missing_paths_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        data_files(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="no data file"):
        data_files(tmp_path)
