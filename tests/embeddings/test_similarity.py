import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import TEXT, byte_level_bpe, is_written, sentencepiece_bpe
from tokenkit.embeddings.auxiliary import MIN_COUNT, Auxiliary, vectors_of_model, vectors_of_text
from tokenkit.embeddings.rows import Matching, Matrices
from tokenkit.embeddings.similarity import focus_weights, omp_weights, sparsemax
from tokenkit.embeddings.transfer import METHODS, InitOptions
from tokenkit.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    old = load_tokenizer(str(byte_level_bpe(folder / "old", 300)))
    return old, load_tokenizer(str(sentencepiece_bpe(folder / "new", 400)))


@pytest.fixture(scope="module")
def auxiliary(pair):
    return vectors_of_text(pair[1], TEXT * 2, size=16)


def test_sparsemax_worked_out_by_hand():
    index, weight = sparsemax(torch.tensor([[0.1, 0.9, 0.6, -3.0], [5.0, 1.0, 0.0, 0.0]]), 4)
    assert index[0, :2].tolist() == [1, 2]
    torch.testing.assert_close(weight[0], torch.tensor([0.65, 0.35, 0.0, 0.0]))  # threshold (0.9+0.6-1)/2
    assert weight[1].tolist() == [1, 0, 0, 0]


@given(st.integers(0, 10_000), st.integers(2, 40))
@settings(max_examples=30, deadline=None)
def test_sparsemax_is_the_nearest_point_of_the_simplex(seed, size):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(1, size, generator=generator).double()
    index, weight = sparsemax(score, size)
    point = torch.zeros(1, size).double().scatter(1, index, weight)
    assert point.sum().item() == pytest.approx(1)
    gap = score - point  # at the nearest point no direction inside the simplex goes on (KKT)
    assert gap[point > 0].max() - gap[point > 0].min() < 1e-9
    assert gap.max() <= gap[point > 0].max() + 1e-9


def test_a_support_beyond_the_first_anchors_is_found(monkeypatch):
    monkeypatch.setattr("tokenkit.embeddings.similarity.SUPPORT", 2)
    vector, anchors = torch.randn(3, 8), torch.randn(12, 8)
    index, weight = focus_weights(vector, anchors)
    monkeypatch.setattr("tokenkit.embeddings.similarity.SUPPORT", 12)
    torch.testing.assert_close((index, weight), focus_weights(vector, anchors))
    assert (weight > 0).sum(1).max() > 2


def omp_of_one(target, anchors, atoms):
    """The definition: one vector, a loop, numpy's least squares."""
    chosen, left = [], target
    for _ in range(atoms):
        match = np.abs(anchors @ left) / np.linalg.norm(anchors, axis=1)
        match[chosen] = -1
        chosen.append(int(match.argmax()))
        weights = np.linalg.lstsq(anchors[chosen].T, target, rcond=None)[0]
        left = target - weights @ anchors[chosen]
    return chosen, weights


def test_pursuit_of_many_vectors_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    vectors, anchors = torch.randn(20, 9, generator=generator), 3 * torch.randn(30, 9, generator=generator)
    index, weight = omp_weights(vectors, anchors, 4)
    for row, vector in enumerate(vectors):
        chosen, weights = omp_of_one(vector.double().numpy(), anchors.double().numpy(), 4)
        assert index[row].tolist() == chosen
        np.testing.assert_allclose(weight[row], weights, rtol=1e-4, atol=1e-6)


def test_pursuit_finds_a_sum_of_two_anchors_again():
    anchors = torch.eye(6) * torch.arange(1.0, 7)[:, None]
    index, weight = omp_weights(2 * anchors[1:2] - 0.5 * anchors[4:5], anchors, 2)
    assert dict(zip(index[0].tolist(), weight[0].tolist(), strict=True)) == pytest.approx({1: 2.0, 4: -0.5})
    index, _ = omp_weights(anchors[:1], anchors, 50)
    assert index.shape == (1, 6), "no more atoms than anchors"


def test_tokens_with_the_same_neighbours_are_near(tmp_path):
    new = load_tokenizer("byte")
    words = "pxq rys pyq rxs zaz zbz zaz zbz "
    vectors = vectors_of_text(new, [words * 20], size=8)
    unit = torch.nn.functional.normalize(vectors.vector_VA, dim=1)
    x, y, p, a = (unit[ord(letter)] for letter in "xypa")
    assert x @ y > x @ p
    assert x @ y > x @ a
    assert not vectors.is_known_V[ord("!")]
    assert torch.equal(vectors.vector_VA, vectors_of_text(new, [words * 20], size=8).vector_VA)


@pytest.mark.parametrize("name", ["focus", "omp"])
def test_rows_are_weighted_sums_of_shared_tokens(pair, auxiliary, name):
    old, new = pair
    old_WD = torch.randn(old.vocab_size, 6)
    made, report = METHODS[name](
        old, new, Matrices(old_WD, old_WD * 2, None), 448, InitOptions(auxiliary=auxiliary, num_atoms=3)
    )
    assert report["weighted_anchors"] > 20
    assert report["mean_of_pieces"] > 0
    assert sum(report.values()) == new.vocab_size
    torch.testing.assert_close(made.output_WD, made.embedding_WD * 2)
    is_shared = np.array([raw in old.token_bytes for raw in new.token_bytes])
    shared = np.flatnonzero(is_shared & is_written(new)).tolist()
    copied = torch.stack([old_WD[old.token_bytes.index(new.token_bytes[i])] for i in shared])
    torch.testing.assert_close(made.embedding_WD[shared], copied)
    if name == "focus":
        assert made.embedding_WD.max() <= old_WD.max() + 1e-4, "convex sums"


def test_the_space_decides(pair):
    """Anchors that point where a new token does make its row, whatever the text says."""
    old, new = pair
    ordinary = np.flatnonzero(is_written(new)).tolist()
    anchor = next(i for i in ordinary if new.token_bytes[i] == b"c")
    target = next(i for i in ordinary if new.token_bytes[i] not in old.token_bytes)
    vectors = torch.randn(new.vocab_size, 32)
    vectors[target] = 3 * vectors[anchor]
    space = Auxiliary(vectors, np.ones(new.vocab_size, bool))
    old_WD = torch.randn(old.vocab_size, 6)
    row = old_WD[old.token_bytes.index(b"c")]
    options = InitOptions(auxiliary=space, num_atoms=1)
    made, _ = METHODS["omp"](old, new, Matrices(old_WD, None, None), new.vocab_size, options)
    torch.testing.assert_close(made.embedding_WD[target], 3 * row, rtol=0, atol=1e-4)


def test_a_vector_of_zeros_makes_no_row_of_zeros(pair):
    """As a row of the head it would draw more probability than an average token."""
    old, new = pair
    new_V = np.array([raw not in old.token_bytes for raw in new.token_bytes]) & ~new.is_special_V
    vectors = torch.randn(new.vocab_size, 32)
    vectors[torch.from_numpy(new_V)] = 0
    given = Matrices(torch.randn(old.vocab_size, 6), None, None)
    options = InitOptions(auxiliary=Auxiliary(vectors, np.ones(new.vocab_size, bool)))
    made, report = METHODS["omp"](old, new, given, new.vocab_size, options)
    by_fvt, _ = METHODS["fvt"](old, new, given, new.vocab_size, options)
    assert report["weighted_anchors"] == 0
    torch.testing.assert_close(made.embedding_WD, by_fvt.embedding_WD)


@pytest.mark.parametrize("name", ["focus", "omp"])
def test_what_cannot_work_is_said(pair, auxiliary, name):
    given = Matrices(torch.randn(pair[0].vocab_size, 4), None, None)
    with pytest.raises(ValueError, match="give a text with --data"):
        METHODS[name](*pair, given, 400, InitOptions())
    nothing = InitOptions(auxiliary=auxiliary, matching=Matching(same_bytes=False))
    with pytest.raises(ValueError, match="convert_by_matching cannot be false"):
        METHODS[name](*pair, given, 400, nothing)
    with pytest.raises(ValueError, match=f"at least {MIN_COUNT} times"):
        vectors_of_text(pair[1], ["cat"])
    with pytest.raises(ValueError, match="which is not the target"):
        vectors_of_model(torch.randn(300, 4), *pair)
    with pytest.raises(ValueError, match="has 3 rows for a tokenizer"):
        vectors_of_model(torch.randn(3, 4), pair[1], pair[1])
