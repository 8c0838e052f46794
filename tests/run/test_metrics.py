"""The record of a run reads back exactly, survives crashes and holds no secrets."""

import json
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.registry import fault
from tokenkit.errors import ExitCode
from tokenkit.run import curves, metrics
from tokenkit.run.ending import Outcome, write_outcome
from tokenkit.run.metrics import (
    MetricsFile,
    Trackers,
    read_metrics,
    truncate_metrics,
)
from tokenkit.run.redaction import HIDDEN, RedactingFilter, redact, redact_config
from tokenkit.training.reports import Progress


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats()))
def test_numbers_read_back_exactly(tmp_path, values):
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    file = MetricsFile(tmp_path, step=0, is_main=True)
    for step, value in enumerate(values):
        file.write(step, {"loss": value, "loss/alm": torch.tensor(value, dtype=torch.float64)})
    file.close()
    for line, value in zip(read_metrics(tmp_path / "metrics.jsonl"), values, strict=True):
        for name in ("loss", "loss/alm"):
            assert line[name] == value or (math.isnan(line[name]) and math.isnan(value))


def test_every_line_is_strict_json(tmp_path):
    file = MetricsFile(tmp_path, step=0, is_main=True)
    file.write(1, {"loss": math.nan, "grad_norm": -math.inf, "note": "é"})
    file.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": "nan", "grad_norm": "-inf", "note": "é"}


@fault(
    "metrics.jsonl is torn, or ahead of the checkpoint",
    "cut back to the checkpoint: each step stands there once",
    code="-",
    kept="everything",
)
def test_a_resumed_run_forgets_what_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1}\n{"step": 2, "loss": 0.1}\n{"step": 2, "eval": 3}\n{"step": 3}\n{"step": 4, "lo'
    )
    file = MetricsFile(tmp_path, step=2, is_main=True)
    file.write(3, {"loss": 7})
    file.close()
    assert (
        path.read_text()
        == '{"step": 1}\n{"step": 2, "loss": 0.1}\n{"step": 2, "eval": 3}\n{"step": 3, "loss": 7}\n'
    )


@pytest.mark.parametrize(("step", "kept"), [(None, ""), (0, '{"step": 0, "eval": 3}\n')])
def test_what_was_measured_before_the_first_step_stays_with_a_checkpoint_alone(tmp_path, step, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval": 3}\n{"step": 1}\n')
    MetricsFile(tmp_path, step=step, is_main=True).close()
    assert path.read_text() == kept


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}', "", "\x00\x00"])
def test_a_torn_last_line_is_dropped(torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    assert read_metrics(path) == [{"step": 1}]
    truncate_metrics(path, 9)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ["nonsense", '{"loss": 1}', "[1]", '{"step": "x"}'])
def test_a_broken_line_inside_is_named_and_nothing_is_changed(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl must be a JSON object with a step"):
        truncate_metrics(path, 1)
    assert path.read_text().endswith('{"step": 3}\n')


def test_other_ranks_write_nothing(tmp_path):
    file = MetricsFile(tmp_path, step=0, is_main=False)
    file.write(1, {"loss": 1.0})
    file.sync()
    file.close()
    assert os.listdir(tmp_path) == []


def test_curves_are_a_picture_of_what_there_is(tmp_path):
    curves.draw_curves(tmp_path)
    assert os.listdir(tmp_path) == []
    file = MetricsFile(tmp_path, step=0, is_main=True)
    curves.draw_curves(tmp_path)
    for step in range(120):
        file.write(
            step, {"loss": 3 / (step + 1), "loss/alm": math.nan if step == 5 else 1.0, "learning_rate": 1e-3}
        )
    file.write(120, {"bits_per_byte/student": 1.2, "bits_per_byte/teacher": 1.0, "unknown": 4})
    curves.draw_curves(tmp_path)
    file.close()
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[k : k + 4], "big") for k in (16, 20))
    assert (width, height) == (3 * 550, 374)
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.jsonl"]


def test_smoothing_starts_at_the_first_value_and_follows():
    assert curves._smooth((4.0,) * 5) == [4.0] * 5
    assert curves._smooth((1.0, 0.0), half_life=1)[-1] == pytest.approx(1 / 3)


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_bar_shows_the_numbers_on_a_terminal_and_nothing_elsewhere(monkeypatch, capsys):
    progress = Progress(10, 0, is_main=True)
    progress.update(5, loss=1.0)
    progress.close()
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(10, 4, is_main=True)
    progress.update(6, loss=0.12345, bits_per_byte=None, tokens_per_second=5432.1)
    progress.close()
    assert "6/10" in terminal.text
    assert "loss=0.1235" in terminal.text
    assert "tokens per second=5432" in terminal.text
    other = Terminal()
    monkeypatch.setattr(sys, "stderr", other)
    Progress(10, 0, is_main=False).close()
    assert other.text == ""


def test_the_outcome_says_how_it_ended_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    write_outcome(tmp_path, Outcome(ExitCode.NUMERICS, "loss alm is nan (correct-horse-battery)", 17))
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome.pop("time").endswith("+00:00")
    assert outcome == {
        "code": 70,
        "outcome": "numerics",
        "reason": f"loss alm is nan ({HIDDEN})",
        "step": 17,
        "rank": 0,
    }


def test_exit_codes_are_those_that_schedulers_are_told():
    assert [int(code) for code in ExitCode] == [0, 1, 64, 65, 69, 70, 71, 74, 75, 130]


def test_secrets_of_the_environment_and_well_known_keys_are_hidden(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "s3cr3t-value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    monkeypatch.setenv("SHORT_KEY", "true")
    text = "s3cr3t-value sometimes true hf_abcdefghijklmnopqrstuvwxyz tokens_to_add"
    assert redact(text) == f"{HIDDEN} sometimes true {HIDDEN} tokens_to_add"


def test_a_name_with_hyphens_is_no_key():
    for name in ("multi-task-tokenizer-transfer-of-llama", "sk-documents-of-the-web-in-slovak"):
        assert redact(name) == name
    for key in ("sk-proj-Ab3dEf6hIj9lMn2pQr5t", "sk-ant-api03-Zx_8cV7bN6mQ5wE4rT3yU2-iO1p"):
        assert redact(f"with {key} inside") == f"with {HIDDEN} inside"


def test_fields_named_like_secrets_are_hidden_and_tokenizers_are_not():
    config = {
        "target_tokenizer_name": "gpt2",
        "tokens_to_add": ["<x>"],
        "api_key": "k",
        "hub": {"token": "t", "keys": 3, "password": ""},
        "paths": ["hf_abcdefghijklmnopqrstuvwxyz"],
    }
    assert redact_config(config) == {
        "target_tokenizer_name": "gpt2",
        "tokens_to_add": ["<x>"],
        "api_key": HIDDEN,
        "hub": {"token": HIDDEN, "keys": 3, "password": ""},
        "paths": [HIDDEN],
    }


def test_log_records_and_their_tracebacks_are_redacted(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RedactingFilter())
    log = logging.getLogger("tokenkit.test_redaction")
    log.addHandler(handler)
    try:
        raise RuntimeError("with correct-horse-battery inside")
    except RuntimeError:
        log.exception("key %s", "correct-horse-battery")
    finally:
        log.removeHandler(handler)
    shown = capsys.readouterr().err
    assert "correct" not in shown
    assert shown.count(HIDDEN) == 3  # the message, the line of code, the exception


class Broken:
    def __init__(self, folder, config):
        if config.get("fail"):
            raise OSError("no network")

    def log(self, step, values):
        raise ConnectionError("gone")

    def close(self):
        raise SystemError("worse")


@fault(
    "A tracker (wandb) that is missing, or raises",
    "said once, and counted; training goes on",
    code="-",
    kept="everything",
)
def test_a_tracker_that_fails_is_counted_and_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(metrics._OPENERS, "wandb", Broken)
    tracker = Trackers(["wandb"], tmp_path, {}, is_main=True)
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    tracker.log(4, {"loss": 1.0})
    assert tracker.failures == {"wandb": 4}
    assert caplog.text.count("wandb failed and will be ignored: ConnectionError: gone") == 1
    assert Trackers(["wandb"], tmp_path, {"fail": True}, is_main=True).failures == {"wandb": 1}


def test_trackers_are_off_unless_asked_for_and_unknown_ones_refused(tmp_path):
    Trackers(["none"], tmp_path, {}, is_main=True).log(1, {"loss": 1.0})
    Trackers(["wandb"], tmp_path, {}, is_main=False).log(1, {"loss": 1.0})
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="none, wandb or tensorboard, got 'mlflow'"):
        Trackers(["mlflow"], tmp_path, {}, is_main=True)


def test_wandb_works_offline_and_no_key_reaches_any_file(tmp_path):
    """In a process of its own: wandb starts a server and threads."""
    pytest.importorskip("wandb")
    script = (
        "import sys, pathlib; from tokenkit.run.metrics import Trackers, run_id\n"
        "folder = pathlib.Path(sys.argv[1]) / 'run'; folder.mkdir()\n"
        "own = {'wandb.project': 'p', 'wandb.entity': 'e', 'wandb.log_model': 'checkpoints'}\n"
        "config = {'hub_token': 'canary-in-the-config', 'lr': 1} | own\n"
        "t = Trackers(['wandb'], folder, config, is_main=True); run = t._runs['wandb']._run\n"
        "assert (run.project, run.entity) == ('p', 'e')\n"
        "step = folder / 'step_1'; step.mkdir(); (step / 'weights').write_bytes(b'w'); kept = []\n"
        "run.log_artifact = lambda *a, **k: kept.append(a); t.upload(step); assert kept == [(str(step),)]\n"
        "t.log(1, {'loss': 1.0, 'name': 'x', 'bad': float('nan')}); t.close()\n"
        "assert not t.failures, t.failures\n"
        "assert len(run_id(folder)) == 16 and run_id(folder) == run_id(folder)\n"
    )
    environment = os.environ | {"WANDB_API_KEY": "c" * 30 + "anary" + "e" * 5, "WANDB_MODE": "offline"}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True, timeout=60)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert b"canary-in-the-config" not in content, path
        assert environment["WANDB_API_KEY"].encode() not in content, path


def test_tensorboard_gets_the_finite_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = Trackers(["tensorboard"], tmp_path, {"hub_token": "canary-in-the-config"}, is_main=True)
    tracker.log(1, {"loss": 1.0, "bad": math.inf})
    tracker.close()
    assert not tracker.failures
    content = b"".join(p.read_bytes() for p in tmp_path.rglob("events*"))
    assert b"loss" in content
    assert b"bad" not in content
    assert b"canary" not in content
