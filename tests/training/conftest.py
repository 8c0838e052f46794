"""A tiny transfer: a Llama of two layers, from a byte-level BPE of 300 ids to a SentencePiece one of 400."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import TEXT, sentencepiece_bpe, tiny_folder
from tokenkit.config import ALIASES, TrainConfig, parse_command_line


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer")
    tiny_folder(folder / "model")
    sentencepiece_bpe(folder / "target")
    generator = random.Random(0)
    words = " ".join(TEXT).split(" ")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(120):
            text = " ".join(generator.choices(words, k=generator.randint(3, 30)))
            file.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture
def make_config(workspace: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: object) -> TrainConfig:
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
            "output_dir": tmp_path / "run",
        }
        settings |= {name.replace("__", "."): value for name, value in changes.items()}
        flags = []
        for name, value in settings.items():
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return parse_command_line(TrainConfig, flags, program="test", aliases=ALIASES)

    return make
