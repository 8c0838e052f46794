import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import sentencepiece_bpe, tiny_folder, tiny_model
from tokenkit.errors import NonFiniteError, exit_code
from tokenkit.models.causal_lm import Vocabulary
from tokenkit.parallel import World
from tokenkit.training.build import build
from tokenkit.training.loop import train
from tokenkit.training.requests import StudentHalf, TeacherHalf
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)


def measured(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("mode", ["full", "lora", "none"])
def test_a_run_lowers_its_losses_and_exports_a_model_that_loads(make_config, tmp_path, mode):
    config = make_config(train_model_mode=mode, steps=12, eval_interval=6, eval_at_step_zero="true")
    assert train(config) == 0
    run = tmp_path / "run"
    bits = measured(run, "bits_per_byte/student")
    assert bits[-1] < bits[0]
    assert len(set(measured(run, "bits_per_byte/teacher"))) == 1, "the teacher moved"

    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert model.config.vocab_size % 64 == 0
    assert len(tokenizer) <= model.config.vocab_size
    ids = tokenizer("The cats sat", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith("The cats sat")
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "curves.png", "outcome.json", "checkpoints", "export"} <= names
    for part in ("data", "teacher", "student", "optimizer"):
        assert len(measured(run, f"seconds/{part}")) == 12
    assert all(
        0 < share < 0.9 for side in ("student", "teacher") for share in measured(run, f"padding/{side}")
    )
    assert measured(run, "peak_memory_gib")[-1] > 0


def test_adapters_and_embeddings_alone_keep_one_copy_of_the_body(make_config):
    for mode in ("lora", "none"):
        model = build(make_config(train_model_mode=mode), SINGLE).run.model
        assert isinstance(model.teacher, Vocabulary)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert all("lora_" in name or "embed_tokens" in name or "lm_head" in name for name in names)


def test_embeddings_can_be_left_alone(make_config):
    model = build(make_config(train_embeddings="false"), SINGLE).run.model
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("field", "part"),
    [("model_lora_targets", "lm_head.lora_A"), ("model_lora_modules_to_save", "lm_head.mod")],
)
def test_a_head_that_lora_names_is_trained_all_the_same(make_config, field, part):
    parts = build(make_config(train_embeddings="false", **{field: ["lm_head"]}), SINGLE)
    assert any(part in name for name, p in parts.run.model.named_parameters() if p.requires_grad)
    assert not any(
        "embed_tokens" in name for name, p in parts.run.model.named_parameters() if p.requires_grad
    )
    assert train_step(parts.run, next(parts.batches)).grad_norm > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_layer_norms_take_what_trained_embeddings_give(make_config, tmp_path, dtype):
    model = tiny_folder(tmp_path / "gpt2", "gpt2")
    config = make_config(student__pretrained_model_name_or_path=model, dtype=dtype)
    parts = build(config, SINGLE)
    assert train_step(parts.run, next(parts.batches)).losses["clm"] > 0


def test_a_teacher_of_another_width_and_tokenizer(make_config, workspace, tmp_path):
    shutil.copytree(workspace / "model", tmp_path / "teacher")
    tiny_model(hidden_size=48, seed=1).save_pretrained(tmp_path / "teacher")
    config = make_config(teacher__pretrained_model_name_or_path=tmp_path / "teacher", steps=2)
    assert train(config) == 0


def test_a_student_that_keeps_its_tokenizer_and_its_weights_is_at_the_minimum(make_config, workspace):
    config = make_config(
        target_tokenizer_name=workspace / "model", losses=["alm_unconstrained"], train_model_mode="full"
    )
    parts = build(config, SINGLE)
    report = train_step(parts.run, next(parts.batches))
    assert report.grad_norm < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_low_precision_trains_float32_parameters(make_config, dtype, mode):
    parts = build(make_config(dtype=dtype, train_model_mode=mode), SINGLE)
    reports = [train_step(parts.run, next(parts.batches)) for _ in range(3)]
    assert {p.dtype for p in parts.run.model.parameters() if p.requires_grad} == {torch.float32}
    assert not any(report.skipped for report in reports)
    exact = build(make_config(train_model_mode=mode), SINGLE)
    first = train_step(exact.run, next(exact.batches))
    assert reports[0].losses["clm"] == pytest.approx(first.losses["clm"], rel=0.02)
    assert reports[0].grad_norm == pytest.approx(first.grad_norm, rel=0.1)


def test_the_teacher_does_without_dropout_while_the_student_has_it(make_config, workspace, tmp_path):
    tiny_folder(tmp_path / "model", attention_dropout=0.5)
    changes = {"student__pretrained_model_name_or_path": tmp_path / "model", "losses": ["alm_unconstrained"]}
    parts = build(make_config(**changes, train_model_mode="full"), SINGLE)
    (batch,) = next(parts.batches)
    assert parts.run.model.train().training
    said = [parts.run.model(TeacherHalf(batch))["alm_unconstrained"] for _ in range(2)]
    assert torch.equal(said[0].sizes[0].teacher_BC, said[1].sizes[0].teacher_BC)
    totals = [parts.run.model(StudentHalf(batch, {"alm_unconstrained": said[0]})) for _ in range(2)]
    assert totals[0]["alm_unconstrained"].total != totals[1]["alm_unconstrained"].total


def test_gradient_checkpointing_changes_no_number(make_config):
    losses = []
    for value in ("true", "false"):
        parts = build(make_config(gradient_checkpointing=value, train_model_mode="full"), SINGLE)
        report = train_step(parts.run, next(parts.batches))
        losses.append((report.loss, report.grad_norm))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_each_step_runs_at_the_rate_of_its_own_number(make_config):
    parts = build(make_config(), SINGLE)
    rates = []
    for step in range(3):
        report = train_step(parts.run, next(parts.batches))
        parts.run.step += 1
        assert report.learning_rate == parts.run.main.learning_rate(step)
        assert {group["lr"] for group in parts.run.optimizer.param_groups} == {report.learning_rate}
        rates.append(report.learning_rate)
    assert len(set(rates)) == 3


def test_a_users_own_loss(make_config):
    own = "tests.training.own_losses:double_clm"
    parts = build(make_config(losses=["clm", own]), SINGLE)
    report = train_step(parts.run, next(parts.batches))
    assert report.losses[own] == pytest.approx(2 * report.losses["clm"], rel=1e-6)


def test_the_weight_of_a_users_loss_multiplies_its_gradient(make_config):
    own = "tests.training.own_losses:double_clm"
    norms = []
    for weights in ([1.0, 0.0], [0.0, 0.5]):  # half of twice the cross entropy
        torch.manual_seed(0)  # adapters begin alike
        parts = build(make_config(losses=["clm", own], loss_weights=weights), SINGLE)
        norms.append(train_step(parts.run, next(parts.batches)).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_users_loss_with_a_count_of_its_own_is_told_to_say_so(make_config):
    parts = build(make_config(losses=["tests.training.own_losses:wrong_count"]), SINGLE)
    with pytest.raises(ValueError, match=r"give the function an attribute `count\(teacher, batch\)`"):
        train_step(parts.run, next(parts.batches))


def test_a_count_may_be_a_plain_number(make_config):
    own = "tests.training.own_losses:counted_by_number"
    parts = build(make_config(losses=[own]), SINGLE)
    assert train_step(parts.run, next(parts.batches)).counts[own] == 4


def test_a_gradient_that_no_loss_scale_saves_ends_the_run(make_config):
    parts = build(
        make_config(losses=["tests.training.own_losses:not_finite_backward"], dtype="float16"), SINGLE
    )
    micro_batches = next(parts.batches)
    before = [p.detach().clone() for p in parts.run.model.parameters()]
    reports = (train_step(parts.run, micro_batches) for _ in range(40))
    with pytest.raises(NonFiniteError, match="at any loss scale"):
        assert all(report.skipped for report in reports)
    assert all(map(torch.equal, before, parts.run.model.parameters()))


def test_a_loss_that_is_not_finite_is_named_and_updates_nothing(make_config, tmp_path):
    own = "tests.training.own_losses:not_finite"
    config = make_config(losses=["clm", own])
    parts = build(config, SINGLE)
    before = {name: p.detach().clone() for name, p in parts.run.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=f"loss {own} is not finite at step 0"):
        train_step(parts.run, next(parts.batches))
    assert all(torch.equal(before[name], p) for name, p in parts.run.model.named_parameters())
    with pytest.raises(NonFiniteError):
        train(config)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["code"] == 70


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"data.dataset_name": "empty.jsonl"}, 65),
        ({"student.pretrained_model_name_or_path": "broken"}, 65),
        ({"target_tokenizer_name": "byte:target=Lama"}, 64),
        ({"max_length_new": 1000}, 64),
    ],
)
def test_a_run_that_cannot_begin_says_whose_fault_it_is_and_leaves_the_folder_free(
    make_config, workspace, tmp_path, monkeypatch, wrong, code
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    shutil.copytree(workspace / "model", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r".") as caught:
        train(make_config(**wrong))
    assert exit_code(caught.value) == code
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["code"] == code
    assert train(make_config(steps=1)) == 0


def test_a_dry_run_writes_nothing(make_config, tmp_path, capsys):
    assert train(make_config(dry_run="true")) == 0
    assert not (tmp_path / "run").exists()
    assert "dry run: clm" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_refused_and_left_alone(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt"):
        train(make_config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_resuming_a_finished_run_says_so_and_is_no_failure(make_config, tmp_path, capsys):
    assert train(make_config(steps=2)) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(make_config(steps=2, resume="true")) == 0
    assert "there is nothing to resume" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_smaller_tokenizer_that_is_not_the_models_own_is_refused(make_config, tmp_path):
    with pytest.raises(ValueError, match=r"is not the tokenizer of .* ids mean the same text"):
        train(make_config(student__tokenizer_name=sentencepiece_bpe(tmp_path / "pieces", 290)))


def test_an_old_export_is_refused_before_training(make_config, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("precious")
    with pytest.raises(FileExistsError, match="move it away, or name another folder with export_to"):
        train(make_config(export_to=tmp_path / "model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length_new": 500}, "max_length_new is 500, but the model has 128 positions"),
        ({"student.tokenizer_name": "TARGET"}, "is not the tokenizer of"),
        ({"data.dataset_name": "./nowhere.jsonl"}, "nowhere.jsonl"),
        ({"target_tokenizer_name": "./nowhere"}, "nowhere"),
        ({"data.text_field": "body"}, "body"),
        ({"model_lora_layers": "7"}, "the model's layers are 0 to 1"),
        ({"optimizer.param_groups": '[{pattern: "nothing", lr_scale: 2}]'}, "matches none"),
    ],
)
def test_bad_input_is_one_clear_error_before_any_step(make_config, workspace, tmp_path, changes, message):
    changes = {name: workspace / "target" if value == "TARGET" else value for name, value in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(make_config(**changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_added_tokens_leave_the_students_revision_as_it_is(make_config, monkeypatch):
    from dataclasses import replace

    from tokenkit.training import pair

    config, asked, load = make_config(), [], pair.load_tokenizer

    def noting(spec, **options):
        asked.append(options)
        return load(spec, **options)

    monkeypatch.setattr(pair, "load_tokenizer", noting)
    student = replace(config.student, revision="a1b2c3")
    target = replace(config.target, target_tokenizer_name=None, tokens_to_add=("<|new|>",))
    tokenizers = pair.load_tokenizers(replace(config, student=student, teacher=student, target=target))
    assert tokenizers.target.vocab_size == tokenizers.old.vocab_size + 1
    assert [options["revision"] for options in asked] == ["a1b2c3"] * 3
