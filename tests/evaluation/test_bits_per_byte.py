import math

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import TEXT, byte_level_bpe, sentencepiece_bpe, tiny_model
from tests.tokenization.tiny import lacking_bytes
from tokenkit.data.collate import AlignedCollator
from tokenkit.evaluation import bits_per_byte as module
from tokenkit.evaluation.bits_per_byte import bits_per_byte
from tokenkit.models.causal_lm import CausalLM
from tokenkit.parallel import World, shard
from tokenkit.tokenization.chat.documents import Message
from tokenkit.tokenization.chat.encode import Document
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer
from tokenkit.training.distillation import Distillation

SINGLE = World(0, 1, torch.device("cpu"), None)


def heldout_batches(documents, student, teacher, batch_size=3, **options):
    lengths = {"max_length_student": 64, "max_length_teacher": 64} | options
    return module.heldout_batches(documents, AlignedCollator(student, teacher, **lengths), batch_size)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return (
        load_tokenizer(str(byte_level_bpe(folder / "a", 300))),
        load_tokenizer(str(sentencepiece_bpe(folder / "b", 400))),
    )


def model_for(student, teacher) -> Distillation:
    sides = [
        CausalLM(tiny_model(vocab_size=t.vocab_size, seed=s), t.vocab_size)
        for s, t in ((0, student), (1, teacher))
    ]
    return Distillation(*sides, {})


def documents(texts):
    return [Document(text=text) for text in texts]


def test_one_document_by_hand(pair):
    student, teacher = pair
    model = model_for(student, teacher)
    text = "The cats sat on the mat."
    batches = heldout_batches(documents([text]), student, teacher)
    got = bits_per_byte(model, batches, SINGLE)
    ids = torch.tensor([[student.bos_id, *student.encode(text).ids.tolist(), student.eos_id]])
    logits = model.student.causal_lm(input_ids=ids).logits.log_softmax(-1)
    nats = -logits[0, :-2].gather(-1, ids[0, 1:-1, None]).sum()  # not the end of the document
    assert got.num_bytes == len(text.encode())
    assert got.student == pytest.approx(nats.item() / math.log(2) / len(text.encode()), rel=1e-5)


def test_it_does_not_depend_on_how_documents_are_batched(pair):
    student, teacher = pair
    model = model_for(student, teacher)
    results = []
    for size in (1, 3, 100):
        results.append(bits_per_byte(model, heldout_batches(documents(TEXT[:5]), *pair, size), SINGLE))
    for result in results[1:]:
        assert result.num_bytes == results[0].num_bytes
        assert result.student == pytest.approx(results[0].student, rel=1e-5)
        assert result.teacher == pytest.approx(results[0].teacher, rel=1e-5)


def test_the_same_model_and_tokenizer_on_both_sides_is_worth_the_same(pair):
    model = CausalLM(tiny_model(), 300)
    batches = heldout_batches(documents(TEXT[:5]), pair[0], pair[0])
    result = bits_per_byte(Distillation(model, model.vocabulary(), {}), batches, SINGLE)
    assert result.student == pytest.approx(result.teacher, rel=1e-6)


def test_what_only_one_side_read_before_its_limit_does_not_count(pair):
    (short,) = heldout_batches(documents(TEXT[:1]), *pair, max_length_student=5)
    (whole,) = heldout_batches(documents(TEXT[:1]), *pair)
    assert 0 < short.num_bytes < whole.num_bytes == len(TEXT[0].encode())


def test_text_that_nobody_scores_is_an_error(pair):
    with pytest.raises(ValueError, match="none of the 1 held-out documents"):
        heldout_batches(documents(TEXT[:1]), *pair, max_length_student=1, max_length_teacher=1)


def test_documents_that_no_tokenizer_can_write_are_an_error_with_the_reason(pair):
    chat = [Document(messages=(Message("user", "hello"), Message("assistant", "hi")))]
    with pytest.raises(
        ValueError, match=r"none of the 1 held-out documents can be tokenized: .*chat template"
    ):
        heldout_batches(chat, *pair)


def test_of_an_enormous_document_only_the_beginning_is_read(pair, monkeypatch):
    read = []
    encode = Tokenizer.cut_texts

    def counted(self, texts, before):
        read.append(sum(map(len, texts)))
        return encode(self, texts, before)

    text = " ".join(TEXT[:5]) + " "
    long, whole = (heldout_batches(documents([text * times]), *pair)[0] for times in (400, 40))
    assert torch.equal(long.batch.student.ids_BT, whole.batch.student.ids_BT)
    assert long.num_bytes == whole.num_bytes
    monkeypatch.setattr(Tokenizer, "cut_texts", counted)
    heldout_batches(documents([text * 400]), *pair)
    assert sum(read) < len(text * 400) / 4


@pytest.mark.parametrize("unencodable", ["skip", "drop"])
def test_documents_with_lacking_characters_are_said_or_mended(tmp_path, pair, caplog, unencodable):
    lacking = load_tokenizer(str(lacking_bytes(tmp_path)))
    with caplog.at_level("WARNING"):
        (batch,) = heldout_batches(
            documents(["the cat", "a 🙂 smile"]), lacking, pair[0], unencodable=unencodable
        )
    rows = len(batch.batch.student.length_B)
    assert rows == (1 if unencodable == "skip" else 2)
    said = "of 2 held-out documents some are not measured: 1 " in caplog.text
    assert said == (unencodable == "skip")


def test_bytes_that_no_token_predicts_do_not_count(pair):
    mode = "direct_encode_no_force_bos"
    (batch,) = heldout_batches(documents(TEXT[:1]), pair[0], pair[0], chat_template_mode=mode)
    first = pair[0].encode(TEXT[0]).byte_ends[0]
    assert batch.num_bytes == len(TEXT[0].encode()) - first


def measure(world, tokenizers):
    model = shard(model_for(*tokenizers), [], world, param_dtype=None)
    batches = heldout_batches(documents(TEXT[:5]), *tokenizers)[:1] * 3
    result = bits_per_byte(model, batches, world)
    return [result.student, result.teacher, result.num_bytes]


def test_ranks_that_run_a_batch_too_many_do_not_count_it(pair):
    expected = measure(SINGLE, pair)
    for result in run_ranks(measure, 2, pair):
        assert result == pytest.approx(expected, rel=1e-6)
