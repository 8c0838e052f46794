"""Steps without a trained token: skipped on all ranks alike, counted and said; many in a row end the run.

Faults tried, each caught here: the update taken with gradients of zero (AdamW moves by its moments); a rank
that decides by its own share; the count lost in a resume; a skipped step that teaches the loss scale.
"""

import dataclasses
import json

import pytest
import torch

from tests.faults.registry import fault
from tests.ranks import run_ranks
from tokenkit.errors import DataError
from tokenkit.parallel import World
from tokenkit.training import loop
from tokenkit.training.build import build
from tokenkit.training.step import MOST_UNTRAINED, train_step

SINGLE = World(0, 1, torch.device("cpu"), None)
STAGE = {"n_prefix_layers": 1, "prefix_steps": 2, "prefix_lr": 0.01}
LOSSES = ["clm", "alm_unconstrained", "alm_latents", "baseline_uld"]


def untrained(batches):
    """The same batches with no token that the loss mask keeps."""
    return [
        dataclasses.replace(
            batch,
            **{
                name: dataclasses.replace(side, trained_BT=torch.zeros_like(side.trained_BT))
                for name, side in (("student", batch.student), ("teacher", batch.teacher))
            },
        )
        for batch in batches
    ]


def steps(world, config, empty, only_rank=None):
    """Return by step whether it was skipped and moved anything; `empty` says which have no trained token."""
    torch.manual_seed(0)
    parts = build(config, world)
    run, found = parts.run, []
    for is_empty in empty:
        before = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
        batches = next(parts.batches)
        if is_empty and only_rank in (None, world.rank):
            batches = untrained(batches)
        report = train_step(run, batches)
        run.step += 1
        after = [p.detach() for p in run.model.parameters() if p.requires_grad]
        moved = any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        found.append((report.skipped or "", moved, report.loss))
    return found, run.untrained_steps, run.loss_scale.good_steps


@pytest.mark.parametrize(
    "changes", [{}, {"multitask_aggregation_fn": "approx_gradmag"}, {"dtype": "float16"}]
)
def test_such_a_step_moves_nothing_and_teaches_nothing(make_config, changes):
    config = make_config(losses=LOSSES, **changes)
    found, number, good = steps(SINGLE, config, [False, True, False])
    assert [(skipped, moved) for skipped, moved, _ in found] == [("", True), ("untrained", False), ("", True)]
    assert found[1][2] == 0
    assert number == 1
    assert good == (2 if changes.get("dtype") == "float16" else 0)


def test_so_does_one_of_the_prefix_stage(make_config):
    found, number, _ = steps(SINGLE, make_config(**STAGE), [False, True, False])
    assert [(skipped, moved) for skipped, moved, _ in found] == [("", True), ("untrained", False), ("", True)]
    assert number == 1


@fault(
    "No token of a step is trained, on one rank or on all",
    "a rank without one adds nothing; a step without one is skipped and counted, ten in a row end the run",
    code="-, 65",
    kept="the last checkpoint",
)
@pytest.mark.parametrize("only_rank", [None, 1])
def test_ranks_decide_alike(make_config, only_rank):
    """All of them skip, or, where one has an empty share, none."""
    for found, number, _ in run_ranks(steps, 2, make_config(losses=LOSSES), [False, True, False], only_rank):
        skips = ["", "", ""] if only_rank == 1 else ["", "untrained", ""]
        assert [skipped for skipped, _, _ in found] == skips
        assert number == skips.count("untrained")


def test_many_in_a_row_end_the_run(make_config):
    with pytest.raises(DataError, match=f"no token was trained in {MOST_UNTRAINED} steps in a row"):
        steps(SINGLE, make_config(steps=30), [True] * MOST_UNTRAINED)
    _, number, _ = steps(SINGLE, make_config(), ([True] * (MOST_UNTRAINED - 1) + [False]) * 2)
    assert number == 2 * (MOST_UNTRAINED - 1)


def test_a_run_says_how_many_and_goes_on_counting(make_config, tmp_path, monkeypatch, capfd):
    take = loop.train_step

    def take_one_in_two(run, batches):
        return take(run, untrained(batches) if run.step % 2 else batches)

    monkeypatch.setattr(loop, "train_step", take_one_in_two)
    assert loop.train(make_config(steps=4)) == 0
    assert "steps skipped, because no token of theirs is trained: 2" in capfd.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["untrained_steps"]) for x in lines if "untrained_steps" in x] == [(2, 1), (4, 2)]


def test_a_run_whose_every_answer_is_cut_off_ends_with_a_reason(make_config, tmp_path):
    row = {"prompt": "once upon a time there was a cat " * 9, "completion": " and a dog"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 40)
    changes = {"data__dataset_name": tmp_path / "rows.jsonl", "data__heldout__fraction": 0}
    with pytest.raises(DataError, match="the answers may lie behind max_length_new"):
        loop.train(make_config(**changes, steps=30))
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["code"] == 65
    with pytest.raises(DataError, match="no token of the first step is trained"):
        loop.train(make_config(**changes, dry_run="true", output_dir=tmp_path / "dry"))
