"""Values without measure, secrets, hostile files: one short line, before anything is loaded or lost."""

import json
import logging
import os
import time

import pytest
import torch

from tests.faults.registry import fault
from tests.ranks import start_ranks, wait_ranks
from tests.tiny import tiny_folder
from tokenkit import cli, parallel
from tokenkit.commands.pair_stats import PairStatsConfig
from tokenkit.commands.zett import ZettConfig
from tokenkit.config import ALIASES, TrainConfig, parse_command_line
from tokenkit.config.read import read_config
from tokenkit.config.yaml_files import parse_yaml
from tokenkit.data.mix import open_data
from tokenkit.data.options import DataOptions
from tokenkit.errors import CheckpointError, ConfigError, TooLargeError, exit_code
from tokenkit.models.causal_lm import LoadOptions, load_causal_lm
from tokenkit.run import checkpoint, metrics
from tokenkit.run import folder as run_folder
from tokenkit.run.checkpoint import Identity, State
from tokenkit.run.folder import staging_folder
from tokenkit.run.metrics import read_metrics
from tokenkit.run.redaction import is_secret_name
from tokenkit.training import estimate, loop
from tokenkit.training.loop import go_on
from tokenkit.training.reports import measurements

BASE = {"student.pretrained_model_name_or_path": "m", "data.dataset_name": "d", "losses": "clm"}
BASE |= {"target_tokenizer_name": "t"}
HUGGING = "hf_" + "abcDEF1234567890" * 2


def parse(flag, value):
    name = flag.removeprefix("--").replace("-", "_")
    return read_config(TrainConfig, [], BASE | {name: value}, aliases=ALIASES)


SECRET_NAMES = [
    "OPENAI_KEY",
    "SSH_PRIVATE_KEY",
    "GITHUB_PAT",
    "DB_PASS",
    "TOKEN_HF",
    "PASSWORD_FILE",
    "MY_PWD",
]
SECRET_NAMES += ["HF_TOKEN", "awsSecretAccessKey", "KEY2", "SLACK_WEBHOOK", "BASIC_AUTH", "client.secret"]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets_are_known_wherever_the_word_stands(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["tokens_to_add", "TOKENIZERS_PARALLELISM", "PWD", "OLDPWD", "PATH", "KEYBOARD", "monkey", "compass"],
)
def test_other_names_are_not(name):
    assert not is_secret_name(name)


@fault(
    "A secret in the configuration, by ${oc.env:NAME} or as text",
    "refused, by the variable's name or by what the value looks like; the value is never repeated",
    code=64,
    kept="nothing is begun",
)
@pytest.mark.parametrize("name", [*SECRET_NAMES[:6], "HARMLESS"])
def test_secrets_do_not_get_into_a_configuration(name, monkeypatch):
    monkeypatch.setenv(name, HUGGING)
    with pytest.raises(ConfigError, match=r"secret|holds a key") as caught:
        parse("--name", f"${{oc.env:{name}}}")
    assert HUGGING not in str(caught.value)
    texts = (
        HUGGING,
        f"s3://user:{'p' * 12}@host/data",
        "x ghp_" + "a" * 36,
        "-----BEGIN RSA PRIVATE KEY-----",
    )
    for text in texts if name == "HARMLESS" else ():
        with pytest.raises(ConfigError, match="name holds a key") as caught:
            parse("--name", text)
        assert text not in str(caught.value)


def test_the_value_of_a_secret_variable_is_refused_and_a_path_to_one_is_not(monkeypatch):
    monkeypatch.setenv("DB_PASS", "correct-horse")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/socket")
    with pytest.raises(ConfigError, match="name holds a key"):
        parse("--name", "run-correct-horse")
    assert parse("--name", "/tmp/socket").run.name == "/tmp/socket"


@fault(
    "A secret in an error, a traceback, a warning of any library, or the words of a tracker that fails",
    "blacked out",
    code="-",
    kept="everything",
)
def test_no_log_of_any_library_shows_a_secret(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    before = logging.getLogRecordFactory()
    try:
        assert cli.run(lambda: 0) == 0
        cli.run(lambda: 0)
        logging.getLogger("some.library").warning("key %s", "correct-horse-battery")
        try:
            raise ValueError("correct-horse-battery")
        except ValueError:
            logging.getLogger("some.library").exception("failed")
    finally:
        logging.setLogRecordFactory(before)

    def broken(folder, config):
        raise ConnectionError("401 for correct-horse-battery")

    monkeypatch.setitem(metrics._OPENERS, "wandb", broken)
    metrics.Trackers(["wandb"], tmp_path, {}, is_main=True)
    assert "401 for [redacted]" in caplog.text
    assert "correct-horse-battery" not in caplog.text
    assert caplog.text.count("[redacted]") >= 3


@fault("YAML of nested aliases or merge keys", "refused before it is expanded", code=64, kept="-")
def test_yaml_that_grows_is_refused_before_it_grows():
    lines = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(10)) + "}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)]
    began = time.monotonic()
    with pytest.raises(ConfigError, match="once its aliases are expanded"):
        parse_yaml("\n".join(lines), "bomb.yaml")
    with pytest.raises(ConfigError, match=r"once its aliases are expanded|YAML"):
        parse_yaml("a: &a [*a]", "loop.yaml")
    assert time.monotonic() - began < 2
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "fine.yaml") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
    }


@fault(
    "A number without measure: steps, batch_size, lengths, ranks of adapters, layers in a config.json",
    "refused with the largest that is taken, in a short line",
    code="64, 65",
    kept="-",
)
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", "1e30"),
        ("--steps", "1" + "0" * 5000),
        ("--batch-size", "1000000000"),
        ("--max-length-new", "1e9"),
        ("--model-lora-rank", "1e9"),
        ("--hang-timeout", "1e12"),
    ],
)
def test_numbers_without_measure_are_refused(flag, value, capsys):
    def read():
        parse(flag, value)

    assert cli.run(read) == 64
    line = capsys.readouterr().err
    assert flag.removeprefix("--").replace("-", "_") in line
    assert len(line) < 2500
    assert "4300" not in line


def test_a_value_of_any_length_gives_a_short_line(capsys):
    def read():
        parse("--losses", "x" * 400_000)

    assert cli.run(read) == 64
    assert len(capsys.readouterr().err) < 2500


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", 10**7), ("vocab_size", 10**12)])
def test_a_model_of_ten_million_layers_is_not_built(name, value, tmp_path):
    path = tiny_folder(tmp_path / "model") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=rf"{name} in the config.json of .* must be at most"):
        load_causal_lm(str(tmp_path / "model"), 300, LoadOptions())


@fault(
    "Memory runs out, of the machine or of a GPU",
    "one line: how much was wanted; in a training what holds it by the estimate, and what to change",
    code=71,
    kept="the last checkpoint",
)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory_is_one_line_with_what_to_change(error, capsys):
    def door():
        raise error

    assert cli.run(door) == 71 == exit_code(error)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "out of memory: " in line
    assert "gradient_accumulation_steps" in line
    assert "If reserved" not in line


def test_a_training_without_memory_says_what_holds_it(make_config, tmp_path, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but")

    monkeypatch.setattr(loop, "train_step", run_out)
    with pytest.raises(TooLargeError, match=r"Tried to allocate 2\.00 GiB: by the estimate a process needs"):
        loop.train(make_config(losses=["clm"], train_model_mode="full"))
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["code"], outcome["outcome"]) == (71, "memory")
    assert any(f"for the {part}, {lever}" in outcome["reason"] for part, lever in estimate.LEVERS.items())


def test_every_part_of_the_estimate_can_be_made_smaller(make_config):
    assert estimate.estimate(make_config(), 2).memory.keys() == estimate.LEVERS.keys()


def test_hugging_faces_switch_for_foreign_code_is_said_to_do_nothing(monkeypatch, capsys):
    monkeypatch.setenv("HF_TRUST_REMOTE_CODE", "1")
    cli.run(lambda: cli.run(lambda: 0))
    assert capsys.readouterr().err.count("HF_TRUST_REMOTE_CODE has no effect here") == 1
    assert "HF_TRUST_REMOTE_CODE" not in os.environ


@pytest.mark.parametrize(
    ("schema", "flags"),
    [
        (PairStatsConfig, ["--teacher-tokenizer-name", "a", "--target-tokenizer-name", "b", "--output", "o"]),
        (ZettConfig, ["--method", "focus"]),
        (ZettConfig, ["--method", "omp"]),
    ],
)
def test_what_a_command_cannot_do_without_is_asked_for_before_anything_is_loaded(schema, flags):
    if schema is ZettConfig:
        flags = [
            *flags,
            "--model.pretrained-model-name-or-path",
            "m",
            "--target-tokenizer-name",
            "t",
            "--output",
            "o",
        ]
    with pytest.raises(ConfigError, match=r"nothing to count|give a text with --data"):
        parse_command_line(schema, flags, program="test")


@fault(
    "A line of metrics.jsonl, or the state of a rank, that no run wrote (nested, forged)",
    "refused, naming the file",
    code="64, 65",
    kept="everything",
)
@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": 1e999}', '{"step": []}', "7"])
def test_a_line_of_metrics_that_is_none_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .*metrics\.jsonl must be a JSON object"):
        read_metrics(path)


@pytest.mark.parametrize("name", ["position", "epoch", "read", "documents"])
@pytest.mark.parametrize("value", [-1, 1.5, "7", None, True, 10**30])
def test_a_position_that_no_run_had_is_refused(name, value, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a b"}\n' * 5)
    mix, _ = open_data(DataOptions(dataset_name=str(tmp_path / "d.jsonl")))
    state = mix.state_dict()
    (state if name == "documents" else state["sources"][0])[name] = value
    with pytest.raises(ValueError, match=f"its {name} is "):
        mix.load_state_dict(state)


@pytest.mark.parametrize(
    "rng",
    [{"torch": []}, {"torch": "AA==", "cuda": None}, {"torch": "?"}, [], 7, {"torch": None, "python": [1]}],
)
def test_a_forged_state_of_a_rank_is_refused_in_words(rng, tmp_path):
    alone = parallel.World(0, 1, torch.device("cpu"), None)
    state = State(torch.nn.Linear(2, 2), None, 1)
    folder = checkpoint.save(tmp_path, state, Identity({}), alone)
    (folder / "rank_00000.json").write_text(json.dumps({"extra": {}, "rng": rng}))
    with pytest.raises(CheckpointError, match="holds no state of a rank"):
        checkpoint._load_rank_state(folder, checkpoint.read_manifest(folder), state, alone)


@pytest.mark.parametrize(
    "forged",
    [
        {"loss_scale": 5},
        {"loss_scale": ["x", None]},
        {"objective": []},
        {"data": {}},
        {"objective": {"a": 1}},
    ],
)
def test_a_forged_position_of_a_run_is_refused_in_words(make_config, forged, tmp_path):
    from tokenkit.training.build import build

    alone = parallel.World(0, 1, torch.device("cpu"), None)
    parts = build(make_config(losses=["clm"]), alone)
    run = parts.run
    extra = {
        "data": parts.batches.state_dict(),
        "loss_scale": [1.0, 0],
        "objective": run.objective.state_dict(),
    }
    state = State(run.model, run.optimizer, 1, extra | forged)
    with pytest.raises(CheckpointError, match="holds no state that this run can go on from"):
        go_on(parts, state, alone, tmp_path)


def killed_in_an_export(world, folder):
    with staging_folder(folder / "export") as staging:
        (staging / "model.safetensors").write_text("half")
        os.kill(os.getpid(), 9)


@fault(
    "Killed, or out of room, while the export is written",
    "an error removes what was written; what a kill left is removed by the next export beside it, and said",
    code="-9, 74",
    kept="the checkpoints",
)
def test_what_a_killed_export_left_is_swept_and_nothing_else(tmp_path, capsys):
    wait_ranks(start_ranks(killed_in_an_export, 1, tmp_path, always_shard=False))
    (left,) = tmp_path.iterdir()
    others = [".export-mine", ".export-0123456g", "export2-01234567", ".export-01234567"]
    for name in others[:-1]:
        (tmp_path / name).mkdir()
    (tmp_path / others[-1]).symlink_to(tmp_path / "export2-01234567")
    work = staging_folder(tmp_path / "export")
    staging = work.__enter__()
    with staging_folder(tmp_path / "export") as second:
        assert staging.is_dir(), "one at work was swept"
        assert not left.exists()
        (second / "x").touch()
    with pytest.raises(OSError, match="not empty"):  # the export that came first stays
        work.__exit__(None, None, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "export"])
    assert f"removed {left}" in capsys.readouterr().err
    with pytest.raises(OSError, match="No space"), staging_folder(tmp_path / "export3"):
        raise OSError(28, "No space left on device")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "export"])


def test_a_folder_of_which_nobody_knows_whether_it_is_in_use_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / ".export-01234567").mkdir()
    monkeypatch.setattr(run_folder, "_lock", lambda handle, *, wait: False)
    with staging_folder(tmp_path / "export"):
        pass
    assert (tmp_path / ".export-01234567").is_dir()
    assert "may have been left by an export that was cut off: remove it" in capsys.readouterr().err


def test_the_card_of_a_resumed_run_says_the_bits_per_byte_that_were_measured(tmp_path):
    assert measurements(read_metrics(tmp_path / "metrics.jsonl")) == {}
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "bits_per_byte/student": 2.5, "bits_per_byte/teacher": 2.25, "heldout_bytes": 100},
        {"step": 3, "loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = measurements(read_metrics(tmp_path / "metrics.jsonl"))[2]
    assert (found.student, found.teacher, found.num_bytes) == (2.5, 2.25, 100)
