"""What a run says at its start, and what it does not load."""

import dataclasses

import pytest
import torch

from tests.tiny import tiny_folder
from tokenkit.models.causal_lm import CausalLM
from tokenkit.parallel import World
from tokenkit.structs import LossTerm
from tokenkit.training.build import build
from tokenkit.training.notes import describe
from tokenkit.training.reports import Progress, _spelled, small_losses, step_line
from tokenkit.training.step import StepReport, train_step

SINGLE = World(0, 1, torch.device("cpu"), None)


def described(config):
    parts = build(config, SINGLE)
    return parts, describe(parts, config)


def test_clm_alone_loads_one_body_and_measures_one_model(make_config, tmp_path):
    from tokenkit.training.loop import train

    config = make_config(losses=["clm"], train_model_mode="full", steps=2)
    parts, text = described(config)
    assert parts.run.model.teacher is None
    assert "teacher: none: no loss reads one" in text
    assert train_step(parts.run, next(parts.batches)).grad_norm > 0
    assert train(config) == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "bits_per_byte/student" in metrics
    assert "bits_per_byte/teacher" not in metrics


def test_a_named_teacher_is_loaded_where_something_reads_it(make_config, workspace):
    changes = {"losses": ["clm"], "teacher__pretrained_model_name_or_path": workspace / "model"}
    assert isinstance(build(make_config(**changes), SINGLE).run.model.teacher, CausalLM), "bits per byte"
    parts, text = described(make_config(**changes, data__heldout__fraction=0))
    assert parts.run.model.teacher is None
    assert f"no loss reads one, {workspace / 'model'} is not loaded" in text


def test_parameters_are_counted_once(make_config):
    parts, text = described(make_config(train_model_mode="full"))
    own = sum(p.numel() for p in parts.student.parameters())
    assert f"{own:,} of {own:,} parameters are trained (full)" in text
    assert "parameters beside the student's" in text


def test_what_only_the_loaded_model_shows_to_be_without_effect_is_said(make_config, workspace, tmp_path):
    _, text = described(make_config(output_embeddings_mode="untie", special_tokens_mode="ignore_pad"))
    assert "output_embeddings_mode (untie: the head has its own matrix anyway)" in text
    assert "special_tokens_mode (ignore_pad: the templates here write no padding token)" in text
    tied = tiny_folder(tmp_path / "tied", tie_word_embeddings=True)
    changes = {"student__pretrained_model_name_or_path": tied}
    assert "without effect" not in described(make_config(output_embeddings_mode="untie", **changes))[1]
    network = {"hypernet__num_heads": 4, "hypernet__shared": "false"}
    assert "hypernet.shared (false: one matrix is written)" in described(make_config(**changes, **network))[1]


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_matrix_that_lora_saves_is_trained_and_stays_one(make_config, tmp_path, names):
    tied = tiny_folder(tmp_path / "tied", tie_word_embeddings=True)
    config = make_config(
        student__pretrained_model_name_or_path=tied,
        model_lora_modules_to_save=names,
        train_embeddings="false",
    )
    parts = build(config, SINGLE)
    assert parts.student.is_tied
    before = parts.student.embedding.weight.detach().clone()
    train_step(parts.run, next(parts.batches))
    assert not torch.equal(before, parts.student.embedding.weight)


def test_the_excess_is_zero_where_student_and_teacher_agree(make_config, workspace):
    config = make_config(
        target_tokenizer_name=workspace / "model", losses=["alm_unconstrained"], train_model_mode="full"
    )
    parts = build(config, SINGLE)
    report = train_step(parts.run, next(parts.batches))
    floor = report.floors["alm_unconstrained"]
    assert floor > 0.01
    assert report.losses["alm_unconstrained"] == pytest.approx(floor, abs=1e-6)


@pytest.mark.parametrize("diff", ["abs", "joschu_k3", "reverse_binary_kl", "abs_exp"])
def test_differences_without_a_floor_have_none(make_config, diff):
    parts = build(
        make_config(losses=["alm_unconstrained"], alm_diff_fn=diff, distill_chunk_sizes=[1, 2]), SINGLE
    )
    assert train_step(parts.run, next(parts.batches)).floors["alm_unconstrained"] == pytest.approx(
        0, abs=1e-9
    )


def faint(student, teacher, batch):
    term = LossTerm(student.hidden_BTD.square().sum(), batch.student.trained_BT.sum())
    return LossTerm(1e-6 * term.total, term.count)


faint.count = lambda teacher, batch: batch.student.trained_BT.sum()


def test_shares_of_the_gradient_are_those_of_the_whole_step_and_change_nothing(make_config):
    name = "tests.training.test_notes:faint"
    parts = build(make_config(losses=["clm", name], train_model_mode="full"), SINGLE)
    micro_batches = next(parts.batches)
    torch.manual_seed(5)
    shares = dict(train_step(parts.run, micro_batches).gradient_shares)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[name] < 0.02
    assert f"loss {name} gives" in small_losses(shares)
    parts.run.step = 1
    assert train_step(parts.run, micro_batches).gradient_shares == {}

    bits = []
    for compares in (True, False):
        parts = build(make_config(losses=["clm", name]), SINGLE)
        parts.run.has_compared = not compares
        torch.manual_seed(5)
        train_step(parts.run, micro_batches)
        bits.append([p.detach().clone() for p in parts.run.model.parameters()])
    assert all(map(torch.equal, *bits))


def test_lines_say_what_is_there_and_no_more():
    report = StepReport(2.0, {"clm": 2.0}, {"clm": 9.0}, 1.5, 1e-3)
    assert step_line(report, 12345.0) == "clm 2.0000  grad 1.5  lr 0.001  12,345 tokens/s"
    skipped = dataclasses.replace(report, skipped="overflow")
    assert "skipped: float16 overflow" in step_line(skipped, 1.0)
    assert small_losses({"a": 0.0, "b": 1.0}) is None, "nothing to compare is not little"
    assert small_losses({}) is None
    assert [_spelled(s) for s in (3, 600, 3700, 100_000)] == ["3 s", "10 min", "1 h 02 min", "27 h 47 min"]


def test_lines_are_printed_by_the_first_rank_where_there_is_no_bar(capsys):
    Progress(10, 0, is_main=False).line(3, "words")
    assert capsys.readouterr().err == ""
    progress = Progress(10, 0, is_main=True)
    progress.line(5, "words")
    progress.line(10, "words")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("step 5/10  words  ")
    assert first.endswith(" left")
    assert last == "step 10/10  words"
