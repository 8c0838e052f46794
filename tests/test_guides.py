"""Fields, files and commands that users know from elsewhere work here, or are refused with a reason.

The tables are in tests/guides.py. Hub names are not loaded here; where a folder is needed a stand-in is.
"""

import re
import shlex

import pytest
import yaml

from tests import guides
from tokenkit.cli import door, main
from tokenkit.commands.eval import ALIASES as EVAL_ALIASES
from tokenkit.commands.eval import EvalConfig
from tokenkit.commands.eval_ensemble import ALIASES as ENSEMBLE_ALIASES
from tokenkit.commands.eval_ensemble import EvalEnsembleConfig
from tokenkit.commands.export import ALIASES as EXPORT_ALIASES
from tokenkit.commands.export import ExportConfig
from tokenkit.commands.mined_mapping import MinedMappingConfig
from tokenkit.commands.pair_stats import PairStatsConfig
from tokenkit.commands.zett import ALIASES as ZETT_ALIASES
from tokenkit.commands.zett import ZettConfig
from tokenkit.config import ALIASES, ConfigError, TrainConfig, parse_command_line, read_config
from tokenkit.config.read import nested, to_dict
from tokenkit.config.schema import leaves
from tokenkit.config.values import coerce, plain
from tokenkit.config.yaml_files import load_yaml
from tokenkit.errors import ExitCode

MODEL = "pretrained_model_name_or_path"
PAIR = {"teacher_tokenizer_name": "byte", "target_tokenizer_name": "byte", "output": "o"}
DATA = {"data.dataset_name": "stories.txt"}
DOORS = {
    "train": (TrainConfig, ALIASES, {f"student.{MODEL}": "m", "target_tokenizer_name": "byte"} | DATA),
    "zett": (
        ZettConfig,
        ZETT_ALIASES,
        {f"model.{MODEL}": "m", "target_tokenizer_name": "byte", "output": "o"},
    ),
    "eval-ensemble": (EvalEnsembleConfig, ENSEMBLE_ALIASES, {"models": ["m", "n"], "prompts": "x"}),
    "pair-stats": (PairStatsConfig, {}, PAIR | DATA),
    "mined-mapping": (MinedMappingConfig, {}, PAIR),
    "eval": (EvalConfig, EVAL_ALIASES, {"models": ["m"], "tasks": ["t"], "output": "o"}),
    "export": (ExportConfig, EXPORT_ALIASES, {"checkpoint_path": "x", "output": "o"}),
}
"""Configuration, other names, and what it cannot do without."""
NEEDED = {name: [f"{field}={value}" for field, value in door[2].items()] for name, door in DOORS.items()}
TABLES = {
    "train": guides.TRAIN,
    "zett": guides.ZETT,
    "eval-ensemble": guides.EVAL_LOCKSTEP,
    "pair-stats": guides.PAIR_STATS,
    "mined-mapping": guides.MINED_MAPPING,
    "eval": guides.EVAL,
}
LINES = [(name, line) for name, table in TABLES.items() for line in table.strip().splitlines()]
FOLDER = "outputs/tokenizer_data/llama3_to_qwen2"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """What earlier commands of the guides would have written."""
    mined = tmp_path / f"{FOLDER}_mined"
    mined.mkdir(parents=True)
    (tmp_path / FOLDER).mkdir()
    for folder in (mined, tmp_path / FOLDER):
        (folder / "mapping.npy").touch()
    monkeypatch.chdir(tmp_path)


def read(name, words):
    schema, aliases, _ = DOORS[name]
    return to_dict(parse_command_line(schema, words, program="test", aliases=aliases))


def wanted(schema, name, text):
    hints = {leaf.name: leaf.type for leaf in leaves(schema)}
    value = load_yaml(text, name) if text[:1] in "[{" else text
    return plain(coerce(hints[name], value, name))


def as_list(text):
    return [word.strip() for word in text.strip("[]").split(",")]


@pytest.mark.parametrize(("name", "line"), LINES, ids=[f"{name}:{line[:50]}" for name, line in LINES])
def test_a_field_works_or_says_why_not(name, line, tmp_path):
    line, _, reason = line.replace("FOLDER", FOLDER).partition(" ! ")
    line, _, becomes = line.partition(" -> ")
    setting, _, beside = line.partition(" ; ")
    field, _, value = setting.partition(" = ")
    in_yaml = as_list(value) if field == "losses" else yaml.safe_load(value)
    for file, values in (("needed.yaml", DOORS[name][2]), ("one.yaml", {field: in_yaml})):
        (tmp_path / file).write_text(yaml.safe_dump(nested(values)), encoding="utf-8")
    words = [*NEEDED[name], *beside.split(), f"{field}={value}"]
    from_file = ["--config", "needed.yaml", "one.yaml", *beside.split()]
    if reason:
        for given in (words, from_file):
            with pytest.raises(ConfigError) as caught:
                read(name, given)
            assert reason.replace("`", "") in str(caught.value).replace("`", "")
        return
    target, _, expected = becomes.partition(" = ")
    target = target or field
    expected = as_list(value) if field == "losses" else wanted(DOORS[name][0], target, expected or value)
    for given in (words, from_file):
        assert read(name, given)[target] == expected


def test_fields_of_a_trainer_of_language_models_are_refused_with_what_there_is():
    reasons = dict(line.split(" = ") for line in guides.LM_WORDS.strip().splitlines())
    for group, _, names in (part.partition(":") for part in re.split(r"\n(?=\w)", guides.LM_TRAINER.strip())):
        for name in (f"{group}.{last}" for last in names.split()):
            with pytest.raises(ConfigError) as caught:
                read_config(TrainConfig, (), nested({name: 1}), aliases=ALIASES)
            message = str(caught.value).replace("`", "")
            assert f"unknown field {name}: " in message
            assert reasons.get(name, "") in message


@pytest.mark.parametrize("name", [name for name in TABLES if name != "train"])
def test_the_whole_file_of_a_command_is_read(name, tmp_path, capsys):
    lines = [line.partition(" -> ") for line in TABLES[name].strip().splitlines() if line[:7] != "source_"]
    pairs = [setting.split(" = ") for setting, _, _ in lines]
    values = {field: yaml.safe_load(value) for field, value in pairs}
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(nested(values)), encoding="utf-8")
    fields = {(becomes or setting).partition(" = ")[0] for setting, _, becomes in lines}
    assert fields <= set(read(name, ["--config", "whole.yaml"]))


COMMANDS = [" ".join(command.split()) for command in guides.COMMANDS.split("\n\n")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:3]))
def test_a_command_comes_to_what_it_says(command):
    line, _, expected = command.partition("=>")
    name, words = door(shlex.split(line))
    values = read(name, words)
    for pair in expected.split():
        field, _, text = pair.partition("=")
        assert values[field] == wanted(DOORS[name][0], field, text)


@pytest.mark.parametrize("line", guides.ABSENT.strip().splitlines(), ids=lambda line: line.split()[0])
def test_a_command_that_is_not_here_says_why(line, capsys):
    assert main(line.split()) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert f"{line.split()[0]} is no command: " in error
    assert error.count("\n") == 1


def test_a_whole_file_with_two_names_for_one_thing(tmp_path):
    """The student's tokenizer with a target, data.batch_size beside batch_size, warmup_steps twice."""
    content = {
        "teacher": {"pretrained_model_name_or_path": "google/gemma-2-2b-it", "tokenizer_name": guides.GEMMA},
        "new": {
            "pretrained_model_name_or_path": "Qwen/Qwen2.5-1.5B",
            "tokenizer_name": "Qwen/Qwen2.5-1.5B:source=Qwen2:target=Gemma2",
        },
        "batch_size": 64,
        "warmup_steps": 100,
        "optimizer": {"warmup_steps": 1000, "learning_rate": "1e-4"},
        "data": {"dataset_name": "Anthropic/tulu-v3-sft-mixtures", "batch_size": 32},
    }
    file = tmp_path / "whole.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    said = []
    config = read_config(TrainConfig, [file], aliases=ALIASES, say=said.append)
    assert (config.schedule.batch_size, config.schedule.warmup_steps) == (64, 100)
    assert config.student.tokenizer_name == "Qwen/Qwen2.5-1.5B:source=Qwen2"
    assert config.target.target_tokenizer_name == "Qwen/Qwen2.5-1.5B:source=Qwen2:target=Gemma2"
    text = "\n".join(said)
    for line in (
        "data.batch_size gives way to batch_size",
        "optimizer.warmup_steps gives way to warmup_steps",
    ):
        assert line in text
    assert "new is read as student" in text


def test_files_name_others_and_templates_have_variables(tmp_path):
    (tmp_path / "overrides").mkdir()
    (tmp_path / "overrides" / "base.yaml").write_text("steps: 7", encoding="utf-8")
    names = [
        "_self_",
        {"models": "llama_qwen"},
        {"optimizer": "adamw"},
        {"data": "tulu3"},
        {"overrides": "base"},
    ]
    main_file = tmp_path / "mine.yaml"
    main_file.write_text(yaml.safe_dump({"defaults": names, "steps": 5}), encoding="utf-8")
    values = read("train", ["--config", str(main_file)])
    assert values["student.pretrained_model_name_or_path"] == guides.LLAMA
    assert (values["steps"], values["optimizer.beta2"]) == (7, 0.95)
    (tmp_path / "overrides" / "base.yaml").unlink()
    with pytest.raises(ConfigError, match=r"defaults: .*overrides/base does not exist.*mine\.yaml"):
        read("train", ["--config", str(main_file)])

    (tmp_path / "templates").mkdir()
    template = (
        "teacher: google/gemma-2-${size}-it\nnew: {pretrained_model_name_or_path: 'Qwen2.5-${target_size}'}"
    )
    (tmp_path / "templates" / "t.yaml").write_text(template, encoding="utf-8")
    words = ["--config-name=templates/t", "size=2b", "target_size=1.5B", "data=stories.txt"]
    values = read("train", words)
    assert values["teacher.pretrained_model_name_or_path"] == "google/gemma-2-2b-it"
    assert values["student.pretrained_model_name_or_path"] == "Qwen2.5-1.5B"
    with pytest.raises(ConfigError, match=r"unknown field other"):
        read("train", [*words, "other=1"])


def test_several_patterns_and_ranges_of_layers_are_lists_too(tmp_path):
    file = tmp_path / "lora.yaml"
    file.write_text("model_lora_target_regex: ['.*q_proj', '.*mlp.*']\nmodel_lora_layers: ['0-8', 20]")
    values = read("train", [*NEEDED["train"], "--config", str(file)])
    assert values["model_lora_target_regex"] == "(?:.*q_proj)|(?:.*mlp.*)"
    assert values["model_lora_layers"] == "0-8,20"


def test_printing_the_configuration_has_two_names(capsys):
    for form in (["--cfg=job"], ["--cfg", "job", "--resolve"], ["--print-config"]):
        with pytest.raises(SystemExit, match="0"):
            read("train", [*NEEDED["train"], *form])
        assert "batch_size: 16" in capsys.readouterr().out


def test_short_flags_and_a_comma_say_the_same_at_every_door():
    values = read(
        "train", "--student m --target byte --data s.txt --lr 1e-4 --output o --losses clm,alm_space".split()
    )
    assert values["optimizer.learning_rate"] == 1e-4
    assert (values["data.dataset_name"], values["output_dir"]) == ("s.txt", "o")
    assert values["losses"] == ["clm", "alm_space"]
    values = read(
        "train",
        [*NEEDED["train"], *"--loss-weights clm=1,alm_space=2 --losses clm alm_space steps=9".split()],
    )
    assert (values["loss_weights"], values["steps"]) == ({"clm": 1.0, "alm_space": 2.0}, 9)
    assert (
        read("zett", "--student m --target byte --output-dir o".split())[
            "model.pretrained_model_name_or_path"
        ]
        == "m"
    )
    assert (
        read("pair-stats", "--student byte --teacher gpt2 --data s.txt --output o".split())[
            "target_tokenizer_name"
        ]
        == "byte"
    )
