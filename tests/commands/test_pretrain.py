"""`tokenkit pretrain`: five sections of a file become a run of the one loop."""

import dataclasses
import json

import pytest
import yaml

from tests.conftest import SHARED_DATA
from tests.tiny import TEXT, byte_level_bpe
from tokenkit.commands.pretrain import ALIASES, dry_run, main
from tokenkit.config import ConfigError, parse_command_line, read_config, to_dict
from tokenkit.config.pretrain import PretrainConfig, train_config
from tokenkit.config.read import nested
from tokenkit.config.schema import leaves
from tokenkit.data.epoch import rows_of_an_epoch
from tokenkit.data.options import SourceOptions
from tokenkit.errors import ExitCode

GUIDE = SHARED_DATA.parent / "guides" / "lm_trainer_configuration.md"
PEER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 320, "max_position_embeddings": 64, "peer_start_layer": 1,
    "peer_config": {
        "num_experts": 64, "product_key_dim": [8, 8], "num_experts_per_tok": 2, "num_heads": 2,
        "query_dim": 16,
    },
    "mla_config": {
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "qk_nope_head_dim": 8,
    },
}  # fmt: skip
DATA = {
    "dataset_config.datasets": [{"path": "text.txt"}], "dataset_config.tokenizer_name": "byte",
    "dataset_config.max_seq_length": 64,
}  # fmt: skip


def read(**changes):
    given = {"model_config": PEER, "train_config.max_steps": 10} | DATA
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    return read_config(PretrainConfig, (), given, say=lambda line: None)


def guide(tmp_path):
    """The blocks of the guide, one file as it is."""
    if not GUIDE.is_file():
        pytest.skip(f"the guide is absent: {GUIDE}")
    blocks = [part.split("```")[0] for part in GUIDE.read_text().split("```yaml")[1:]]
    (tmp_path / "guide.yaml").write_text("\n".join(b for b in blocks if "data_mixes" not in b))
    return str(tmp_path / "guide.yaml")


def test_the_guides_file_is_read_as_it_is_and_its_model_is_made_without_memory(tmp_path, capsys):
    words = ["--config", guide(tmp_path), "--dry-run"]
    assert main(words) == ExitCode.CONFIG
    assert "num_train_epochs needs steps_per_epoch, since pile-uncopyrighted, c4" in capsys.readouterr().err
    assert main([*words, "--train-config.steps-per-epoch", "10000"]) == 0
    said = capsys.readouterr().out
    assert "peer_mla: 16,267,581,440 parameters" in said
    assert "64 rows of 2,048 tokens" in said
    assert "30,000 steps" in said
    assert "3,000 of them warm up" in said
    sizes = {line.split("  ")[1]: line.split() for line in said.splitlines() if line.startswith("  ")}
    assert sizes["tables of experts"][-5:] == ["64.4", "32.2", "16.1", "8.1", "4.0"], "of 1, 2, 4, 8, 16"
    assert sizes["together"][-5:] == ["260.3", "130.6", "65.7", "33.2", "17.0"]
    assert "without activations" in said


OTHERS = {
    "model_config": {**PEER, "use_peer": False}, "train_config.output_dir": "x",
    "train_config.lr_scheduler_type": "linear", "train_config.attn_implementation": "eager",
    "train_config.resume_from_checkpoint": "true", "train_config.warmup_ratio": 0.5,
    "dataset_config.datasets": [{"path": "a"}], "dataset_config.tokenizer_name": "x",
    "dataset_config.max_seq_length": 32, "dataset_config.heldout_fraction": 0.5,
    "dataset_config.eval_dataset": "x", "wandb_config.project": "x", "wandb_config.entity": "x",
    "wandb_config.name": "x", "wandb_config.log_model": "all", "dry_run": None, "debug": True,
    "train_config.float8": "rowwise", "train_config.max_steps": 5, "train_config.log_level": None,
    "train_config.gradient_accumulation_steps": 2, "train_config.num_train_epochs": None,
    "train_config.steps_per_epoch": None,
    "eval_config.evals_registry_path": None, "eval_config.evals": None,
    "eval_config.eval_batch_size": None, "eval_config.limit": None, "eval_config.num_fewshot": None,
    "eval_config.task_data": None,
}  # fmt: skip
"""Another value of a field; None: tests below look at it, or nothing here reads it."""


@pytest.mark.parametrize("name", [leaf.name for leaf in leaves(PretrainConfig)])
def test_every_field_becomes_one_of_the_run(name):
    default = next(leaf.default for leaf in leaves(PretrainConfig) if leaf.name == name)
    if name in OTHERS:
        value = OTHERS[name]
    elif isinstance(default, bool):
        value = not default
    else:
        value = default // 2 if isinstance(default, int) else default * 0.5
    if value is None:
        return
    before = to_dict(train_config(read()))
    after = to_dict(train_config(read(**{name: value})))
    assert before != after, name


def test_sections_become_numbers_of_the_loop(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = train_config(
        read(
            train_config__max_steps=None, train_config__num_train_epochs=1.5, train_config__fp16=True,
            train_config__steps_per_epoch=100, train_config__per_device_train_batch_size=3,
            train_config__gradient_accumulation_steps=4, train_config__warmup_ratio=0.1,
        )
    )  # fmt: skip
    assert made.schedule.steps == 150
    assert made.schedule.warmup_steps == 15
    assert made.schedule.batch_size == 3 * 4 * 2
    assert made.training.dtype == "float16"
    assert made.student.from_config["model_type"] == "peer_mla"
    assert made.run.report_to == "none"


def test_benchmarks_are_those_of_training():
    asked = {"evals": ["piqa"], "eval_batch_size": 3, "limit": 5, "num_fewshot": 2, "task_data": "documents"}
    found = train_config(read(**{f"eval_config__{name}": value for name, value in asked.items()}))
    made = found.evaluation.eval
    assert (made.tasks, made.batch_size, made.limit) == (("piqa",), 3, 5)
    assert (made.num_fewshot, made.task_data) == (2, "documents")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_config__num_train_epochs": 3}, r"max_steps \(10\) and num_train_epochs \(3\) are both set"),
        ({"train_config__max_steps": None}, "nothing says how long"),
        ({"train_config__steps_per_epoch": 3}, "goes with num_train_epochs"),
        ({"train_config__float8": "rowwise", "train_config__fp16": True}, "goes with bfloat16, and fp16 is"),
        ({"train_config__bf16": True, "train_config__fp16": True}, "fp16 and bf16 are both true"),
        ({"train_config__warmup_raito": 0.1}, "did you mean train_config.warmup_ratio"),
        ({"model_config": {**PEER, "hiden_size": 3}}, "did you mean hidden_size"),
        (
            {"model_config": {**PEER, "peer_config": {**PEER["peer_config"], "num_experts": 65}}},
            "multiplies to 64",
        ),
        ({"dataset_config__max_seq_length": 65}, "the model has 64 positions"),
        ({"dataset_config__datasets": []}, "nothing to train on"),
        ({"train_config__resume_from_checkpoint": "elsewhere"}, "is not in output_dir"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(changes, words):
    with pytest.raises(ConfigError, match=words):
        train_config(read(**changes))


def test_processes_that_do_not_divide_the_columns_are_named_at_once(monkeypatch):
    columns = {**PEER, "peer_config": {**PEER["peer_config"], "sharding": "columns"}}
    read(model_config=columns)
    monkeypatch.setenv("WORLD_SIZE", "3")
    read(model_config=PEER)
    with pytest.raises(ConfigError, match="divide hidden_size, got 3 and 32"):
        read(model_config=columns)


def test_a_small_run_counts_its_epochs_and_goes_on_from_its_checkpoint(tmp_path, capsys):
    byte_level_bpe(tmp_path / "tokenizer")
    rows = [{"q": f"{number}", "a": text} for number, text in enumerate(TEXT * 6)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "text").write_text("\n\n".join(TEXT), encoding="utf-8")
    source = {
        "path": str(tmp_path / "rows.json"),
        "format": "json",
        "text_template": "{q} {a}",
        "weight": 0.7,
    }
    other = {"path": str(tmp_path / "text"), "format": "text", "weight": 0.3}
    given = {
        "model_config": PEER,
        "train_config.output_dir": str(tmp_path / "run"), "train_config.num_train_epochs": 1,
        "train_config.per_device_train_batch_size": 8, "train_config.gradient_accumulation_steps": 2,
        "train_config.learning_rate": "1e-2", "train_config.logging_steps": 1, "train_config.save_steps": 2,
        "train_config.eval_steps": 3, "dataset_config.datasets": [source, other],
        "dataset_config.tokenizer_name": str(tmp_path / "tokenizer"), "dataset_config.max_seq_length": 64,
        "dataset_config.heldout_fraction": 0.1, "wandb_config": None,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(nested(given)))
    words = ["--config", str(tmp_path / "config.yaml")]
    assert main(words) == 0
    said = capsys.readouterr().err
    files = [SourceOptions(**source), SourceOptions(**other)]
    expected = rows_of_an_epoch(files, 0.1, str(tmp_path / "tokenizer"), 64)
    assert f"an epoch is {expected} rows, {expected // 16} steps of 16" in said
    assert rows_of_an_epoch(files[1:], 0.0, str(tmp_path / "tokenizer"), None) == len(TEXT)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    steps = expected // 16
    newest = ["--train-config.resume-from-checkpoint", str(tmp_path / "run" / f"checkpoint-{steps}")]
    assert main([*words, *newest]) == 0
    assert "this run is done" in capsys.readouterr().err
    newest[1] = str(tmp_path / "run" / "checkpoint-999")
    assert main([*words, *newest]) == ExitCode.CONFIG
    assert (
        f"no checkpoint of step 999, only of {steps - 1 if steps % 2 else steps - 2}"
        in capsys.readouterr().err
    )


def test_the_word_resume_and_what_yaml_says_for_it():
    assert not train_config(read(train_config__resume_from_checkpoint=False)).run.resume
    for words in (
        ["--resume"],
        ["resume=true"],
        ["--train-config.resume-from-checkpoint", "outputs/pretrain"],
    ):
        given = [f"--{name}={json.dumps(value)}" for name, value in DATA.items() if "tokenizer" not in name]
        given += ["--dataset-config.tokenizer-name=byte", f"--model-config={json.dumps(PEER)}", *words]
        made = parse_command_line(PretrainConfig, [*given, "--max-steps=3"], program="test", aliases=ALIASES)
        assert train_config(made).run.resume, words


def test_words_change_the_model_of_a_file_and_yaml_takes_its_place(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(nested({"model_config": PEER} | DATA)))
    words = ["--config", str(tmp_path / "base.yaml"), "--max-steps=3", "--model-config"]
    one = parse_command_line(
        PretrainConfig, [*words, "hidden_size=64", "peer_config.num_heads=4"], program="test", aliases=ALIASES
    )
    assert one.model_config == PEER | {
        "hidden_size": 64,
        "peer_config": PEER["peer_config"] | {"num_heads": 4},
    }
    assert "replaced" not in capsys.readouterr().err
    whole = {"model_type": "gpt2", "vocab_size": 300}
    two = parse_command_line(PretrainConfig, [*words, json.dumps(whole)], program="test", aliases=ALIASES)
    assert two.model_config == whole
    assert "model_config is replaced as a whole: without hidden_size, " in capsys.readouterr().err


def test_a_dry_run_compares_the_rows_with_the_tokenizer():
    with pytest.raises(ConfigError, match="vocab_size is 260, and the tokenizer has 261 ids"):
        dry_run(read(model_config={**PEER, "vocab_size": 260}))
    sizeless = {name: value for name, value in PEER.items() if name != "vocab_size"}
    assert "27,264 parameters" in dry_run(read(model_config=sizeless)), "320 rows, as the run will have"
    said = dry_run(read(dataset_config__tokenizer_name="org/tokenizer"))
    assert "the tokenizer org/tokenizer is not here" in said


def test_dry_runs_of_other_architectures(capsys):
    llama = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 320}
    config = read(model_config=llama)
    assert "llama: " in dry_run(config)
    assert dataclasses.replace(config).kind == "llama"
