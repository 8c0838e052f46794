"""Every loss in the real trainer: it trains, ranks agree, its trained parts are saved, and are not exported.

Faults tried, each caught here: the teacher's head kept from the first half; parts left out of the optimizer,
or of the checkpoint; parts built after sharding; options left on the configuration's defaults.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import KILLED, run_ranks, start_ranks, wait_ranks
from tests.training.test_resume import curve, run_in_rank
from tokenkit.commands.mined_mapping import main as mined_mapping
from tokenkit.config import ConfigError
from tokenkit.errors import ExitCode
from tokenkit.parallel import World
from tokenkit.structs import LossTerm
from tokenkit.training.build import build
from tokenkit.training.loop import train
from tokenkit.training.pair import Pair, read_mapping
from tokenkit.training.requests import StudentHalf, TeacherHalf
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)
NAMES = [
    "alm_unbiased", "alm_side_path", "alm_latents", "baseline_uld", "baseline_mined", "baseline_dskd",
    "baseline_gold", "baseline_gold_js", "baseline_xtoken",
]  # fmt: skip
EVERY_LAYER = {"latents_to_align": "all_hidden_states", "latents_do_project": "true"}


@pytest.mark.parametrize("wide", [False, True], ids=["lora", "full, another teacher"])
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_falls(config_of, files, name, wide):
    changes = {}
    if wide:
        changes = EVERY_LAYER | {
            "train_model_mode": "full",
            "teacher__pretrained_model_name_or_path": files / "teacher",
            "gradient_checkpointing": "true",
        }
    parts = build(config_of(losses=[name], **changes), SINGLE)
    micro_batches = next(parts.batches)
    reports = [train_step(parts.run, micro_batches) for _ in range(6)]
    assert all(report.counts[name] > 0 for report in reports)
    assert reports[-1].losses[name] < reports[0].losses[name], [r.losses for r in reports]


@pytest.mark.parametrize("align", ["all_hidden_states", "qkv"])
@pytest.mark.parametrize("chunks", ["naive", "space"])
def test_latents_of_layers_train_what_adapters_reach(config_of, align, chunks):
    settings = {"latents_to_align": align, "latents_chunks": chunks, "losses": ["alm_latents"]}
    parts = build(config_of(**settings), SINGLE)
    (batch,) = micro_batches = next(parts.batches)
    assert list(batch.chunks) == ["unconstrained" if chunks == "naive" else "space"]
    first = train_step(parts.run, micro_batches).losses["alm_latents"]
    assert min(train_step(parts.run, micro_batches).losses["alm_latents"] for _ in range(4)) < first


@pytest.mark.parametrize("mode", ["mined", "exact_match", "bias_threshold"])
@pytest.mark.parametrize("distance", ["kl", "reverse_kl", "kl_subset", "reverse_kl_subset", "log_abs", "abs"])
def test_side_path_takes_every_mapping_and_every_distance(config_of, mode, distance):
    settings = {"side_path_mapping_mode": mode, "side_path_distance_fn": distance}
    parts = build(config_of(losses=["alm_side_path"], **settings), SINGLE)
    report = train_step(parts.run, next(parts.batches))
    assert report.losses["alm_side_path"] > 0
    assert report.grad_norm > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_near_float32(config_of, files, dtype):
    losses = [name for name in NAMES if name != "baseline_uld"]
    settings = {"losses": losses, **EVERY_LAYER, "teacher__pretrained_model_name_or_path": files / "teacher"}
    values = []
    for one in (dtype, "float32"):
        parts = build(config_of(**settings, dtype=one), SINGLE)
        parts_of = [p for n, p in parts.run.model.named_parameters() if n.startswith("parts.")]
        assert {p.dtype for p in parts_of} == {torch.float32}
        values.append(train_step(parts.run, next(parts.batches)).losses)
    for name in losses:
        assert values[0][name] == pytest.approx(values[1][name], rel=0.05), name


def teachers_head(student, teacher, batch):
    """A user's loss that multiplies with the teacher's head in the student's half."""
    width = min(student.hidden_BTD.shape[-1], teacher.hidden_BTD.shape[-1])
    logits = student.hidden_BTD[..., :width] @ teacher.head.weight_VD[:, :width].T
    return LossTerm(logits.logsumexp(-1)[batch.student.trained_BT].sum(), batch.student.trained_BT.sum())


teachers_head.count = lambda teacher, batch: batch.student.trained_BT.sum()


def three_steps(world, config):
    """Return losses, gradient norms and counts of three steps."""
    torch.manual_seed(0)
    parts = build(config, world)
    reports = [train_step(parts.run, next(parts.batches)) for _ in range(3)]
    return [[*report.losses.values(), report.grad_norm, *report.counts.values()] for report in reports]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_processes_and_micro_batches_agree_with_one(config_of, files, mode):
    settings = {
        "losses": [*NAMES, "tests.training.test_losses:teachers_head"],
        "teacher__pretrained_model_name_or_path": files / "teacher",
        "train_model_mode": mode,
        "batch_size": 8,
        "latents_do_project": "true",
        "latents_to_align": "all_hidden_states" if mode == "full" else "qkv",
        "gradient_checkpointing": str(mode == "lora").lower(),
    }
    expected = torch.tensor(three_steps(SINGLE, config_of(**settings)))
    for result in run_ranks(three_steps, 2, config_of(**settings, gradient_accumulation_steps=2)):
        torch.testing.assert_close(torch.tensor(result), expected, rtol=1e-4, atol=1e-6)


def test_projections_are_resumed_to_the_same_bits_on_any_number_of_ranks(config_of, files, tmp_path):
    changes = {
        "losses": ["baseline_dskd", "alm_latents"], "steps": 4, "train_model_mode": "full", **EVERY_LAYER,
        "teacher__pretrained_model_name_or_path": files / "teacher", "resume": "true",
    }  # fmt: skip
    run = partial(run_ranks, run_in_rank, always_shard=False)
    assert run(2, config_of(**changes, output_dir=tmp_path / "whole"), None) == [ExitCode.DONE] * 2
    broken = config_of(**changes, output_dir=tmp_path / "broken")
    assert KILLED in wait_ranks(start_ranks(run_in_rank, 2, broken, 3, always_shard=False))
    shutil.copytree(tmp_path / "broken", tmp_path / "alone")
    assert run(2, broken, None) == [ExitCode.DONE] * 2
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")

    assert run(1, config_of(**changes, output_dir=tmp_path / "alone"), None) == [ExitCode.DONE]
    weights = {
        x: load_file(tmp_path / x / "export" / "model.safetensors") for x in ("whole", "broken", "alone")
    }
    assert not any("query" in name or "parts" in name for name in weights["whole"])
    for name, tensor in weights["whole"].items():
        assert torch.equal(tensor, weights["broken"][name]), name
        assert tensor.shape == weights["alone"][name].shape


def test_parts_are_in_a_group_of_their_own_that_a_pattern_scales(config_of):
    config = config_of(losses=["baseline_dskd"], optimizer__param_groups='[{pattern: "^parts", lr_scale: 5}]')
    optimizer = build(config, SINGLE).run.optimizer
    groups = {group["name"]: group["lr_scale"] for group in optimizer.param_groups}
    assert groups == {"student": 1, "parts": 5}
    assert sum(len(g["params"]) for g in optimizer.param_groups if g["name"] == "parts") == 6


def test_kd_rate_weighs_baselines_against_clm(config_of):
    config = config_of(losses=["clm", "baseline_uld", "alm_space"], baseline__kd_rate=0.75)
    assert config.objective.static_weights == {"clm": 0.25, "baseline_uld": 0.75, "alm_space": 1.0}
    with pytest.raises(ConfigError, match="keep the one that is meant"):
        config_of(losses=["clm", "baseline_uld"], loss_weights=[1, 1], baseline__kd_rate=0.5)
    for losses in (["clm"], ["sft", "alm_space"]):
        with pytest.raises(ConfigError, match="losses names no baseline"):
            config_of(losses=losses, baseline__kd_rate=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": ["alm_unbiased"]}, "tokenizer_pair_data_path is not set"),
        ({"losses": ["baseline_mined"]}, "mined_mapping_path is not set"),
        (
            {"losses": ["alm_side_path"], "side_path_mapping_mode": "mined"},
            "mined_mapping_path is not set",
        ),
        (
            {"losses": ["alm_side_path"], "side_path_mapping_mode": "bias_threshold"},
            "make one with `tokenkit pair-stats`",
        ),
        ({"tokenizer_pair_bias_threshold_side_path": 2}, r"must lie in \[0, 1\], got 2"),
        ({"baseline__kd_temp": 0}, r"baseline\.kd_temp must be positive, got 0"),
        ({"baseline__gold__beta": 2}, r"baseline\.gold\.beta must lie in \[0, 1\], got 2"),
        ({"baseline__gold__uld_teacher_temperature": 0}, r"uld_teacher_temperature must be positive, got 0"),
        (
            {"baseline__gold__uld_hybrid_matched_weight": 1, "baseline__gold__uld_use_hybrid_loss": "true"},
            "belong together: give both or neither",
        ),
        (
            {f"baseline__gold__uld_hybrid_{x}_weight": 1 for x in ("matched", "unmatched")},
            r"acts only where baseline\.gold\.uld_use_hybrid_loss is true",
        ),
        ({"baseline__skew_lambda": 1.5}, r"baseline\.skew_lambda must lie in \[0, 1\], got 1.5"),
        ({"loss_workspace_mib": 0}, "loss_workspace_mib must be at least 1"),
    ],
)
def test_configurations_that_cannot_work_are_refused(make_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def test_unbiased_chunks_are_those_whose_ends_the_statistics_allow(config_of, files):
    parts = build(config_of(losses=["alm_unbiased", "alm_unconstrained"]), SINGLE)
    (batch,) = next(parts.batches)
    joined, smallest = (batch.chunks[kind].student_BT for kind in ("unbiased", "unconstrained"))
    assert joined.amax(1).sum() < smallest.amax(1).sum()
    assert ((joined >= 0) == (smallest >= 0)).all()


def test_statistics_of_another_pair_stop_the_run(config_of, files, tmp_path):
    shutil.copytree(files / "pair", tmp_path / "pair")
    path = tmp_path / "pair" / "summary.json"
    path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(ValueError, match="holds the statistics of another teacher tokenizer"):
        build(config_of(losses=["alm_unbiased"], tokenizer_pair_data_path=tmp_path / "pair"), SINGLE)


def test_a_mapping_is_read_from_a_folder_a_file_or_a_tensor(tmp_path):
    np.save(tmp_path / "mapping.npy", np.arange(5))
    torch.save(torch.arange(5, dtype=torch.int32), tmp_path / "mapping.pt")
    for path in (tmp_path, tmp_path / "mapping.npy", tmp_path / "mapping.pt"):
        assert read_mapping(Path(path), 5, 7).tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "guide").mkdir()
    torch.save(torch.arange(5), tmp_path / "guide" / "mapping.pt")
    assert read_mapping(tmp_path / "guide", 5, 7).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; make it with `tokenkit mined-"):
        read_mapping(tmp_path / "nowhere", 5, 7)
    with pytest.raises(ValueError, match=r"each of the student's 6 ids: got torch.int64 of shape \(5,\)"):
        read_mapping(tmp_path, 6, 7)
    with pytest.raises(ValueError, match=r"ids of the teacher's 4: got 0 to 4; was it mined for these"):
        read_mapping(tmp_path, 5, 4)
    for name in ("words.npy", "words.pt"):
        (tmp_path / name).write_text("no array")
        with pytest.raises(ValueError, match=rf"{name} must be an npy file, or a .pt file with a tensor"):
            read_mapping(tmp_path / name, 5, 7)


def test_a_mapping_that_was_mined_for_another_pair_is_refused(config_of, workspace, tmp_path):
    flags = ["--target-tokenizer-name", str(workspace / "target"), "--output", str(tmp_path / "own")]
    assert mined_mapping([*flags, "--teacher-tokenizer-name", str(workspace / "model")]) == 0
    build(config_of(losses=["baseline_mined"], mined_mapping_path=tmp_path / "own"), SINGLE).batches.close()
    path = tmp_path / "own" / "summary.json"
    about = json.loads(path.read_text())
    about["teacher"] = {"tokenizer": "llama3", "fingerprint": "0"}
    path.write_text(json.dumps(about))
    for given in (tmp_path / "own", tmp_path / "own" / "mapping.npy"):
        with pytest.raises(ValueError, match=r"another teacher tokenizer \(llama3\), not for"):
            build(config_of(losses=["baseline_mined"], mined_mapping_path=given), SINGLE)


def test_a_mapping_of_other_tokenizers_ends_the_run_before_it_starts(make_config, tmp_path):
    np.save(tmp_path / "mapping.npy", np.arange(5))
    with pytest.raises(ValueError, match="was it mined for these tokenizers"):
        train(make_config(losses=["baseline_mined"], mined_mapping_path=tmp_path))


def test_latents_of_another_width_are_told_to_be_projected(config_of, files):
    config = config_of(losses=["alm_latents"], teacher__pretrained_model_name_or_path=files / "teacher")
    with pytest.raises(ValueError, match="32 wide and the teacher's 48: set latents_do_project"):
        build(config, SINGLE)


def test_of_student_ids_with_one_nearest_teacher_id_the_one_of_its_bytes_is_its_pair():
    texts = [b"ab", b"a", b"c", b"a"]  # the byte piece of a letter stands in front of it
    student = SimpleNamespace(
        token_bytes=texts, is_special_V=np.zeros(4, bool), byte_length_V=np.array([2, 1, 1, 1]),
        try_encode_batch=lambda texts, before: [SimpleNamespace(ids=[3]) for _ in texts],
    )  # fmt: skip
    source = SimpleNamespace(
        mapping=lambda: torch.tensor([0, 0, 1, 0]), student=student,
        teacher=SimpleNamespace(token_bytes=[b"a", b"d"]), device=torch.device("cpu"),
    )  # fmt: skip
    pairs = Pair.nearest(source)
    assert (pairs["student_index"].tolist(), pairs["teacher_index"].tolist()) == ([2, 3], [1, 0])


def test_kl_trains_between_models_of_one_tokenizer_and_refuses_two(config_of, files):
    teacher = {"teacher__pretrained_model_name_or_path": files / "teacher"}
    parts = build(config_of(losses=["kl"], target_tokenizer_name="null", **teacher), SINGLE)
    micro_batches = next(parts.batches)
    reports = [train_step(parts.run, micro_batches) for _ in range(4)]
    assert reports[0].counts["kl"] > 0
    assert reports[-1].losses["kl"] < reports[0].losses["kl"]
    with pytest.raises(ValueError, match=r"kl compares .* id by id, and their tokenizers differ"):
        build(config_of(losses=["kl"]), SINGLE)


def test_options_of_baselines_reach_their_losses(config_of):
    """Each changes the first step's loss. Some seconds: seven runs are built."""
    srkl = {"baseline__divergence": "srkl"}
    settings = {
        "baseline_gold": [{}, {"baseline__gold__uld_use_hybrid_loss": "true"}],
        "baseline_uld": [{"baseline__uld_extended": x} for x in ("false", "true")],
        "baseline_mined": [srkl, srkl | {"baseline__skew_lambda": 0.4}],
    }
    for name, changes in settings.items():
        values = []
        for change in changes:
            parts = build(config_of(losses=[name], **change), SINGLE)
            (batch,) = next(parts.batches)
            parts.batches.close()
            term = parts.run.model(StudentHalf(batch, parts.run.model(TeacherHalf(batch))))[name]
            values.append(round(float((term.total / term.count).mean().detach()), 5))
        assert len(set(values)) == len(values), (name, values)
    run = build(config_of(losses=["baseline_gold"], baseline__exact_sort="false"), SINGLE).run
    assert run.model.losses["baseline_gold"].options.exact is False
