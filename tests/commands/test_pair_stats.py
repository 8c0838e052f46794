import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.tiny import TEXT, byte_level_bpe
from tests.tokenization.tiny import write
from tokenkit.commands.pair_stats import main
from tokenkit.errors import ExitCode
from tokenkit.pairing.bias.files import FILES, load_biases
from tokenkit.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the folder with two tokenizers, a text and the statistics of the pair."""
    root = tmp_path_factory.mktemp("pair")
    byte_level_bpe(root / "teacher", 340)
    byte_level_bpe(root / "student", 300)
    (root / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    assert main(flags(root, "stats")) == 0
    return root


def flags(root, output, *more):
    return [
        "--teacher-tokenizer-name", str(root / "teacher"), "--target-tokenizer-name", str(root / "student"),
        "--data.dataset-name", str(root / "text.txt"), "--output", str(root / output), *more,
    ]  # fmt: skip


def pair(root):
    return tuple(load_tokenizer(str(root / name)) for name in ("teacher", "student"))


def test_what_is_written_is_read_again(written):
    teacher, student = pair(written)
    biases = load_biases(written / "stats", teacher, student)
    summary = json.loads((written / "stats" / "summary.json").read_text())
    assert len(biases.teacher_P) == summary["pairs"]
    assert biases.shape == (teacher.vocab_size, student.vocab_size)
    assert (biases.teacher_bias_P >= 0).all()
    assert (biases.student_bias_P <= 1).all()
    counts = np.load(written / "stats" / "student_counts.npy")
    assert counts.sum() == summary["student_tokens_counted"]


def test_scipy_reads_the_matrices(written):
    sparse = pytest.importorskip("scipy.sparse")
    teacher, student = pair(written)
    matrix = sparse.load_npz(written / "stats" / "teacher_bias.npz")
    biases = load_biases(written / "stats", teacher, student)
    assert matrix.shape == biases.shape
    assert np.array_equal(matrix.data, biases.teacher_bias_P)


def test_statistics_of_other_tokenizers_are_refused(written):
    teacher, student = pair(written)
    with pytest.raises(ValueError, match="holds the statistics of another teacher tokenizer"):
        load_biases(written / "stats", student, teacher)


def test_statistics_that_exist_are_not_overwritten(written, capsys):
    assert main(flags(written, "stats")) != 0
    assert "exists: give --output another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher-subsample-percent", "0"], "teacher_subsample_percent must lie in (0, 100], got 0"),
        (["--additive-smoothing-constant", "-1"], "must lie in [0, 1], got -1.0"),
        (["--additive-smoothing-constant", "1e308"], "must lie in [0, 1], got 1e+308"),
        (["--output", ""], "output must name a folder, got ''"),
        (["--min-continuation-probability", "1"], "min_continuation_probability must lie in [0, 1), got 1"),
        (["--data.dataset-name", "/absent.txt"], "/absent.txt"),
    ],
)
def test_bad_input_is_one_line(written, capsys, words, message):
    assert main(flags(written, "other", *words)) != 0
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_rare_continuations_are_left_out_with_a_bound_that_is_said(written, capsys):
    assert main(flags(written, "near", "--min-continuation-probability", "0.02")) == 0
    assert "a teacher's bias is too small by 0." in capsys.readouterr().out
    near, exact = (load_biases(written / name, *pair(written)) for name in ("near", "stats"))
    summary = json.loads((written / "near" / "summary.json").read_text())
    assert summary["min_continuation_probability"] == 0.02
    for side in ("teacher", "student"):
        short_P = getattr(exact, f"{side}_bias_P") - getattr(near, f"{side}_bias_P")
        assert short_P.min() >= -1e-12
        assert 0 < short_P.max() <= summary["largest_error"][side] + 1e-12
    exact = json.loads((written / "stats" / "summary.json").read_text())
    assert exact["largest_error"] == {"teacher": 0, "student": 0}


KILLED = """
import os, signal, sys
from tokenkit.data import token_counts
from tokenkit.commands.pair_stats import main
token_counts.BATCH, token_counts.SAVE_EVERY = 3, 2
left, where = int(sys.argv[1]), sys.argv[2]
function = getattr(token_counts, where) if where != "replace" else os.replace
def killing(*arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)
setattr(token_counts if where != "replace" else os, where, killing)
main(sys.argv[3:])
"""


@pytest.mark.parametrize(("where", "calls"), [("_count", 9), ("replace", 4)])
def test_a_count_that_was_killed_goes_on(written, where, calls):
    """Killed in a batch, or after the counts of a save but before the state that names them."""
    output = f"killed{where}"
    command = [sys.executable, "-c", KILLED, str(calls), where, *flags(written, output)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    state = json.loads((written / output / "counting.json").read_text())
    assert 0 < state["mix"]["documents"] < len(TEXT)
    assert not state["done"]
    assert main(flags(written, output)) == 0
    for name in ("teacher_counts.npy", "student_counts.npy"):
        assert np.array_equal(np.load(written / output / name), np.load(written / "stats" / name))
    assert not list((written / output).glob("*.tmp"))


def test_counts_of_other_tokenizers_are_not_taken_over(written, tmp_path, capsys):
    shutil.copytree(written / "stats", tmp_path / "half")
    for name in FILES:
        (tmp_path / "half" / name).unlink()
    words = flags(written, "x", "--output", str(tmp_path / "half"), "--target-tokenizer-name", "byte")
    assert main(words) == ExitCode.DATA
    error = capsys.readouterr().err
    assert "holds counts of other sides: give --output another folder" in error
    assert len(error.strip().splitlines()) == 1


def test_a_pair_without_shared_bytes_is_refused_before_it_counts(written, tmp_path, capsys):
    for name, strings in (("teacher", ["a", "ab"]), ("student", ["c", "cd"])):
        vocab = [["<unk>", 0.0], *([string, -1.0] for string in strings)]
        model = {"type": "Unigram", "unk_id": 0, "vocab": vocab}
        write(tmp_path / name, {"model": model, "added_tokens": []}, unk_token="<unk>", eos_token="<unk>")
    words = ["--teacher-tokenizer-name", str(tmp_path / "teacher"), "--output", str(tmp_path / "out")]
    words += ["--target-tokenizer-name", str(tmp_path / "student")]
    assert main([*words, "--data.dataset-name", str(written / "text.txt")]) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert "share no bytes: no pair of tokens exists" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_named(written, capsys):
    assert main(flags(written, "text.txt")) == ExitCode.DATA
    assert "text.txt must be a folder and is a file" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["{", "[]", "{}", '{"about": []}', "outside", "lost", "junk", "short"])
def test_counts_that_are_damaged_are_named(written, tmp_path, capsys, state):
    folder = tmp_path / "half"
    shutil.copytree(written / "stats", folder)
    for name in FILES:
        (folder / name).unlink()
    (counts,) = folder.glob("counting_*.npz")
    if state == "lost":
        counts.unlink()
    elif state == "junk":
        counts.write_bytes(b"junk")
    elif state == "short":
        np.savez(counts, teacher=np.ones(3, int), student=np.ones(3, int))
    elif state == "outside":
        shutil.copy(counts, tmp_path / "counts.npz")
        about = json.loads((folder / "counting.json").read_text())
        (folder / "counting.json").write_text(json.dumps({**about, "counts": "../counts.npz"}))
    else:
        (folder / "counting.json").write_text(state)
    assert main(flags(written, "x", "--output", str(folder))) == ExitCode.DATA
    error = capsys.readouterr().err
    assert "does not hold the counts that an interrupted pass left" in error
    assert len(error.strip().splitlines()) == 1
    assert (folder / "counting.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher-tokenizer-name", "{root}/broken"], "is not valid JSON"),
        (["--data.dataset-name", "{root}/empty.txt"], "is empty"),
        (["--output", "{root}/text.txt/below"], "text.txt: is a file, so --output"),
    ],
)
def test_files_at_fault_are_faults_of_the_data(written, capsys, words, message):
    (written / "broken").mkdir(exist_ok=True)
    (written / "broken" / "tokenizer.json").write_text("{")
    (written / "empty.txt").write_text("")
    assert main(flags(written, "other", *(word.format(root=written) for word in words))) == ExitCode.DATA
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_ctrl_c_is_one_line(written, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenkit.pairing.bias.bias.find_covers", interrupt)
    assert main(flags(written, "stopped")) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "tokenkit: interrupted"
    monkeypatch.undo()
    assert main(flags(written, "stopped")) == 0, "the counts that were taken are not in the way"


def test_a_folder_without_statistics_is_named(written):
    with pytest.raises(FileNotFoundError, match="holds no pair statistics"):
        load_biases(written / "teacher", *pair(written))
