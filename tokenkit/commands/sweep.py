"""`tokenkit sweep`: all combinations of several values, one training run each, and one table of results.

tokenkit sweep CONFIG --optimizer.learning-rate 1e-4,5e-5 --losses clm,alm_space --output outputs/sweep
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenkit.cli import run
from tokenkit.config import ALIASES, ConfigError, TrainConfig, read_config, to_dict, to_yaml
from tokenkit.config.command_line import WITH_COMMAS, canonical_flag, from_words
from tokenkit.config.forms import Words, short_forms, sort_words, split_commas
from tokenkit.config.paths import check_paths
from tokenkit.config.read import canonical
from tokenkit.config.schema import leaves
from tokenkit.config.unknown import unknown_field
from tokenkit.config.yaml_files import read_yaml
from tokenkit.disk import check_vacant
from tokenkit.errors import at_least

USAGE = """usage: tokenkit sweep [CONFIG ...] --FIELD VALUE,VALUE ... [--FIELD VALUE ...] [OPTIONS]
       tokenkit sweep --table FOLDER

Train once for each combination of values. CONFIG and the fields are those of `tokenkit train`.

A comma between values makes an axis: --optimizer.learning-rate 1e-4,5e-5 are two runs. That holds for lists
too: --losses clm,alm_space are two runs of one loss each. A list inside one run stands in brackets:
--losses clm,[clm,alm_space] is a run with one loss and one with two; --losses [clm,alm_space], or with a
space, is one value for all runs. Quotes keep the commas of a text: --model-lora-layers '"0-3,10",0-5'.
optimizer.learning_rate=1e-4,5e-5 says the same as a flag does.

  --output FOLDER    Folder of the sweep (default: output_dir of CONFIG). The same command again goes on: runs
                     that are done stay, broken ones are resumed. One that holds another sweep is refused.
  --jobs N           Runs at once (default: 1). Where CUDA_VISIBLE_DEVICES lists several, each gets one.
  --launch COMMAND   What starts a run (default: this Python), such as "torchrun --nproc-per-node 4".
  --slurm FOLDER     Start nothing: write FOLDER/sweep.sbatch, an array of all runs that are not done.
  --slurm-options T  Its further options, such as "--gres=gpu:1 --time=8:00:00".
  --metrics A,B      Columns of the table: names of metrics.jsonl, or their beginning (default:
                     bits_per_byte). The first orders the table, smallest first.
  --list             Show the runs and stop.
  --table FOLDER     Write the table of a sweep as it stands now, and stop.

Written: FOLDER/results.csv, runs/NAME (as by `tokenkit train`), points/NAME.yaml, logs/NAME.log, sweep.json.
"""

MOST_POINTS = 10_000
RUN_FOLDER_NAME = 100  # characters
MANIFEST = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How the runs of a sweep are started, and what is said of them."""

    output: str | None = None
    jobs: int = 1
    launch: str | None = None
    slurm: str | None = None
    slurm_options: str = ""
    metrics: str = "bits_per_byte"
    table: str | None = None
    list: bool = False

    def __post_init__(self) -> None:
        """Check the number of jobs."""
        at_least("jobs", self.jobs, 1, 1024)


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep."""

    name: str
    values: dict[str, str]
    """By axis, as they were written."""
    config: TrainConfig


@dataclass(frozen=True, slots=True)
class Sweep:
    """A folder and its runs."""

    folder: Path
    axes: dict[str, list[str]]
    points: list[Point] = field(default_factory=list)

    def file(self, name: str) -> Path:
        """The configuration of a run."""
        return self.folder / "points" / f"{name}.yaml"

    def run_folder(self, name: str) -> Path:
        """Where a run writes."""
        return self.folder / "runs" / name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: sweep(list(sys.argv[1:] if argv is None else argv)))


def sweep(arguments: list[str]) -> int:
    """Plan, then list, write for Slurm, or run.

    Raises:
        ConfigError: no axis, a value that is none, or combinations that no run can have.
        FileExistsError: the folder holds something else.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    options, rest = take_options(arguments)
    if options.table is not None:
        print_table(Path(options.table).expanduser(), options.metrics)
        return 0
    planned = plan(rest, options)
    if options.list:
        print("\n".join(point.name for point in planned.points))
        return 0
    write_points(planned)
    if options.slurm is not None:
        from tokenkit.commands.sweep_runs import write_slurm

        print(write_slurm(planned, options))
        return 0
    from tokenkit.commands.sweep_runs import run_all

    code = run_all(planned, options)
    print_table(planned.folder, options.metrics)
    return code


def take_options(arguments: Sequence[str]) -> tuple[SweepOptions, list[str]]:
    """Split the options of the sweep itself from the words for its runs.

    Raises:
        ConfigError: an option without its value.
    """
    names = {f.name: f for f in dataclasses.fields(SweepOptions)}
    values: dict[str, Any] = {}
    rest, left = [], list(arguments)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        name = "output" if name == "output_dir" else name
        if name not in names:
            rest.append(word)
        elif name == "list":
            values[name] = True
        elif not equals and not left:
            raise ConfigError(f"{flag} needs a value; tokenkit sweep --help lists the options")
        else:
            values[name] = value if equals else left.pop(0)
    if "jobs" in values and not values["jobs"].isdigit():
        raise ConfigError(f"jobs: expected an integer, got {values['jobs']!r}")
    if "jobs" in values:
        values["jobs"] = int(values["jobs"])
    return SweepOptions(**values), rest


def plan(arguments: Sequence[str], options: SweepOptions) -> Sweep:
    """Read the configuration of every combination.

    Raises:
        ConfigError: naming the combination where it is one of several.
    """
    shorts = short_forms(TrainConfig)
    first = next((i for i, word in enumerate(arguments) if word[0:1] in "-+" or "=" in word), len(arguments))
    files, rest = list(arguments[:first]), arguments[first:]
    words = sort_words(rest, TrainConfig, lambda name: shorts.get(name) or canonical(name, ALIASES))
    files += words.files
    fixed, axes = read_words(words)
    output = options.output or fixed.pop("output_dir", None)
    if not axes:
        raise ConfigError(
            "no field has several values, so this is one run: part values by commas (--seed 0,1), or use "
            "`tokenkit train`"
        )
    if "output_dir" in axes:
        raise ConfigError("output_dir is the folder of the whole sweep: name one")
    count = 1
    for written, _ in axes.values():
        count *= len(written)
    if count > MOST_POINTS:
        raise ConfigError(f"{count} combinations are more than {MOST_POINTS}")
    said: set[str] = set()
    found: list[Point] = []
    for index, chosen in enumerate(itertools.product(*[zip(w, v, strict=True) for w, v in axes.values()])):
        values = dict(zip(axes, (written for written, _ in chosen), strict=True))
        overrides = fixed | {name: value for name, (_, value) in zip(axes, chosen, strict=True)}
        name = f"{index:03d}_" + "_".join(f"{_last(axis)}-{_plain(text)}" for axis, text in values.items())
        name = name[:RUN_FOLDER_NAME]
        try:
            config = read_config(
                TrainConfig, files, overrides, aliases=ALIASES, folders=words.folders, say=said.add
            )
            check_paths(config)
        except (ConfigError, FileNotFoundError) as error:
            raise type(error)(f"{', '.join(f'{a}={t}' for a, t in values.items())}: {error}") from error
        folder = Path(output or config.run.output_dir).expanduser().absolute()
        where = dataclasses.replace(
            config.run, output_dir=str(folder / "runs" / name), resume=True, name=f"{config.run.name}_{name}"
        )
        found.append(Point(name, values, dataclasses.replace(config, run=where)))
    for line in sorted(said):
        print(line, file=sys.stderr)
    folders = {Path(point.config.run.output_dir).parents[1] for point in found}
    if len(folders) > 1:
        raise ConfigError("output_dir depends on an axis: name the folder of the sweep with --output")
    return Sweep(folders.pop(), {name: written for name, (written, _) in axes.items()}, found)


def read_words(words: Words) -> tuple[dict[str, Any], dict[str, tuple[list[str], list[Any]]]]:
    """Sort settings into those of all runs, and axes: values as they were written, and as YAML has them.

    Raises:
        ConfigError: an unknown field, an empty value, or one that an axis has twice.
    """
    types = {leaf.name: leaf.type for leaf in leaves(TrainConfig)}
    pairs: list[tuple[str, list[str]]] = []
    for word in words.flags:
        flag = canonical_flag(TrainConfig, word, ALIASES, {})
        if flag.startswith("--"):
            name, equals, value = flag[2:].partition("=")
            pairs.append((name.replace("-", "_"), [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            raise ConfigError(f"unexpected argument {word!r}: flags begin with --")
    pairs += [(name, [value]) for name, value in words.others.items()]
    fixed: dict[str, Any] = {}
    axes: dict[str, tuple[list[str], list[Any]]] = {}
    for name, given in pairs:
        if name not in types and name not in words.others:
            raise ConfigError(unknown_field(TrainConfig, name, "command line"))
        parts = split_commas(given[0]) if len(given) == 1 and name not in WITH_COMMAS else given
        hint = types.get(name, str)
        if len(given) != 1 or len(parts) == 1:
            fixed[name] = from_words(hint, parts if len(given) == 1 else given, name)
            continue
        if len(set(parts)) < len(parts):
            raise ConfigError(f"{name} names a value twice: {given[0]}")
        axes[name] = (parts, [from_words(hint, [part], name) for part in parts])
    return {name: value for name, value in fixed.items() if name not in axes}, axes


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _plain(text: str) -> str:
    """A value as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "+", Path(text).name if "/" in text else text).strip("+")


def write_points(planned: Sweep, facts: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write what is to be run, where nothing else is.

    Args:
        planned: all runs.
        facts: by run, further columns of the table.

    Raises:
        FileExistsError: the folder holds files of other origin, or another sweep, with the first difference.
    """
    folder = planned.folder
    if not (folder / MANIFEST).is_file():
        check_vacant(folder)
    else:
        before = read_manifest(folder)["axes"]
        if before != planned.axes:
            other = " ".join(f"{name}={','.join(values)}" for name, values in before.items())
            raise FileExistsError(f"{folder} holds another sweep, {other}: name another with --output")
        for point in planned.points:
            _compare(planned.file(point.name), to_dict(point.config))
    (folder / "points").mkdir(parents=True, exist_ok=True)
    for point in planned.points:
        planned.file(point.name).write_text(to_yaml(point.config), encoding="utf-8")
    about = {"axes": planned.axes, "points": {point.name: point.values for point in planned.points}}
    about |= {"facts": facts} if facts else {}
    (folder / MANIFEST).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _compare(file: Path, values: dict[str, Any]) -> None:
    """Refuse a run that would go on with other settings than it began with."""
    if not file.is_file():
        return
    before = to_dict(read_config(TrainConfig, [file], say=lambda line: None))
    same = ("output_dir", "resume")  # a sweep may be moved
    for name, value in values.items():
        if name not in same and name in before and before[name] != value:
            raise FileExistsError(
                f"{file.parents[1]} holds another sweep: {name} is {before[name]!r} there and {value!r} "
                "here; name another folder with --output"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What sweep.json says.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} holds no sweep: there is no {MANIFEST}")
    return read_yaml(folder / MANIFEST)  # JSON is YAML


def print_table(folder: Path, metrics: str) -> list[dict[str, Any]]:
    """Write results.csv, print and return it, the smallest value of the first metric first.

    `seconds` are those between the first file of a run and its last word, with whatever stopped it between.
    """
    from tokenkit.run.ending import read_outcome
    from tokenkit.run.metrics import METRICS_NAME, read_metrics

    about = read_manifest(folder)
    wanted = split_commas(metrics)
    rows: list[dict[str, Any]] = []
    for name, values in about["points"].items():
        outcome = read_outcome(folder / "runs" / name)
        last: dict[str, Any] = {}
        for line in read_metrics(folder / "runs" / name / METRICS_NAME):
            last |= line
        shown = {
            key: last[key] for want in wanted for key in sorted(last) if (key + "/").startswith(want + "/")
        }
        state = outcome.get("outcome", "not started")
        more = dict(about.get("facts", {}).get(name, {}))
        began, ended = (folder / "runs" / name / file for file in ("config.yaml", "outcome.json"))
        if state == "done" and began.exists():
            more["seconds"] = round(ended.stat().st_mtime - began.stat().st_mtime)
        rows.append({"run": name, **values, "state": state, "step": last.get("step", 0), **shown, **more})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    first = [name for name in columns if (name + "/").startswith(wanted[0] + "/")]
    scores = [[row[key] for key in first if key in row and not math.isnan(row[key])] for row in rows]
    rows = [row for _, row in sorted(zip(scores, rows, strict=True), key=lambda pair: pair[0] or [math.inf])]
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    shown_rows = [columns, *[[_spell(row.get(column, "")) for column in columns] for row in rows]]
    widths = [max(len(row[i]) for row in shown_rows) for i in range(len(columns))]
    for row in shown_rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return rows


def _spell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
