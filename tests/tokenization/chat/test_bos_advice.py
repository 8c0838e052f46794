"""BOS on one side only is explained, once, at the doors that align two tokenizers."""

import numpy as np
import pytest

from tests.tiny import byte_level_bpe
from tokenkit.commands.align import main
from tokenkit.structs import UNPAIRED
from tokenkit.tokenization.chat.advice import (
    explain_changed_bos,
    explain_one_sided_bos,
    fitting_families,
)
from tokenkit.tokenization.chat.encode import Document, Message, encode_documents
from tokenkit.tokenization.chat.families import FAMILIES
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer

WITH, WITHOUT = "byte:target=Llama3", "byte:target=Qwen2"


@pytest.mark.parametrize(
    ("student", "teacher", "having", "family"),
    [
        (WITH, WITHOUT, "student", "Qwen2"),
        (WITHOUT, WITH, "teacher", "Llama3"),
        (WITHOUT, "byte:target=Gemma2", "teacher", "Gemma2"),
        (WITH, "byte:target=Phi3", "student", "Phi3"),
    ],
)
def test_the_side_its_token_and_the_way_out_are_named(student, teacher, having, family):
    pair = load_tokenizer(student), load_tokenizer(teacher)
    said = explain_one_sided_bos(*pair, "direct_encode")
    bos = pair[having == "teacher"].family.tokens["bos"]
    assert f"{bos!r} for the {having}" in said
    assert f"in ':target={family}' (docs" in said
    assert "direct_encode_no_force_bos" in said


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_that_fits_is_found_by_its_tokens_and_its_turns(tmp_path, name):
    load_tokenizer(f"byte:target={name}").save(tmp_path)
    read = load_tokenizer(str(tmp_path))
    assert read.family.name == "generic"
    same = [other for other, family in FAMILIES.items() if family.turns == FAMILIES[name].turns]
    assert name in fitting_families(read)
    assert set(fitting_families(read)) <= set(same)


def test_a_tokenizer_like_no_family_gets_an_example(tmp_path):
    byte_level_bpe(tmp_path, bos="<first>", eos="<last>")
    said = explain_one_sided_bos(load_tokenizer(WITHOUT), load_tokenizer(str(tmp_path)), "direct_encode")
    assert "':target=' and a family that writes BOS, such as Llama3 (docs" in said


def test_several_families_that_fit_are_all_named(tmp_path):
    byte_level_bpe(tmp_path)  # <s> and </s>, no template
    said = explain_one_sided_bos(load_tokenizer(WITHOUT), load_tokenizer(str(tmp_path)), "direct_encode")
    assert "':target=Llama2' or ':target=TinyLlama' or ':target=Mistral'" in said


def test_a_model_that_moves_untrained_is_told_what_it_meets():
    bos, none = load_tokenizer(WITH), load_tokenizer(WITHOUT)
    assert explain_changed_bos(bos, bos) is explain_changed_bos(none, none) is None
    lost, gained = explain_changed_bos(bos, none), explain_changed_bos(none, bos)
    assert "own tokenizer begins documents with '<|begin_of_text|>', the target with no BOS" in lost
    assert "the target begins documents with '<|begin_of_text|>'" in gained
    assert "in ':target=Llama3' (docs" in lost
    assert "in ':target=Qwen2' (docs" in gained


@pytest.mark.parametrize("name", [WITH, WITHOUT])
def test_two_sides_that_agree_need_no_words(name):
    pair = load_tokenizer(name), load_tokenizer("byte:target=Gemma2" if name == WITH else name)
    assert explain_one_sided_bos(*pair, "direct_encode") is None


def test_without_bos_in_plain_text_conversations_alone_are_named():
    pair = load_tokenizer(WITH), load_tokenizer(WITHOUT)
    assert "conversations begin" in explain_one_sided_bos(*pair, "direct_encode_no_force_bos")


@pytest.fixture
def silent_template(tmp_path):
    """A tokenizer that begins a text with BOS, and whose template writes none."""
    load_tokenizer(WITH).save(tmp_path)
    read = load_tokenizer(str(tmp_path))
    template = read.chat_template.replace('"<|begin_of_text|>"', "''")
    return Tokenizer(read.spec, read.document, read.family, template)


@pytest.mark.parametrize(
    ("mode", "other", "expected"),
    [
        ("direct_encode", WITH, "conversations begin with '<|begin_of_text|>' for the teacher"),
        ("direct_encode_no_force_bos", WITH, "conversations begin with '<|begin_of_text|>' for the teacher"),
        ("surround_instruct", WITH, "documents begin with '<|begin_of_text|>' for the teacher"),
        ("direct_encode", WITHOUT, "documents begin with '<|begin_of_text|>' for the student"),
        ("direct_encode_no_force_bos", WITHOUT, None),
        ("surround_instruct", WITHOUT, None),
    ],
)
def test_the_template_decides_where_the_template_is_written(silent_template, mode, other, expected):
    pair = silent_template, load_tokenizer(other)
    said = explain_one_sided_bos(*pair, mode)
    assert said is None if expected is None else expected in said
    messages = tuple(Message(role, "Hi") for role in ("user", "assistant"))
    documents = [Document(text="Hi"), Document(messages=messages)][mode == "direct_encode_no_force_bos" :]
    written = encode_documents(documents, pair, mode=mode)
    begins = [[s.ids[0] == t.bos_id for s, t in zip(sides, pair, strict=True)] for sides in written]
    assert any(a != b for a, b in begins) == (said is not None)


def test_where_conversations_alone_differ_plain_text_is_no_way_out(silent_template):
    said = explain_one_sided_bos(silent_template, load_tokenizer(WITH), "direct_encode")
    assert "':target=Llama3' (docs" in said
    assert "plain text" not in said
    pair = silent_template, load_tokenizer(WITH)
    assert explain_one_sided_bos(*pair, "direct_encode", use_chat_template=False) is None


def test_without_a_template_only_texts_are_compared(tmp_path):
    plain = load_tokenizer(str(byte_level_bpe(tmp_path)))
    assert explain_one_sided_bos(plain, load_tokenizer(WITH), "direct_encode_no_force_bos") is None


def test_what_is_said_of_tokens_holds():
    pair = load_tokenizer(WITH), load_tokenizer(WITHOUT)
    ((student, teacher),) = encode_documents([Document(text="Hi")], pair, mode="direct_encode")
    assert student.byte_ends[0] == UNPAIRED
    assert np.array_equal(student.byte_ends[1:3], teacher.byte_ends[:2])
    (bare,) = encode_documents([Document(text="Hi")], pair, mode="direct_encode_no_force_bos")
    assert len(bare[0].ids) == len(bare[1].ids)


def test_align_says_it_once_on_stderr(capsys):
    assert main(["--student", WITH, "--teacher", WITHOUT, "--text", "Hi"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("BOS on one side only") == 1
    assert "BOS on one side only" not in captured.out
