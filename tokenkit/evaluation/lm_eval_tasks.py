"""Tasks of lm-eval: by name, from a file of one's own, with documents from the hub or from local files.

With local files a task stays as lm-eval defines it, prompt, choices and metrics; where its documents come
from is all that changes. Everything here comes before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from tokenkit.config.benchmarks import LmEval
from tokenkit.errors import ConfigError, DataError
from tokenkit.evaluation.run_code import pass_at_k, with_prompt
from tokenkit.evaluation.task_data import read_rows, same_name, task_files

logger = logging.getLogger(__name__)

OWN_FUNCTIONS = {
    "humaneval/utils.pass_at_k": pass_at_k,
    "humaneval/utils.build_predictions": with_prompt,
    "humaneval/utils.build_predictions_instruct": with_prompt,
}
"""What stands for functions of lm-eval's that run code without limits, or fetch what runs it."""
RESAMPLES = 1000  # for the errors of scores that are no means; lm-eval's 100,000 take minutes for lambada
ALONE = "DISABLE_MULTIPROC"
"""Variable of the environment that lm-eval asks before it starts processes."""
_FOLDERS = {"boolq": "super_glue"}
"""Where lm-eval keeps tasks whose folder their names do not begin with."""


def load_tasks(names: Sequence[str], data: str | None = None, *, allow_code: bool = False) -> list[Any]:
    """Return lm-eval's objects of tasks and groups, their documents read.

    Args:
        names: of tasks, groups or tags, and paths of YAML files with a task.
        data: folder of documents, see `task_data`; None: where a task says, mostly the hub.
        allow_code: let tasks run programs that a model wrote.

    Raises:
        ConfigError: an unknown task; one that runs programs, which is not allowed.
        DataError: documents that cannot be had.
    """
    manager = _manager(names)
    known = [_known(name, manager) for name in names]
    leaves = [leaf for name in known for leaf in _leaves(name, manager)]
    if twice := next((leaf for leaf in leaves if leaves.count(leaf) > 1), None):
        raise ConfigError(f"tasks: {twice} is asked for twice, in {', '.join(names)}: name it once")
    for leaf in leaves:
        _check_code(leaf, manager, allow_code)
    if data is not None:
        with _quiet():
            leaves = _from_files(leaves, Path(data).expanduser(), manager)
        known = [leaf for name in known for leaf in _wanted(name, leaves, manager)]
    return [found for name in known for found in _loaded(name, manager, data)]


def run_tasks(
    lm: Any,
    tasks: Sequence[Any],
    options: LmEval,
    *,
    seed: int = 0,
    samples: bool = False,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Ask a model everything; return lm-eval's results.

    Args:
        lm: from `language_model`.
        tasks: from `load_tasks`.
        options: what is asked, and how.
        seed: of the examples in front of a question.
        samples: keep every question and answer, under `samples`.
        resamples: draws for the errors of scores that are no means; 0: there are no errors.
    """
    from lm_eval import __version__
    from lm_eval.evaluator import evaluate

    groups = {task.name: task for task in tasks if hasattr(task, "get_all_tasks")}
    leaves = [task for task in tasks if task not in groups.values()]
    leaves += [task for group in groups.values() for task in group.get_all_tasks()]
    groups |= {inner.name: inner for group in list(groups.values()) for inner in group.get_all_groups()}
    for task in leaves:
        _set(task, options, seed)
    with redirect_stdout(io.StringIO()), redirect_stderr(_WithoutBars(sys.stderr)), _one_process():
        found = evaluate(
            lm,
            {"tasks": {task.task_name: task for task in leaves}, "groups": groups},
            limit=options.limit,
            bootstrap_iters=resamples,
            log_samples=samples,
            apply_chat_template=options.chat_template_mode == "surround_instruct",
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=options.allow_code,
        )
    asked = {
        name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()
    }
    about = {"config": asked | {"seed": seed}, "lm_eval_version": __version__, "date": time.time()}
    return {**found, **about}


def _set(task: Any, options: LmEval, seed: int) -> None:
    """Tell a task what the options say of it."""
    own = task.get_config("num_fewshot")
    if options.num_fewshot and own == 0:
        logger.warning("num_fewshot is 0 for %s by its definition, and stays so", task.task_name)
    elif options.num_fewshot is not None or own is None:
        task.set_config("num_fewshot", options.num_fewshot or 0)
    if options.generation and task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", options.generation, update=True)
    task.set_fewshot_seed(seed=seed)


@contextmanager
def _one_process() -> Iterator[None]:
    """Let lm-eval draw in this process: forks of one with threads hang."""
    before = os.environ.get(ALONE)
    os.environ[ALONE] = "1"
    try:
        yield
    finally:
        os.environ.pop(ALONE) if before is None else os.environ.update({ALONE: before})


class _WithoutBars(io.TextIOBase):
    """Passes on what is written, but for bars of progress, which lm-eval draws for every task."""

    def __init__(self, stream: TextIO):
        self._stream, self._after_bar = stream, False

    def write(self, text: str) -> int:
        is_end = self._after_bar and text == "\n"
        self._after_bar = text.startswith("\r")
        return len(text) if is_end or self._after_bar else self._stream.write(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back lm-eval's words about options that only it has."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _loaded(name: str, manager: Any, data: str | None) -> list[Any]:
    """Return what lm-eval makes of a name: a group, or tasks."""
    try:
        with _quiet():
            found = manager.load([name])
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        words = " ".join(str(error).split())[:300]
        remedy = "; --task-data DIR reads them from files of DIR, without a network" if data is None else ""
        raise DataError(f"tasks: the documents of {name} cannot be had: {words}{remedy}") from error
    groups, tasks = found.get("groups", {}), found["tasks"]
    if name in groups:
        return [groups[name]]
    for task in tasks.values():
        if data is not None:
            task.set_config("custom_dataset", None)  # else the results hold its source
    return list(tasks.values())


def _manager(names: Sequence[str]) -> Any:
    """Return lm-eval's list of tasks: of the folders that names begin with, else of all, which takes 8 s."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks import __file__ as package

    root = Path(package).parent
    plain = [name for name in names if not _is_file(name)]
    starts = {_FOLDERS.get(name, name) for name in plain}
    near = [f for f in sorted(root.iterdir()) if f.is_dir() and any(s.startswith(f.name) for s in starts)]
    manager = TaskManager(include_path=near, include_defaults=False)
    return manager if all(name in manager.task_index for name in plain) else TaskManager()


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _known(name: str, manager: Any) -> str:
    if _is_file(name):
        if not Path(name).expanduser().is_file():
            raise FileNotFoundError(f"tasks: the task file {name} does not exist")
        return str(Path(name).expanduser())
    if name in manager.task_index:
        return name
    if (other := same_name(name, manager.all_tasks)) is not None:
        logger.warning("the task %s is called %s", name, other)
        return other
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
    hint = f"the nearest are {', '.join(near)}" if near else "lm-eval lists them: lm-eval ls tasks"
    raise ConfigError(f"tasks: {name!r} is no task of lm-eval, nor a YAML file with one: {hint}")


def _leaves(name: str, manager: Any) -> Iterator[str]:
    """Yield the tasks that a name stands for."""
    entry = manager.task_index.get(name)
    if entry is None:  # a file
        yield name
    elif entry.kind.name == "TAG":
        for inner in sorted(entry.tags):
            yield from _leaves(inner, manager)
    elif entry.kind.name == "GROUP":
        for child in (entry.cfg or {}).get("task") or ():
            inner = child if isinstance(child, str) else child.get("task") or child.get("group")
            if isinstance(inner, str) and inner in manager.task_index:
                yield from _leaves(inner, manager)
    else:
        yield name


def _settings(name: str, manager: Any, *, resolve: bool) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    path = name if entry is None else entry.yaml_path
    found: dict[str, Any] = {} if path is None else load_yaml(path, resolve_func=resolve)
    return found


def _check_code(name: str, manager: Any, allow_code: bool) -> None:
    """Refuse a task that runs programs where that is not allowed; where it is, let ours run them."""
    settings = _settings(name, manager, resolve=False)
    if not settings.get("unsafe_code"):
        return
    if not allow_code:
        raise ConfigError(
            f"tasks: {name} runs programs that the model writes: if you want that, set allow_code "
            "(--allow-code), in a container at best"
        )
    replaced = _replaced(settings)
    if replaced == settings:
        raise ConfigError(
            f"tasks: {name} runs programs in a way that has no limits here: choose humaneval or its kin"
        )
    _repoint(name, manager, replaced)


def _replaced(value: Any) -> Any:
    """Put our functions where a task names those that run code."""
    if isinstance(value, dict):
        return {key: _replaced(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner) for inner in value]
    own = [ours for name, ours in OWN_FUNCTIONS.items() if isinstance(value, str) and value.endswith(name)]
    return own[0] if own else value


def _repoint(name: str, manager: Any, settings: dict[str, Any]) -> None:
    """Let a name of lm-eval's list stand for these settings."""
    entry = manager.task_index[name]
    manager.task_index[name] = dataclasses.replace(entry, yaml_path=None, cfg=settings)


def _from_files(leaves: Iterable[str], folder: Path, manager: Any) -> list[str]:
    """Let tasks read their documents from a folder; return those for which it has some."""
    if not folder.is_dir():
        raise FileNotFoundError(f"task_data: {folder} is no folder")
    found = []
    for leaf in leaves:
        files = {} if leaf not in manager.task_index else task_files(folder, leaf)
        if "test" not in files:
            continue
        entry = manager.task_index[leaf]
        settings = dict(entry.cfg) if entry.yaml_path is None else _settings(leaf, manager, resolve=True)
        rows = {purpose: read_rows(path, leaf) for purpose, path in files.items()}
        _repoint(leaf, manager, settings | _splits(settings, files, rows))
        found.append(leaf)
    return found


def _splits(settings: dict[str, Any], files: dict[str, Path], rows: dict[str, Any]) -> dict[str, Any]:
    """Return what a task's settings say instead, of where its documents are."""

    def data_set(**_: Any) -> Any:
        from datasets import Dataset, disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        return {purpose: Dataset.from_list(own) for purpose, own in rows.items()}

    examples = "train" if "train" in rows else "test"  # lm-eval leaves the question itself out
    return {
        "custom_dataset": data_set,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {purpose: str(path) for purpose, path in files.items()}},
        "training_split": "train" if "train" in rows else None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": examples,
    }


def _wanted(name: str, leaves: Sequence[str], manager: Any) -> list[str]:
    """Return what is loaded for a name: of a tag those tasks for which there are documents.

    Raises:
        DataError: there are none, or a group lacks some.
    """
    own = list(_leaves(name, manager))
    missing = [leaf for leaf in own if leaf not in leaves and leaf in manager.task_index]
    if not missing:
        return [name]
    is_tag = manager.task_index[name].kind.name == "TAG"
    if is_tag and len(missing) < len(own):
        logger.warning("%s without %s: task_data has no file of these names", name, ", ".join(missing))
        return [leaf for leaf in own if leaf not in missing]
    raise DataError(
        f"task_data: no file there has the documents of {', '.join(missing[:5])}"
        f"{f' and {len(missing) - 5} others' if len(missing) > 5 else ''}: expected {missing[0]}.jsonl"
    )
