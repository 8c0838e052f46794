"""BOS on one side only is explained, once, at the doors that align two tokenizers."""

import numpy as np
import pytest

from tokenkit.align import main
from tokenkit.structs import UNPAIRED
from tokenkit.tokenization.byteify import load_tokenizer
from tokenkit.tokenization.chat import Document, encode_documents
from tokenkit.tokenization.one_sided import explain_one_sided_bos

WITH, WITHOUT = "byte:target=Llama3", "byte:target=Qwen2"


@pytest.mark.parametrize(
    ("student", "teacher", "having", "family"),
    [(WITH, WITHOUT, "student", "Qwen2"), (WITHOUT, WITH, "teacher", "Llama3")],
)
def test_the_side_its_token_and_the_way_out_are_named(student, teacher, having, family):
    said = explain_one_sided_bos(load_tokenizer(student), load_tokenizer(teacher), "direct_encode")
    assert f"'<|begin_of_text|>' for the {having}" in said
    assert f"such as {family}" in said
    assert "direct_encode_no_force_bos" in said


@pytest.mark.parametrize("name", [WITH, WITHOUT])
def test_two_sides_that_agree_need_no_words(name):
    pair = load_tokenizer(name), load_tokenizer("byte:target=Gemma2" if name == WITH else name)
    assert explain_one_sided_bos(*pair, "direct_encode") is None


def test_without_bos_in_plain_text_conversations_alone_are_named():
    pair = load_tokenizer(WITH), load_tokenizer(WITHOUT)
    assert "conversations begin" in explain_one_sided_bos(*pair, "direct_encode_no_force_bos")


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
