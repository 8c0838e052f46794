"""How files of the field are stored: packing, encodings, line ends, and JSON that does not keep to lines."""

import bz2
import codecs
import gzip
import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_files import rows, texts
from tests.faults.registry import fault
from tokenkit.data.files import BadRow
from tokenkit.data.options import BadRowOptions

LINES = '{"text": "naïve"}\n{"text": "日本"}\n'
CONTENTS = {
    "a.jsonl": LINES,
    "a.json": '[{"text": "naïve"}, {"text": "日本"}]',
    "a.txt": "naïve\n\n日本\n",
    "a.csv": "text\nnaïve\n日本\n",
    "a.tsv": "text\tn\nnaïve\t1\n日本\t2\n",
}


def zstd(data):
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


PACKINGS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize(
    "encode",
    [
        str.encode,
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
        lambda text: text.encode("utf-32"),
        lambda text: text.replace("\n", "\r\n").encode("utf-16"),
        lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
    ],
    ids="utf8 mark utf16 utf16be utf32 utf16-crlf mark-cr cr crlf".split(),
)
@pytest.mark.parametrize("name", CONTENTS)
def test_marks_and_line_ends_are_no_text(tmp_path, name, encode):
    path = tmp_path / name
    path.write_bytes(encode(CONTENTS[name]))
    assert texts(path) == ["naïve", "日本"]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_packed_files_are_known_by_their_first_bytes(tmp_path, packing, named):
    path = tmp_path / ("a.jsonl" + packing if named else "a.jsonl")
    pack = PACKINGS[packing]
    path.write_bytes(pack(LINES.encode()) + pack(LINES.encode()))  # in two parts, as parallel packers write
    assert texts(path) == ["naïve", "日本"] * 2


def test_a_file_that_is_not_packed_may_be_named_so(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_text(LINES)
    assert texts(path) == ["naïve", "日本"]


@fault(
    "A packed file of data is damaged",
    "named, with its row",
    code=65,
    kept="the last checkpoint",
)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_archives_are_named(tmp_path, packing, damage):
    whole = bytearray(PACKINGS[packing](json.dumps({"text": "".join(map(chr, range(200, 4000)))}).encode()))
    if damage == "cut" or packing == ".zst":  # ours has no checksum of its content
        del whole[len(whole) // 2 :]
    else:
        for at in range(len(whole) // 2, len(whole) // 2 + 8):
            whole[at] ^= 0xFF
    path = tmp_path / ("a.jsonl" + packing)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"a.jsonl{packing} is damaged"):
        rows(path)


@fault(
    "A small archive unpacks to a huge file",
    "refused at data.bad_rows.max_file_bytes",
    code=65,
    kept="the last checkpoint",
)
@pytest.mark.parametrize("packing", PACKINGS)
def test_small_archives_of_huge_files_are_refused(tmp_path, packing):
    path = tmp_path / ("a.txt" + packing)
    path.write_bytes(PACKINGS[packing](b"\0" * (2**24 + 1)))
    with pytest.raises(ValueError, match="max_file_bytes"):
        rows(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", "is a zip archive: unpack it"),
        (b"\x04\x22\x4d\x18rest", "is packed with lz4"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS.*git lfs pull"),
        (b"PAR1\x15\x04", "is a parquet file: name it .parquet"),
        (LINES.encode("utf-16-le"), "looks like UTF-16 or UTF-32 without a byte order mark"),
        (LINES.encode("utf-32-be"), "looks like UTF-16 or UTF-32 without a byte order mark"),
        (LINES.encode("utf-16")[:-1], "is damaged: 'utf-16-le' codec"),
    ],
    ids="zip lz4 lfs parquet utf16le utf32be odd".split(),
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_other_kinds_of_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        rows(path)


def test_text_with_zeros_is_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\0\0\0\0\0\0\0\0\0\0ab\0")
    assert texts(path) == ["\0" * 10 + "ab\0"]


def test_lone_surrogates_of_utf16_spoil_their_row_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "\ud800"}\n{"text": "b"}\n'.encode("utf-16", "surrogatepass"))
    first, second = texts(path)
    with pytest.raises(UnicodeEncodeError):
        first.encode()
    assert second == "b"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda values: json.dumps(values),
        lambda values: json.dumps(values, indent=2),
        lambda values: "[\n" + ",\n".join(map(json.dumps, values)) + "\n]\n",
        lambda values: "\n".join(json.dumps(value, indent=2) for value in values),
        lambda values: " ".join(map(json.dumps, values)),
    ],
    ids="list indented-list list-of-lines indented one-line".split(),
)
def test_json_need_not_keep_to_lines(tmp_path, name, layout):
    path = tmp_path / name
    path.write_text("\n" + layout([{"text": "a"}, ["no"], {"text": "b"}]))
    assert texts(path) == ["a", "not a JSON object", "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("digits", [4301, 9131])
@pytest.mark.parametrize("layout", ["lines", "list", "indented", "under data"])
def test_a_huge_number_spoils_its_row_alone(tmp_path, name, digits, layout):
    values = ['{"text": "[a"}', f'{{"text": "b", "id": {"1" * digits}}}', '{"text": "c", "n": 3}']
    contents = {
        "lines": "\n".join(values),
        "list": f"[{', '.join(values)}]",
        "indented": "\n".join(value.replace("{", "{\n ") for value in values),
        "under data": f'{{"note": "[1", "data": [{", ".join(values)}]}}',
    }
    path = tmp_path / name
    path.write_text(contents[layout])
    found = rows(path, limits=BadRowOptions())
    assert found == [{"text": "[a"}, BadRow("a number of too many digits"), {"text": "c", "n": 3}]
    assert found[1].place in (f"{path} line 2", f"{path} line 3", f"{path} item 2")


def test_a_broken_object_among_indented_ones_is_one_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{\n "text": "a"\n}\n{\n "text": oops\n}\n{\n "text": "b"\n}\n{\n "text": "cut')
    found = rows(path)
    assert [row if isinstance(row, BadRow) else row["text"] for row in found] == [
        "a", BadRow("not JSON"), "b", BadRow("not JSON"),
    ]  # fmt: skip
    assert [row.place for row in found if isinstance(row, BadRow)] == [f"{path} line 4", f"{path} line 10"]


def test_broken_first_lines_do_not_spoil_the_others(tmp_path):
    path = tmp_path / "a.jsonl"
    for first in ("{broken", '["list"]', "[broken", "{", '{"text": "a"', '"{"'):
        path.write_text(f'{first}\n{{"text": "b"}}\n')
        assert [row for row in rows(path) if not isinstance(row, BadRow)] == [{"text": "b"}]


ENCODINGS = [str.encode, lambda text: text.encode("utf-16"), lambda text: gzip.compress(text.encode())]
OBJECTS = st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers(), min_size=1, max_size=3)


@settings(max_examples=40)
@given(st.lists(OBJECTS, min_size=1, max_size=4), st.sampled_from([None, 1]), st.sampled_from(ENCODINGS))
def test_any_objects_come_back(tmp_path_factory, values, indent, encode):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(encode("\n".join(json.dumps(value, indent=indent) for value in values)))
    assert rows(path, limits=BadRowOptions()) == values
