"""What lm-eval is answered is what its own class for Hugging Face models answers.

Faults tried one by one, each caught here: targets one position late; a row shared with a text that it begins
but for the last token; the prefix of a rolling text left out, EOS in the place of BOS in front of a text
without a context, a BOS written twice; pieces of a long continuation that overlap by a token; a stop string
left in; padding without its mask; the batches of another process lost.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.tiny import byte_level_bpe, tiny_model
from tokenkit.evaluation.lm_eval import Asking, language_model
from tokenkit.evaluation.scorer import ModelScorer
from tokenkit.models.causal_lm import CausalLM
from tokenkit.parallel import World

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
QUESTION = "Once upon a time there was"
ASKED = [
    (QUESTION, " a girl"),
    (QUESTION, " a"),  # the beginning of the last
    (QUESTION, " the"),  # reads the same as that
    (QUESTION + " a girl who", " liked the dog"),
    (QUESTION + " x", " dog"),
    (QUESTION + " y", " dog"),  # differs in its last token alone
    ("", "The cats"),
    ("Once ", "upon"),  # the space belongs to the continuation
    ("naïve café — " * 12, "東京 and the cats"),  # cut on the left
    ("She", " ran home to her mother" * 2),  # longer than half of what is read
]
WRITING = [
    ("Once upon", {"until": ["e"], "max_gen_toks": 9, "do_sample": False}),
    ("The cats sat on the mat, and", {"until": ["e"], "max_gen_toks": 9, "do_sample": False}),
    ("She", {"until": "zzz", "max_new_tokens": 5}),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(byte_level_bpe(tmp_path_factory.mktemp("bpe"), 300))
    model = tiny_model(max_position_embeddings=64)
    causal = CausalLM(model, 300).eval()
    return SimpleNamespace(
        causal=causal, model=model, hf_tokenizer=tokenizer, positions=64, device=torch.device("cpu")
    )


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, index, metadata=("", 0, 1)) for index, given in enumerate(arguments)]


def ours(opened, world=ALONE, **asking):
    return language_model(ModelScorer(opened), opened.hf_tokenizer, Asking(**asking), world)


@pytest.fixture(scope="module")
def stock(opened):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=opened.model, tokenizer=opened.hf_tokenizer, batch_size=3)


def test_likelihoods_are_those_of_the_stock_class(opened, stock):
    asked = requests("loglikelihood", ASKED)
    found = ours(opened, batch_size=3).loglikelihood(asked)
    expected = stock.loglikelihood(asked, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    torch.testing.assert_close(*(torch.tensor([logp for logp, _ in x]) for x in (found, expected)))
    texts = requests("loglikelihood_rolling", [("Once upon a time",), (QUESTION * 9,), ("a",)])
    found = ours(opened, batch_size=3).loglikelihood_rolling(texts)
    expected = stock.loglikelihood_rolling(texts, disable_tqdm=True)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_a_continuation_is_greedy_where_greedy_decoding_writes_it(opened):
    lm = ours(opened)
    prompt = lm.tok_encode(QUESTION)
    written = opened.model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0].tolist()
    other = [*written[:-1], (written[-1] + 1) % 300]
    pairs = [(None, prompt, ids[len(prompt) :]) for ids in (written, other)]
    assert [is_greedy for _, is_greedy in lm._loglikelihood_tokens(pairs)] == [True, False]


def test_what_is_longer_than_the_model_reads_is_scored_in_pieces(opened):
    lm = ours(opened, max_length=16)
    context, continuation = [5, 6, 7], list(range(20, 61))
    [(found, _)] = lm._loglikelihood_tokens([(None, context, continuation)])
    whole, expected = context + continuation, 0.0
    for place in range(3, 44):  # pieces of 8 tokens, each behind as many as fit
        end = min(3 + 8 * ((place - 3) // 8 + 1), 44)
        ids = whole[max(0, end - 17) : place]
        logits_V = opened.model(torch.tensor([ids])).logits[0, -1]
        expected += logits_V.log_softmax(0)[whole[place]].item()
    assert found == pytest.approx(expected, abs=1e-3)


def test_texts_are_those_of_the_stock_class(opened, stock):
    asked = requests("generate_until", WRITING)
    found = ours(opened, batch_size=2).generate_until(asked)
    assert found == stock.generate_until(asked, disable_tqdm=True)
    assert any(found)


def test_lengths_in_tokens_are_longer_where_tokens_are_bytes(opened):
    lm = ours(opened, max_length=10, bytes_per_token=4)
    assert lm.max_length == 40
    assert lm._writing({"max_gen_toks": 3}).options["max_new_tokens"] == 12
    assert lm._writing({"max_gen_toks": 100}).options["max_new_tokens"] == 20, "half of what is read"
    assert ours(opened, max_length=1000).max_length == 64, "never more than the model reads"


def test_bos_is_written_once(opened):
    bos = opened.hf_tokenizer.bos_token_id
    without, own = (ours(opened, add_bos=wanted).tok_encode("cats") for wanted in (False, None))
    assert ours(opened, add_bos=True).tok_encode("cats") == [bos, *without]
    assert ours(opened, add_bos=True).tok_encode("<s>cats") == [bos, *without]
    assert own in (without, [bos, *without])


def test_processes_share_the_batches(opened):
    asked = requests("loglikelihood", ASKED)
    parts = {}

    class Half(World):
        """One of two processes, which hears later what the other found."""

        def gather(self, value):
            parts[self.rank] = value
            return [parts.get(rank, []) for rank in range(2)]

    for rank in (0, 1):
        found = ours(opened, Half(rank, 2, torch.device("cpu"), None), batch_size=1).loglikelihood(asked)
    assert parts[0]
    assert parts[1]
    assert [logp for logp, _ in found] == pytest.approx(
        [logp for logp, _ in ours(opened, batch_size=1).loglikelihood(asked)]
    )
