import json

import numpy as np
import pytest

from tests.tiny import TEXT, byte_level_bpe
from tokenkit.pair_stats import main
from tokenkit.pairing.bias_files import load_biases
from tokenkit.tokenization.byteify import load_tokenizer


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
        (["--additive-smoothing-constant", "-1"], "additive_smoothing_constant must be at least 0"),
        (["--data.dataset-name", "/absent.txt"], "/absent.txt"),
    ],
)
def test_bad_input_is_one_line(written, capsys, words, message):
    assert main(flags(written, "other", *words)) != 0
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_folder_without_statistics_is_named(written):
    with pytest.raises(FileNotFoundError, match="holds no pair statistics"):
        load_biases(written / "teacher", *pair(written))
