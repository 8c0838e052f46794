"""The scripts of examples/ work on local folders: a stand-in collects their commands, which run here."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.tiny import TEXT, byte_level_bpe, tiny_folder
from tokenkit.cli import door, main
from tokenkit.config import ALIASES, TrainConfig, parse_command_line

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINING = {"llama3_to_qwen2", "llama3_to_byte", "gemma2_from_openmath"}
SCRIPTS = TRAINING | {"zett", "ensembles"}
SMALL = """--steps 2 --warmup-steps 1 --batch-size 4 --gradient-accumulation-steps 1 --max-length-new 32
--lr 1e-3 --max-length-teacher 32 --dtype float32 --data.heldout.documents 2
--data.heldout.fraction 0.2""".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    tiny_folder(folder / "student")
    tiny_folder(folder / "teacher", vocab_size=320)
    byte_level_bpe(folder / "target", 310)
    (folder / "data.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    stub = folder / "bin" / "tokenkit"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nprintf '\\n\\0'\n", encoding="utf-8")
    stub.chmod(0o755)
    return folder


def commands(name, folder, environment, *more):
    """The commands that a script would run."""
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    env = {key: value for key, value in os.environ.items() if key not in ("STUDENT", "TARGET", "DATA")}
    result = subprocess.run(
        ["bash", str(EXAMPLES / f"{name}.sh"), *more],
        env=env | environment | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return [part.split("\0")[:-1] for part in result.stdout.split("\n\0") if part]


def local(folder):
    names = {"STUDENT": "student", "TEACHER": "teacher", "TARGET": "target", "DATA": "data.txt"}
    return {key: str(folder / name) for key, name in names.items()}


def test_every_script_is_tried():
    assert {file.stem for file in EXAMPLES.glob("*.sh")} - {"quickstart"} == SCRIPTS


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_without_folders_a_script_names_the_hub(name, folders):
    ((_, *words),) = commands(name, folders, {})
    config = parse_command_line(TrainConfig, words, program="test", aliases=ALIASES)
    assert config.student.pretrained_model_name_or_path.count("/") == 1
    assert config.run.output_dir == f"outputs/{name}"


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_a_script_trains_on_local_folders(name, folders, tmp_path):
    environment = local(folders) | {"OUTPUT": str(tmp_path / "run")}
    to_byte = name == "llama3_to_byte"  # the others load everything and try a step, which is cheaper
    if to_byte:
        environment["TARGET"] += ":conversion=byte"
    (words,) = commands(name, folders, environment, *SMALL, *([] if to_byte else ["--dry-run"]))
    assert door(words)[0] == "train"
    assert main(words) == 0
    assert (tmp_path / "run" / "export" / "config.json").is_file() == to_byte


def test_zett_scores_and_writes(folders, tmp_path, capsys):
    environment = local(folders) | {"OUTPUT": str(tmp_path / "model"), "TEXT": str(folders / "data.txt")}
    compare, write = commands("zett", folders, environment)
    assert main(compare) == 0
    assert "fvt" in capsys.readouterr().out
    assert main(write) == 0
    assert (tmp_path / "model" / "config.json").is_file()


def test_ensembles_moves_one_model_and_asks_both(folders, tmp_path, capsys):
    environment = {"PIVOT": "teacher", "STUDENT": "student", "TEXT": "data.txt"}
    environment = {key: str(folders / name) for key, name in environment.items()}
    move, ask = commands(
        "ensembles", folders, environment | {"OUTPUT": str(tmp_path / "moved")}, "--limit", "2"
    )
    assert main(move) == 0
    assert main(ask) == 0
    assert "ensemble (mean_prob)" in capsys.readouterr().out
    (again,) = commands(
        "ensembles", folders, environment | {"MOVED": str(tmp_path / "moved")}, "--limit", "2"
    )
    assert again == ask
