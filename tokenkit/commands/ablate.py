"""`tokenkit ablate`: what the parts of a language model from nothing are worth, one run for each combination.

    tokenkit ablate --base-config config.yaml --axes data_mix selection_heads --custom-datasets datasets.yaml

A sweep (`tokenkit sweep`) of the configurations that `tokenkit pretrain` makes: its folder, its resume, its
array jobs of Slurm, its table.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tokenkit.cli import run
from tokenkit.commands.sweep import MOST_POINTS, Point, Sweep, SweepOptions, print_table, write_points
from tokenkit.config import ConfigError, parse_command_line, read_config
from tokenkit.config.command_line import take_own
from tokenkit.config.pretrain import PretrainConfig, train_config
from tokenkit.config.yaml_files import read_yaml
from tokenkit.errors import at_least, nearest

Axis = Literal["data_mix", "expert_setup", "selection_heads"]
Changes = dict[str, dict[str, Any]]

EXPERT_SETUPS: Changes = {
    "65k_2d": {"num_experts": 65536, "product_key_dim": [256, 256]},
    "1m_2d": {"num_experts": 1048576, "product_key_dim": [1024, 1024]},
    "1m_3d": {"num_experts": 1000000, "product_key_dim": [100, 100, 100], "query_dim": 258},
    "1m_4d": {"num_experts": 1048576, "product_key_dim": [32, 32, 32, 32]},
}
SELECTION_HEADS: Changes = {
    f"h{heads}_k{128 // heads}": {"num_heads": heads, "num_experts_per_tok": 128 // heads}
    for heads in (4, 8, 16, 32)
}
SECTIONS: dict[Axis, tuple[str, Changes]] = {
    "data_mix": ("data_mixes", {}),
    "expert_setup": ("expert_setups", EXPERT_SETUPS),
    "selection_heads": ("selection_heads", SELECTION_HEADS),
}
"""By axis, the section of a file that has its values, and the values where there is none."""

ALIASES = {"config": "base_config", "gpus": "jobs", "output": "output_dir"}


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Train once for each combination of values of some axes, and compare."""

    base_config: str
    """File of `tokenkit pretrain` that all runs begin with."""

    output_dir: str = "outputs/ablations"
    """Folder of all runs; the same command again goes on, and broken runs are resumed."""

    axes: tuple[Axis, ...]
    """What is combined."""

    custom_datasets: str | None = None
    """File with data_mixes, and perhaps expert_setups and selection_heads: names, and what each changes."""

    tokens: float | None = None
    """Tokens of each run, instead of the base's max_steps."""

    jobs: int = 1
    """Runs at once; where CUDA_VISIBLE_DEVICES lists several, each gets one."""

    launch: str | None = None
    """What starts a run. None: this Python."""

    slurm: str | None = None
    """Start nothing: write FOLDER/sweep.sbatch, an array of all runs that are not done."""

    slurm_options: str = ""
    """Its further options in one word, such as "--gres=gpu:1 --time=8:00:00"."""

    list: bool = False
    """Show the runs and stop."""

    def __post_init__(self) -> None:
        at_least("jobs", self.jobs, 1, 1024)
        at_least("tokens", self.tokens, 1)
        if not self.axes or len(set(self.axes)) < len(self.axes):
            raise ConfigError(f"axes must name each axis once, got {[*self.axes]}: {', '.join(SECTIONS)}")
        for name in ("base_config", "custom_datasets"):
            path = getattr(self, name)
            if path is not None and not Path(path).expanduser().is_file():
                raise FileNotFoundError(f"{name}: {path} does not exist: name a YAML file")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: ablate(read_words(words)))


def read_words(words: Sequence[str]) -> AblateConfig:
    """Read the command line; as at `tokenkit sweep`, one word behind --slurm-options may begin with dashes.

    Raises:
        ConfigError: one line that says what is wrong.
        FileNotFoundError: a path that leads nowhere.
    """
    own, rest = take_own(words, {"slurm-options": str}, "tokenkit ablate")
    rest += [f"--slurm-options={value}" for value in own.values()]
    return parse_command_line(AblateConfig, rest, program="tokenkit ablate", aliases=ALIASES)


def ablate(config: AblateConfig) -> int:
    """List the runs, write them for Slurm, or run them; then write the table and the picture.

    Raises:
        ConfigError: a combination that cannot be, named.
        FileExistsError: the folder holds something else.
    """
    from tokenkit.commands.sweep_runs import run_all, write_slurm

    planned = plan(config)
    if config.list:
        print("\n".join(point.name for point in planned.points))
        return 0
    facts = {point.name: parameters(point) for point in planned.points}
    write_points(planned, facts)
    options = SweepOptions(
        jobs=config.jobs, launch=config.launch, slurm=config.slurm, slurm_options=config.slurm_options
    )
    if config.slurm is not None:
        print(write_slurm(planned, options))
        return 0
    code = run_all(planned, options)
    rows = print_table(planned.folder, "bits_per_byte/student,eval")
    draw(planned.folder, rows)
    return code


def plan(config: AblateConfig) -> Sweep:
    """Return the configuration of every combination.

    Raises:
        ConfigError: naming the combination.
    """
    own = read_yaml(Path(config.custom_datasets).expanduser()) if config.custom_datasets else {}
    known = [section for section, _ in SECTIONS.values()]
    if unknown := [name for name in own if name not in known]:
        raise ConfigError(
            f"custom_datasets: unknown section {unknown[0]}{nearest(unknown[0], known)}; sections are "
            f"{', '.join(known)}"
        )
    values = {axis: _values(axis, own) for axis in config.axes}
    folder = Path(config.output_dir).expanduser().absolute()
    base = read_yaml(Path(config.base_config).expanduser())
    combinations = list(itertools.product(*values.values()))
    if len(combinations) > MOST_POINTS:
        raise ConfigError(f"{len(combinations)} combinations are more than {MOST_POINTS}")
    points = []
    for index, chosen in enumerate(combinations):
        names = dict(zip(values, chosen, strict=True))
        name = f"{index:03d}_" + "_".join(chosen)
        try:
            given = _changed(base, names, values, config.tokens)
            made = read_config(PretrainConfig, (), given, say=lambda line: None)
            if made.train_config.length.max_steps is None:
                raise ConfigError("train_config.max_steps says how long runs are: set it, or --tokens")
            loop = train_config(made)
        except ConfigError as error:
            raise ConfigError(f"{', '.join(f'{a}={v}' for a, v in names.items())}: {error}") from error
        where = replace(loop.run, output_dir=str(folder / "runs" / name), resume=True, name=name)
        points.append(
            Point(name, {str(axis): value for axis, value in names.items()}, replace(loop, run=where))
        )
    return Sweep(folder, {str(axis): list(changes) for axis, changes in values.items()}, points)


def _values(axis: Axis, own: Mapping[str, Any]) -> Changes:
    """Return the values of an axis: those of the file, or those that come with it."""
    section, built_in = SECTIONS[axis]
    found = own.get(section, built_in)
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(
            f"axis {axis} has no value: give a file with {section} as custom_datasets, each a name and what "
            "it changes"
        )
    for name, changes in found.items():
        if not isinstance(changes, Mapping) or (axis == "data_mix" and not changes.get("datasets")):
            wanted = "a list datasets" if axis == "data_mix" else "fields of peer_config"
            raise ConfigError(f"{section}.{name} must hold {wanted}, got {changes!r:.80}")
    return {str(name): dict(changes) for name, changes in found.items()}


def _changed(
    base: Mapping[str, Any], names: Mapping[Axis, str], values: Mapping[Axis, Changes], tokens: float | None
) -> dict[str, Any]:
    """Return the base with the changes of one combination, by dotted name."""
    sections: dict[str, Any] = {
        name: dict(section) if isinstance(section, Mapping) else section for name, section in base.items()
    }
    model, data = (dict(sections.get(name) or {}) for name in ("model_config", "dataset_config"))
    train = dict(sections.get("train_config") or {})
    for axis, name in names.items():
        changes = values[axis][name]
        if axis == "data_mix":
            data["datasets"] = changes["datasets"]
        else:
            model["peer_config"] = {**(model.get("peer_config") or {}), **changes}
    if tokens is not None:
        rows = int(train.get("per_device_train_batch_size", 8)) * int(
            train.get("gradient_accumulation_steps", 1)
        )
        step = rows * int(data.get("max_seq_length", 2048))
        train = {k: v for k, v in train.items() if k not in ("num_train_epochs", "steps_per_epoch")}
        train["max_steps"] = max(1, round(tokens / step))
    given: dict[str, Any] = {"model_config": model}
    for section, fields in (*sections.items(), ("dataset_config", data), ("train_config", train)):
        if section != "model_config":
            given |= {f"{section}.{k}": v for k, v in (fields or {}).items()}
    if tokens is not None:
        given = {
            k: v
            for k, v in given.items()
            if k.partition(".")[2] not in ("num_train_epochs", "steps_per_epoch")
        }
    return given


def parameters(point: Point) -> dict[str, int]:
    """Return how many parameters the model of a run has, and how many of them a token meets."""
    from tokenkit.evaluation.parameters import count_parameters
    from tokenkit.models.new import ids_of, new_model_on_meta

    student = point.config.student
    ids = ids_of(student.tokenizer_name or student.pretrained_model_name_or_path)
    found = count_parameters(new_model_on_meta(student.from_config or {}, ids))
    return {"parameters": found["total"], "active": found["active"]}


def draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the bits per byte of the runs that have them."""
    from tokenkit.disk import write_durably
    from tokenkit.evaluation.bars import draw_bars

    measured = {row["run"]: row["bits_per_byte/student"] for row in rows if "bits_per_byte/student" in row}
    if measured:
        picture = draw_bars(list(measured), {"student": list(measured.values())}, "bits per byte, held out")
        write_durably(folder / "bits_per_byte.png", picture)


if __name__ == "__main__":
    raise SystemExit(main())
