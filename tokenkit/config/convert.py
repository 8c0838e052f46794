"""Training configurations of tokenkit in JAX as ours: names, shapes, and the defaults that differ.

What the tables do not name has the same name and meaning here. docs/configs.md shows them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenkit.config.read import canonical, looks_secret, nested, read_config
from tokenkit.config.schema import group_prefixes, leaves
from tokenkit.config.train import ALIASES, TrainConfig
from tokenkit.config.yaml_files import dump_yaml, read_yaml
from tokenkit.errors import ConfigError, nearest

RENAMED = {
    "optimizer.b1": "optimizer.beta1",
    "optimizer.b2": "optimizer.beta2",
    "optimizer.eps": "optimizer.epsilon",
    "num_workers": "data.num_workers",
    "bce_temp": "binarization_temp",
    "ppl_eval_data.path": "ppl_eval_data",
    "ppl_eval_data.dataset_configs": "ppl_eval_data",
    "data.dataset_configs": "data.datasets",
}
"""Their name: ours."""

WITHOUT_EFFECT = {
    "data.kind": "how data is stored is seen from the file or the hub",
    "data.mix_languages": "a mix is data.datasets with their weights",
    "eval": "benchmarks are not here yet; bits per byte are measured on held-out text",
    "ppl_eval_data": "of it the path alone is read here",
    "export_to_gcs_bucket": "exports are local folders: export_to",
    "n_model_parallel": "the vocabulary is not divided yet: data-parallel ranks take all processes",
    "n_data_parallel": "torchrun says how many processes there are",
    "hypernet.multiply_hidden_dim_by_num_embeddings": "the network here has one width",
    "identity_steps": "`tokenkit train-hypernet` has it",
    "identity_lr": "`tokenkit train-hypernet` has one rate",
    "compat": "there is one kind of hypernetwork",
}
"""Fields and groups that nothing here reads, and why."""

DEFAULTS: dict[str, tuple[str, Any]] = {
    "seed": ("", 1234),
    "dtype": ("", "bfloat16"),
    "baseline.divergence": ("baseline_", "srkl"),
    "baseline.kd_temp": ("baseline_", 2.0),
    "baseline.gradnorm_alpha": ("gradnorm", 0.12),
    "hypernet.num_heads": ("hypernet", 16),
    "hypernet.use_attention_mask": ("hypernet", False),
}
"""What their program takes where a file is silent and ours would take something else; with the word that must
stand in the file for it to matter."""

OTHERWISE = {
    "debug": "shows the traceback of an error here",
    "dry_run": "runs one step here and writes nothing",
}
"""Fields of the same name that mean something else."""

NEEDED = {
    "student.pretrained_model_name_or_path": "student",
    "target_tokenizer_name": "byte",
    "data.dataset_name": None,
    "data.datasets": [{"path": "data"}],
}
"""Stands in, while values are checked, for what their command line would have given."""

MASKS = {"dolly": "assistant", "openmath2": "assistant"}
"""Their loss_mask_mode by data set: here the rows say what is a prompt."""


def convert(old: Path, new: Path) -> list[str]:
    """Write the configuration `old` of the JAX program as `new`, one that `tokenkit train` reads.

    Returns:
        Lines about what has another name or shape, or no effect here.

    Raises:
        ConfigError: a field that neither program has, with the nearest; or a value without a counterpart.
        FileExistsError: `new` exists.
    """
    if new.exists():
        raise FileExistsError(f"{new} exists, and is not overwritten: name another file")
    notes: list[str] = []
    values: dict[str, Any] = {}
    read = _flat(read_yaml(old))
    if not read:
        raise ConfigError(f"{old} holds no field: name a configuration of the JAX program")
    for name, value in read.items():
        ours = _our_name(name)
        if ours is None:
            notes.append(f"{name} has no effect here: {_why_not(name, old)}")
            continue
        given = _value(ours, value, notes)
        if given is not None:
            values[ours] = given
            notes += [f"{name} is {ours}"] if ours != name else []
            notes += [f"{name} {OTHERWISE[name]}"] if name in OTHERWISE and value else []
    text = old.read_text(encoding="utf-8")
    for name, (needs, value) in DEFAULTS.items():
        if name not in values and needs in text:
            values[name] = value
            notes.append(f"{name} is not set, and their default {value} is written out")
    read_config(
        TrainConfig, (), NEEDED | values, say=lambda line: notes.append(line.removeprefix("tokenkit: "))
    )
    new.parent.mkdir(parents=True, exist_ok=True)
    with new.open("x", encoding="utf-8") as file:
        file.write(dump_yaml(nested(values)))
    return notes


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value and key not in ("loss_weights", "loss_schedules"):
            values |= _flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def _our_name(name: str) -> str | None:
    """The field here; None: there is none, or nothing reads it."""
    if name in RENAMED:
        return RENAMED[name]
    if name in WITHOUT_EFFECT or name.partition(".")[0] in WITHOUT_EFFECT:
        return None
    known = canonical(name, ALIASES)
    return known if known in {leaf.name for leaf in leaves(TrainConfig)} else None


def _why_not(name: str, file: Path) -> str:
    """Why nothing reads a field.

    Raises:
        ConfigError: the field is unknown.
    """
    for known, reason in WITHOUT_EFFECT.items():
        if name == known or name.startswith(f"{known}."):
            return reason
    if name.rstrip(".") + "." in group_prefixes(TrainConfig):
        return "it is a group without a field"
    if looks_secret(name.rpartition(".")[2]):
        raise ConfigError(f"{name} looks like a secret ({file}): remove it")
    fields = [*RENAMED, *WITHOUT_EFFECT, *ALIASES, *(leaf.name for leaf in leaves(TrainConfig))]
    raise ConfigError(f"unknown field {name} ({file}){nearest(name, fields) or ': neither program has it'}")


def _value(name: str, value: Any, notes: list[str]) -> Any:
    """A value in the shape that the field has here.

    Raises:
        ConfigError: data sets of a shape that is not known.
    """
    if name == "loss_mask_mode" and value in MASKS:
        notes.append(f"loss_mask_mode {value} is {MASKS[value]}: the rows say what is a prompt")
        return MASKS[value]
    if name == "optimizer.max_grad_norm" and value is None:
        return 0.0  # no clipping
    if name == "train_model_mode" and value in (False, "no"):
        return "none"
    if name == "data.shuffle_buffer_size" and value == "inf":
        notes.append("data.shuffle_buffer_size inf: without data.streaming all rows are shuffled")
        return 10_000
    if name in ("data.datasets", "ppl_eval_data") and isinstance(value, list):
        sources = [_source(item, notes) for item in value]
        if name == "data.datasets":
            return sources
        notes.append("ppl_eval_data is one file or data set here: the first is read")
        return sources[0]["path"]
    return value


def _source(item: Any, notes: list[str]) -> dict[str, Any]:
    """One data set: theirs is called by path, and by name for a part of it."""
    if not isinstance(item, Mapping) or "path" not in item:
        raise ConfigError(f"data.dataset_configs: each needs a path, got {item!r}")
    known = {"path": "path", "name": "subset", "subset": "subset", "split": "split", "weight": "weight"}
    for key in item:
        if key not in known:
            notes.append(f"data.dataset_configs: {key} has no effect here")
    return {known[key]: value for key, value in item.items() if key in known}
