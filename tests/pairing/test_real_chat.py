"""Every ordered pair of real tokenizers with a way to write conversations, on real conversations."""

import json
from itertools import pairwise, permutations

import pytest

from tokenkit.pairing.align import SideRules, align_kinds, token_spans
from tokenkit.tokenization.chat.encode import document_from_row, encode_flat
from tokenkit.tokenization.ragged import FlatTokens

SPECS = {
    "llama3": "llama3",
    "qwen2.5": "qwen2.5",
    "phi-3-mini": "phi-3-mini",
    "smollm2": "smollm2",
    "llama2": "llama2:source=Llama2",
    "mistral": "mistral-v0.1:source=Mistral",
    "gpt2 as Llama3": "gpt2:target=Llama3",
    "qwen2.5 as Gemma2": "qwen2.5:source=Qwen2:target=Gemma2",
    "tinystories10k as Qwen3": "tinystories10k:target=Qwen3",
}


@pytest.fixture(scope="module")
def tokenizers(load_real):
    return {name: load_real(spec) for name, spec in SPECS.items()}


OWN_SPECS = ["bytelevel2k", "bytelevel2k:target=Llama3", "spm1k:source=Llama2"]
OWN_CONVERSATIONS = [
    [
        ("user", "Wer bist du?"),
        ("assistant", "Ein naïver 🦊.\n\n    def f():"),
        ("user", "12345?"),
        ("assistant", "東京"),
    ],
    [("system", "Be terse."), ("user", "What is 15 + 27?"), ("assistant", "42")],
    [("user", "أين النافذة؟"), ("assistant", "It is there, isn't it?\n- one\n- two")],
]


@pytest.fixture(scope="module")
def conversations(shared_data):
    lines = (shared_data / "chat/conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return [document_from_row(json.loads(line)) for line in lines[:12]]


def text_of_chunks(tokenizer, side: FlatTokens, chunk_N):
    """Chunk id to the text that its tokens spell, template tokens left out.

    A chunk may reach into the next text. Some tokenizers put a space in front of each, which is no text.
    """
    result = {}
    begins = True  # a text of these conversations, none of which begins with a space
    for token_id, special, chunk in zip(
        side.ids_N.tolist(), side.special_N.tolist(), chunk_N.tolist(), strict=True
    ):
        text = b"" if special else tokenizer.token_bytes[token_id]
        if chunk >= 0:
            result[chunk] = result.get(chunk, b"") + (text.removeprefix(b" ") if begins else text)
        begins = special
    return result


@pytest.mark.parametrize("names", list(permutations(SPECS, 2)), ids=" / ".join)
def test_conversations_align(tokenizers, conversations, names):
    check_alignment(conversations, [tokenizers[name] for name in names])


@pytest.mark.parametrize("specs", list(permutations(OWN_SPECS, 2)), ids=" / ".join)
def test_conversations_align_under_the_tokenizers_of_the_repository(load_real, specs):
    rows = [[{"role": role, "content": text} for role, text in talk] for talk in OWN_CONVERSATIONS]
    check_alignment(
        [document_from_row({"messages": row}) for row in rows], [load_real(spec) for spec in specs]
    )


def check_alignment(conversations, pair):
    student, teacher = encode_flat(conversations, pair)
    rules = [SideRules(t.space_mask("space+tab+newline"), t.unk_id, t.pad_id) for t in pair]
    kinds = align_kinds(student, teacher, ["unconstrained", "space"], *rules)

    for alignment in kinds.values():
        spelled = [
            text_of_chunks(tokenizer, side, chunk_N)
            for tokenizer, side, chunk_N in zip(pair, (student, teacher), alignment[:2], strict=True)
        ]
        assert spelled[0] == spelled[1]
        for side, chunk_N in ((student, alignment.student_N), (teacher, alignment.teacher_M)):
            assert (chunk_N[~side.special_N] >= 0).all(), "text without a chunk"

    smallest = kinds["unconstrained"]
    for a, b in pairwise(student.offset_B):
        last_text = max(i for i in range(a, b) if not student.special_N[i])
        assert smallest.student_N[last_text] in smallest.teacher_M[~teacher.special_N]
    trained = [side.byte_ends_N[side.trained_N & ~side.special_N].max() for side in (student, teacher)]
    assert trained[0] == trained[1]


def test_turn_ends_pair_across_families(tokenizers, conversations):
    """`<|eot_id|>` and `<|im_end|>` end the same turns, so each is the other's chunk."""
    pair = tokenizers["llama3"], tokenizers["qwen2.5"]
    student, teacher = encode_flat(conversations, pair)
    none = SideRules(pair[0].space_mask("space"), None), SideRules(pair[1].space_mask("space"), None)
    alignment = align_kinds(student, teacher, ["unconstrained"], *none)["unconstrained"]
    ends = [
        chunk_N[side.ids_N == tokenizer.control[string]].tolist()
        for tokenizer, side, chunk_N, string in (
            (pair[0], student, alignment.student_N, "<|eot_id|>"),
            (pair[1], teacher, alignment.teacher_M, "<|im_end|>"),
        )
    ]
    # Qwen's template writes a system prompt of its own, which no token of Llama's says.
    assert ends[0] == [chunk for chunk in ends[1] if chunk >= 0]
    assert ends[1].count(-1) == sum(c.messages[0].role != "system" for c in conversations)
    assert len(ends[0]) == sum(len(conversation.messages) for conversation in conversations)
    bos_spans = token_spans(student)[0][student.offset_B[:-1]]
    assert (bos_spans == -1).all()
    assert (alignment.student_N[student.offset_B[:-1]] == -1).all()
