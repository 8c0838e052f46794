"""All faults of a configuration are listed at once, with the exit code that a run would end with."""

import json

import numpy as np
import pytest
from transformers import LlamaConfig

from tests.tiny import TEXT, byte_level_bpe, tiny_folder
from tokenkit.cli import main
from tokenkit.errors import ExitCode
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.training.doctor.findings import Findings
from tokenkit.training.doctor.tokenizers import check_special, check_vocabulary


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    tiny_folder(folder / "model")
    byte_level_bpe(folder / "target", 280)
    (folder / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    return folder


def examined(capsys, root, *arguments):
    usual = {
        "--student": root / "model", "--data": root / "text.txt", "--output-dir": root / "out",
        "--max-length-new": 64, "--max-length-teacher": 64,
    }  # fmt: skip
    named = {word.partition("=")[0] for word in arguments}
    words = [f"{name}={value}" for name, value in usual.items() if name not in named]
    code = main(["doctor", *words, *arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["code"] == code
    return code, found["findings"]


def said(findings, severity, check):
    return " | ".join(f["says"] for f in findings if (f["severity"], f["check"]) == (severity, check))


def test_nothing_is_wrong(capsys, root):
    code, found = examined(capsys, root, f"--target={root / 'target'}")
    assert code == ExitCode.DONE
    assert not [f for f in found if f["severity"] == "error"]
    assert "of the student's" in said(found, "note", "data")
    assert "torch" in said(found, "note", "machine")
    assert "are free for" in said(found, "note", "disk")
    assert not (root / "out").exists()


def test_every_fault_is_listed(capsys, root, tmp_path):
    """Lengths, a teacher that is not there, an export folder in use: one list."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}", encoding="utf-8")
    code, found = examined(
        capsys, root, f"--target={root / 'target'}", "--teacher=/nowhere", "--max-length-new=999",
        f"--export-to={tmp_path / 'export'}",
    )  # fmt: skip
    errors = {f["check"] for f in found if f["severity"] == "error"}
    assert errors == {"config", "tokenizers", "models", "disk"}
    assert code == next(f["code"] for f in found if f["severity"] == "error")
    assert "positions" in said(found, "error", "models")
    assert "/nowhere" in said(found, "error", "tokenizers")


def test_what_the_data_lacks(capsys, root, tmp_path):
    answers = [{"prompt": "x " * 80, "completion": "y"}] * 3 + [{"text": "some text"}, {"neither": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    _, found = examined(
        capsys, root, f"--target={root / 'target'}", f"--data={tmp_path / 'rows.jsonl'}", "--no-weights",
        "--data.heldout.fraction=0",
    )  # fmt: skip
    assert "3 of 4 documents have no token to train on" in said(found, "warning", "data")
    assert "1 rows of the sample are left out" in said(found, "warning", "data")


def test_weights_and_rows(capsys, root, tmp_path):
    """A folder without weights passes with --no-weights alone; too few rows are an error either way."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    byte_level_bpe(tmp_path, 300)
    for rows, error in ((320, ""), (290, "290 rows")):
        LlamaConfig(vocab_size=rows, max_position_embeddings=64, **sizes).save_pretrained(tmp_path)
        arguments = (f"--student={tmp_path}", f"--target={root / 'target'}")
        code, found = examined(capsys, root, *arguments, "--no-weights")
        assert code == (ExitCode.DATA if error else ExitCode.DONE)
        assert error in said(found, "error", "models")
        assert ("padded: 320 rows" in said(found, "note", "models")) == (not error)
        code, found = examined(capsys, root, *arguments)
        assert code == ExitCode.DATA


def test_special_tokens_and_pairs(capsys, root, tmp_path):
    byte_level_bpe(tmp_path / "same", 300)
    _, found = examined(capsys, root, f"--target={tmp_path / 'same'}", "--no-weights")
    assert "same tokenizer" in said(found, "note", "pair")
    _, found = examined(capsys, root, f"--target={root / 'target'}:target=Qwen2", "--no-weights")
    assert "BOS on one side only" in said(found, "warning", "pair")
    tokenizer, findings = load_tokenizer(root / "target"), Findings()
    tokenizer.pad_id = tokenizer.eos_id
    check_special(tokenizer, "student", [5, 6], findings)
    words = [one.says for one in findings.found]
    assert any("padding is EOS" in line for line in words)
    assert any("stops at 2 tokens" in line for line in words)
    assert any("ends documents with" in line for line in words)
    tokenizer.eos_id = None
    check_special(tokenizer, "student", [], findings)
    assert "no EOS" in findings.found[-1].says


def test_a_byte_that_is_another_is_found(root):
    tokenizer, findings = load_tokenizer(root / "target"), Findings()
    check_vocabulary(tokenizer, "student", findings)
    assert not findings.found
    number = int(np.flatnonzero(tokenizer.byte_length_V == 1)[40])
    tokenizer.token_bytes[number] = b"elsewhere"
    check_vocabulary(tokenizer, "student", findings)
    assert f"id {number} is 'elsewhere' here" in findings.found[0].says


def test_its_own_options(capsys):
    assert main(["doctor"]) == 0
    assert "usage: tokenkit doctor" in capsys.readouterr().out
    assert main(["doctor", "--documents", "no"]) == ExitCode.CONFIG
    assert "'no' is no number" in capsys.readouterr().err
    assert main(["doctor", "--json=yes"]) == ExitCode.CONFIG
