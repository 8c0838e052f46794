"""A configuration is read strictly: what it accepts, what wins, and what it says to a mistake."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import (
    ALIASES,
    ConfigError,
    TrainConfig,
    parse_command_line,
    read_config,
    to_dict,
    to_yaml,
)
from tokenkit.config.later import LATER, feature_of, spell
from tokenkit.config.schema import flatten, leaves
from tokenkit.config.yaml_files import parse_yaml, read_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
OF_OTHER_DOORS = ("zett", "compute_tokenizer_info", "compute_mined_mapping", "eval_lockstep", "eval")
FILES_OF_TRAIN = sorted(file for file in CONFIGS.rglob("*.yaml") if file.stem not in OF_OTHER_DOORS)

NEEDED = {
    "student.pretrained_model_name_or_path": "student",
    "target_tokenizer_name": "byte",
    "data.dataset_name": "stories.txt",
}
NEEDED_FLAGS = [word for name, value in NEEDED.items() for word in ("--" + name, value)]

GUIDE = """
student.pretrained_model_name_or_path student.tokenizer_name student.revision
teacher.pretrained_model_name_or_path teacher.tokenizer_name teacher.revision target_tokenizer_name
tokens_to_add special_tokens_mode name output_dir seed steps warmup_steps batch_size
gradient_accumulation_steps eval_interval save_interval logging_interval sync_interval eval_at_step_zero
save_at_step_zero skip_lm_eval dry_run do_cost_analysis debug max_length_teacher max_length_new
pad_to_multiple_of use_chat_template chat_template_mode loss_mask_mode losses loss_weights
loss_weight_mode uncertainty_s_init ema_alpha loss_schedules multitask_aggregation_fn alm_diff_fn
alm_mode binarization_temp renyi_alpha distill_chunk_sizes distill_main_path_numerator
distill_main_path_denominator space_mask_mode tokenizer_pair_bias_threshold tokenizer_pair_data_path
side_path_mapping_mode side_path_distance_fn tokenizer_pair_bias_threshold_side_path latents_to_align
latents_normalization latents_chunks latents_do_project baseline.divergence baseline.kd_temp
baseline.kd_rate baseline.teacher_temperature baseline.skew_lambda baseline.adaptive_kl_alpha
baseline.dskd_use_causal_attention_mask baseline.gradnorm_alpha baseline.gradnorm_lr mined_mapping_path
train_model_mode train_embeddings output_embeddings_mode expand_input_ids model_lora_rank
model_lora_alpha model_lora_dropout model_lora_targets model_lora_target_regex model_lora_layers
model_lora_modules_to_save hypernet.architecture hypernet.num_layers hypernet.num_heads hypernet.residual
hypernet.residual_alpha hypernet.use_attention hypernet.use_attention_mask hypernet.shared
n_prefix_layers prefix_steps prefix_lr prefix_trainable dtype gradient_checkpointing use_flash_attention
attn_implementation optimizer.name optimizer.learning_rate optimizer.weight_decay optimizer.beta1
optimizer.beta2 optimizer.epsilon optimizer.max_grad_norm optimizer.lr_scheduler_type optimizer.schedule
optimizer.lr_min_ratio optimizer.use_fused_adam optimizer.param_groups data.dataset_name
data.dataset_config_name data.split data.streaming data.shuffle_buffer_size data.text_field
data.text_template data.num_workers data.batch_size data.datasets use_distributed distributed_backend
n_data_parallel n_model_parallel eval.tasks eval.limit eval.add_bos eval.chat_template_mode ppl_eval_data
export_to report_to resume
""".split()


def read(overrides=None, **fields):
    return read_config(TrainConfig, (), NEEDED | (overrides or {}) | fields, aliases=ALIASES)


def refusal(overrides=None, **fields):
    with pytest.raises(ConfigError) as caught:
        read(overrides, **fields)
    return str(caught.value)


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_field_of_the_guide_exists_and_is_documented():
    fields = {leaf.name: leaf for leaf in leaves(TrainConfig)}
    assert not set(GUIDE) - set(fields)
    assert [name for name, leaf in fields.items() if not leaf.help] == []


def test_defaults_given_explicitly_change_nothing():
    config = read()
    assert read_config(TrainConfig, (), to_dict(config)) == config


def test_the_printed_configuration_reads_back_equal(tmp_path):
    config = read(
        losses=["clm", "alm_space"],
        loss_weights={"clm": 0.5},
        loss_schedules=["constant", "linear(1,0.1,50)"],
        tokens_to_add=["<a>", "1e5", "null", "\\${x}"],
        optimizer={"param_groups": [{"pattern": "embed", "lr_scale": 2}], "learning_rate": 3e-5},
        model_lora_layers="0-8",
    )
    file = write(tmp_path, "config.yaml", to_yaml(config))
    assert read_config(TrainConfig, [file]) == config


@settings(deadline=None)
@given(st.text(alphabet="${}\\:x ", max_size=8))
def test_text_that_looks_like_an_interpolation_survives_printing(text):
    config = read()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=text))
    assert read_config(TrainConfig, (), parse_yaml(to_yaml(config), "printed")) == config


@pytest.mark.parametrize("written", ["5e-5", "5.0e-5", "0.5E-4", "0.00005", '"5e-5"'])
def test_numbers_with_an_exponent_are_numbers(tmp_path, written):
    file = write(tmp_path, "a.yaml", f"optimizer: {{learning_rate: {written}}}")
    assert read_config(TrainConfig, [file], NEEDED).optimizer.learning_rate == 5e-5


def test_later_files_win_field_by_field_and_flags_win_over_files(tmp_path):
    first = write(tmp_path, "a.yaml", "steps: 10\nbatch_size: 4\noptimizer: {beta1: 0.5, beta2: 0.6}")
    second = write(tmp_path, "b.yaml", "steps: 20\noptimizer: {beta2: 0.7}")
    flags = ["--config", str(first), str(second), *NEEDED_FLAGS, "--batch-size", "8"]
    config = parse_command_line(TrainConfig, flags, program="x")
    assert (config.schedule.steps, config.schedule.batch_size) == (20, 8)
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.5, 0.7)


def test_a_group_set_to_null_forgets_what_an_earlier_file_said(tmp_path):
    first = write(tmp_path, "a.yaml", "teacher: {pretrained_model_name_or_path: big}")
    second = write(tmp_path, "b.yaml", "teacher: null")
    assert read_config(TrainConfig, [first], NEEDED).teacher.pretrained_model_name_or_path == "big"
    assert read_config(TrainConfig, [first, second], NEEDED).teacher is None


def test_interpolation_sees_fields_defaults_flags_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENKIT_TEST_STEPS", "30")
    text = (
        "output_dir: ${oc.env:TOKENKIT_TEST_NONE,runs}/${name}-${seed}\nsteps: ${oc.env:TOKENKIT_TEST_STEPS}"
    )
    file = write(tmp_path, "a.yaml", text)
    config = read_config(TrainConfig, [file], NEEDED | {"name": "mine"})
    assert (config.run.output_dir, config.schedule.steps) == ("runs/mine-0", 30)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${oc.create:x}", "only ${oc.env:VAR,default} is"),
        ("${eval:1+1}", "only ${oc.env:VAR,default} is"),
        ("${oc.env:HF_TOKEN,x}", "looks like a secret"),
        ("${oc.env:WANDB_API_KEY}", "looks like a secret"),
        ("${oc.env:'HF_TOKEN'}", "looks like a secret"),
        ("${oc.env:HF_${name}}", "looks like a secret"),
        ("${nothing_of_that_name}", "output_dir: cannot resolve"),
        ("${oc.env:TOKENKIT_TEST_UNSET}", "output_dir: cannot resolve"),
    ],
)
def test_interpolations_that_are_refused(value, message):
    assert message in refusal(output_dir=value)


def test_flags_take_lists_mappings_records_booleans_and_null():
    flags = (
        "--losses clm alm_space --loss_weights clm=2 alm_space=0.5 --no-train-embeddings --dry-run".split()
    )
    flags += "--distill-chunk-sizes 1 2 --model_lora_alpha none --gradient-checkpointing true".split()
    flags += [
        "--optimizer.param-groups",
        "[{pattern: embed, lr_scale: 0.1}]",
        "--loss-schedules",
        "[cosine, linear]",
    ]
    config = parse_command_line(TrainConfig, NEEDED_FLAGS + flags, program="x")
    assert config.objective.loss_weights == {"clm": 2.0, "alm_space": 0.5}
    assert config.objective.loss_schedules == ("cosine", "linear")
    assert config.objective.options.alm.chunk_sizes == (1, 2)
    assert not config.training.train_embeddings
    assert config.run.dry_run
    assert config.training.gradient_checkpointing
    assert config.optimizer.param_groups[0].lr_scale == 0.1


def test_an_alias_is_read_and_reported_once(tmp_path):
    file = write(
        tmp_path, "a.yaml", "new: {pretrained_model_name_or_path: m}\noptimizer: {grad_acc_steps: 2}"
    )
    again = write(tmp_path, "b.yaml", "optimizer: {grad_acc_steps: 4}\nlog_interval: 3")
    said = []
    needed = {name: value for name, value in NEEDED.items() if not name.startswith("student")}
    config = read_config(TrainConfig, [file, again], needed, aliases=ALIASES, say=said.append)
    assert config.student.pretrained_model_name_or_path == "m"
    assert config.schedule.gradient_accumulation_steps == 4
    assert sorted(said) == [
        "tokenkit: log_interval is read as logging_interval",
        "tokenkit: new is read as student",
        "tokenkit: optimizer.grad_acc_steps is read as gradient_accumulation_steps",
    ]


def test_aliases_work_as_flags(capsys):
    flags = [
        "--new.pretrained-model-name-or-path",
        "m",
        "--target-tokenizer",
        "byte",
        "--data.dataset_name",
        "d",
    ]
    config = parse_command_line(TrainConfig, [*flags, "--output=o"], program="x", aliases=ALIASES)
    assert (config.student.pretrained_model_name_or_path, config.run.output_dir) == ("m", "o")
    assert "--new.pretrained-model-name-or-path is read as --student." in capsys.readouterr().err


def test_settings_without_dashes_follow_each_other_behind_a_flag():
    words = ["--student", "m", "steps=7", "lr=0.5", "output=o", "data=d", "--losses", "clm", "seed=3"]
    found = flatten(parse_command_line(TrainConfig, words, program="train"))
    wanted = {"steps": 7, "optimizer.learning_rate": 0.5, "output_dir": "o", "losses": ("clm",), "seed": 3}
    assert {name: found[name] for name in wanted} == wanted


def test_every_alias_stands_for_something_that_exists():
    names = {leaf.name for leaf in leaves(TrainConfig)} | {"student"}
    assert set(ALIASES.values()) <= names
    assert set(ALIASES) & names == {"data.batch_size"}  # a field of the data, which other commands have


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stesp", 1, "unknown field stesp, did you mean steps?"),
        ("learning_rate", 1, "unknown field learning_rate: it is optimizer.learning_rate"),
        ("optimizer.steps", 1, "unknown field optimizer.steps: it is steps"),
        ("optimizer", {"lr": 1}, "unknown field optimizer.lr"),
        ("optimizr", {"steps": 1}, "unknown section optimizr, did you mean optimizer?"),
        ("optimizr", {}, "unknown section optimizr, did you mean optimizer?"),
        ("data.heldot", {"fraction": 1}, "unknown section data.heldot, did you mean data.heldout?"),
        ("optimizer", 3, "optimizer: expected a mapping, got 3"),
        ("steps", "many", "steps: expected an integer, got 'many'"),
        ("steps", 1.5, "steps: expected an integer, got 1.5"),
        ("steps", True, "steps: expected an integer, got True"),
        ("steps", None, "steps: expected an integer, got None"),
        ("steps", {"a": 1}, "steps: expected an integer"),
        ("binarization_temp", "nan", "binarization_temp: expected a number, got 'nan'"),
        ("binarization_temp", float("inf"), "binarization_temp: expected a number, got inf"),
        ("dry_run", "perhaps", "dry_run: expected true or false"),
        ("dtype", "bf16", "dtype: 'bf16' is not valid"),
        ("alm_diff_fn", "binary_cee", "did you mean binary_ce?"),
        ("alm_mode", "append_spaces", "did you mean append_space?"),
        ("losses", ["alm_unconstraind"], "did you mean alm_unconstrained?"),
        ("losses", [], "losses is empty"),
        ("losses", ["clm", "sft"], "names one loss twice"),
        ("losses", ["alm"], "make one with `tokenkit pair-stats`"),
        ("loss_weights", [1, 2], "one value per loss (1: alm_unconstrained), got 2"),
        ("loss_weights", {"clm": 1}, "loss_weights names clm, but the losses of this run are"),
        ("loss_weights", [-1], "loss_weights must be at least 0"),
        ("loss_weights", [0], "loss_weights are all 0: nothing would be trained"),
        ("loss_weights", ["x"], "loss_weights: expected a list, each a number or a mapping"),
        ("optimizer.param_groups", [{"patern": "x"}], "unknown field patern, did you mean pattern?"),
        ("optimizer.param_groups", [{"lr_scale": 1}], "missing required field pattern"),
        ("optimizer.learning_rate", -1, "optimizer.learning_rate must be positive"),
        ("distill_chunk_sizes", [0], "sizes of at least 1"),
        ("seed", -1, "seed must lie in"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_wants(field, value, message):
    text = refusal({field: value})
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_tokenizer_name": None}, "would be its own teacher"),
        ({"data.dataset_name": None}, "missing required field data.dataset_name"),
        (
            {"batch_size": 10, "gradient_accumulation_steps": 4},
            "must be a multiple of gradient_accumulation_steps",
        ),
        ({"warmup_steps": 11, "steps": 10}, "must not exceed steps (10)"),
        ({"train_model_mode": "none", "train_embeddings": False}, "nothing would be trained"),
        ({"use_flash_attention": True, "attn_implementation": "eager"}, "contradicts attn_implementation"),
        ({"model_lora_targets": ["a"], "model_lora_target_regex": "b"}, "both set"),
        (
            {"optimizer.schedule": "cosine", "optimizer.lr_scheduler_type": "linear"},
            "keep the one that is meant",
        ),
        ({"trust_remote_code": True}, "needs student.revision to be a 40-digit commit"),
        ({"teacher.tokenizer_name": "byte"}, "missing required field teacher.pretrained_model_name_or_path"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, message):
    assert message in refusal(fields)


def test_a_missing_required_field_is_named_with_its_flag():
    with pytest.raises(ConfigError, match=r"missing required field student\.pretrained.*--student VALUE"):
        read_config(TrainConfig, (), {"steps": 5})


def test_clm_alone_needs_neither_teacher_nor_target():
    assert read(losses=["clm"], target_tokenizer_name=None).teacher is None


def test_a_loss_of_ones_own_is_accepted():
    assert read(losses=["my_package.losses:mine"]).objective.losses == ("my_package.losses:mine",)


def other_value(leaf):
    """Some valid value of a field that is not its default."""
    if isinstance(leaf.default, bool):
        return not leaf.default
    if isinstance(leaf.default, int | float):
        return leaf.default + 1
    choices = [option for option in getattr(leaf.type, "__args__", ()) if isinstance(option, str)]
    nested = [c for option in getattr(leaf.type, "__args__", ()) for c in getattr(option, "__args__", ())]
    strings = [choice for choice in choices + nested if isinstance(choice, str) and choice != "static"]
    if strings:
        return next(choice for choice in strings if choice != leaf.default)
    return ["x"] if isinstance(leaf.default, tuple) else 3 if "int" in str(leaf.type) else "x"


LATER_FIELDS = [leaf for leaf in leaves(TrainConfig) if feature_of(leaf.name)]


@pytest.mark.parametrize("leaf", LATER_FIELDS, ids=lambda leaf: leaf.name)
def test_a_field_without_its_feature_says_so_when_set(leaf):
    assert read({leaf.name: leaf.default}) == read()
    message = refusal({leaf.name: other_value(leaf)})
    assert message.startswith(f"{leaf.name} is accepted but its feature comes with ")
    assert message.endswith(f"remove it or set it to {spell(leaf.default)}")


def test_the_features_that_are_not_here_yet():
    assert [leaf.name for leaf in LATER_FIELDS] == ["n_model_parallel"]


def test_every_rule_for_later_fields_concerns_some_field():
    rules = {key for leaf in LATER_FIELDS for key in LATER if leaf.name == key or leaf.name.startswith(key)}
    assert rules == set(LATER)


def test_a_mode_that_writes_a_template_needs_it():
    assert read({"use_chat_template": False}).text.use_chat_template is False
    message = refusal({"use_chat_template": False, "chat_template_mode": "surround_instruct"})
    assert "choose direct_encode, or leave use_chat_template" in message


@pytest.mark.parametrize(
    "name", ["hf_token", "wandb_api_key", "password", "student.secret", "data.access_key"]
)
def test_a_field_that_looks_like_a_secret_is_refused_without_repeating_it(name):
    message = refusal({name: "hunter2"})
    assert "looks like a secret" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("file", FILES_OF_TRAIN, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_file_of_configs_is_valid_alone_and_behind_the_main_one(file):
    needed = {
        name: value for name, value in NEEDED.items() if "data" not in read_yaml(file) or "data" not in name
    }
    assert read_config(TrainConfig, [file], needed).student.pretrained_model_name_or_path == "student"
    behind = [CONFIGS / "cross_tokenizer_distill.yaml", file]
    assert read_config(TrainConfig, behind).run.name == "cross_tokenizer_distill"


def test_an_error_in_a_file_names_the_file(tmp_path):
    file = write(tmp_path, "a.yaml", "steps: x")
    with pytest.raises(ConfigError, match=r"steps: expected an integer, got 'x' \(.*a\.yaml\)"):
        read_config(TrainConfig, [file], NEEDED)


@given(
    st.dictionaries(
        st.sampled_from(sorted(flatten(read()))), st.text() | st.integers() | st.none(), max_size=4
    )
)
def test_any_values_give_a_configuration_or_a_config_error(values):
    with contextlib.suppress(ConfigError):
        read(values)
