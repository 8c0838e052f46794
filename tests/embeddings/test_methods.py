from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.tiny import byte_level_bpe, is_written, sentencepiece_bpe, tiny_model
from tokenkit.embeddings import rows as rows_module
from tokenkit.embeddings.rows import LABELS, Matching, Matrices, from_lists, mean_row, row_sources
from tokenkit.embeddings.transfer import METHODS, InitOptions, transfer_vocabulary
from tokenkit.models.causal_lm import CausalLM
from tokenkit.tokenization.tokenizer import load_tokenizer

ALONE = ("fvt", "mean", "overlap", "random_normal")
"""Methods that need nothing beside the two tokenizers."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    old = load_tokenizer(str(byte_level_bpe(folder / "old", 300)))
    return old, load_tokenizer(str(sentencepiece_bpe(folder / "new", 400)))


def matrices(old, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(old.vocab_size, width, generator=generator) for _ in range(2))
    return Matrices(first, second, torch.randn(old.vocab_size, generator=generator))


def make(name, pair, old_matrices, size=None, **options):
    old, new = pair
    return METHODS[name](old, new, old_matrices, size or new.vocab_size, InitOptions(**options))


def is_text(new):
    return torch.tensor(is_written(new))


def test_weighted_sums_worked_out_by_hand():
    sources = from_lists([[0, 2], [1], []], np.array([1, 1, 3], np.uint8), LABELS, [[2, -1], [0.5], []])
    old_WD = torch.tensor([[1.0, 2.0], [4.0, 6.0], [3.0, 1.0]])
    expected = [[-1.0, 3.0], [2.0, 3.0], [8 / 3, 3.0], [8 / 3, 3.0]]
    torch.testing.assert_close(sources.rows(old_WD, 4), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_any_size_give_the_same_rows(pair, monkeypatch, dtype):
    sources = row_sources(*pair)
    old_WD = matrices(pair[0]).embedding_WD.to(dtype)
    whole = sources.rows(old_WD, 500)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 4 * 6 * 7)
    assert whole.dtype == dtype
    torch.testing.assert_close(sources.rows(old_WD, 500), whole)
    torch.testing.assert_close(mean_row(old_WD), old_WD.float().mean(0))


@pytest.mark.parametrize("name", ALONE)
def test_every_matrix_is_made_and_every_row_counted(pair, name):
    old, new = pair
    made, report = make(name, pair, matrices(old), size=448)
    assert made.embedding_WD.shape == made.output_WD.shape == (448, 6)
    assert made.bias_W.shape == (448,)
    assert sum(report.values()) == new.vocab_size
    torch.testing.assert_close(made.embedding_WD[-1], matrices(old).embedding_WD.mean(0))
    tied, _ = make(name, pair, replace(matrices(old), output_WD=None, bias_W=None))
    assert tied.output_WD is tied.bias_W is None


@pytest.mark.parametrize("name", ["fvt", "overlap", "random_normal"])
def test_same_bytes_are_copied(pair, name):
    old, new = pair
    made, _ = make(name, pair, matrices(old))
    for new_id, raw in enumerate(new.token_bytes):
        if is_text(new)[new_id] and raw in old.token_bytes:
            torch.testing.assert_close(
                made.output_WD[new_id], matrices(old).output_WD[old.token_bytes.index(raw)]
            )


def test_mean_and_overlap_differ_in_the_same_bytes_alone(pair):
    old, new = pair
    by_mean, by_overlap = (make(name, pair, matrices(old))[0].embedding_WD for name in ("mean", "overlap"))
    differs = (by_mean != by_overlap).any(1)
    shared = torch.tensor([raw in old.token_bytes for raw in new.token_bytes]) & is_text(new)
    assert torch.equal(differs, shared)
    mean_D = matrices(old).embedding_WD.mean(0)
    torch.testing.assert_close(by_mean[is_text(new)], mean_D.expand(int(is_text(new).sum()), -1))


def test_random_rows_have_the_moments_of_the_old_ones_and_follow_the_seed(pair):
    scale = torch.tensor([0.1, 1.0, 5.0, 2.0, 3.0, 0.5])
    given = replace(matrices(pair[0]), embedding_WD=matrices(pair[0]).embedding_WD * scale + 3)
    made = [make("random_normal", pair, given, seed=seed)[0].embedding_WD for seed in (0, 0, *range(1, 30))]
    assert torch.equal(made[0], made[1])
    is_drawn = (made[0] != made[2]).any(1)
    assert make("random_normal", pair, given)[1]["random"] == int(is_drawn.sum())
    drawn = torch.cat([rows[is_drawn] for rows in made[1:]])
    torch.testing.assert_close(drawn.std(0), given.embedding_WD.std(0), rtol=0.1, atol=0)
    torch.testing.assert_close(drawn.mean(0), given.embedding_WD.mean(0), rtol=0, atol=0.3)


def test_what_is_not_to_be_copied_is_made_otherwise(pair):
    old, new = pair
    mean_D = matrices(old).embedding_WD.mean(0)
    made, report = make("fvt", pair, matrices(old), matching=Matching(bos_eos=False))
    assert report["special"] == 0
    torch.testing.assert_close(made.embedding_WD[new.bos_id], mean_D)
    kept, _ = make("fvt", pair, matrices(old), matching=Matching(special=False))
    torch.testing.assert_close(kept.embedding_WD[new.bos_id], matrices(old).embedding_WD[old.bos_id])
    _, report = make("fvt", pair, matrices(old), matching=Matching(same_bytes=False))
    assert report["same_bytes"] == 0
    assert report["mean_of_pieces"] > 350


def test_the_method_reaches_the_model(pair):
    old, new = pair
    model = CausalLM(tiny_model(tie_word_embeddings=True), old.vocab_size)
    before = model.embedding.weight.detach().clone()
    assert transfer_vocabulary(model, old, new, method="mean")["mean_of_all"] > 390
    assert model.is_tied
    torch.testing.assert_close(model.embedding.weight[new.vocab_size - 1].detach(), before.mean(0))


@pytest.mark.parametrize("name", ALONE)
def test_vocabularies_without_a_shared_byte_are_refused(pair, name):
    with pytest.raises(ValueError, match="they share no byte"):
        METHODS[name](letters("αβ"), letters("xyz"), matrices(pair[0]), 400, InitOptions())


def letters(text):
    """What a method reads first of a tokenizer that has no bytes to fall back on."""
    raw = [b"<s>", *(letter.encode() for letter in text)]
    special = np.arange(len(raw)) == 0
    lengths = np.array([len(token) for token in raw])
    return SimpleNamespace(token_bytes=raw, is_special_V=special, byte_length_V=lengths)
