import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from tests.tokenization.tiny import CORPUS, KINDS, byte_level, write
from tokenkit.tokenization.tokenizer import Tokenizer, canonical_text, load_tokenizer

TEXTS = [
    *CORPUS[:4],
    "👩‍👩‍👧‍👦 family, naïve e\u0301 \u212b ﬁ ①",
    "a\r\nb\r\n\r\n\tx = 1  # c\n",
    " lead",
    "  two  inside   and behind  ",
    "x",
    "\x00\x01\x7f\x85\u00a0\u2028x",
    "▁a▁▁b",
]
CONTROL_STRINGS = "</s> <unk><s> <|endoftext|> <|im_start|>user\n <|im_end|> <tool_call> <pad> [INST] <0x0A>"

PARTS = [*"ab .▁<>|/s\n", "  ", "<unk>", "</s>", "<0x41>", "<|im_end|>", "é", "e\u0301", "日", "👍🏽"]

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40) | st.lists(
    st.sampled_from(PARTS), max_size=20
).map("".join)


def check_spells(tokenizer: Tokenizer, text: str) -> None:
    """Each token's bytes are those of the text that it spans; the first may bring a space of its own."""
    tokens, raw = tokenizer.encode(text), text.encode()
    starts = [0, *tokens.byte_ends][: len(tokens.ids)]
    for index, (token_id, start, end) in enumerate(zip(tokens.ids, starts, tokens.byte_ends, strict=True)):
        if token_id == tokenizer.unk_id:
            assert end > start
            continue
        assert not tokenizer.is_special_V[token_id]
        piece, spanned = tokenizer.token_bytes[token_id], raw[start:end]
        assert piece == spanned or (index == 0 and piece == b" " + spanned), (text, index)
    assert (tokens.byte_ends[-1] if len(tokens.byte_ends) else 0) == len(raw)
    assert not tokens.special.any()
    assert tokens.trained.all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*TEXTS, CONTROL_STRINGS])
def test_the_bytes_of_the_ids_spell_the_canonical_text(tokenizers, kind, text):
    check_spells(tokenizers[kind], canonical_text(text, tokenizers[kind]))


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@settings(deadline=None)
def test_the_bytes_of_the_ids_spell_any_canonical_text(tokenizers, kind, text):
    check_spells(tokenizers[kind], canonical_text(text, tokenizers[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_gets_the_ids_of_the_original_tokenizer(tokenizers, folders, kind, text):
    original = RustTokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    canonical = canonical_text(text, tokenizers[kind])
    expected = original.encode(canonical, add_special_tokens=False).ids
    assert tokenizers[kind].encode(canonical).ids.tolist() == expected


def test_special_token_strings_inside_text_are_spelled_out(tokenizers, folders):
    for kind in ("byte-level", "sentencepiece", "unigram", "unigram with bytes"):
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode(canonical_text(CONTROL_STRINGS, tokenizer)).ids
        assert not set(ids.tolist()) & set(tokenizer.control.values()) - {tokenizer.unk_id}
        # The original does read them as special tokens: the test means something.
        original = RustTokenizer.from_file(str(folders[kind] / "tokenizer.json"))
        assert set(original.encode(CONTROL_STRINGS).ids) & set(tokenizer.control.values())


def test_a_unigram_model_reads_a_byte_piece_in_text_as_characters(tokenizers):
    tokens = tokenizers["unigram with bytes"].encode("it <0x41> is")
    assert tokenizers["unigram with bytes"].decode(tokens.ids) == "it <0x41> is"
    assert tokens.byte_ends[-1] == len("it <0x41> is")


def test_a_dummy_prefix_takes_no_bytes(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    tokens = tokenizer.encode("The cat")
    assert tokenizer.token_bytes[tokens.ids[0]].startswith(b" ")
    assert tokens.byte_ends[0] == len(tokenizer.token_bytes[tokens.ids[0]]) - 1
    assert tokenizer.encode("Ω").byte_ends[0] == 0  # a lone prefix


def test_a_text_that_begins_with_a_space_keeps_it(tokenizers):
    for kind in ("sentencepiece", "metaspace", "byte-level"):
        tokenizer = tokenizers[kind]
        assert tokenizer.encode(" The cat").byte_ends[-1] == len(" The cat")
        assert tokenizer.normalize(" The cat") == " The cat"


def test_an_unknown_character_spans_its_own_bytes(tokenizers):
    tokenizer = tokenizers["unigram"]
    tokens = tokenizer.encode("cat 日本 dog")
    (at,) = np.flatnonzero(tokens.ids == tokenizer.unk_id)
    start, end = tokens.byte_ends[at - 1], tokens.byte_ends[at]
    assert "cat 日本 dog".encode()[start:end] == "日本".encode()


def test_an_added_word_may_bring_a_space_of_its_own_behind_it(folders, tmp_path):
    document = json.loads((folders["sentencepiece"] / "tokenizer.json").read_text())
    word = {"id": 1 + max(document["model"]["vocab"].values()), "content": "dog", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append({**word, **flags})
    tokenizer = load_tokenizer(str(write(tmp_path, document)))
    tokens = tokenizer.encode("the doghouse")
    original = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokens.ids.tolist() == original.encode("the doghouse", add_special_tokens=False).ids
    at = tokens.ids.tolist().index(word["id"])
    assert tokens.byte_ends[at] == len("the dog")
    assert b"".join(tokenizer.token_bytes[i] for i in tokens.ids[at + 1 :]) == b" house"
    assert tokens.byte_ends[-1] == len("the doghouse")


def test_an_unknown_character_behind_a_manual_prefix_spans_its_own_bytes(folders):
    tokenizer = load_tokenizer(f"{folders['metaspace']}:conversion=manual_add_prefix_space")
    tokens = tokenizer.encode("the Ω")
    assert tokens.ids[-1] == tokenizer.unk_id
    assert tokens.byte_ends[-2:].tolist() == [len("the "), len("the Ω".encode())]


def test_unknown_ids_exist_only_where_text_can_become_unknown(tokenizers):
    assert tokenizers["byte-level"].unk_id is None
    assert tokenizers["sentencepiece"].unk_id is None
    assert tokenizers["unigram with bytes"].unk_id is None
    assert tokenizers["unigram"].unk_id == 2
    assert tokenizers["metaspace"].unk_id == 0


def test_added_whitespace_keeps_its_ids_when_special_tokens_go(tokenizers, folders):
    tokenizer = tokenizers["byte-level"]
    original = RustTokenizer.from_file(str(folders["byte-level"] / "tokenizer.json"))
    tokens = tokenizer.encode("x    y")
    assert original.token_to_id("    ") in tokens.ids
    assert tokenizer.token_bytes[original.token_to_id("    ")] == b"    "


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_encoded_like_its_texts(tokenizers, kind):
    tokenizer = tokenizers[kind]
    batch = [canonical_text(text, tokenizer) for text in TEXTS]
    for text, tokens in zip(batch, tokenizer.encode_batch(batch), strict=True):
        alone = tokenizer.encode(text)
        assert tokens.ids.tolist() == alone.ids.tolist()
        assert tokens.byte_ends.tolist() == alone.byte_ends.tolist()
        assert (tokens.ids.dtype, tokens.byte_ends.dtype) == (np.int32, np.int64)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_text_back(tokenizers, kind):
    tokenizer = tokenizers[kind]
    text = canonical_text("the cat and the dog", tokenizer)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_text_that_would_be_changed_is_refused_with_the_place(tokenizers):
    with pytest.raises(ValueError, match=r"would change the text at character 3.*canonical_text"):
        tokenizers["byte-level"].encode("cafe\u0301")
    with pytest.raises(ValueError, match="canonical_text"):
        tokenizers["unigram"].encode("two  spaces")


def test_text_that_is_not_unicode_is_refused(tokenizers):
    for call in (tokenizers["byte-level"].encode, tokenizers["unigram"].normalize):
        with pytest.raises(ValueError, match="valid Unicode"):
            call("a\ud800b")


def test_text_that_the_vocabulary_lacks_is_refused(tmp_path):
    folder = byte_level(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text())
    del document["model"]["vocab"]["z"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="cannot spell the text at character 2"):
        load_tokenizer(str(folder)).encode("a zoo")


def test_canonical_text_is_left_alone_by_all_tokenizers(tokenizers):
    text = canonical_text("cafe\u0301  ﬁn\n\nx ", *tokenizers.values())
    assert text == "café fin x"
    for tokenizer in tokenizers.values():
        assert tokenizer.normalize(text) == text
        tokenizer.encode(text)


def test_normalizers_that_undo_each_other_are_refused(tokenizers, folders, tmp_path):
    document = json.loads((folders["byte-level"] / "tokenizer.json").read_text())
    decomposing = load_tokenizer(str(write(tmp_path, {**document, "normalizer": {"type": "NFD"}})))
    assert canonical_text("plain", tokenizers["byte-level"], decomposing) == "plain"
    for pair in ((tokenizers["byte-level"], decomposing), (decomposing, tokenizers["byte-level"])):
        with pytest.raises(ValueError, match="undo each other's work"):
            canonical_text("café", *pair)


@given(text=texts)
@settings(deadline=None)
def test_normalizing_twice_changes_nothing_more(tokenizers, text):
    for tokenizer in tokenizers.values():
        assert tokenizer.normalize(tokenizer.normalize(text)) == tokenizer.normalize(text)


def test_the_space_mask_looks_at_the_first_byte(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    mask_V = tokenizer.space_mask("space")
    assert mask_V.sum() == sum(b.startswith(b" ") for b in tokenizer.token_bytes) > 10
    assert not mask_V[tokenizer.eos_id]
    assert tokenizer.space_mask("special")[tokenizer.eos_id]
    newline = tokenizer.token_bytes.index(b"\n")
    assert tokenizer.space_mask()[newline]
    assert not tokenizer.space_mask("space+tab")[newline]
    with pytest.raises(ValueError, match="got 'spaces'"):
        tokenizer.space_mask("spaces")


def test_places_inside_a_template_get_a_space_only_where_the_tokenizer_writes_one(tokenizers):
    spelled = {}
    for kind in ("sentencepiece", "metaspace", "byte-level", "unigram"):
        for before in ("start", "special", "text", "space"):
            (tokens,) = tokenizers[kind].try_encode_batch(["The cat"], before)
            assert tokens.byte_ends[-1] == len("The cat")
            spelled[kind, before] = b"".join(tokenizers[kind].token_bytes[i] for i in tokens.ids)[:1] == b" "
    assert [spelled["sentencepiece", b] for b in ("start", "special", "text", "space")] == [
        True,
        True,
        False,
        True,
    ]
    assert [spelled["metaspace", b] for b in ("start", "special", "text", "space")] == [
        True,
        False,
        False,
        True,
    ]
    assert [spelled["byte-level", b] for b in ("start", "special", "text", "space")] == [
        False,
        False,
        False,
        True,
    ]
    assert all(spelled["unigram", b] for b in ("start", "special", "text", "space"))


def test_the_fingerprint_follows_what_decides_about_ids(tokenizers, folders):
    folder = str(folders["byte-level"])
    same = load_tokenizer(folder).fingerprint()
    assert same == tokenizers["byte-level"].fingerprint()
    others = (load_tokenizer(folder, tokens_to_add=["<x>"]), load_tokenizer(folder + ":target=Llama3"))
    assert len({same, *(other.fingerprint() for other in others)}) == 3


def test_the_byte_tokenizer_has_the_bytes_first_and_then_special_tokens():
    tokenizer = load_tokenizer("byte", tokens_to_add=["<mine>"])
    assert tokenizer.token_bytes[:256] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.encode("aé").ids.tolist() == list("aé".encode())
    assert tokenizer.control["<mine>"] == tokenizer.vocab_size - 1
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3


def test_byte_conversion_keeps_the_special_tokens(folders):
    tokenizer = load_tokenizer(f"{folders['byte-level']}:conversion=byte")
    assert list(tokenizer.control.items()) == [
        ("<|endoftext|>", 256),
        ("<|im_start|>", 257),
        ("<|im_end|>", 258),
        ("<tool_call>", 259),
    ]
    assert tokenizer.eos_id == 258


def test_a_manual_prefix_space_gives_the_ids_of_the_tokenizers_own(tokenizers, folders):
    manual = load_tokenizer(f"{folders['sentencepiece']}:conversion=manual_add_prefix_space")
    for text in ("The cat", " The cat", "日本"):
        tokens, own = manual.encode(text), tokenizers["sentencepiece"].encode(text)
        assert tokens.ids.tolist() == own.ids.tolist()
        assert tokens.byte_ends.tolist() == own.byte_ends.tolist()
    added = load_tokenizer(f"{folders['byte-level']}:conversion=manual_add_prefix_space").encode("The cat")
    assert added.ids.tolist() == tokenizers["byte-level"].encode(" The cat").ids.tolist()
    assert added.byte_ends[-1] == len("The cat")


def test_a_prebyteified_vocabulary_is_read_as_it_stands(tmp_path):
    document = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "Unigram", "vocab": [["Ġa", -1.0], ["Ã©", -2.0], ["b", -3.0]], "unk_id": None},
    }
    tokenizer = load_tokenizer(f"{write(tmp_path, document)}:conversion=prebyteified")
    assert tokenizer.token_bytes == [b" a", "é".encode(), b"b"]
