"""The doors: help at once, one line for every mistake, an exit code of its kind."""

import contextlib
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tokenkit import cli, train
from tokenkit.cli import DOORS, EXIT_PIPE, exit_code, main, run
from tokenkit.config import ConfigError
from tokenkit.errors import DataError, ExitCode, OtherRankError, blaming_data

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "triton", "transformers", "datasets", "peft", "numpy", "matplotlib", "wandb"}


def tokenkit(*arguments, **environment):
    command = [sys.executable, "-X", "importtime", "-m", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def modules(result):
    """Top-level packages that a process imported, from -X importtime."""
    return {line.rpartition("|")[2].strip().split(".")[0] for line in _timings(result)}


def _timings(result):
    return [line for line in result.stderr.splitlines() if line.startswith("import time:")]


def complaint(result):
    return [line for line in result.stderr.splitlines() if not line.startswith("import time:")]


def test_help_of_training_comes_within_a_second_and_a_half():
    def seconds():  # of processor time: the wall clock of a busy machine says little
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        tokenkit("tokenkit.train", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 1.5


def test_help_imports_nothing_heavy_and_lists_the_fields():
    result = tokenkit("tokenkit.train", "--help")
    assert result.returncode == 0
    assert not modules(result) & HEAVY
    for flag in (
        "--student.pretrained-model-name-or-path",
        "--losses",
        "--alm-diff-fn",
        "max_teacher_length for",
    ):
        assert flag in result.stdout


def test_completion_imports_nothing_heavy():
    result = tokenkit("tokenkit.cli", "completion", "bash")
    assert result.stdout.endswith("complete -o default -F _tokenkit tokenkit\n")
    assert not modules(result) & HEAVY


def test_a_mistake_in_the_configuration_is_one_line_and_64_before_torch_is_imported():
    result = tokenkit("tokenkit.train", "--stesp", "3")
    assert result.returncode == ExitCode.CONFIG
    assert complaint(result) == ["tokenkit: unknown field stesp (command line), did you mean steps?"]
    assert not modules(result) & HEAVY


def test_of_several_ranks_one_speaks_about_the_configuration():
    assert complaint(tokenkit("tokenkit.train", "--stesp", "3", RANK="1", WORLD_SIZE="2")) == []


def test_print_config_prints_what_reads_back_the_same(tmp_path, capsys):
    config = str(ROOT / "configs" / "cross_tokenizer_distill.yaml")
    with pytest.raises(SystemExit, match="0"):
        train.main(["--config", config, "--steps", "600", "--print-config"])
    printed = capsys.readouterr().out
    again = tmp_path / "printed.yaml"
    again.write_text(printed, encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        train.main(["--print-config", "--config", str(again)])
    assert capsys.readouterr().out == printed
    assert "steps: 600" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config"], "--config needs at least one file"),
        (["run.yaml"], "unexpected argument 'run.yaml': pass configuration files with --config"),
        (["5"], "unexpected argument '5': flags begin with --"),
        (["--steps"], "--steps takes one value (an integer), got none"),
        (["--steps", "1", "2"], "--steps takes one value (an integer), got 2: 1 2"),
        (["--steps", "x"], "steps: expected an integer, got 'x'"),
        (["--no-steps"], "unknown field no_steps"),
        (
            ["--learning-rate", "1"],
            "unknown field learning_rate (command line): it is optimizer.learning_rate",
        ),
        (["--max-length", "5"], "it is max_length_new or eval.max_length"),
        (["--optimizer.betta1", "0.9"], "did you mean optimizer.beta1?"),
        (["--binarisation-temp", "3"], "did you mean binarization_temp?"),
        (["--tau", "3"], "unknown field tau (command line); --help lists all fields"),
        (["--loss-weights", "{a: "], "--loss-weights, line 1"),
        (["--hf-token", "hunter2"], "looks like a secret"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, arguments, message):
    assert train.main(arguments) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert error.startswith("tokenkit: ")
    assert message in error
    assert error.count("\n") == 1
    assert "hunter2" not in error


def test_the_list_of_commands_names_every_door(capsys):
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", text, re.M) for name in DOORS)


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == ExitCode.CONFIG
    assert "'trian' is no command, did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("name", DOORS)
def test_every_door_opens(name, capsys):
    with contextlib.suppress(SystemExit):
        assert main([name, "--help"]) == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_a_name_of_other_scripts_opens_the_same_door(capsys):
    with contextlib.suppress(SystemExit):
        assert main(["compute_tokenizer_info", "--help"]) == 0
    assert "usage: tokenkit pair-stats" in capsys.readouterr().out


def test_the_version_is_the_packages_own(capsys):
    from tokenkit import __version__

    main(["--version"])
    assert capsys.readouterr().out == f"tokenkit {__version__}\n"


def raising(error):
    def door():
        raise error

    return door


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a\nb"), ExitCode.CONFIG, "a b"),
        (ValueError("losses are wrong: do this"), ExitCode.CONFIG, "losses are wrong: do this"),
        (FileNotFoundError(2, "No such file", "x.txt"), ExitCode.DATA, "x.txt: No such file"),
        (FileExistsError("out holds a run: pass --resume"), ExitCode.DATA, "out holds a run: pass --resume"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ExitCode.DATA, "can't decode byte 0xff"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            ExitCode.CONFIG,
            "pip install 'tokenkit-torch[train]'",
        ),
        (
            ModuleNotFoundError("No module named 'wandb'", name="wandb"),
            ExitCode.CONFIG,
            "'tokenkit-torch[track]'",
        ),
        (FloatingPointError("loss clm is not finite"), ExitCode.NUMERICS, "loss clm is not finite"),
    ],
)
def test_an_error_with_a_remedy_is_one_line_and_the_code_of_its_kind(capsys, error, code, text):
    assert run(raising(error)) == code == exit_code(error)
    written = capsys.readouterr().err
    assert written.startswith("tokenkit: ")
    assert text in written
    assert written.count("\n") == 1


@pytest.mark.parametrize("missing", ["yaml", "tyro"])
def test_without_the_train_extra_the_commands_say_what_to_install(missing):
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from tokenkit.train import main; sys.exit(main([]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1
    assert "pip install 'tokenkit-torch[train]'" in result.stderr


def test_debug_shows_the_traceback_too(capsys):
    assert run(raising(ValueError("wrong")), debug=True) == ExitCode.CONFIG
    written = capsys.readouterr().err
    assert "Traceback" in written
    assert written.endswith("tokenkit: wrong\n")


def test_neither_message_nor_traceback_shows_a_secret(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    run(raising(ValueError("401 for hunter2hunter2")), debug=True)
    written = capsys.readouterr().err
    assert "hunter2" not in written
    assert "401 for" in written


def test_a_fault_of_our_own_keeps_its_traceback(capsys):
    for error in (KeyError("x"), ModuleNotFoundError("No module", name="tokenkit.nothing")):
        assert run(raising(error)) == 1
        assert "Traceback" in capsys.readouterr().err


def test_an_error_names_its_rank_where_there_are_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    run(raising(ValueError("wrong")))
    assert capsys.readouterr().err == "tokenkit: rank 2: wrong\n"


def test_an_error_that_every_rank_has_is_said_once(monkeypatch, capsys):
    error = DataError("data set x is empty")
    error.is_on_every_rank = True
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "tokenkit: data set x is empty\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert run(raising(error)) == ExitCode.DATA
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("arguments", [["tokenkit.cli", "--help"], ["tokenkit.train", "--help"]])
def test_a_reader_that_goes_away_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", *arguments], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, check=False
    )
    os.close(write)
    assert result.stderr == b""
    assert result.returncode == EXIT_PIPE


def test_another_pipe_that_breaks_is_an_error(capsys):
    assert run(raising(BrokenPipeError(32, "Broken pipe", "the tracker"))) == ExitCode.DATA
    assert "the tracker: Broken pipe" in capsys.readouterr().err


def test_an_error_may_carry_its_own_exit_code():
    class PreemptedError(RuntimeError):
        exit_code = 75

    assert run(raising(PreemptedError("stopped"))) == 75
    assert run(lambda: 3) == 3
    assert run(lambda: None) == 0


def test_data_is_blamed_for_what_reading_it_raises():
    with pytest.raises(DataError, match="empty") as caught, blaming_data():
        raise ValueError("data set x is empty")
    assert exit_code(caught.value) == ExitCode.DATA
    with pytest.raises(ConfigError), blaming_data():
        raise ConfigError("steps must be at least 1")
    with pytest.raises(ValueError, match="flash") as caught, blaming_data():
        raise ValueError("no flash attention") from ImportError("flash_attn")
    assert exit_code(caught.value) == ExitCode.CONFIG


def test_exit_codes_are_those_that_the_outcome_records():
    assert ExitCode(1) == ExitCode(17) == ExitCode.FAULT
    assert ExitCode(exit_code(KeyboardInterrupt())) == ExitCode.INTERRUPTED
    assert ExitCode(exit_code(OtherRankError("rank 1 failed"))) == ExitCode.OTHER_RANK
    assert (ExitCode.CONFIG, ExitCode.DATA, ExitCode.NUMERICS) == (
        ExitCode.CONFIG,
        ExitCode.DATA,
        ExitCode.NUMERICS,
    )


@pytest.mark.parametrize(
    ("rank", "failed", "speaks"),
    [(0, 1, False), (1, 1, True), (2, 1, True), (3, 1, False), (0, 2, True), (1, 2, False), (3, None, True)],
)
def test_what_one_of_four_ranks_on_two_machines_says_is_heard_once_on_each(
    rank, failed, speaks, monkeypatch, capsys
):
    monkeypatch.setattr(cli, "PATIENCE", 0)
    for name, value in (("RANK", rank), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    own, others = OSError("no"), OtherRankError("a rank failed to load: no", failed)
    cli.run(raising(own if rank == failed else others))
    assert bool(capsys.readouterr().err) == speaks


def test_an_interruption_is_130(capsys):
    assert cli.run(raising(KeyboardInterrupt())) == 130
