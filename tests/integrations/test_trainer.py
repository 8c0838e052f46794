"""`DistillationTrainer`: gradients of the whole step, evaluation, and every way that a Trainer runs."""

import copy
import os

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from tests.integrations.material import distance, gradients, randomised
from tests.ranks import run_ranks
from tests.tiny import tiny_model
from tokenkit.integrations import DistillationTrainer, Distiller

LOSSES = {"clm": 1.0, "alm_unconstrained": 20.0}
SCALED = {"alm_latents": 1.0}


class KeepGradients(TrainerCallback):
    """Keeps the gradient of each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


def make_trainer(models, collator, rows, folder, *, losses=LOSSES, **arguments):
    kept = KeepGradients()
    more = {name: arguments.pop(name) for name in ("eval_dataset", "loss_options") if name in arguments}
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    trainer = DistillationTrainer(
        models[0],
        TrainingArguments(**settings),
        teacher=models[1],
        losses=losses,
        data_collator=collator,
        train_dataset=rows,
        callbacks=[kept],
        **more,
    )
    return trainer, kept


def one_batch(models, collator, rows, losses=LOSSES):
    """The loss and gradient of all rows as one batch, by the losses alone."""
    model = copy.deepcopy(models[0])
    distiller = Distiller(model, models[1], collator, losses)
    values = distiller.backward(model, [collator(rows)])
    return values, gradients(model)


@pytest.mark.parametrize("losses", [LOSSES, SCALED])
def test_four_micro_batches_are_one_big_batch(losses, models, make_collator, rows, tmp_path):
    values, wanted = one_batch(models, make_collator(), rows, losses)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer, kept = make_trainer(models, make_collator(), rows, tmp_path, losses=losses, **parts)
    trainer.train()
    assert distance(kept.steps[0], wanted) < 1e-5
    logged = trainer.state.log_history[0]
    for name, value in values.items():
        assert logged[name] == pytest.approx(value, rel=1e-5), name


def _train_on_a_rank(world, models, make_collator, rows, folder, arguments):
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(world.rank)}
    trainer, kept = make_trainer(
        models,
        make_collator(),
        rows,
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_dataset=rows,
        per_device_eval_batch_size=2,
        **arguments,
    )
    trainer.train()
    found = [trainer.evaluate()["eval_clm"]]
    for some in (rows[:7], rows[:5], rows[:1], Stream(rows[:5])):  # no whole batch of both ranks
        found.append(trainer.evaluate(some)["eval_clm"])
    trainer.eval_dataset = {"part": rows[:5]}
    found.append(trainer.evaluate()["eval_part_clm"])
    found.append(trainer.predict(rows[:5]).metrics["test_clm"])
    alone = [
        trainer.distiller.evaluate(
            [trainer.distiller.sums(trainer.model, trainer.data_collator.collator(part))]
        )
        for part in (rows, rows[:7], rows[:5], rows[:1])
    ]
    return kept.steps[0], trainer.state.log_history[0], found, [one["clm"] for one in alone]


@pytest.mark.parametrize("losses", [LOSSES, {"clm": 1.0, "baseline_uld": 1.0}, {"clm": 1.0, **SCALED}])
def test_two_ranks_are_one_big_batch(losses, models, make_collator, rows, tmp_path):
    values, wanted = one_batch(models, make_collator(), rows, losses)
    results = run_ranks(
        _train_on_a_rank, 2, models, make_collator, rows, tmp_path, {"losses": losses}, always_shard=False
    )
    for gradient, logged, evaluated, alone in results:
        assert distance(gradient, wanted) < 1e-5
        assert logged["loss"] == pytest.approx(values["loss"], rel=1e-5)
        each_row_once = [*alone, alone[2], alone[2], alone[2]]
        assert evaluated == pytest.approx(each_row_once, rel=1e-6)


def _train_parts_on_a_rank(world, models, make_collator, rows, folder, losses):
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(world.rank)}
    torch.manual_seed(world.rank)  # parts that begin unlike are made alike
    trainer, kept = make_trainer(
        models,
        make_collator(),
        rows,
        folder,
        losses=losses,
        learning_rate=0.0,
        seed=world.rank,
        data_seed=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    parts = trainer.distiller.parts
    return kept.steps[0], gradients(parts), parts.state_dict()


@pytest.mark.parametrize("losses", [{"clm": 1.0, "baseline_dskd": 1.0}])
def test_what_a_loss_trains_beside_the_model_has_the_gradient_of_one_big_batch(
    losses, models, make_collator, rows, tmp_path
):
    results = run_ranks(
        _train_parts_on_a_rank, 2, models, make_collator, rows, tmp_path, losses, always_shard=False
    )
    whole = Distiller(models[0], models[1], make_collator(), losses)
    whole.parts.load_state_dict(results[0][2])
    whole.backward(models[0], [make_collator()(rows)])
    for of_model, of_parts, state in results:
        assert distance(of_model, gradients(models[0])) < 1e-5
        assert distance(of_parts, gradients(whole.parts)) < 1e-5
        assert all(torch.equal(value, results[0][2][name]) for name, value in state.items())


def test_evaluation_divides_once(models, make_collator, rows, tmp_path):
    values, _ = one_batch(models, make_collator(), rows)
    trainer, _ = make_trainer(
        models, make_collator(), rows, tmp_path, eval_dataset=rows, per_device_eval_batch_size=3
    )
    found = trainer.evaluate()
    for name, value in values.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert trainer.predict(rows).metrics["test_clm"] == pytest.approx(values["clm"], rel=1e-5)


def test_eval_strategy_saving_and_resume(models, make_collator, rows, tmp_path):
    arguments = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_dataset": rows,
        "losses": {"clm": 1.0, "baseline_dskd": 1.0},
    }
    before = copy.deepcopy(models[1].state_dict())
    trainer, _ = make_trainer(copy.deepcopy(models), make_collator(), rows, tmp_path, **arguments)
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert all(
        torch.equal(value, before[name])
        for name, value in trainer.distiller.teacher.model.state_dict().items()
    )
    assert not any(p.grad is not None for p in trainer.distiller.teacher.parameters())

    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-4" / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) <= set(models[0].state_dict())
    again, _ = make_trainer(copy.deepcopy(models), make_collator(), rows, tmp_path, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(
        again.distiller.parts.parameters(), trainer.distiller.parts.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_streaming_data(models, make_collator, rows, tmp_path):
    _, wanted = one_batch(models, make_collator(), rows)
    trainer, kept = make_trainer(
        models,
        make_collator(),
        Stream(rows),
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    trainer.train()
    assert distance(kept.steps[0], wanted) < 1e-5


def test_bf16_computes_in_bf16(models, make_collator, rows, tmp_path):
    _, wanted = one_batch(models, make_collator(), rows)
    trainer, kept = make_trainer(models, make_collator(), rows, tmp_path, bf16=True)
    seen = []
    models[0].model.layers[0].mlp.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert 1e-5 < distance(kept.steps[0], wanted) < 0.1
    assert kept.steps[0].dtype == torch.float32


# about 4 s: Dynamo traces a whole model
def test_torch_compile_compiles(models, make_collator, rows, tmp_path):
    torch._dynamo.utils.counters.clear()
    student = randomised(tiny_model("llama", vocab_size=300, num_hidden_layers=1))
    models = (student, models[1])
    _, wanted = one_batch(models, make_collator(), rows)
    trainer, kept = make_trainer(
        models, make_collator(), rows, tmp_path, torch_compile=True, torch_compile_backend="eager"
    )
    trainer.train()
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert distance(kept.steps[0], wanted) < 1e-5


def test_lora_with_a_saved_adapter(models, make_collator, rows, tmp_path):
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(models[0], LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer, kept = make_trainer(
        (student, models[1]), make_collator(), rows, tmp_path, max_steps=2, gradient_checkpointing=True
    )
    trainer.train()
    assert all(bool(gradient.any()) for gradient in kept.steps)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alm_space", {"diff": "abs"}),
        ("alm_side_path", {}),
        ("alm_latents", {"align": "all_hidden_states", "project": True}),
        ("baseline_xtoken", {}),
        ("baseline_gold", {"beta": 0.3}),
        ("baseline_gold", {"uld_use_hybrid_loss": True}),
        ("baseline_mined", {"teacher_index": torch.arange(300)}),
    ],
)
def test_every_loss_by_name(name, options, models, make_collator, rows, tmp_path):
    trainer, kept = make_trainer(
        models, make_collator(), rows, tmp_path, losses={name: 2.0}, loss_options={name: options}
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(2 * logged[name], rel=1e-5)
    assert bool(kept.steps[0].any())
    assert bool(torch.isfinite(kept.steps[0]).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": {"alm_unconstraint": 1.0}}, "did you mean alm_unconstrained"),
        ({"losses": {}}, "losses must give a weight by name"),
        ({"losses": {"clm": 0.0}}, "weight of clm must be positive"),
        (
            {"losses": {"clm": 1}, "loss_options": {"clm": {"tau": 3}}},
            "clm has no option tau: it has workspace",
        ),
        (
            {"losses": {"clm": 1}, "loss_options": {"alm_space": {}}},
            "options of alm_space, which is not among",
        ),
        ({"losses": {"baseline_mined": 1}}, "baseline_mined needs the option teacher_index"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect"),
    ],
)
def test_what_cannot_act_is_refused(change, message, models, make_collator, rows, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(models, make_collator(), rows, tmp_path, **change)


def test_an_evaluation_of_nothing_is_refused(models, make_collator, rows, tmp_path):
    trainer, _ = make_trainer(models, make_collator(), rows, tmp_path)
    with pytest.raises(ValueError, match="there is nothing to evaluate"):
        trainer.distiller.evaluate([])


def test_wrong_material_is_refused(models, make_collator, rows, tmp_path):
    with pytest.raises(TypeError, match="must be an AlignedCollator of both tokenizers: got function"):
        make_trainer(models, lambda rows: rows, rows, tmp_path)
    with pytest.raises(ValueError, match="this is not the tokenizer that the model was trained with"):
        make_trainer((models[0], models[0]), make_collator(), rows, tmp_path)
    trainer, _ = make_trainer(models, make_collator(), [{"body": "no such field"}] * 8, tmp_path)
    with pytest.raises(ValueError, match="since rows were left out: 8 no field text"):
        trainer.train()
