"""Methods are compared on one model: each begins with the old vocabulary, and so does whoever comes after.

Faults tried, each caught here: the new number of tokens kept; the rows of the last method kept; a head left
tied, or untied; the bias of the last method kept.
"""

import pytest
import torch

from tests.tiny import TEXT, byte_level_bpe, sentencepiece_bpe, tiny_model
from tokenkit.embeddings.transfer import transfer_vocabulary
from tokenkit.evaluation.compare_methods import compare_methods
from tokenkit.models.causal_lm import CausalLM
from tokenkit.tokenization.chat.encode import Document
from tokenkit.tokenization.tokenizer import load_tokenizer

ROWS = 320  # 20 of padding


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    old, new = byte_level_bpe(folder / "old", 300), sentencepiece_bpe(folder / "new", 400)
    return load_tokenizer(str(old)), load_tokenizer(str(new))


def state(model):
    """Everything of a vocabulary that a transfer may change."""
    matrices = [model.embedding.weight, model.output.weight, model.output.bias]
    facts = {
        "vocab_size": model.vocab_size,
        "config": (model.config.vocab_size, model.config.tie_word_embeddings),
        "sizes": (model.embedding.num_embeddings, model.output.out_features),
        "is_tied": model.is_tied,
    }
    return facts, [None if matrix is None else matrix.detach().clone() for matrix in matrices]


def check_same(first, second):
    assert first[0] == second[0]
    for one, other in zip(first[1], second[1], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("mode", ["preserve", "tie", "untie"])
@pytest.mark.parametrize("kind", ["tied", "untied", "with a bias"])
def test_each_method_begins_with_the_old_vocabulary(tokenizers, kind, mode):
    causal_lm = tiny_model(vocab_size=ROWS, tie_word_embeddings=kind == "tied")
    if kind == "with a bias":
        causal_lm.lm_head.bias = torch.nn.Parameter(torch.randn(ROWS))
    model = CausalLM(causal_lm, tokenizers[0].vocab_size)
    before = state(model)
    seen = []

    def transfer(method):
        seen.append(state(model))
        return transfer_vocabulary(model, *tokenizers, method=method, output_embeddings=mode)

    names = ["fvt", "mean", "overlap"]
    documents = [Document(text=text) for text in TEXT[:3]]
    together = compare_methods(model, tokenizers, documents, 64, dict.fromkeys(names, transfer))
    assert len(seen) == 3
    for found in [*seen, state(model)]:
        check_same(found, before)
    alone = compare_methods(model, tokenizers, documents, 64, {"overlap": transfer})
    assert alone["original"] == together["original"]
    scores = [result["methods"]["overlap"]["bits_per_byte"] for result in (alone, together)]
    assert scores[0] == scores[1]
