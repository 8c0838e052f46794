"""A sample of `python -m tests.architectures`, and the doors that models of special form go through."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.architectures import study, tiny, tokenizers
from tests.tiny import TEXT, byte_level_bpe, sentencepiece_bpe, tiny_folder, tiny_model
from tokenkit.cli import run
from tokenkit.commands.zett import main
from tokenkit.config import ALIASES, TrainConfig, parse_command_line
from tokenkit.embeddings.transfer import old_matrices, transfer_vocabulary
from tokenkit.errors import DataError, ExitCode
from tokenkit.export.huggingface import ExportRequest, export_huggingface, rehearse
from tokenkit.models.causal_lm import CausalLM, LoadOptions, load_causal_lm
from tokenkit.models.lora import add_lora
from tokenkit.models.options import LoraOptions
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.training.loop import train

IDS = torch.arange(3, 20)[None]


# 13 architectures through load, adapters, transfer, export and reload: about half a second each
@pytest.mark.parametrize(
    "kind",
    [
        "falcon_h1", "hyperclovax", "modernbert-decoder", "cohere", "gemma3n_text", "gemma4_text", "gemma3",
        "got_ocr2", "llama4", "phimoe", "xglm", "youtu", "phi",
    ],
)  # fmt: skip
def test_permuted_ids_give_the_same_model(kind, tmp_path):
    row = study(kind, tmp_path)
    assert row.logits.startswith("equal"), row
    assert float(row.permuted) <= 1e-6, row
    assert row.adapters == "train" or (kind == "falcon_h1" and "Mamba" in row.adapters), row


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
@torch.no_grad()
def test_rows_of_every_layer_belong_to_a_vocabulary(kind, tmp_path):
    old, new, _ = tokenizers(tmp_path)
    model = CausalLM(tiny(kind), 300)
    before, kept = model(IDS).hidden_BTD, model.vocabulary()
    transfer_vocabulary(model, old, new)
    torch.testing.assert_close(model(IDS, kept).hidden_BTD, before)
    assert (model(IDS).hidden_BTD - before).abs().max() > 1e-2
    assert model.config.vocab_size_per_layer_input == 300
    assert set(model.vocabulary_modules) == {model.embedding, model.output, model.layer_table}


@torch.no_grad()
def test_ids_beyond_the_table_of_layers_read_its_first_row(tmp_path):
    old, new, place_V = tokenizers(tmp_path)
    model = CausalLM(tiny("gemma3n_text", vocab_size_per_layer_input=280), 300)
    ids_BT = torch.arange(270, 295)[None]
    before_BTV = model.causal_lm(input_ids=ids_BT).logits
    assert torch.equal(old_matrices(model, old).table_WE[280:], model.layer_table.weight[:1].expand(20, -1))
    transfer_vocabulary(model, old, new)
    after_BTV = model.causal_lm(input_ids=place_V[ids_BT]).logits[..., place_V]
    torch.testing.assert_close(after_BTV, before_BTV[..., :300])


def test_a_router_that_is_named_gets_no_adapter():
    student = CausalLM(tiny("phimoe"), 300)
    with pytest.raises(ValueError, match=r"mlp\.router.*a router of experts"):
        add_lora(student, LoraOptions(targets=("router", "q_proj")))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doors")
    sentencepiece_bpe(folder / "new", 400)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    return folder


def zett(root, model, output, *more):
    source = [
        "--model.pretrained-model-name-or-path",
        str(model),
        "--target-tokenizer-name",
        str(root / "new"),
    ]
    return main([*source, "--output", str(output), *more])


def saved(model, folder):
    byte_level_bpe(folder)
    model.save_pretrained(folder)
    return folder


def trained(root, model, output, *more):
    """Run two steps, as the command does, and return the exit code."""
    flags = [
        "--student.pretrained-model-name-or-path", str(model), "--target-tokenizer-name", str(root / "new"),
        "--data.dataset-name", str(root / "text.jsonl"), "--data.num-workers", "0", "--losses", "clm",
        "--steps", "2", "--batch-size", "2", "--max-length-new", "32", "--max-length-teacher", "32",
        "--model-lora-rank", "2", "--output-dir", str(output), *more,
    ]  # fmt: skip
    return run(lambda: train(parse_command_line(TrainConfig, flags, program="test", aliases=ALIASES)))


def test_zett_moves_the_text_part_of_images_and_text(root, tmp_path, capsys):
    folder = saved(tiny("gemma3"), tmp_path / "model")
    assert zett(root, folder, tmp_path / "out") == 0
    assert "of gemma3 the text part is read alone" in capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("gemma3_text", 448)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "Gemma3ForCausalLM"


# load, two steps and export through the command: what no single function shows
def test_gemma_4_trains_with_adapters_and_is_exported(root, tmp_path):
    folder = saved(tiny("gemma4_text"), tmp_path / "model")
    contradictory = {"do_sample": False, "temperature": 0.9, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(contradictory))
    assert trained(root, folder, tmp_path / "run") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert model.model.embed_tokens_per_layer.weight.shape[0] == model.config.vocab_size
    assert model.config.vocab_size_per_layer_input == model.config.vocab_size == 448
    assert model.generation_config.repetition_penalty == 1.1
    assert model.generation_config.temperature is None


@pytest.mark.parametrize("settings", [{"do_sample": False, "temperature": 0.9}, {"top_p": 0.6}])
def test_generation_settings_that_contradict_each_other_stop_nothing(settings, root, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.1}))
    assert zett(root, folder, tmp_path / "zett") == 0
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "zett").generation_config
    assert (written.repetition_penalty, written.temperature, written.top_p) == (1.1, None, None)


def test_a_model_that_is_refused_ends_with_65_and_writes_nothing(root, tmp_path, capsys):
    folder = saved(tiny("bert"), tmp_path / "model")
    assert zett(root, folder, tmp_path / "zett") == ExitCode.DATA
    assert trained(root, folder, tmp_path / "run") == ExitCode.DATA
    llama = tiny_folder(tmp_path / "llama")
    teacher = ["--teacher.pretrained-model-name-or-path", str(folder), "--losses", "clm", "alm_unconstrained"]
    assert trained(root, llama, tmp_path / "taught", *teacher) == ExitCode.DATA
    errors = capsys.readouterr().err.split("tokenkit: ")[1:]
    assert len(errors) == 3
    assert all("depends on the tokens after it" in error for error in errors)
    assert not (tmp_path / "zett").exists()


def test_what_the_export_would_refuse_is_refused_before_the_first_step(tmp_path):
    new = load_tokenizer(str(sentencepiece_bpe(tmp_path, 400)))
    old = load_tokenizer(str(byte_level_bpe(tmp_path / "old", 300)))
    student = CausalLM(tiny("moshi"), 300)  # it has one row more than its vocab_size says
    transfer_vocabulary(student, old, new)
    with pytest.raises(DataError, match=r"model\.embed_tokens\.weight .*nothing was trained"):
        rehearse(student, new)
    student = CausalLM(tiny("xglm", pad_token_id=310, max_position_embeddings=400), 300)
    transfer_vocabulary(student, old, load_tokenizer(str(byte_level_bpe(tmp_path / "less", 280))))
    with pytest.raises(DataError, match="positions depend on its pad_token_id, 310"):
        rehearse(student, old)


def test_code_of_the_old_repository_is_not_named_in_the_export(root, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "auto_map": {"AutoModelForCausalLM": "other/repo--x.Llama"}}
    path.write_text(json.dumps(config))
    assert zett(root, folder, tmp_path / "out") == 0
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_stays_tied_or_untied(tied, tmp_path):
    old, new, _ = tokenizers(tmp_path)
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    student = load_causal_lm(str(tmp_path / "model"), 300, LoadOptions())
    transfer_vocabulary(student, old, new)
    export_huggingface(student, None, new, ExportRequest(folder=tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.config.tie_word_embeddings is tied
