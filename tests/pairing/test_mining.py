"""The nearest teacher token against the definition: every distance by dynamic programming, first best wins.

Faults tried, each caught here: a bound that skips the lengths at its edge; the last instead of the first
of equal distances; frequency forgotten; special tokens among the candidates; a block's places mixed up.
"""

import json

import numpy as np
import pytest

from tests.tiny import byte_level_bpe, sentencepiece_bpe
from tests.tokenization.tiny import write
from tokenkit.commands.mined_mapping import main
from tokenkit.errors import ExitCode
from tokenkit.pairing import mining
from tokenkit.pairing.mining import mine_mapping
from tokenkit.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    student = load_tokenizer(str(sentencepiece_bpe(folder / "student", 380)))
    return student, load_tokenizer(str(byte_level_bpe(folder / "teacher", 340)))


def levenshtein(a: bytes, b: bytes) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def definition(student, teacher, rank):
    """Return teacher id and distance of each text token of the student."""
    candidates = [i for i in np.argsort(rank).tolist() if not teacher.is_special_V[i]]
    result = {}
    for i in np.flatnonzero(~student.is_special_V).tolist():
        distances = [levenshtein(student.token_bytes[i], teacher.token_bytes[j]) for j in candidates]
        best = int(np.argmin(distances))
        result[i] = candidates[best], distances[best]
    return result


@pytest.mark.parametrize("by_frequency", [False, True])
def test_every_text_token_gets_its_nearest_and_the_preferred_of_equals(pair, monkeypatch, by_frequency):
    student, teacher = pair
    monkeypatch.setattr(mining, "BLOCK", 7)
    counts, rank = None, np.arange(teacher.vocab_size)
    if by_frequency:
        counts = np.random.default_rng(0).integers(0, 5, teacher.vocab_size)
        rank = np.argsort(np.argsort(-counts, kind="stable"))
    mapping = mine_mapping(student, teacher, teacher_counts=counts, workers=1)
    for i, (teacher_id, distance) in definition(student, teacher, rank).items():
        assert (mapping.teacher_V[i], mapping.distance_V[i]) == (teacher_id, distance), student.token_bytes[i]


def test_of_two_tokens_with_the_same_bytes_the_one_that_is_written_is_meant(pair):
    pieces, letters = pair
    letter = pieces.document["model"]["vocab"]["a"]
    assert pieces.token_bytes.index(b"a") < letter
    assert letter in pieces.encode("xa").ids
    for counts in (None, np.arange(pieces.vocab_size)):  # the letter behind its byte piece, and in front
        mapping = mine_mapping(letters, pieces, teacher_counts=counts, workers=1)
        assert mapping.teacher_V[letters.token_bytes.index(b"a")] == letter


def test_special_tokens_map_by_role(pair):
    student, teacher = pair
    mapping = mine_mapping(student, teacher, workers=1)
    assert mapping.teacher_V[student.bos_id] == teacher.bos_id
    assert mapping.teacher_V[student.eos_id] == teacher.eos_id
    assert mapping.distance_V[student.eos_id] == 0


def test_every_id_is_mapped_to_an_id_of_the_teacher(pair):
    for student, teacher in (pair, pair[::-1]):
        mapping = mine_mapping(student, teacher, workers=1)
        assert mapping.teacher_V.shape == (student.vocab_size,)
        assert mapping.teacher_V.min() >= 0
        assert mapping.teacher_V.max() < teacher.vocab_size


def test_counts_of_another_vocabulary_are_refused(pair):
    student, teacher = pair
    with pytest.raises(ValueError, match=r"one count per teacher token \(340\): got shape \(3,\)"):
        mine_mapping(student, teacher, teacher_counts=np.ones(3, int))


def test_the_door_writes_once_and_says_what_it_mapped(tmp_path, capsys):
    teacher = str(byte_level_bpe(tmp_path / "teacher"))
    flags = ["--teacher-tokenizer-name", teacher, "--target-tokenizer-name", "byte"]
    flags += ["--output", str(tmp_path / "out"), "--num-workers", "1"]
    assert main(flags) == 0
    assert "mean distance" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tokens"] == len(np.load(tmp_path / "out" / "mapping.npy"))
    assert summary["teacher"]["fingerprint"] == load_tokenizer(teacher).fingerprint()
    assert main(flags) != 0
    assert "exists: give --output another folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["text", "words", "archive"])
def test_counts_that_are_no_numbers_are_named(content, tmp_path, capsys):
    path = tmp_path / "counts.npy"
    if content == "text":
        path.write_text("no array")
    elif content == "words":
        np.save(path, np.array(["a", "b"]))
    else:
        with path.open("wb") as file:
            np.savez(file, np.ones(3))
    flags = ["--teacher-tokenizer-name", "byte", "--target-tokenizer-name", "byte"]
    assert main([*flags, "--output", str(tmp_path / "out"), "--teacher-counts", str(path)]) != 0
    error = capsys.readouterr().err
    assert f"teacher_counts {path} must be an npy file" in error
    assert "pickle" not in error


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--output", " "], ExitCode.CONFIG, "output must name a folder"),
        (["--num-workers", "100000"], ExitCode.CONFIG, "num_workers must lie in [0, 1024], got 100000"),
        (["--num-workers", "-1"], ExitCode.CONFIG, "num_workers must lie in [0, 1024], got -1"),
        (["--output", "{root}/counts.npy/below"], ExitCode.DATA, "counts.npy: is a file, so --output"),
        (["--teacher-tokenizer-name", "{root}/absent"], ExitCode.DATA, "there is no tokenizer folder"),
        (["--teacher-counts", "{root}/absent.npy"], ExitCode.DATA, "absent.npy"),
        (["--teacher-counts", "{root}/counts.npy"], ExitCode.DATA, "got a negative number or NaN"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, words, code, message):
    np.save(tmp_path / "counts.npy", np.full(261, np.nan))
    flags = ["--teacher-tokenizer-name", "byte", "--target-tokenizer-name", "byte"]
    flags += ["--output", str(tmp_path / "out"), *(word.format(root=tmp_path) for word in words)]
    assert main(flags) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_pair_without_shared_bytes_is_refused(tmp_path, capsys):
    for name, strings in (("teacher", ["a", "ab"]), ("student", ["c", "cd"])):
        vocab = [["<unk>", 0.0], *([string, -1.0] for string in strings)]
        model = {"type": "Unigram", "unk_id": 0, "vocab": vocab}
        write(tmp_path / name, {"model": model, "added_tokens": []}, unk_token="<unk>", eos_token="<unk>")
    flags = ["--teacher-tokenizer-name", str(tmp_path / "teacher"), "--output", str(tmp_path / "out")]
    assert main([*flags, "--target-tokenizer-name", str(tmp_path / "student")]) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert "share no bytes" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names", [("spm1k", "bytelevel2k"), ("tinystories-spm", "qwen2.5-sub8000")], ids="-".join
)
def test_a_real_pair_is_mapped_as_by_the_definition_on_a_sample(load_real, names):
    student, teacher = map(load_real, names)
    mapping = mine_mapping(student, teacher, workers=1)
    candidates = np.flatnonzero(~teacher.is_special_V).tolist()
    sample = np.random.default_rng(0).choice(np.flatnonzero(~student.is_special_V), 6, replace=False)
    for i in sample.tolist():
        distances = [levenshtein(student.token_bytes[i], teacher.token_bytes[j]) for j in candidates]
        assert mapping.distance_V[i] == min(distances)
        assert mapping.teacher_V[i] == candidates[int(np.argmin(distances))]
