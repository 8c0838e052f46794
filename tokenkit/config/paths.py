"""Paths of a configuration that lead nowhere, found before anything heavy is imported."""

from pathlib import Path
from typing import Any

from tokenkit.config.schema import flatten
from tokenkit.disk import is_path, why_missing

MODELS = ("pretrained_model_name_or_path", "auxiliary_model")
FILES = {
    "mined_mapping_path": "make it with `tokenkit mined-mapping`",
    "tokenizer_pair_data_path": "make it with `tokenkit pair-stats`",
    "teacher_counts": "`tokenkit pair-stats` writes teacher_counts.npy",
    "hypernet": "make it with `tokenkit train-hypernet`",
    "file": "name a data file or a folder of them",
    "task_data": "name a folder of JSON files with the documents of tasks",
    "eval.task_data": "name a folder of JSON files with the documents of tasks",
}
"""Options that name a file or folder of this machine, with what makes one."""
TEXTS = ("ppl_eval_data", "data", "data.dataset_name")
"""Options that name a file, a folder, or a data set on the hub."""


def check_paths(config: Any) -> None:
    """Refuse paths that lead nowhere, whether or not an option reads them here.

    Raises:
        FileNotFoundError: with the option's name, and what to do.
    """
    for name, value in flatten(config).items():
        _check_path(name, value)


def lost_paths(config: Any) -> list[str]:
    """Return what `check_paths` says of each path that leads nowhere, not of the first alone."""
    said = []
    for name, value in flatten(config).items():
        try:
            _check_path(name, value)
        except FileNotFoundError as error:
            said.append(str(error))
    return said


def _check_path(name: str, value: Any) -> None:
    if not isinstance(value, str):
        return
    if name.rpartition(".")[2] in MODELS:
        check_model_folder(name, value)
    elif name in FILES and not Path(value).expanduser().exists():
        raise FileNotFoundError(f"{name}: {value} does not exist: {FILES[name]}")
    elif name in TEXTS and is_path(value) and not Path(value).expanduser().exists():
        raise FileNotFoundError(f"{name}: {value} does not exist: name a file, a folder or a hub data set")


def check_model_folder(name: str, value: str) -> None:
    """Refuse a model's path that is no folder with a model; a name on the hub passes.

    Raises:
        FileNotFoundError: nothing is there, or something else.
    """
    path = Path(value).expanduser()
    if not path.exists():
        if is_path(value):
            raise FileNotFoundError(f"{name}: model folder {value} does not exist")
        return
    if path.is_file():
        raise FileNotFoundError(f"{name}: {value} is a file: name the folder of a Hugging Face model")
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return  # of an adapter, the loader says more
    if (path / "export" / "config.json").is_file():
        raise FileNotFoundError(
            f"{name}: {value} is the folder of a run, and its model is in {path / 'export'}: name that"
        )
    if (path / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{name}: {value} is the folder of a run that has not exported its model yet: go on with "
            "--resume to its end, then name its export folder"
        )
    raise FileNotFoundError(f"{name}: {value} has no config.json: it is not a Hugging Face model folder")


def check_opened(name: str, *values: str) -> None:
    """Refuse names under which `open_model` finds nothing: no model, run or checkpoint, nor a cached one.

    For the start of a command, before anything heavy is imported, and before the first of several is used.

    Raises:
        FileNotFoundError: nothing is there, or something else.
    """
    for value in values:
        path = Path(value).expanduser()
        is_run = (path / "checkpoints").is_dir() or (path / "export" / "config.json").is_file()
        if is_run or path.name == "checkpoints" or path.name.startswith("step_"):
            continue
        if why := why_missing(value):
            raise FileNotFoundError(f"{name}: model folder {value} {why}")
        check_model_folder(name, value)
