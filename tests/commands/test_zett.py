import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import TEXT, byte_level_bpe, sentencepiece_bpe, tiny_folder, tiny_model
from tests.tokenization.tiny import write
from tokenkit.commands.zett import main
from tokenkit.embeddings.rows import row_sources
from tokenkit.errors import ExitCode
from tokenkit.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zett")
    tiny_folder(folder / "model", tie_word_embeddings=False)
    tiny_folder(folder / "tied", tie_word_embeddings=True, dtype=torch.bfloat16)
    sentencepiece_bpe(folder / "new", 400)
    (folder / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    return folder


def flags(root, output, *more, model="model"):
    return [
        "--model.pretrained-model-name-or-path", str(root / model), "--target-tokenizer-name",
        str(root / "new"), "--output", str(root / output), "--pad-to-multiple-of", "1", *more,
    ]  # fmt: skip


def moved(root, output, *more, model="model"):
    assert main(flags(root, output, *more, model=model)) == 0
    return AutoModelForCausalLM.from_pretrained(root / output)


def by_fvt(root, side, model="model"):
    old = AutoModelForCausalLM.from_pretrained(root / model)
    weight = getattr(old, f"get_{side}_embeddings")().weight
    old_and_new = load_tokenizer(str(root / model)), load_tokenizer(str(root / "new"))
    return row_sources(*old_and_new).rows(weight, 400)


def test_the_folder_loads_and_holds_the_rows(root, capsys):
    model = moved(root, "fvt")
    assert "400 rows by fvt" in capsys.readouterr().out
    torch.testing.assert_close(model.get_input_embeddings().weight.detach(), by_fvt(root, "input"))
    torch.testing.assert_close(model.get_output_embeddings().weight.detach(), by_fvt(root, "output"))
    tokenizer = AutoTokenizer.from_pretrained(root / "fvt")
    text = "The cats sat on the mat."
    assert (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        == load_tokenizer(str(root / "new")).encode(text).ids.tolist()
    )
    layer = AutoModelForCausalLM.from_pretrained(root / "model").model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight, layer)
    config = json.loads((root / "fvt" / "config.json").read_text())
    assert config["vocab_size"] == 400


def test_a_model_keeps_its_dtype_and_its_tied_head(root):
    model = moved(root, "bf16", "--clone-all-layers", model="tied")
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model.get_input_embeddings().weight.detach(), by_fvt(root, "input", "tied"))


def test_the_head_can_be_tied_or_mixed_with_the_input(root):
    tied = moved(root, "tie", "--no-extend-output-embeddings")
    torch.testing.assert_close(tied.get_output_embeddings().weight.detach(), by_fvt(root, "input"))
    mixed = moved(root, "mix", "--combine-output-embed-with-input")
    expected = (by_fvt(root, "input") + by_fvt(root, "output")) / 2
    torch.testing.assert_close(mixed.get_output_embeddings().weight.detach(), expected)


def test_methods_are_compared(root, capsys):
    words = ["--compare", "--data", str(root / "text.txt"), "--ppl-eval-data", str(root / "text.txt")]
    assert main(flags(root, "compare", *words)) == 0
    result = json.loads((root / "compare" / "compare.json").read_text())
    assert set(result["methods"]) >= {"fvt", "mean", "overlap", "random_normal", "omp", "focus"}
    assert (root / "compare" / "compare.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for name, score in result["methods"].items():
        assert f"{score['bits_per_byte']:.3f}" in next(
            row for row in out.splitlines() if row.startswith(name)
        )
    again = ["--compare", "mean", "fvt", *words[1:]]
    assert main(flags(root, "two", *again)) == 0
    two = json.loads((root / "two" / "compare.json").read_text())["methods"]
    assert list(two) == ["mean", "fvt"]
    assert two["fvt"]["bits_per_byte"] == result["methods"]["fvt"]["bits_per_byte"], "each from the old rows"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "fvtt"], "method"),
        (["--output", ""], "output must name a folder, got ''"),
        (["--seed", str(2**70)], "seed must lie in [0, 2**63)"),
        (["--pad-to-multiple-of", "100000000000"], "pad_to_multiple_of must lie in [1, 65536]"),
        (["--output", "text.txt/below"], "text.txt: is a file, so --output"),
        (["--method", "focus"], "give a text with --data"),
        (["--compare"], "set ppl_eval_data"),
        (["--compare", "mean", "--method", "omp", "--ppl-eval-data", "text.txt"], "list it behind compare"),
        (["--no-extend-output-embeddings", "--output-embeddings-mode", "untie"], "exclude each other"),
        (["--model.pretrained-model-name-or-path", "/absent/model"], "/absent/model"),
        (["--method", "omp", "--auxiliary-model", "AUX"], "is not the target"),
        (["--hypernet", "trained"], "hypernet is read by method hypernet, and the method is fvt"),
        (["--data", "text.txt", "--method", "mean"], "data is read by method focus and omp"),
        (["--ppl-eval-data", "text.txt"], "set compare, or leave it out"),
    ],
)
def test_bad_input_is_one_line(root, capsys, words, message):
    words = [str(root / "model") if word == "AUX" else word for word in words]
    words = [str(root / word) if word.startswith("text.txt") else word for word in words]
    assert main(flags(root, "bad", *words)) != 0
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (root / "bad").exists()


def test_an_output_that_is_not_empty_is_left_alone(root, capsys):
    (root / "full").mkdir()
    (root / "full" / "mine.txt").write_text("mine")
    assert main(flags(root, "full")) != 0
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in (root / "full").iterdir()] == ["mine.txt"]


def test_a_bos_that_is_lost_is_explained_once(root, capsys):
    words = flags(root, "bos")
    words[words.index(str(root / "new"))] = "byte:target=Qwen2"
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.err.count("BOS on one side only") == 1
    assert "the model's own tokenizer begins documents with '<s>'" in captured.err
    assert main(flags(root, "both")) == 0
    assert "BOS on one side only" not in capsys.readouterr().err


def refused(root, capsys, *words):
    """Return the one line of an error of the data."""
    assert main(flags(root, "bad", *words)) == ExitCode.DATA
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert not (root / "bad").exists()
    return error


def test_a_tokenizer_with_more_ids_than_rows_is_refused(root, capsys, tmp_path):
    shutil.copytree(root / "model", tmp_path / "large")
    byte_level_bpe(tmp_path / "large", 420)
    error = refused(root, capsys, "--model.pretrained-model-name-or-path", str(tmp_path / "large"))
    assert "ids but the model's embedding only 300 rows" in error


def test_rows_that_no_id_names_are_left_out(root, tmp_path):
    """A model padded with rows of its own: they are in no mean, and in no new row."""
    shutil.copytree(root / "model", tmp_path / "padded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    model.resize_token_embeddings(320, mean_resizing=False)
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        matrix.data[300:] = 1e6
    model.save_pretrained(tmp_path / "padded")
    for method in ("mean", "random_normal"):
        made = [
            moved(root, f"{method}-{name}", "--method", method, model=folder)
            for name, folder in (("plain", "model"), ("padded", tmp_path / "padded"))
        ]
        for side in ("input", "output"):
            rows = [getattr(model, f"get_{side}_embeddings")().weight for model in made]
            assert torch.equal(*rows)


def test_a_target_without_shared_bytes_is_refused(root, capsys, tmp_path):
    for name, strings in (("old", ["a", "ab"]), ("new", ["c", "cd"])):
        vocab = [["<unk>", 0.0], *([string, -1.0] for string in strings)]
        model = {"type": "Unigram", "unk_id": 0, "vocab": vocab}
        write(tmp_path / name, {"model": model, "added_tokens": []}, unk_token="<unk>", eos_token="<unk>")
    tiny_model(vocab_size=3).save_pretrained(tmp_path / "old")
    words = ["--model.pretrained-model-name-or-path", str(tmp_path / "old")]
    words += ["--target-tokenizer-name", str(tmp_path / "new")]
    text = ["--data", str(root / "text.txt"), "--ppl-eval-data", str(root / "text.txt")]
    for method in ("fvt", "mean", "overlap", "random_normal"):
        assert "share no byte" in refused(root, capsys, *words, "--method", method)
    assert "share no byte" in refused(root, capsys, *words, "--compare", "mean", *text)
