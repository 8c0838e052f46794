"""What an exported folder says of itself, and what makes batches of it possible."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.tiny import sentencepiece_bpe, tiny_folder
from tokenkit.commands.zett import main
from tokenkit.export.card import CardFacts, model_card, public_name
from tokenkit.export.tokenizer_folder import PADDING, padding_id
from tokenkit.tokenization.tokenizer import load_tokenizer

CARD = "---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# Base\n"


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    tiny_folder(folder / "base")
    (folder / "base" / "README.md").write_text(CARD, encoding="utf-8")
    sentencepiece_bpe(folder / "new")
    words = ["--model.pretrained-model-name-or-path", str(folder / "base")]
    words += ["--target-tokenizer-name", str(folder / "new"), "--output-dir", str(folder / "moved")]
    assert main(words) == 0
    return folder


def test_a_command_is_published_without_where_its_files_lie(tmp_path):
    words = [
        "--student",
        str(tmp_path / "m"),
        f"output_dir={tmp_path / 'o'}",
        "--lr",
        "1e-4",
        "byte:target=Qwen2",
    ]
    card = model_card(CardFacts(base="org/base", losses=("clm",), command=words))
    assert "**command**: `--student m output_dir=o --lr 1e-4 byte:target=Qwen2`" in card


def test_the_card_of_zett_says_that_nothing_was_trained(moved):
    card = ModelCard.load(moved / "moved" / "README.md")
    assert card.data.base_model == "base"
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en", "de"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "without any training" in " ".join(card.text.split())
    assert "fvt: " in card.text


def test_no_file_of_an_export_names_a_path_of_the_machine(moved):
    for path in (moved / "moved").iterdir():
        if path.suffix in (".json", ".md", ".jinja", ".py"):
            assert str(moved) not in path.read_text(encoding="utf-8"), path.name


def test_a_card_of_training_has_losses_results_and_names():
    facts = CardFacts(
        base="/home/someone/models/llama",
        teacher="org/teacher",
        losses=("clm", "alm_unconstrained"),
        lines={"steps": "30"},
        bits_per_byte=1.23456,
    )
    text = model_card(facts, needs_code=True)
    card = ModelCard(text)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("bits_per_byte", 1.2346)
    assert card.data.base_model == "llama"
    assert "distillation" in card.data.tags
    assert "**teacher**: org/teacher" in text
    assert "clm, alm_unconstrained" in text
    assert "someone" not in text
    assert "trust_remote_code=True" in text
    assert "distillation" not in ModelCard(model_card(CardFacts(base="a/b", losses=("clm",)))).data.tags


def test_names_with_the_signs_of_yaml_leave_a_card_that_can_be_read():
    name, title = 'org/a: "b" #c', "run: 7 # 'last'"
    facts = CardFacts(base=name, title=title, losses=("clm", "my.module:loss"), bits_per_byte=1.5)
    card = ModelCard(model_card(facts))
    assert (card.data.base_model, card.data.model_name) == (name, title)
    assert card.data.eval_results[0].metric_value == 1.5
    assert f"# {title}\n" in card.text
    assert "clm, my.module:loss" in card.text


def test_a_card_claims_no_measurement_and_no_teacher_that_there_was_not():
    card = ModelCard(model_card(CardFacts(base="org/base", losses=("clm",), lines={"steps": "3"})))
    assert card.data.eval_results is None
    assert "teacher" not in card.text
    assert "**steps**: 3" in card.text
    assert "trust_remote_code" not in card.text


@pytest.mark.parametrize("content", ["---\nlicense: [\n---\n", "no metadata", "---\nlanguage: 3\n---\n"])
def test_a_card_that_cannot_be_read_is_passed_over(tmp_path, content):
    (tmp_path / "README.md").write_text(content, encoding="utf-8")
    assert "license" not in model_card(CardFacts(base=str(tmp_path)))


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("byte:target=Llama3", "byte:target=Llama3"),
        ("/data/models/llama", "llama"),
        ("/data/run7/export", "run7"),
        ("/data/tokenizers/qwen:target=Qwen2", "qwen:target=Qwen2"),
        ("./qwen", "qwen"),
        ("a/b/c", "c"),
    ],
)
def test_names_are_published_and_paths_are_not(location, name):
    assert public_name(location) == name


def test_batches_can_be_made_of_an_export(moved):
    tokenizer = AutoTokenizer.from_pretrained(moved / "moved")
    model = AutoModelForCausalLM.from_pretrained(moved / "moved")
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 128
    texts = ["The cats", "The dog ran after the little cats"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    alone = tokenizer(texts[0], return_tensors="pt")
    together = model.generate(**batch, max_new_tokens=3, do_sample=False)[0]
    single = model.generate(**alone, max_new_tokens=3, do_sample=False)[0]
    assert torch.equal(together[-3:], single[-3:])
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    assert len(write(texts, max_new_tokens=2)) == 2


def test_padding_is_the_tokenizers_own_else_what_is_called_so_else_eos(tmp_path):
    for string in ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<PAD>", "<|padding|>"):
        assert PADDING.match(string)
    for string in ("<|endoftext|>", "padding of a chair", "<s>", "<|image_pad|>", "<|vision_pad|>"):
        assert not PADDING.match(string)
    folder = sentencepiece_bpe(tmp_path / "new")
    plain = load_tokenizer(str(folder))
    assert padding_id(plain) == plain.eos_id
    added = load_tokenizer(str(folder), tokens_to_add=("<|pad|>",))
    assert padding_id(added) == added.control["<|pad|>"]
    llama = load_tokenizer("byte:target=Llama3")
    assert padding_id(llama) == (llama.eos_id if llama.pad_id is None else llama.pad_id)
    assert json.loads((Path(folder) / "tokenizer_config.json").read_text()).get("pad_token") is None
