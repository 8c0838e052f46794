import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import tokenizer_folder
from tests.tiny import byte_level_bpe, is_written, sentencepiece_bpe, tiny_model
from tokenkit.embeddings.rows import LABELS, Matching, row_sources
from tokenkit.embeddings.transfer import transfer_vocabulary
from tokenkit.models.causal_lm import CausalLM
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_level_bpe(folder / "small", 300)
    byte_level_bpe(folder / "large", 420, bos="<begin>", eos="<end>")
    sentencepiece_bpe(folder / "pieces", 400)
    named = {path.name: load_tokenizer(str(path)) for path in folder.iterdir()}
    return {**named, "byte": load_tokenizer("byte")}


def test_same_bytes_take_the_old_row_and_others_the_mean_of_their_pieces(tokenizers):
    old, new = tokenizers["small"], tokenizers["large"]
    sources = row_sources(old, new)
    old_WD = torch.randn(old.vocab_size, 8)
    new_VD = sources.rows(old_WD, new.vocab_size)
    for token_id, raw in enumerate(new.token_bytes):
        if new.is_special_V[token_id]:
            continue
        pieces = old.encode(raw.decode()).ids if _is_text(raw) else None
        method = LABELS[sources.method_V[token_id]]
        if raw in old.token_bytes:
            assert method == "same_bytes"
            torch.testing.assert_close(new_VD[token_id], old_WD[old.token_bytes.index(raw)])
        elif pieces is not None:
            assert method == "mean_of_pieces"
            torch.testing.assert_close(new_VD[token_id], old_WD[pieces].mean(0))


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_special_tokens_go_by_role_whatever_they_are_called(tokenizers):
    old, new = tokenizers["small"], tokenizers["large"]
    old_WD = torch.randn(old.vocab_size, 8)
    new_VD = row_sources(old, new).rows(old_WD, new.vocab_size)
    torch.testing.assert_close(new_VD[new.bos_id], old_WD[old.bos_id])
    torch.testing.assert_close(new_VD[new.eos_id], old_WD[old.eos_id])


def test_one_token_in_two_roles_is_made_of_both(tokenizers, tmp_path):
    old = tokenizers["small"]
    new = load_tokenizer(str(byte_level_bpe(tmp_path, 300, bos="<|both|>", eos="<|both|>")))
    old_WD = torch.randn(old.vocab_size, 8)
    new_VD = row_sources(old, new).rows(old_WD, new.vocab_size)
    torch.testing.assert_close(new_VD[new.bos_id], old_WD[[old.bos_id, old.eos_id]].mean(0))


@pytest.mark.parametrize("old", ["small", "large", "pieces", "byte"])
@pytest.mark.parametrize("new", ["small", "large", "pieces", "byte"])
def test_every_row_has_a_method_and_bytes_always_reach_some_old_row(tokenizers, old, new):
    sources = row_sources(tokenizers[old], tokenizers[new])
    report = sources.report()
    assert sum(report.values()) == tokenizers[new].vocab_size
    without = np.flatnonzero(sources.method_V == LABELS.index("mean_of_all"))
    written = is_written(tokenizers[new])
    assert not any(written[i] for i in without), "all old ones here can write any byte"


def test_a_piece_inside_a_word_is_not_written_with_the_space_that_begins_a_text(tokenizers):
    old = tokenizers["pieces"]
    sources = row_sources(old, tokenizers["large"])
    inside = [i for i, raw in enumerate(tokenizers["large"].token_bytes) if raw.isalpha() and len(raw) > 1]
    for token_id in inside:
        start = sources.offset_V[token_id]
        end = sources.offset_V[token_id + 1] if token_id + 1 < len(sources.offset_V) else None
        spelled = b"".join(old.token_bytes[i] for i in sources.old_ids_K[start:end].tolist())
        assert spelled == tokenizers["large"].token_bytes[token_id]


def test_a_byte_piece_does_not_stand_for_a_character_that_has_a_token(tokenizers, tmp_path):
    raw = json.loads((sentencepiece_bpe(tmp_path) / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]  # bytes behind the characters, where Gemma has some of them
    letter, byte = vocab["a"], vocab["<0x61>"]
    assert byte < letter
    vocab["a"], vocab["<0x61>"] = byte, letter
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    old = load_tokenizer(str(tmp_path))
    assert old.token_bytes[byte] == old.token_bytes[letter] == b"a"
    sources = row_sources(old, tokenizers["small"])
    new_id = tokenizers["small"].token_bytes.index(b"a")
    assert sources.old_ids_K[sources.offset_V[new_id]] == byte


def test_what_is_never_written_takes_no_part_of_what_is(tokenizers):
    new = tokenizers["pieces"]
    spare = [i for i, raw in enumerate(new.token_bytes) if raw in new.token_bytes[i + 1 :]]
    assert b"a" in [new.token_bytes[i] for i in spare]
    small = tokenizers["small"]
    old_WD = torch.randn(small.vocab_size, 8)
    rows_VD = row_sources(small, new).rows(old_WD, new.vocab_size)
    torch.testing.assert_close(rows_VD[spare], old_WD.mean(0).expand(len(spare), 8))


@pytest.mark.parametrize("name", ["pieces", "small"])
def test_a_vocabulary_that_only_grows_keeps_every_row(tokenizers, name):
    old = tokenizers[name]
    new = load_tokenizer(str(old.spec), tokens_to_add=["<|mine|>", "<dog>"])
    old_WD = torch.randn(old.vocab_size, 8)
    rows_VD = row_sources(old, new).rows(old_WD, new.vocab_size)
    kept = [i for i in range(old.vocab_size) if i not in new.control.values() or i in old.control.values()]
    assert len(kept) >= old.vocab_size - 1
    assert torch.equal(rows_VD[kept], old_WD[kept])


@pytest.mark.parametrize("old", ["small", "pieces", "byte"])
def test_an_added_token_begins_as_the_mean_of_its_pieces(tokenizers, old):
    old = tokenizers[old]
    new = load_tokenizer(str(tokenizers["large"].spec), tokens_to_add=["<|mine|>", "<dog>"])
    old_WD = torch.randn(old.vocab_size, 8)
    sources = row_sources(old, new)
    rows_VD = sources.rows(old_WD, new.vocab_size)
    for string in ("<|mine|>", "<dog>"):
        pieces = old.try_encode_batch([string], before="text")[0].ids
        assert LABELS[sources.method_V[new.control[string]]] == "mean_of_pieces"
        torch.testing.assert_close(rows_VD[new.control[string]], old_WD[pieces].mean(0))
    apart = row_sources(old, new, Matching(special=False))
    assert LABELS[apart.method_V[new.control["<|mine|>"]]] == "mean_of_all"


def test_an_added_token_that_the_old_vocabulary_has_keeps_its_row(tokenizers):
    old = load_tokenizer(str(tokenizers["small"].spec), tokens_to_add=["<|mine|>"])
    new = load_tokenizer(str(tokenizers["large"].spec), tokens_to_add=["<|mine|>"])
    old_WD = torch.randn(old.vocab_size, 8)
    rows_VD = row_sources(old, new).rows(old_WD, new.vocab_size)
    assert torch.equal(rows_VD[new.control["<|mine|>"]], old_WD[old.control["<|mine|>"]])


@given(st.integers(0, 100), st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_padding_rows_are_the_mean_row(tokenizers, extra, width):
    old, new = tokenizers["small"], tokenizers["byte"]
    old_WD = torch.randn(old.vocab_size, width)
    new_VD = row_sources(old, new).rows(old_WD, new.vocab_size + extra)
    for row in new_VD[new.vocab_size :]:
        torch.testing.assert_close(row, old_WD.mean(0))


def test_it_is_deterministic(tokenizers):
    first, second = (row_sources(tokenizers["pieces"], tokenizers["large"]) for _ in range(2))
    assert torch.equal(first.old_ids_K, second.old_ids_K)
    assert torch.equal(first.offset_V, second.offset_V)


@pytest.mark.parametrize("tied", [True, False])
def test_input_and_output_embeddings_are_made_separately(tokenizers, tied):
    old, new = tokenizers["small"], tokenizers["large"]
    model = CausalLM(tiny_model(tie_word_embeddings=tied), old.vocab_size)
    embedding, output = model.embedding.weight.detach().clone(), model.output.weight.detach().clone()
    report = transfer_vocabulary(model, old, new, pad_to_multiple_of=64)
    sources = row_sources(old, new)
    assert report == sources.report()
    assert model.is_tied == tied
    assert model.config.vocab_size == model.embedding.weight.shape[0] == 448
    torch.testing.assert_close(model.embedding.weight.detach(), sources.rows(embedding, 448))
    torch.testing.assert_close(model.output.weight.detach(), sources.rows(output, 448))


def test_a_tied_head_can_be_untied(tokenizers):
    model = CausalLM(tiny_model(tie_word_embeddings=True), 300)
    transfer_vocabulary(model, tokenizers["small"], tokenizers["large"], output_embeddings="untie")
    assert not model.is_tied
    torch.testing.assert_close(model.output.weight, model.embedding.weight)


def test_the_bias_of_a_head_moves_too(tokenizers):
    old, new = tokenizers["small"], tokenizers["large"]
    model = CausalLM(tiny_model(tie_word_embeddings=False), 300)
    model.output.bias = torch.nn.Parameter(torch.randn(300))
    bias = model.output.bias.detach().clone()
    transfer_vocabulary(model, old, new)
    expected = row_sources(old, new).rows(bias[:, None], new.vocab_size)[:, 0]
    torch.testing.assert_close(model.output.bias.detach(), expected)


def test_a_tokenizer_that_the_model_never_had_is_refused(tokenizers):
    with pytest.raises(ValueError, match=r"\d+ ids but the model's embedding only 300 rows"):
        transfer_vocabulary(CausalLM(tiny_model(), 300), tokenizers["large"], tokenizers["small"])


@pytest.mark.parametrize(
    ("names", "least", "without_source"),
    [(("llama2", "gpt2"), 15_000, 0), (("spm1k", "bytelevel2k"), 700, 4)],  # names of control tokens
)
def test_real_vocabularies(names, least, without_source):
    old, new = (load_tokenizer(str(tokenizer_folder(name))) for name in names)
    report = row_sources(old, new).report()
    assert report["same_bytes"] > least
    assert report["mean_of_all"] == without_source
