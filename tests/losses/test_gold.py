"""baseline_gold is TRL's: each option, values and gradients, against its code and frozen values of it."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer

from tests.conftest import tokenizer_folder
from tests.losses import published
from tests.losses.published import CASES, FROZEN, inputs, name_of, pair_ids, summary
from tokenkit.data.collate import AlignedCollator
from tokenkit.losses import gold, gold_loss
from tokenkit.losses.answers import answer_tokens, extended_groups, without_last
from tokenkit.pairing.matching import matching_tokens, published_pairs
from tokenkit.structs import Batch, Chunks, Context
from tokenkit.tokenization.tokenizer import load_tokenizer

VALUES = json.loads(FROZEN.read_text(encoding="utf-8"))["values"]


def ours(batch, student, teacher, case):
    """Return our loss, its pairs given in any order."""
    ids = [index.flip(0) for index in pair_ids()] if case.get("uld_use_hybrid_loss") else []
    term = gold_loss(student, teacher, batch, *ids, **case)
    return (term.total / term.count).mean()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_frozen_values_of_trl(case):
    _, batch, student, teacher = inputs()
    got, truth = (
        torch.tensor(summary(ours(batch, student, teacher, case), student)),
        torch.tensor(VALUES[name_of(case)]),
    )
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)
    assert teacher.hidden_BTD.grad is None


@pytest.mark.parametrize("seed", range(1, 4))
def test_values_and_gradients_equal_trls(seed):
    # some seconds: TRL is imported
    pytest.importorskip("trl.experimental.gold")
    for case in CASES:
        results = []
        for by_trl in (True, False):
            given, batch, student, teacher = inputs(seed)
            if by_trl:
                loss = published.published(given, batch, student, teacher, case).sum()
            else:
                loss = ours(batch, student, teacher, case)
            loss.backward()
            results.append((loss.detach(), student.hidden_BTD.grad, student.head.weight_VD.grad))
        for name, truth, value in zip(("loss", "hidden", "weight"), *results, strict=True):
            error = float((value - truth).abs().max() / truth.abs().max())
            assert error < 1e-9, (case, name, error)


def test_the_columns_of_pairs_are_found_once_for_each_pair_of_vocabularies(monkeypatch):
    _, batch, student, teacher = inputs()
    options = gold.GoldOptions(uld_use_hybrid_loss=True)
    loss = gold.Gold(options, *pair_ids())
    found, find = [], gold.split_columns
    monkeypatch.setattr(gold, "split_columns", lambda *args: found.append(args) or find(*args))
    for weight_VD in (student.head.weight_VD, student.head.weight_VD.clone()):  # as FSDP2 gathers it anew
        head = dataclasses.replace(student.head, weight_VD=weight_VD)
        loss.prepare(teacher, batch, Context(teacher.head, head))
    assert len(found) == 1
    longer = torch.cat([student.head.weight_VD, student.head.weight_VD[:1]])
    context = Context(teacher.head, dataclasses.replace(student.head, weight_VD=longer, vocab_size=None))
    fresh = gold.Gold(options, *pair_ids()).prepare(teacher, batch, context)
    assert torch.equal(loss.prepare(teacher, batch, context).pairs.student_rest, fresh.pairs.student_rest)
    assert len(found) == 3


PROMPT = "Wer bist du?\n"
ANSWERS = [
    "I'm a naïve 🦊, 12345 years old…\n\n    def f(x):\treturn 日本語",
    "the quick brown fox jumps over it all",
]


@pytest.mark.parametrize("names", [("gpt2", "qwen2.5"), ("smollm2", "llama3")], ids="-".join)
@pytest.mark.parametrize("strategy", ["observed", "bayesian"])
def test_groups_of_real_tokenizers_are_those_of_trl(names, strategy):
    """The collator's chunks against TRL's offsets of bytes and its walk along them, token by token."""
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    utils = pytest.importorskip("trl.experimental.utils")
    folders = [tokenizer_folder(name) for name in names]
    collate = AlignedCollator(*map(load_tokenizer, map(str, folders)))
    batch = collate([{"prompt": PROMPT, "completion": answer} for answer in ANSWERS])
    ends = [without_last(mask) for mask in answer_tokens(batch, "unconstrained")]
    # what templates write behind an answer is left out there and here
    groups = extended_groups(batch, "unconstrained", *ends, strategy)
    backends = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in folders]
    for b, answer in enumerate(ANSWERS):
        offsets = [utils.encode_with_byte_offsets(backend, [answer])[0][1] for backend in backends]
        theirs = gold.ULDLoss._align_by_byte_offsets(*offsets)
        assert len(theirs[0]) > 5
        of_document_N = groups.document_N == b
        for k, (rows, scalars, mask_BL) in enumerate(
            zip(groups.rows, (groups.student, groups.teacher), ends, strict=True)
        ):
            L = mask_BL.shape[1]
            first = int(mask_BL[b].nonzero()[0])
            assert int(mask_BL[b].sum()) == len(offsets[k])
            shift = 1 if strategy == "bayesian" else 0
            base = [group[-shift] + first - shift for group in theirs[k]]
            assert (rows[of_document_N] - b * L).tolist() == base
            found = {}
            for row, target, group in zip(*(x.tolist() for x in scalars), strict=True):
                if of_document_N[group]:
                    found.setdefault(group - int(of_document_N.nonzero()[0]), []).append(
                        row - b * L + shift - first
                    )
                    assert target == int((batch.student, batch.teacher)[k].ids_BT.flatten()[row + shift])
            expected = {
                n: [i for i in group if i + first - shift != base[n]] for n, group in enumerate(theirs[k])
            }
            assert found == {n: places for n, places in expected.items() if places}


def test_pairs_of_byte_level_vocabularies_are_those_of_equal_strings(shared_data):
    """As TRL finds them in what transformers calls the vocabulary."""
    tokenizers = [
        load_tokenizer(str(shared_data / "tokenizers" / name)) for name in ("gpt2", "qwen2.5-sub8000")
    ]
    vocabularies = [
        Tokenizer.from_file(str(shared_data / "tokenizers" / name / "tokenizer.json")).get_vocab()
        for name in ("gpt2", "qwen2.5-sub8000")
    ]
    pairs = published_pairs(*tokenizers)
    expected = {(i, vocabularies[1][word]) for word, i in vocabularies[0].items() if word in vocabularies[1]}
    assert set(zip(*(index.tolist() for index in pairs), strict=True)) == expected
    assert len(pairs.student_P) > 4000


@pytest.mark.parametrize("names", [("tinystories-spm", "gpt2"), ("spm1k", "bytelevel2k")], ids="-".join)
def test_pairs_of_other_vocabularies_are_those_of_equal_bytes(names):
    tokenizers = [load_tokenizer(str(tokenizer_folder(name))) for name in names]
    for one, other in zip(published_pairs(*tokenizers), matching_tokens(*tokenizers), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"uld_token_merge_strategy": "first"},
            "unknown uld_token_merge_strategy 'first': expected one of obs",
        ),
        ({"uld_hybrid_matched_weight": 0.5}, "belong together: give both or neither"),
        ({"uld_distillation_weight": -1}, "uld_distillation_weight must be at least 0, got -1"),
        ({"uld_teacher_temperature": 0}, "uld_teacher_temperature must be positive, got 0"),
        ({"beta": 1.1}, r"beta must lie in \[0, 1\], got 1.1"),
        ({"uld_use_hybrid_loss": True}, "compares pairs of ids: give student_index and teacher_index"),
    ],
)
def test_options_out_of_range_are_named(changes, message):
    _, batch, student, teacher = inputs()
    with pytest.raises(ValueError, match=message):
        gold_loss(student, teacher, batch, **changes)


def test_a_step_in_two_parts_is_the_step():
    """Sums and counts add up over micro-batches, the cross entropy's too."""
    case = {**published.HYBRID, "uld_crossentropy_weight": 0.5, "beta": 0.3}
    _, batch, student, teacher = inputs()
    whole = gold_loss(student, teacher, batch, *pair_ids(), **case)
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        sides = [
            dataclasses.replace(
                side,
                ids_BT=side.ids_BT[rows],
                length_B=side.length_B[rows],
                trained_BT=side.trained_BT[rows],
            )
            for side in (batch.student, batch.teacher)
        ]
        chunks = batch.chunks["unconstrained"]
        own = Batch(*sides, {"unconstrained": Chunks(chunks.student_BT[rows], chunks.teacher_BS[rows])})
        states = [dataclasses.replace(x, hidden_BTD=x.hidden_BTD[rows]) for x in (student, teacher)]
        parts.append(gold_loss(*states, own, *pair_ids(), **case))
    for total, *of_parts in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(of_parts), total, rtol=1e-12, atol=0)
