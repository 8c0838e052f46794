"""From two tokenizers and a text to a run that uses what is known of the pair, each step by its door."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.conftest import OWN_DATA
from tests.tiny import tiny_model
from tokenkit.commands import mined_mapping, pair_stats
from tokenkit.errors import ExitCode
from tokenkit.train import main

TARGET = str(OWN_DATA / "tokenizers" / "bytelevel2k")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, the statistics and the mapping of the pair, and the text."""
    root = tmp_path_factory.mktemp("doors")
    shutil.copytree(OWN_DATA / "tokenizers" / "spm1k", root / "model")
    tiny_model(vocab_size=1200).save_pretrained(root / "model")
    text = (OWN_DATA / "text" / "scripts.txt").read_text(encoding="utf-8")
    (root / "text.txt").write_text(text.replace("\n", "\n<|endoftext|>\n") * 20, encoding="utf-8")
    pair = ["--teacher-tokenizer-name", str(root / "model"), "--target-tokenizer-name", TARGET]
    data = ["--data.dataset-name", str(root / "text.txt")]
    assert pair_stats.main([*pair, *data, "--output", str(root / "pair")]) == 0
    counts = ["--teacher-counts", str(root / "pair" / "teacher_counts.npy"), "--num-workers", "1"]
    assert mined_mapping.main([*pair, *counts, "--output", str(root / "mapping")]) == 0
    return root


def flags(root, output, *words):
    settings = {
        "student.pretrained-model-name-or-path": root / "model",
        "target-tokenizer-name": TARGET,
        "data.dataset-name": root / "text.txt",
        "max-length-teacher": 64, "max-length-new": 48, "batch-size": 2, "steps": 5, "warmup-steps": 1,
        "eval-interval": 5, "save-interval": 5, "output-dir": output,
    }  # fmt: skip
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))] + list(words)


def test_a_run_with_all_that_is_known_of_a_pair(made, tmp_path):
    words = ["--losses", "alm_unbiased", "alm_side_path", "baseline_mined", "--baseline.kd-rate", "1"]
    words += ["--side-path-mapping-mode", "bias_threshold", "--tokenizer-pair-data-path", str(made / "pair")]
    words += ["--mined-mapping-path", str(made / "mapping")]
    assert main(flags(made, tmp_path / "run", *words)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in rows if "loss" in row)
    for name in ("alm_unbiased", "alm_side_path", "baseline_mined"):
        assert last[f"count/{name}"] > 0
        assert last[f"loss/{name}"] > 0


@pytest.mark.parametrize("case", ["short", "other pair", "other mapping"])
def test_what_belongs_to_another_pair_ends_the_run_in_one_line(made, tmp_path, capfd, case):
    if case == "short":
        torch.save(torch.from_numpy(np.load(made / "mapping" / "mapping.npy"))[:50], tmp_path / "mapping.pt")
        words = ["--losses", "baseline_mined", "--mined-mapping-path", str(tmp_path / "mapping.pt")]
        message = (
            "must hold one teacher id for each of the student's 2048 ids: got torch.int64 of shape (50,)"
        )
    elif case == "other pair":
        words = ["--losses", "alm_unbiased", "--tokenizer-pair-data-path", str(made / "pair")]
        words += ["--target-tokenizer-name", "byte"]
        message = "holds the statistics of another student tokenizer"
    else:
        other = ["--teacher-tokenizer-name", "byte", "--output", str(tmp_path / "other")]
        assert mined_mapping.main([*other, "--target-tokenizer-name", TARGET, "--num-workers", "1"]) == 0
        words = ["--losses", "baseline_mined", "--mined-mapping-path", str(tmp_path / "other")]
        message = "was mined for another teacher tokenizer (byte)"
    capfd.readouterr()
    assert main(flags(made, tmp_path / "run", *words)) == ExitCode.DATA
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tokenkit: ")]
    assert len(errors) == 1
    assert message in errors[0]
