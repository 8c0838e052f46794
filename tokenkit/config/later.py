"""Fields that are accepted, but whose feature is not here yet: setting one says so."""

from collections.abc import Mapping
from typing import Any

from tokenkit.config.schema import leaves
from tokenkit.errors import ConfigError

LATER = {
    "n_model_parallel": "vocabulary-parallel heads",
}
"""Name, or beginning of names that ends in `_` or `.`: what its feature comes with."""

_PRETRAIN = "`tokenkit pretrain` reads it, and trains a language model from nothing"
FOREIGN = {
    "model_config": f"{_PRETRAIN}; `tokenkit train` starts from a model: student",
    "train_config": f"{_PRETRAIN}; the fields of `tokenkit train` are steps, batch_size, "
    "optimizer.learning_rate and so on",
    "dataset_config": f"{_PRETRAIN}; data.datasets of `tokenkit train` has the same entries",
    "eval_config": f"{_PRETRAIN}; text held out is measured with ppl_eval_data",
    "wandb_config": f"{_PRETRAIN}; `tokenkit train` has report_to: wandb",
    "data_mixes": "`tokenkit ablate --custom-datasets` reads it; name one mix as data.datasets",
}
"""Groups of fields of other programs that users of this one know, and why there are none here."""


def foreign(name: str) -> str | None:
    """Why a field of another program is not here; None: it is none of those."""
    return FOREIGN.get(name.partition(".")[0])


def refuse_later(values: Mapping[str, Any], schema: type) -> None:
    """Stop at the first field that is set and has no effect yet.

    Raises:
        ConfigError: naming the field, its feature and its default.
    """
    for leaf in leaves(schema):
        feature = feature_of(leaf.name)
        if feature is None or leaf.name not in values:
            continue
        value = values[leaf.name]
        if value != leaf.default:
            raise ConfigError(
                f"{leaf.name} is accepted but its feature comes with {feature}; "
                f"remove it or set it to {spell(leaf.default)}"
            )


def feature_of(name: str) -> str | None:
    """What a field's feature comes with; None where it is here."""
    for key, feature in LATER.items():
        if name == key or (key[-1] in "._" and name.startswith(key)):
            return feature
    return None


def spell(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)
