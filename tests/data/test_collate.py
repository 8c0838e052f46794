import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.tiny import byte_level_bpe
from tokenkit.data.collate import AlignedCollator
from tokenkit.tokenization.chat.documents import Document
from tokenkit.tokenization.tokenizer import load_tokenizer

CHAT = {
    "messages": [
        {"role": "user", "content": "the cat sat"},
        {"role": "assistant", "content": "on the mat"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "the dog"},
    ]
}


def spelled(tokenizer, side, row, keep):
    """The bytes of a row's tokens where `keep` holds."""
    return b"".join(tokenizer.token_bytes[i] for i in side.ids_BT[row][keep].tolist())


def chunk_bytes(tokenizer, side, chunk_BT, row):
    """Chunk id to what its tokens spell."""
    result = {}
    for token_id, chunk in zip(side.ids_BT[row].tolist(), chunk_BT[row].tolist(), strict=True):
        if chunk >= 0:
            result[chunk] = result.get(chunk, b"") + tokenizer.token_bytes[token_id]
    return result


def test_shapes_types_and_padding(word_tokenizer, byte_tokenizer):
    collator = AlignedCollator(
        word_tokenizer, byte_tokenizer, pad_to_multiple_of=8, chunk_kinds=("unconstrained", "space")
    )
    batch = collator([{"text": "the cat"}, {"text": "the cat sat on the mat"}])
    for side, chunks in ((batch.student, "student_BT"), (batch.teacher, "teacher_BS")):
        B, T = side.ids_BT.shape
        assert (B, T % 8) == (2, 0)
        assert (side.ids_BT.dtype, side.length_B.dtype, side.trained_BT.dtype) == (
            torch.int64,
            torch.int64,
            torch.bool,
        )
        padding = torch.arange(T) >= side.length_B[:, None]
        assert not side.trained_BT[padding].any()
        assert padding.any()
        for kind in ("unconstrained", "space"):
            chunk_BT = getattr(batch.chunks[kind], chunks)
            assert chunk_BT.shape == (B, T)
            assert chunk_BT.dtype == torch.int32
            assert (chunk_BT[padding] == -1).all()
            assert chunk_BT.max(dim=1).values.min() > 0
    for tokenizer, side in ((word_tokenizer, batch.student), (byte_tokenizer, batch.teacher)):
        assert side.eos_id == tokenizer.eos_id
        assert side.space_V.tolist() == tokenizer.space_mask().tolist()
    assert int(batch.student.ids_BT.max()) < word_tokenizer.vocab_size


def test_both_sides_spell_the_text(word_tokenizer, byte_tokenizer):
    text = "the cat sat — naïve 👍 </s> <|im_end|>"
    batch = AlignedCollator(word_tokenizer, byte_tokenizer)([{"text": text}])
    for tokenizer, side in ((word_tokenizer, batch.student), (byte_tokenizer, batch.teacher)):
        is_text = ~torch.from_numpy(tokenizer.is_special_V)[side.ids_BT[0]]
        assert spelled(tokenizer, side, 0, is_text).decode() == text


words = st.text(st.sampled_from("the cat\nsat é👍 "), min_size=1, max_size=30).filter(
    lambda text: text.strip()
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(words, min_size=1, max_size=4), st.integers(2, 20), st.integers(2, 20))
def test_chunks_of_a_batch_spell_the_same_bytes_after_truncation(word_tokenizer, byte_tokenizer, texts, T, S):
    collator = AlignedCollator(
        word_tokenizer, byte_tokenizer, max_length_student=T, max_length_teacher=S,
        chunk_kinds=("unconstrained", "space"), chat_template_mode="direct_encode_no_force_eos",
    )  # fmt: skip
    batch = collator.collate([{"text": text} for text in texts])
    assert batch.student.ids_BT.shape[1] <= T
    assert batch.teacher.ids_BT.shape[1] <= S
    for chunks in batch.chunks.values():
        for row in range(len(texts)):
            student = chunk_bytes(word_tokenizer, batch.student, chunks.student_BT, row)
            assert student == chunk_bytes(byte_tokenizer, batch.teacher, chunks.teacher_BS, row)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(words, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_the_rest_of_its_batch(word_tokenizer, byte_tokenizer, texts, random):
    collator = AlignedCollator(word_tokenizer, byte_tokenizer, chunk_kinds=("space",))
    random.shuffle(texts)
    together = collator([{"text": text} for text in texts])
    for row, text in enumerate(texts):
        alone = collator([{"text": text}])
        T = alone.student.ids_BT.shape[1]
        assert torch.equal(together.student.ids_BT[row, :T], alone.student.ids_BT[0])
        assert torch.equal(together.chunks["space"].student_BT[row, :T], alone.chunks["space"].student_BT[0])
        assert (together.chunks["space"].student_BT[row, T:] == -1).all()


def test_only_assistant_turns_are_trained_and_special_tokens_pair(word_tokenizer, byte_tokenizer):
    batch = AlignedCollator(word_tokenizer, byte_tokenizer)([CHAT])
    student = spelled(word_tokenizer, batch.student, 0, batch.student.trained_BT[0])
    teacher = spelled(byte_tokenizer, batch.teacher, 0, batch.teacher.trained_BT[0])
    assert student == b"on the mat<|im_end|>the dog<|im_end|>"
    assert teacher == b"on the mat<|eot_id|>the dog<|eot_id|>"
    chunks = batch.chunks["unconstrained"]
    end = batch.student.ids_BT[0] == word_tokenizer.eos_id
    paired = torch.isin(chunks.teacher_BS[0], chunks.student_BT[0][end]) & (chunks.teacher_BS[0] >= 0)
    ends = [byte_tokenizer.token_bytes[i] for i in batch.teacher.ids_BT[0][paired].tolist()]
    assert ends == [b"<|eot_id|>"] * 4
    assert chunks.teacher_BS[0, 0] == -1  # the BOS that only this side writes


def test_without_a_template_the_answers_alone_are_trained(word_tokenizer, byte_tokenizer):
    batch = AlignedCollator(word_tokenizer, byte_tokenizer, use_chat_template=False)([CHAT])
    teacher = spelled(byte_tokenizer, batch.teacher, 0, batch.teacher.trained_BT[0])
    end = byte_tokenizer.token_bytes[byte_tokenizer.eos_id]
    assert teacher == b"on the mat\nthe dog" + end


def test_ignored_special_tokens_are_in_no_chunk(word_tokenizer, byte_tokenizer):
    batch = AlignedCollator(word_tokenizer, byte_tokenizer, special_tokens_mode="ignore")([CHAT])
    for side, chunk_BT, tokenizer in (
        (batch.student, batch.chunks["unconstrained"].student_BT, word_tokenizer),
        (batch.teacher, batch.chunks["unconstrained"].teacher_BS, byte_tokenizer),
    ):
        special = torch.from_numpy(tokenizer.is_special_V)[side.ids_BT[0]]
        assert (chunk_BT[0][special] == -1).all()
        assert (chunk_BT[0][~special] >= 0).sum() > 5


def test_one_tokenizer_serves_both_sides(word_tokenizer):
    batch = AlignedCollator(word_tokenizer)([{"text": "the cat sat"}])
    assert torch.equal(batch.student.ids_BT, batch.teacher.ids_BT)
    chunks = batch.chunks["unconstrained"]
    assert torch.equal(chunks.student_BT, chunks.teacher_BS)
    n = int(batch.student.length_B[0])
    assert chunks.student_BT[0, :n].tolist() == list(range(n))


def test_sides_say_what_their_ids_mean(word_tokenizer, byte_tokenizer):
    one, two = (AlignedCollator(word_tokenizer, other)([{"text": "a"}]) for other in (None, byte_tokenizer))
    assert one.student.ids_mean == one.teacher.ids_mean == two.student.ids_mean == word_tokenizer.meaning
    assert two.teacher.ids_mean == byte_tokenizer.meaning != word_tokenizer.meaning


def test_rows_that_are_no_documents_are_left_out_and_counted(word_tokenizer, byte_tokenizer):
    collator = AlignedCollator(word_tokenizer, byte_tokenizer)
    rows = [{"text": "the cat"}, {"text": None}, {"no": 1}, {"text": "bad \ud800"}, Document(text="the dog")]
    batch = collator(rows)
    assert batch.student.ids_BT.shape[0] == 2
    assert collator.skipped.total() == 3
    assert all("\ud800" not in reason and "bad" not in reason for reason in collator.skipped)


def test_it_is_a_collate_fn(word_tokenizer, byte_tokenizer):
    rows = [{"text": f"the cat {i}"} for i in range(6)]
    collator = AlignedCollator(word_tokenizer, byte_tokenizer)
    batches = list(DataLoader(rows, batch_size=4, collate_fn=collator))
    assert [len(batch.student.length_B) for batch in batches] == [4, 2]


def test_reasons_never_quote_the_text(word_tokenizer, monkeypatch):
    collator = AlignedCollator(word_tokenizer)

    def fail(documents):
        raise ValueError(
            f"tokenizer x would change the text at character 3 ({documents[0].text!r} becomes '')"
        )

    monkeypatch.setattr(collator, "_encode", fail)
    collator.collate([{"text": "a secret"}, {"text": "it's another"}])
    assert collator.skipped == {"tokenizer x would change the text…": 2}


def test_a_batch_without_a_trained_token_says_why(word_tokenizer, byte_tokenizer):
    collator = AlignedCollator(word_tokenizer, byte_tokenizer, max_length_student=3)
    with pytest.raises(
        ValueError, match=r"none of the 1 rows .* behind the first 3 student tokens \(max_length_new"
    ):
        collator([CHAT])
    with pytest.raises(ValueError, match="since rows were left out: 1 no field text"):
        collator([{"no": 1}])


def test_a_micro_batch_may_ask_for_nothing(word_tokenizer, byte_tokenizer):
    batch = AlignedCollator(word_tokenizer, byte_tokenizer).collate([{"no": 1}])
    for side, chunk_BT in (
        (batch.student, batch.chunks["unconstrained"].student_BT),
        (batch.teacher, batch.chunks["unconstrained"].teacher_BS),
    ):
        assert side.ids_BT.shape == (1, 1)
        assert not side.trained_BT.any()
        assert (chunk_BT == -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length_student": 0}, "max_length_student must be at least 1, got 0"),
        ({"pad_to_multiple_of": -1}, "pad_to_multiple_of"),
        ({"chat_template_mode": "template"}, "chat_template_mode"),
        ({"loss_mask_mode": "some"}, "loss_mask_mode"),
        ({"space_mask_mode": "blank"}, "space_mask_mode"),
        ({"special_tokens_mode": "drop"}, "special_tokens_mode"),
        ({"chunk_kinds": ("word",)}, "'word'"),
    ],
)
def test_wrong_options_are_refused_when_the_collator_is_made(word_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        AlignedCollator(word_tokenizer, **options)


def test_a_tokenizer_of_another_library_is_refused():
    with pytest.raises(TypeError, match="as a tokenizer of transformers: got object"):
        AlignedCollator(object())


def test_a_document_of_one_tokenizer_is_cut_where_the_other_is(word_tokenizer, byte_tokenizer):
    """What is cut off on one side leaves the other side's tokens without a partner, and in no chunk."""
    batch = AlignedCollator(word_tokenizer, byte_tokenizer, max_length_teacher=6)(
        [{"text": "the cat sat on the mat"}]
    )
    covered = chunk_bytes(byte_tokenizer, batch.teacher, batch.chunks["unconstrained"].teacher_BS, 0)
    assert b"".join(covered.values()) == b"the c"[: len(b"".join(covered.values()))]
    student = batch.chunks["unconstrained"].student_BT[0].numpy()
    assert (student[np.argmax(student == -1) :] == -1).all()


def test_an_end_of_text_that_is_the_padding_token_too_is_no_padding(word_tokenizer, tmp_path):
    shutil.copytree(word_tokenizer.spec.name_or_path, tmp_path, dirs_exist_ok=True)
    options = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**options, "pad_token": "<|im_end|>"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_id == tokenizer.eos_id
    batch = AlignedCollator(tokenizer, tokenizer, special_tokens_mode="ignore_pad")([{"text": "the cat"}])
    assert batch.student.ids_BT[0, -1] == tokenizer.eos_id
    assert batch.chunks["unconstrained"].student_BT[0, -1] >= 0


def test_rows_of_the_wrong_kind_say_so_first(word_tokenizer, byte_tokenizer):
    collator = AlignedCollator(word_tokenizer, byte_tokenizer)
    with pytest.raises(ValueError, match="since rows were left out: 2 a row is a mapping of fields"):
        collator(["a string", "another"])


def test_a_tokenizer_may_be_an_object_or_a_path(tmp_path):
    from transformers import AutoTokenizer

    folder = byte_level_bpe(tmp_path / "a")
    held = AutoTokenizer.from_pretrained(folder)
    by_path, by_object = (AlignedCollator(given, folder)([{"text": "The cats"}]) for given in (folder, held))
    assert by_path.student.ids_BT.tolist() == by_object.student.ids_BT.tolist()
    held.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert load_tokenizer(held).vocab_size == load_tokenizer(folder).vocab_size + 1
    with pytest.raises(TypeError, match="by name or path, or as a tokenizer of transformers: got int"):
        AlignedCollator(3)
