"""A tiny transfer: a Llama of two layers, from a byte-level BPE of 300 ids to a SentencePiece one of 400."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import TEXT, sentencepiece_bpe, tiny_folder, tiny_model
from tokenkit.commands.pair_stats import main as pair_stats
from tokenkit.config import ALIASES, TrainConfig, parse_command_line
from tokenkit.pairing.mining import mine_mapping
from tokenkit.tokenization.tokenizer import load_tokenizer


def write_workspace(folder: Path) -> Path:
    """Write the model, the target's tokenizer and the data into an existing folder."""
    tiny_folder(folder / "model")
    sentencepiece_bpe(folder / "target")
    generator = random.Random(0)
    words = " ".join(TEXT).split(" ")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(120):
            text = " ".join(generator.choices(words, k=generator.randint(3, 30)))
            file.write(json.dumps({"text": text}) + "\n")
    return folder


def config_in(workspace: Path, output: Path, **changes: object) -> TrainConfig:
    """Return the configuration of the transfer; `__` in a name stands for a dot."""
    settings: dict[str, object] = {
        "student.pretrained_model_name_or_path": workspace / "model",
        "target_tokenizer_name": workspace / "target",
        "data.dataset_name": workspace / "data.jsonl",
        "data.heldout.fraction": 0.1,
        "data.num_workers": 0,
        "losses": ["clm", "alm_unconstrained"],
        "max_length_new": 48,
        "max_length_teacher": 64,
        "batch_size": 4,
        "steps": 4,
        "save_interval": 2,
        "eval_interval": 4,
        "logging_interval": 1,
        "model_lora_rank": 4,
        "optimizer.learning_rate": 0.01,
        "output_dir": output,
    }
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return parse_command_line(TrainConfig, flags, program="test", aliases=ALIASES)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("transfer"))


@pytest.fixture
def make_config(workspace: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    return partial(config_in, workspace, tmp_path / "run")


@pytest.fixture(scope="session")
def files(workspace, tmp_path_factory):
    """A mined mapping, what pair-stats counted, and a wider and deeper teacher."""
    folder = tmp_path_factory.mktemp("losses")
    tokenizers = (load_tokenizer(str(workspace / name)) for name in ("target", "model"))
    student, teacher = tokenizers
    np.save(folder / "mapping.npy", mine_mapping(student, teacher).teacher_V)
    flags = ["--teacher-tokenizer-name", str(workspace / "model"), "--output", str(folder / "pair")]
    flags += ["--target-tokenizer-name", str(workspace / "target")]
    (folder / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    assert pair_stats([*flags, "--data.dataset-name", str(folder / "text.txt")]) == 0
    shutil.copytree(workspace / "model", folder / "teacher")
    tiny_model(hidden_size=48, num_hidden_layers=3, seed=1).save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def config_of(make_config, files):
    paths = {"mined_mapping_path": files / "mapping.npy", "tokenizer_pair_data_path": files / "pair"}
    return partial(make_config, **paths)
