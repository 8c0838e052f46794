"""A hypernetwork inside distillation: what it writes, how it is trained, sharded, resumed and exported."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from tests.ranks import run_ranks
from tests.tiny import tiny_folder
from tests.training.test_expansion import three_steps
from tests.training.test_resume import run_in_rank
from tokenkit.embeddings.hypernet import surfaces
from tokenkit.embeddings.rows import row_sources
from tokenkit.errors import ConfigError
from tokenkit.evaluation.bits_per_byte import bits_per_byte
from tokenkit.parallel import World
from tokenkit.training.build import build
from tokenkit.training.loop import train
from tokenkit.training.requests import Evaluate
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)
NETWORK = {"hypernet__architecture": "transformer"}


def first_losses(config):
    torch.manual_seed(0)
    parts = build(config, SINGLE)
    return train_step(parts.run, next(parts.batches)).losses


@pytest.mark.parametrize("architecture", ["linear", "mlp", "transformer"])
@pytest.mark.parametrize("mode", ["full", "lora", "none"])
def test_it_begins_as_no_network_to_the_bit(make_config, mode, architecture):
    without = first_losses(make_config(train_model_mode=mode))
    assert first_losses(make_config(train_model_mode=mode, hypernet__architecture=architecture)) == without
    assert first_losses(make_config(train_model_mode=mode, hypernet__architecture="identity")) == without


def test_there_is_none_until_it_is_asked_for_and_then_it_is_a_small_transformer(make_config):
    for changes in ({}, {"hypernet__architecture": "identity"}):
        config = make_config(**changes)
        assert not config.training.has_hypernet
        assert build(config, SINGLE).student.projector is None
    options = make_config(hypernet__num_heads=4).training.hypernet
    assert (options.architecture, options.num_layers, options.residual) == ("transformer", 1, True)


@pytest.mark.parametrize(
    ("mode", "train_embeddings"), [("full", True), ("lora", False), ("none", False), ("none", True)]
)
def test_the_network_is_trained_and_the_rows_below_it_where_embeddings_are(
    make_config, mode, train_embeddings
):
    config = make_config(**NETWORK, train_model_mode=mode, train_embeddings=train_embeddings)
    parts = build(config, SINGLE)
    projector, own = parts.student.projector, parts.student.embedding.weight
    network = [p.detach().clone() for p in projector.network.parameters()]
    before, old = own.detach().clone(), [p.detach().clone() for p in projector.old]
    for _ in range(2):  # in the first the last projection is 0, and hides what lies before it
        train_step(parts.run, next(parts.batches))
    assert not any(map(torch.equal, projector.network.parameters(), network))
    assert torch.equal(own, before) is not train_embeddings
    assert all(map(torch.equal, projector.old, old))


def shaken(student):
    """Give the network of a student weights with which it writes something."""
    with torch.no_grad():
        for parameter in student.projector.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student


@pytest.mark.parametrize(("tied", "output_mode"), [(False, "preserve"), (True, "preserve"), (True, "untie")])
def test_the_model_uses_what_the_definition_says(make_config, tmp_path, tied, output_mode):
    tiny_folder(tmp_path / "model", tie_word_embeddings=tied)
    config = make_config(
        **NETWORK,
        student__pretrained_model_name_or_path=tmp_path / "model",
        output_embeddings_mode=output_mode,
        hypernet__residual_alpha=0.5,
    )
    parts = build(config, SINGLE)
    student, tokenizers = shaken(parts.student).eval(), parts.tokenizers
    own = student.matrices()
    network, teacher = student.projector.network, parts.run.model.teacher
    assert network.reads == (1 if tied else 2)
    assert len(own) == network.writes == (1 if tied and output_mode == "preserve" else 2)
    old = [teacher.embedding.weight, teacher.output.weight][: network.reads]
    found = surfaces(row_sources(tokenizers.old, tokenizers.target))
    difference = [
        written - base
        for written, base in zip(
            network(found, old),
            [sources_rows(tokenizers, old[min(i, len(old) - 1)]) for i in range(len(own))],
            strict=True,
        )
    ]
    expected = [row.detach().clone() for row in own]
    for rows_VD, change_VD in zip(expected, difference, strict=True):
        rows_VD[: len(change_VD)] += change_VD.detach()
    assert all(change.abs().max() > 0.01 for change in difference)

    ids_BT = torch.randint(3, 400, (2, 9))
    states = student(ids_BT)
    torch.testing.assert_close(states.head.weight_VD, expected[-1])
    torch.testing.assert_close(student.embed(ids_BT), expected[0][ids_BT])
    body = student.body(inputs_embeds=expected[0][ids_BT], use_cache=False)
    torch.testing.assert_close(states.hidden_BTD, body.last_hidden_state)


def sources_rows(tokenizers, old_WD):
    sources = row_sources(tokenizers.old, tokenizers.target)
    return sources.rows(old_WD, len(sources.offset_V))


def test_the_gradient_reaches_the_network_from_both_ends(make_config):
    """Through embedding and head, as if the rows were leaves: the chain rule at the rows' seam."""
    parts = build(make_config(**NETWORK, train_model_mode="none", train_embeddings=False), SINGLE)
    student = shaken(parts.student).eval()
    ids_BT, weights = torch.randint(3, 400, (2, 9)), dict(student.projector.network.named_parameters())

    def loss(states):
        return (states.hidden_BTD @ states.head.weight_VD.T).logsumexp(-1).sum()

    got = torch.autograd.grad(loss(student(ids_BT)), list(weights.values()))

    def by_hand(changed):
        rows = functional_call(student.projector, {f"network.{k}": v for k, v in changed.items()}, (own,))
        hidden = student.body(inputs_embeds=rows[0][ids_BT], use_cache=False).last_hidden_state
        return (hidden @ rows[-1].T).logsumexp(-1).sum()

    own = [matrix.detach() for matrix in student.matrices()]
    for name, gradient in zip(weights, got, strict=True):
        direction = torch.randn_like(weights[name])
        direction /= direction.norm()
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                ends.append(by_hand({**weights, name: weights[name] + step * direction}))
        slope = (ends[0] - ends[1]) / 2e-2
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_two_processes_agree_with_one(make_config, mode):
    config = make_config(**NETWORK, train_model_mode=mode, output_embeddings_mode="untie")
    expected = torch.tensor(three_steps(SINGLE, config))
    assert expected.isfinite().all()
    for result in run_ranks(three_steps, 2, config):
        torch.testing.assert_close(torch.tensor(result), expected, rtol=2e-5, atol=1e-6)


def test_it_is_trained_in_bfloat16_sharded_or_not(make_config):
    config = make_config(**NETWORK, train_model_mode="lora", dtype="bfloat16")
    alone = torch.tensor(three_steps(SINGLE, config))
    for result in run_ranks(three_steps, 2, config):
        torch.testing.assert_close(torch.tensor(result), alone, rtol=0.05, atol=0.01)


def test_a_run_is_resumed_to_the_same_bits(make_config, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make_config(**NETWORK, output_dir=whole))
    train(make_config(**NETWORK, output_dir=cut))
    (cut / "checkpoints" / "step_00000004").rename(tmp_path / "last")
    (cut / "export").rename(tmp_path / "away")
    train(make_config(**NETWORK, output_dir=cut, resume=True))
    one, two = (load_file(folder / "export" / "model.safetensors") for folder in (whole, cut))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any("projector" in name or "network" in name for name in one)


def test_two_processes_export_what_one_does(make_config, tmp_path):
    train(make_config(**NETWORK, train_model_mode="full", output_dir=tmp_path / "one"))
    config = make_config(**NETWORK, train_model_mode="full", output_dir=tmp_path / "two")
    assert set(run_ranks(run_in_rank, 2, config, None)) == {0}
    one, two = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["full", "lora", "none"])
def test_the_export_gives_the_trained_students_probabilities(make_config, tmp_path, monkeypatch, mode):
    from transformers import AutoModelForCausalLM

    from tokenkit.training import loop

    seen = []
    export = loop.hand_on
    monkeypatch.setattr(loop, "hand_on", lambda *given: (seen.append(given[2]), export(*given)))
    train(make_config(**NETWORK, train_model_mode=mode))
    student = seen[0].student.eval()
    ids_BT = torch.randint(3, 400, (2, 9))
    states = student(ids_BT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export").eval()
    with torch.no_grad():
        expected = states.hidden_BTD @ states.head.weight_VD.T
        torch.testing.assert_close(model(ids_BT).logits[..., :400], expected[..., :400], rtol=1e-4, atol=1e-4)
    moved = (student.own().embedding(ids_BT) - student.embedding(ids_BT)).abs().max()
    assert moved > 1e-3  # the network had a part in it


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": ["baseline_dskd"]},
        {"n_prefix_layers": 1, "prefix_steps": 2},
        {"multitask_aggregation_fn": "approx_gradmag_preserve_mag"},
        {"target_tokenizer_name": "byte", "expand_input_ids": True, "max_length_new": 100},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"hypernet__residual": False},
        {"hypernet__shared": False, "output_embeddings_mode": "untie"},
        {"hypernet__use_attention_mask": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_it_works_with_everything_else(make_config, tmp_path, changes):
    train(make_config(**{**NETWORK, "train_model_mode": "full"}, **changes))
    assert (tmp_path / "run" / "export" / "config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hypernet__num_heads": 5}, "hypernet.num_heads must divide the embeddings' width, 32: got 5"),
        ({"model_lora_modules_to_save": "embed_tokens"}, "an adapter stands in for them"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        build(make_config(**NETWORK, **changes), SINGLE)


def test_impossible_shapes_are_refused(make_config):
    with pytest.raises(ConfigError, match=r"hypernet\.num_layers must be at least 1, got 0"):
        make_config(hypernet__num_layers=0)
    with pytest.raises(ConfigError, match="the network writes the rows without them"):
        make_config(hypernet__residual=False, n_prefix_layers=1, prefix_steps=2)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        make_config(train_model_mode="none", train_embeddings=False, hypernet__architecture="identity")


def counted(parts):
    """Return the list that grows with every forward of the student's projector."""
    calls = []
    parts.student.projector.register_forward_hook(lambda *_: calls.append(None))
    return calls


@pytest.mark.parametrize(
    ("losses", "expected", "compared"),
    [
        (["clm", "alm_unconstrained"], 2, 1),
        (["clm", "alm_latents"], 2, 1),
        (["baseline_dskd"], 4, 0),
        (["clm", "baseline_dskd"], 4, 1),
    ],
)
def test_it_runs_once_for_each_micro_batch_but_where_the_teacher_s_half_reads_rows(
    make_config, losses, expected, compared
):
    """Once more for the first micro-batch of a run, in which the gradients of several losses are compared."""
    parts = build(make_config(**NETWORK, losses=losses, gradient_accumulation_steps=2), SINGLE)
    calls = counted(parts)
    for more in (compared, 0):
        calls.clear()
        train_step(parts.run, next(parts.batches))
        parts.run.step += 1
        assert len(calls) == expected + more


def test_an_evaluation_runs_it_once_and_measures_what_the_model_uses(make_config):
    parts = build(make_config(**NETWORK), SINGLE)
    shaken(parts.student)
    heldout = parts.heldout * 3
    calls, model = counted(parts), parts.run.model
    measured = bits_per_byte(model, heldout, SINGLE)
    assert len(calls) == 1
    one_by_one = sum(float(model(Evaluate(batch.batch, shares=batch.shares))[0]) for batch in heldout)
    assert len(calls) == 1 + len(heldout)
    assert measured.student == pytest.approx(one_by_one / measured.num_bytes / math.log(2), rel=1e-6)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_it_reads_the_teacher_s_own_matrices_where_the_student_teaches_itself(make_config, mode):
    parts = build(make_config(**NETWORK, train_model_mode=mode), SINGLE)
    assert parts.student.projector.old[0] is parts.run.model.teacher.embedding.weight
