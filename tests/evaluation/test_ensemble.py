"""Ensembles: values worked out by hand, full logits, and generation against a loop without caches.

Faults tried, each caught here: weights that are not those of their members; a member's padding rows counted;
a softcap left out; a mapping the other way round; a cache that stays where its beam went; padding on the left
without its mask.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import byte_level_bpe, tiny_model
from tokenkit.evaluation.ensemble import Ensemble, Member
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.check import HeadForm
from tokenkit.structs import Head, HiddenStates
from tokenkit.tokenization.tokenizer import load_tokenizer

FIRST, SECOND = (0.5, 0.25, 0.25), (0.1, 0.8, 0.1)
BY_HAND = {
    "mean_prob": (0.3, 0.525, 0.175),
    "mean_logits": (0.269752, 0.539504, 0.190744),  # √0.05, √0.2, √0.025 over their sum
    "max": (0.5 / 1.55, 0.8 / 1.55, 0.25 / 1.55),
}


def of_three(probabilities):
    """A model of three tokens that says the same whatever it reads."""

    def causal(ids_BT):
        weight_VD = torch.tensor([[math.log(p)] for p in probabilities])
        return HiddenStates(torch.ones(*ids_BT.shape, 1), Head(weight_VD + 3, vocab_size=3))

    tokenizer = SimpleNamespace(vocab_size=3)
    return SimpleNamespace(causal=causal, tokenizer=tokenizer, positions=None, device=torch.device("cpu"))


@pytest.mark.parametrize("combination", BY_HAND)
def test_a_pair_worked_out_by_hand(combination):
    ensemble = Ensemble([Member(of_three(FIRST)), Member(of_three(SECOND))], combination)
    at = torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1])
    found = ensemble.likelihoods(torch.zeros(1, 2, dtype=torch.int64), at, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found.logp_N.exp(), torch.tensor(BY_HAND[combination]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.members_KN.exp(), torch.tensor([FIRST, SECOND]))
    assert found.is_top1_N.tolist() == [False, True, False]


def test_weights_and_a_mapping_by_hand():
    at, ids = (torch.zeros(3, dtype=torch.int64),) * 2, torch.zeros(1, 1, dtype=torch.int64)
    swapped = Member(of_three(SECOND), torch.tensor([1, 1, 0]))  # ids 0 and 1 are both its id 1
    pair = Ensemble([Member(of_three(FIRST)), swapped], weights=[0.75, 0.25])
    found = pair.likelihoods(ids, at, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found.members_KN[1].exp(), torch.tensor([8, 8, 1]) / 17)
    torch.testing.assert_close(found.logp_N.exp(), torch.tensor([0.492647, 0.305147, 0.202206]))
    again = pair.likelihoods(ids, at, torch.tensor([0, 1, 2]), asks_top=False)
    torch.testing.assert_close(again.logp_N, found.logp_N)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    tokenizer = load_tokenizer(str(byte_level_bpe(tmp_path_factory.mktemp("bpe"), 300)))

    def member(architecture, seed, **changes):
        causal = CausalLM(tiny_model(architecture, seed=seed, **changes), tokenizer.vocab_size)
        if architecture == "gemma2":
            causal.form = HeadForm(softcap=5.0)
        return SimpleNamespace(
            causal=causal,
            model=causal.causal_lm,
            tokenizer=tokenizer,
            hf_tokenizer=tokenizer.to_huggingface(),
            positions=128 - seed,
            device=torch.device("cpu"),
        )

    return [
        Member(member("llama", 0)),
        Member(member("gemma2", 1, vocab_size=320)),
        Member(member("gpt2", 2)),
    ]


def next_by_full_logits(members, weights, combination, ids_BT):
    """log p of every next token by the models' own logits, [B, T, V]."""
    logits = [member.opened.model(input_ids=ids_BT).logits[..., :300] for member in members]
    logp = torch.stack([z.log_softmax(-1) for z in logits])
    weight = torch.tensor(weights).view(-1, 1, 1, 1)
    if combination == "mean_prob":
        return (logp + weight.log()).logsumexp(0)
    return (logp.amax(0) if combination == "max" else (logp * weight).sum(0)).log_softmax(-1)


@pytest.mark.parametrize("combination", BY_HAND)
@pytest.mark.parametrize("workspace_bytes", [10**8, 20_000])
@torch.no_grad()
def test_it_is_what_full_logits_give(members, combination, workspace_bytes):
    weights = [0.5, 0.3, 0.2]
    ids_BT = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0, 0, 1, 2, 2, 2, 2]), torch.tensor([1, 7, 2, 0, 1, 3, 7])
    target_N = ids_BT[at[0], at[1] + 1]
    ensemble = Ensemble(members, combination, weights, workspace_bytes)
    wanted_NV = next_by_full_logits(members, weights, combination, ids_BT)[at]
    target_N[0] = wanted_NV[0].argmax()
    found = ensemble.likelihoods(ids_BT, at, target_N)
    torch.testing.assert_close(
        found.logp_N, wanted_NV.gather(-1, target_N[:, None])[:, 0], rtol=1e-4, atol=1e-4
    )
    assert found.is_top1_N.tolist() == (wanted_NV.argmax(-1) == target_N).tolist()
    fast = ensemble.likelihoods(ids_BT, at, target_N, asks_top=False)
    torch.testing.assert_close(fast.logp_N, found.logp_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.members_KN, found.members_KN, rtol=1e-4, atol=1e-4)
    assert ensemble.positions == 126
    assert len(ensemble.score(ids_BT, (at[0][:0], at[1][:0]), target_N[:0])[0]) == 0


def never(ids):
    return False


@pytest.mark.parametrize("combination", BY_HAND)
@torch.no_grad()
def test_it_writes_what_a_loop_without_caches_writes(members, combination):
    weights = [0.3, 0.3, 0.4]
    prompts, options = (
        [[5, 40, 60, 7], [80, 81]],
        {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None},
    )
    written = Ensemble(members, combination, weights).generate(prompts, never, options)
    for prompt, got in zip(prompts, written, strict=True):
        ids = list(prompt)
        for _ in range(8):
            logp_BTV = next_by_full_logits(members, weights, combination, torch.tensor([ids]))
            ids.append(int(logp_BTV[0, -1].argmax()))
        assert got == ids[len(prompt) :]


def test_beams_change_places_in_every_cache(members):
    """A model and itself are itself, with beams that cross."""
    (one, _, _) = members
    prompts = [[5, 40, 60, 7], [80, 81]]
    options = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False, "eos_token_id": None}
    alone = Ensemble([one]).generate(prompts, never, options)
    moved = []

    class Crossing(Member):
        def reads(self, ids):
            moved.append(ids.shape)
            return ids

    assert Ensemble([one, Crossing(one.opened)]).generate(prompts, never, options) == alone
    assert len(moved) == 12
