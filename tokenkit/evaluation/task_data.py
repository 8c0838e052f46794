"""Documents of benchmark tasks out of local files, in the fields that the tasks of lm-eval read.

    DIR/piqa.jsonl  DIR/arc_easy.jsonl  DIR/gsm8k_test.jsonl  DIR/gsm8k_train.jsonl  DIR/HumanEval.jsonl.gz

A file's name is that of a task or of its family, in any case, with `_` and `-` or without; behind it may
stand the split. A row has the fields of the data set on the hub, or one of these plainer forms:

    query, choices, gold                   of arc_*, piqa, boolq and openbookqa; what lm-eval writes around a
                                           question (`Question: `, `Passage: `) may stand in the query
    context, continuation                  of lambada_openai
    context_options, continuation, gold    of winogrande
    mc1_targets, mc2_targets               of truthfulqa_mc*, each a mapping from answers to 1 or 0
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FAMILIES = ("gsm8k", "hellaswag", "humaneval", "mmlu", "truthfulqa_mc", "wikitext")
"""Data that tasks of several names read: those whose name begins so."""
SPLITS = {
    "train": "train",
    "dev": "train",
    "validation": "test",
    "valid": "test",
    "val": "test",
    "test": "test",
}
"""What stands behind a name, and what it is for: examples, or questions."""
_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def task_files(folder: Path, task: str) -> dict[str, Path]:
    """Return the files with a task's documents, by what they are for: `test`, `train`.

    Raises:
        ValueError: two files hold the same.
    """
    names = [task, *(family for family in FAMILIES if task.startswith(family))]
    for name in names:
        found: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            purpose = _purpose(path.name, name)
            if purpose is None:
                continue
            if purpose in found:
                raise ValueError(f"{found[purpose]} and {path} both hold {name}: move one away")
            found[purpose] = path
        if found:
            return found
    return {}


def _purpose(file: str, task: str) -> str | None:
    """What a file of this name is for, if it is of the task."""
    stem = next((file[: -len(ending)] for ending in _ENDINGS if file.lower().endswith(ending)), None)
    if stem is None:
        return None
    if _plain(stem) == _plain(task):
        return "test"
    start, _, split = stem.rpartition("_")
    return SPLITS.get(split.lower()) if start and _plain(start) == _plain(task) else None


def _plain(name: str) -> str:
    return re.sub("[_-]", "", name).lower()


def same_name(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is the same but for its case, `_` and `-`."""
    return next((other for other in known if _plain(other) == _plain(name)), None)


def read_rows(path: Path, task: str) -> list[Row]:
    """Read a file's documents in the fields that the task reads.

    Raises:
        ValueError: a file that is no JSON, or that holds no documents, or a document that lacks fields.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            text = file.read()
        rows = json.loads(text) if text.lstrip().startswith("[") else [*map(json.loads, text.splitlines())]
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} must hold JSON, one object a line or one list: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold JSON objects, the documents of {task}, and holds none")
    subject = task.removeprefix("mmlu_")
    if subject != task and all("subject" in row for row in rows):
        rows = [row for row in rows if row["subject"] == subject]
        if not rows:
            raise ValueError(f"{path} has no document whose subject is {subject}")
    made = []
    for number, row in enumerate(rows, 1):
        try:
            made.append(_converted(row, task))
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"document {number} of {path} has no form that {task} reads, {sorted(row)}: {error!r}; "
                "docs/evaluation.md lists the forms"
            ) from error
    return made


def _converted(row: Row, task: str) -> Row:
    if "mc1_targets" in row and "choices" not in row["mc1_targets"]:
        return row | {name: _targets(row[name]) for name in ("mc1_targets", "mc2_targets") if name in row}
    for name, convert in FORMS.items():
        if task.startswith(name) and {"query", "context", "context_options"} & set(row):
            return convert(row)
    return row


def _targets(answers: Mapping[str, int]) -> dict[str, list[Any]]:
    return {"choices": list(answers), "labels": list(answers.values())}


def _labelled(row: Row, question: str) -> Row:
    labels = [chr(ord("A") + index) for index in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": labels}
    return {question: _bare(row["query"]), "choices": choices, "answerKey": labels[row["gold"]]}


def _bare(query: str) -> str:
    """A question without what lm-eval writes around it."""
    return query.removeprefix("Question: ").removesuffix("\nAnswer:").removesuffix("\n")


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": _bare(row["query"]), "sol1": first, "sol2": second, "label": int(row["gold"])}


def _boolq(row: Row) -> Row:
    passage, _, question = row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
    if [choice.strip() for choice in row["choices"]] != ["no", "yes"]:
        raise ValueError(f"the choices must be no and yes, got {row['choices']}")
    question = question.removesuffix("\nAnswer:").removesuffix("?")
    return {"passage": passage, "question": question, "label": int(row["gold"])}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['context']} {row['continuation'].strip()}"}


def _winogrande(row: Row) -> Row:
    first, second = row["context_options"]
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
    start = first.rfind(" ", 0, shared) + 1  # options may begin alike
    sentence = f"{first[:start]}_ {row['continuation']}"
    return {
        "sentence": sentence, "option1": first[start:], "option2": second[start:],
        "answer": str(int(row["gold"]) + 1),
    }  # fmt: skip


FORMS: dict[str, Callable[[Row], Row]] = {
    "arc_": lambda row: _labelled(row, "question"),
    "openbookqa": lambda row: _labelled(row, "question_stem"),
    "piqa": _piqa,
    "boolq": _boolq,
    "lambada": _lambada,
    "winogrande": _winogrande,
}
"""By the beginning of a task's name: from a plainer form to the fields of its data set on the hub."""
