"""Folders, splits, saved data sets, and data that changes between runs or during one."""

import bz2
import itertools
import json
import logging
import os

import pytest

from tests.data.test_mix import NONE_OUT, texts, write_jsonl
from tests.faults.registry import fault
from tokenkit.data.files import data_files, format_of, read_rows
from tokenkit.data.mix import local_files, open_data, read_documents
from tokenkit.data.options import BadRowOptions, DataOptions, SourceOptions
from tokenkit.data.places import files_fingerprint

SPLIT_FILES = {
    "train.jsonl": "train", "sub/train-00000-of-00002.jsonl": "train", "notes.jsonl": "train",
    "test.jsonl": "test", "eval_data.jsonl": "test", "dev/part.jsonl": "validation",
    "test/train.jsonl": "train", "valid.jsonl": "validation", "trainer.jsonl": "train",
}  # fmt: skip


def rows_of(count, word="document"):
    return [{"text": f"{word} {i}"} for i in range(count)]


@pytest.fixture
def split_folder(tmp_path):
    for name in SPLIT_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"text": name}])
    return tmp_path


@pytest.mark.parametrize(("split", "usual"), [("train", "train"), ("test", "test"), ("dev", "validation")])
def test_a_split_of_a_folder_is_what_the_names_of_its_files_say(split_folder, split, usual, caplog):
    documents = read_documents(SourceOptions(path=str(split_folder), split=split))
    expected = sorted(name for name, own in SPLIT_FILES.items() if own == usual)
    assert sorted(texts(documents)) == expected
    assert (
        f"{len(SPLIT_FILES) - len(expected)} of {len(SPLIT_FILES)} files are of other splits" in caplog.text
    )


def test_a_split_may_have_a_name_of_its_own(split_folder):
    write_jsonl(split_folder / "train_sft-00000-of-00001.jsonl", [{"text": "sft"}])
    assert texts(read_documents(SourceOptions(path=str(split_folder), split="train_sft"))) == ["sft"]


@pytest.mark.parametrize("split", ["validation", "train[:10%]", "train+test", "math"])
def test_a_split_that_is_not_there_is_an_error(tmp_path, split):
    write_jsonl(tmp_path / "train.jsonl", rows_of(2))
    write_jsonl(tmp_path / "test.jsonl", rows_of(2))
    options = SourceOptions(path=str(tmp_path), split=split)
    with pytest.raises(ValueError, match=r"has no split .*the names of its files say test, train"):
        read_documents(options)
    with pytest.raises(ValueError, match=r"file .*train\.jsonl has no split"):
        read_documents(SourceOptions(path=str(tmp_path / "train.jsonl"), split=split))


def test_a_file_is_read_whatever_split_its_name_says(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", rows_of(2))
    for split in ("train", "test"):
        assert len(read_documents(SourceOptions(path=path, split=split))) == 2


def test_a_configuration_of_local_data_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(2))
    with pytest.raises(ValueError, match="only data sets of the hub have configurations: got 'main'"):
        open_data(DataOptions(dataset_name=path, dataset_config_name="main"))


def test_packed_files_beside_others_are_read_or_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "b"}\n'))
    (tmp_path / "README.md.zip").touch()
    assert texts(read_documents(SourceOptions(path=str(tmp_path)))) == ["a", "b"]
    (tmp_path / "c.jsonl.lz4").touch()
    with pytest.raises(ValueError, match=r"c\.jsonl\.lz4 is packed in a way that is not read"):
        data_files(tmp_path)


def test_only_formats_that_can_be_read_packed_count_as_such(tmp_path):
    found = {name: format_of(tmp_path / name) for name in ("a.TXT.GZ", "a.parquet", "a.parquet.gz", "a.md")}
    assert found == {"a.TXT.GZ": "txt", "a.parquet": "parquet", "a.parquet.gz": None, "a.md": None}


def test_the_format_text_is_txt(tmp_path):
    (tmp_path / "a.md").write_text("one\n\ntwo")
    options = SourceOptions(path=str(tmp_path / "a.md"), format="text")
    assert texts(read_documents(options)) == ["one", "two"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    one = datasets.Dataset.from_list(rows_of(30))
    one.save_to_disk(folder / "one", num_shards=2)
    chosen = one.select([4, 2])
    datasets.DatasetDict({"train": chosen, "test": one}).save_to_disk(folder / "several")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk_are_read_through_datasets(saved, streaming):
    options = {"streaming": streaming}
    assert len(read_documents(SourceOptions(path=str(saved / "one"), **options))) == 30
    train = read_documents(SourceOptions(path=str(saved / "several"), **options))
    assert texts(train) == ["document 4", "document 2"]
    test = read_documents(SourceOptions(path=str(saved / "several"), split="test", **options))
    assert len(test) == 30
    for name in ("one", "several"):
        with pytest.raises(ValueError, match="split 'validation'"):
            read_documents(SourceOptions(path=str(saved / name), split="validation", **options))


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_folders_resume_like_others(saved, streaming):
    options = DataOptions(
        dataset_name=str(saved / "one"), streaming=streaming, shuffle_buffer_size=6, heldout=NONE_OUT
    )
    mix, _ = open_data(options)
    first = texts(mix.take(13))
    resumed, _ = open_data(options)
    resumed.load_state_dict(json.loads(json.dumps(mix.state_dict())))
    assert sorted(first + texts(resumed.take(17))) == sorted(row["text"] for row in rows_of(30))
    assert len(local_files(options)) == 2


def test_a_damaged_saved_folder_is_named(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a readable folder of save_to_disk"):
        read_documents(SourceOptions(path=str(tmp_path)))


def test_arrow_files_of_both_kinds_are_read(saved, tmp_path):
    import pyarrow as pa

    stream = next((saved / "one").glob("*.arrow"))
    assert len(list(read_rows(stream, None, BadRowOptions()))) == 15
    table = pa.table({"text": ["a", None]})
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    assert list(read_rows(tmp_path / "b.arrow", None, BadRowOptions())) == [{"text": "a"}, {"text": None}]
    (tmp_path / "c.arrow").write_bytes(b"no arrow")
    with pytest.raises(ValueError, match=r"c\.arrow is not a readable Arrow file"):
        list(read_rows(tmp_path / "c.arrow", None, BadRowOptions()))


def test_the_cap_counts_what_parquet_unpacks_to(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 100_000] * 300}), path)  # a dictionary of one text
    assert path.stat().st_size < 20_000
    limits = BadRowOptions(max_file_bytes=10_000_000)
    found = read_rows(path, None, limits)
    assert len(list(itertools.islice(found, 64))) == 64
    with pytest.raises(ValueError, match=r"a\.parquet holds more than 10000000 bytes: .*max_file_bytes"):
        list(itertools.islice(found, 40))
    pq.write_table(pa.table({"text": [os.urandom(50_000).hex() for _ in range(20)]}), path)
    with pytest.raises(ValueError, match="holds more than 1000000 bytes"):
        next(read_rows(path, None, BadRowOptions(max_file_bytes=1_000_000)))


CHANGES = {
    "a word": lambda rows: [*rows[:20], {"text": "documend 20"}, *rows[21:]],
    "a row less": lambda rows: rows[:-1],
    "a row more": lambda rows: [*rows, {"text": "new"}],
    "half": lambda rows: rows[:20],
    "another order": lambda rows: rows[::-1],
}


@fault(
    "Data is not what it was when the run was saved",
    "refused on `--resume`",
    code=65,
    kept="everything",
)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_data_that_changed_between_runs_is_refused(tmp_path, streaming, change):
    path = tmp_path / "a.jsonl"
    options = DataOptions(
        dataset_name=write_jsonl(path, rows_of(40)), streaming=streaming, shuffle_buffer_size=8
    )
    mix, _ = open_data(options)
    mix.take(5)
    state = mix.state_dict()
    write_jsonl(path, CHANGES[change](rows_of(40)))
    changed, _ = open_data(options)
    with pytest.raises(ValueError, match=r"is not what it was when the state was saved|has \d+ rows, but 40"):
        changed.load_state_dict(state)
    write_jsonl(path, rows_of(40))  # the same again, at another time
    restored, _ = open_data(options)
    restored.load_state_dict(state)


@fault(
    "A file is cut while it is streamed",
    "an error that names it",
    code=65,
    kept="the last checkpoint",
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_that_is_cut_while_it_is_read_is_an_error(tmp_path, packed):
    path = tmp_path / ("a.jsonl.bz2" if packed else "a.jsonl")
    lines = "".join(json.dumps({"text": f"{i}" * 500}) + "\n" for i in range(1500)).encode()
    path.write_bytes(bz2.compress(lines, 1) if packed else lines)
    options = DataOptions(dataset_name=str(path), streaming=True, shuffle_buffer_size=8, heldout=NONE_OUT)
    mix, _ = open_data(options)
    mix.take(20)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"a\.jsonl.* (changed while it was in use|is damaged)"):
        mix.take(1500)


@pytest.mark.parametrize("is_same", [False, True])
def test_a_stream_that_is_written_anew_between_epochs_is_noticed(tmp_path, is_same):
    path = tmp_path / "a.jsonl"
    options = DataOptions(
        dataset_name=write_jsonl(path, rows_of(9)), streaming=True, shuffle_buffer_size=3, heldout=NONE_OUT
    )
    mix, _ = open_data(options)
    mix.state_dict()  # as a run does before its first step
    mix.take(9)
    write_jsonl(path, rows_of(9) if is_same else rows_of(9, "Document"))
    if is_same:
        assert len(mix.take(9)) == 9
        return
    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was in use: it had 207 bytes"):
        mix.take(9)


def test_large_data_is_compared_in_pieces(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(2**20 * 4))
    whole, pieces = files_fingerprint([path]), files_fingerprint([path], whole_bytes=2**21)
    assert whole["bytes"] == pieces["bytes"] == 2**22
    with path.open("r+b") as file:
        file.seek(2**20 * 2 + 5)  # in a piece that is read
        file.write(b"x")
    assert files_fingerprint([path], whole_bytes=2**21) != pieces
    assert files_fingerprint([path]) != whole


def test_the_first_row_of_each_reason_is_said_with_its_place(tmp_path, caplog):
    rows = [{"text": "good"}, {"text": None}, {"text": "good"}, {"text": 3}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"id": ' + "1" * 5000 + "}\noops\nalso\n")
    options = DataOptions(dataset_name=str(path), heldout=NONE_OUT, shuffle_buffer_size=1, streaming=True)
    with caplog.at_level(logging.WARNING):
        open_data(options)[0].take(4)
    said = [record.getMessage().partition(": a row is left out: ")[2] for record in caplog.records]
    assert said == [
        "field 'text' is not text (row 2); more such rows are only counted",
        f"a number of too many digits ({path} line 5); more such rows are only counted",
        f"not JSON ({path} line 6); more such rows are only counted",
    ]
