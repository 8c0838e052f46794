import pytest

from tokenkit.tokenization.vocabulary import (
    BYTE_ALPHABET,
    find_alphabet,
    is_control,
    plain_text_document,
    read_vocabulary,
    spell,
)

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}


def document(vocab, added=(), pre_tokenizer=None, **model):
    model = {"type": "BPE", "vocab": vocab, "merges": [], **model}
    return {"model": model, "added_tokens": list(added), "normalizer": None, "pre_tokenizer": pre_tokenizer}


def added(token_id, content, **flags):
    return {"id": token_id, "content": content, "special": False, "lstrip": False, "rstrip": False, **flags}


def test_the_byte_alphabet_is_that_of_gpt_2():
    assert len(set(BYTE_ALPHABET)) == 256
    assert [BYTE_ALPHABET[byte] for byte in (0, 0x0A, 0x20, 0x21, 0x7F, 0xAD, 0xFF)] == list("ĀĊĠ!ġŃÿ")
    assert spell("ĠcafÃ©") == " café"
    assert spell("Ã") is None
    assert spell(" ") is None


def test_byte_level_strings_are_bytes():
    vocabulary = read_vocabulary(document({"Ġthe": 0, "Ã": 1, "<raw space> ": 2}, pre_tokenizer=BYTE_LEVEL))
    assert vocabulary.token_bytes == [b" the", b"\xc3", b"<raw space> "]
    assert vocabulary.is_special_V.tolist() == [False, False, True]  # no text produces a raw space
    assert vocabulary.lengths().tolist() == [4, 1, 0]


def test_sentencepiece_strings_are_text_with_marked_spaces():
    vocab = {"<unk>": 0, "▁the": 1, "<0x0A>": 2, "é": 3}
    with_bytes = read_vocabulary(document(vocab, pre_tokenizer=METASPACE, byte_fallback=True))
    assert with_bytes.token_bytes == [b"<unk>", b" the", b"\n", "é".encode()]
    without = read_vocabulary(document(vocab, pre_tokenizer=METASPACE))
    assert without.token_bytes[2] == b"<0x0A>"


def test_ids_that_nothing_has_are_special_and_empty():
    vocabulary = read_vocabulary(document({"a": 0, "b": 3}, [added(5, "<x>", special=True)], BYTE_LEVEL))
    assert vocabulary.token_bytes == [b"a", b"", b"", b"b", b"", b"<x>"]
    assert vocabulary.is_special_V.tolist() == [False, True, True, False, True, True]
    assert vocabulary.control == {"<x>": 5}


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (added(0, "anything", special=True), True),
        (added(0, "<tool_call>"), True),
        (added(0, "</s>", rstrip=True), True),
        (added(0, "</s>"), True),
        (added(0, "<｜User｜>"), True),
        (added(0, "[INST]"), True),
        (added(0, "word", lstrip=True, special=True), True),
        (added(0, "word", lstrip=True), False),
        (added(0, "    "), False),
        (added(0, "word"), False),
        (added(0, "<table>"), False),
        (added(0, "</h1>"), False),
        (added(0, "a <b> c"), False),
    ],
)
def test_control_tokens_are_special_or_look_like_markup(token, expected):
    assert is_control(token) is expected


def test_the_alphabet_is_found_at_any_depth():
    nested = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, BYTE_LEVEL]}
    assert find_alphabet(document({}, pre_tokenizer=nested)) == "byte-level"
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
    assert find_alphabet({**document({}), "normalizer": prepend}) == "metaspace"
    assert find_alphabet(document({})) == "plain"


def test_plain_text_renames_control_entries_and_keeps_their_ids():
    vocab = {"<s>": 0, "a": 1, "s>": 2, "<": 3}
    tokens = [added(0, "<s>", special=True), added(5, "  ")]
    plain = plain_text_document(document(vocab, tokens, merges=["< s>", ["a", "s>"]], unk_token="<s>"))
    assert plain["model"]["vocab"] == {" control 0 ": 0, "a": 1, "s>": 2, "<": 3, "  ": 5}
    assert plain["model"]["unk_token"] == " control 0 "
    assert plain["model"]["merges"] == [["a", "s>"]]
    assert [token["content"] for token in plain["added_tokens"]] == ["  "]


def test_plain_text_pads_a_unigram_vocabulary_up_to_its_added_tokens():
    unigram = document([["</s>", 0.0], ["a", -3.0]], [added(0, "</s>", special=True), added(4, "  ")])
    unigram["model"]["type"] = "Unigram"
    vocab = plain_text_document(unigram)["model"]["vocab"]
    assert [score for _, score in vocab] == [0.0, -3.0, -3.0, -3.0, -3.0]
    assert vocab[4][0] == "  "


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "WordPiece"}, "got WordPiece"),
        ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix='##'"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
    ],
)
def test_models_that_do_not_spell_text_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        read_vocabulary(document({"a": 0}, **model))
