import io
import json

import pytest
import sentencepiece

from tests.conftest import OWN_DATA, SHARED_DATA
from tests.tokenization.tiny import CORPUS
from tokenkit.tokenization.files.sentencepiece_model import Piece, merges, sentencepiece_document
from tokenkit.tokenization.tokenizer import load_tokenizer

TEXTS = [
    "The cat sat on the mat, and the dog ran away.",
    "der Hund läuft über die Straße",
    "and  two   spaces , a ﬁ",
    "it's Ω 日本 here",
    "    def add",
]


def train(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=options.pop("vocab_size", 420),
        hard_vocab_limit=False,
        character_coverage=0.98,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe"},
        {"model_type": "bpe", "byte_fallback": True, "vocab_size": 600},
        {"model_type": "unigram"},
        {"model_type": "unigram", "byte_fallback": True, "vocab_size": 600},
        {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"model_type": "bpe", "normalization_rule_name": "identity", "user_defined_symbols": "    ,dog"},
        {"model_type": "unigram", "user_defined_symbols": "    ,dog"},
    ],
)
def test_a_folder_with_a_model_alone_gives_the_ids_of_sentencepiece(tmp_path, options):
    raw = train(**options)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    tokenizer = load_tokenizer(str(tmp_path))
    reference = sentencepiece.SentencePieceProcessor(model_proto=raw)
    for text in TEXTS:
        assert tokenizer.encode(tokenizer.normalize(text)).ids.tolist() == reference.encode(text), text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id(), reference.eos_id())
    assert tokenizer.family.writes_bos


@pytest.mark.parametrize("name", ["llama2", "mistral-v0.1", "tinystories-spm"])
def test_real_models_give_the_tokenizer_json_beside_them(shared_data, name):
    folder = SHARED_DATA / "tokenizers" / name
    document = sentencepiece_document(folder / "tokenizer.model")
    beside = json.loads((folder / "tokenizer.json").read_text())
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in beside["model"]["merges"]]
    assert document["model"]["merges"] == merges
    assert document["model"]["vocab"] == beside["model"]["vocab"]
    assert document["normalizer"] == beside["normalizer"]


def test_the_model_of_the_repository_gives_the_ids_of_sentencepiece():
    folder = OWN_DATA / "tokenizers" / "spm1k"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(str(folder))
    for line in (OWN_DATA / "text" / "scripts.txt").read_text(encoding="utf-8").splitlines():
        assert tokenizer.encode(tokenizer.normalize(line)).ids.tolist() == reference.encode(line), line


def test_merges_are_ordered_by_score_and_not_by_place():
    pieces = [Piece(string, score, 1) for string, score in (("a", 0), ("b", 0), ("ab", -3), ("ba", -2))]
    assert merges([*pieces, Piece("aba", -1.0, 1), Piece("<x>", 0.0, 3)]) == [
        ["a", "ba"],
        ["ab", "a"],
        ["b", "a"],
        ["a", "b"],
    ]


@pytest.mark.parametrize("raw", [b"", b"not a model at all", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\x08"])
def test_a_broken_model_file_is_refused(tmp_path, raw):
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load_tokenizer(str(tmp_path))


def test_a_model_of_words_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="word"))
    with pytest.raises(ValueError, match="only Unigram and BPE"):
        load_tokenizer(str(tmp_path))
