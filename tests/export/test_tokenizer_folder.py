"""Whether a tokenizer can be exported is known before anything is trained or moved."""

import json

import pytest

from tests.tiny import tiny_folder, tiny_model
from tests.tokenization.tiny import byte_level
from tokenkit.commands.zett import main as zett
from tokenkit.errors import ExportError, exit_code
from tokenkit.export.tokenizer_folder import sample_ids, write_tokenizer
from tokenkit.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """Byte-level BPE without the bytes of 🙂 and of most scripts, as falcon's is without some."""
    folder = byte_level(tmp_path_factory.mktemp("lacking"))
    document = json.loads((folder / "tokenizer.json").read_text())
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    gone = {name for name in vocab if set(name) & set("ðŁĻæ")}
    document["model"]["vocab"] = {name: i for name, i in vocab.items() if name not in gone}
    document["model"]["merges"] = [m for m in merges if not gone & {*m, "".join(m)}]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_tokenizer_that_lacks_bytes_can_be_exported(lacking, tmp_path, architecture):
    tokenizer = load_tokenizer(str(lacking))
    with pytest.raises(ValueError, match="cannot spell"):
        tokenizer.encode("🙂")
    assert len(sample_ids(tokenizer)) > 20
    tiny_model(architecture).config.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, tokenizer, has_own_class=False)


@pytest.fixture(scope="module")
def unsaveable(tmp_path_factory):
    folder = byte_level(tmp_path_factory.mktemp("unsaveable"))
    return f"{folder}:conversion=manual_add_prefix_space"


def test_a_tokenizer_that_comes_back_otherwise_is_refused(lacking, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(lacking))
    own, other = type(tokenizer).save, load_tokenizer("byte")
    monkeypatch.setattr(type(tokenizer), "save", lambda self, folder: own(other, folder))
    with pytest.raises(ExportError, match="the tokenizer, loaded back, gives"):
        write_tokenizer(tmp_path, tokenizer, has_own_class=False)


def test_zett_refuses_before_it_writes(unsaveable, tmp_path, capsys):
    tiny_folder(tmp_path / "model")
    flags = ["--model.pretrained-model-name-or-path", str(tmp_path / "model"), "--target-tokenizer-name"]
    assert zett([*flags, unsaveable, "--output", str(tmp_path / "out")]) == 65
    assert "cannot be exported with tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_refuses_before_its_first_step(unsaveable, tmp_path):
    from tokenkit.config import ALIASES, TrainConfig, parse_command_line
    from tokenkit.training.loop import train

    tiny_folder(tmp_path / "model")
    (tmp_path / "data.txt").write_text("\n\n".join(f"the cat {i}" for i in range(40)))
    settings = {
        "student.pretrained-model-name-or-path": tmp_path / "model",
        "target-tokenizer-name": unsaveable,
        "data.dataset-name": tmp_path / "data.txt",
        "losses": "clm",
        "steps": 2,
        "batch-size": 2,
        "max-length-new": 16,
        "max-length-teacher": 16,
        "output-dir": tmp_path / "run",
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    with pytest.raises(ValueError, match="cannot be exported") as caught:
        train(parse_command_line(TrainConfig, flags, program="test", aliases=ALIASES))
    assert exit_code(caught.value) == 65
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
