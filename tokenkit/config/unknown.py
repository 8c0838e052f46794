"""What to say of a name in a configuration that is no field."""

import difflib

from tokenkit.config.later import foreign
from tokenkit.config.schema import group_prefixes, leaves
from tokenkit.errors import nearest
from tokenkit.run.redaction import is_secret_name

SYNONYMS = {
    "lr": "learning_rate",
    "model": "pretrained_model_name_or_path",
    "model_name": "pretrained_model_name_or_path",
    "model_name_or_path": "pretrained_model_name_or_path",
    "base_model": "pretrained_model_name_or_path",
    "tokenizer": "target_tokenizer_name",
    "target": "target_tokenizer_name",
    "dataset": "dataset_name",
    "train_file": "dataset_name",
    "dataset_name": "data",
    "max_steps": "steps",
    "num_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "max_length": "max_length_new",
    "max_seq_length": "max_length_new",
    "loss": "losses",
    "lora_rank": "model_lora_rank",
    "lora_r": "model_lora_rank",
    "lora_alpha": "model_lora_alpha",
    "logging_steps": "logging_interval",
    "save_steps": "save_interval",
    "eval_steps": "eval_interval",
    "epochs": "steps",
    "num_train_epochs": "steps",
    "output_folder": "output_dir",
    "out": "output",
}
"""What other programs call a field: the last part of its name here."""


def unknown_field(schema: type, name: str, source: str = "") -> str:
    """What to say of a field that does not exist: the nearest one, and where its name is nested.

    The value is never repeated: it may be a secret.
    """
    where = f" ({source})" if source else ""
    valid = [leaf.name for leaf in leaves(schema)]
    last = name.rsplit(".", 1)[-1]
    group, _, setting = name.partition(".")
    if group in valid and setting:
        flag = group.replace("_", "-")
        return f"unknown field {name}{where}: {group} is one field, written --{flag} {setting}=VALUE ..."
    reason = None if group + "." in group_prefixes(schema) else foreign(name)
    if is_secret_name(last) and reason is None:
        return (
            f"{name} looks like a secret{where}, and configurations are saved with checkpoints: remove it "
            "and pass it through the environment (HF_TOKEN, WANDB_API_KEY)"
        )
    if name + "." in group_prefixes(schema):
        inside = [other for other in valid if other.startswith(name + ".")]
        more = f", or {', '.join(inside[1:4])}" + (", ..." if len(inside) > 4 else "") if inside[1:] else ""
        return f"{name} is a group of fields{where}: set {inside[0]}{more}"
    if reason is None and (section := _near_section(schema, name)):
        return f"unknown section {section[0]}{where}, did you mean {section[1]}?"
    if last == "name" and reason is not None:
        return f"unknown field {name}{where}: {reason}"  # what has a name there has none here
    nested = [other for other in valid if other.rsplit(".", 1)[-1] in (last, SYNONYMS.get(last))]
    if nested:
        return f"unknown field {name}{where}: it is {' or '.join(nested)}"
    if reason is not None:
        return f"unknown field {name}{where}: {reason}"
    hint = nearest(name, valid)
    if not hint and (near := nearest(last, [other.rsplit(".", 1)[-1] for other in valid])):
        ending = near.removeprefix(", did you mean ").removesuffix("?")
        hint = f", did you mean {next(other for other in valid if other.rsplit('.', 1)[-1] == ending)}?"
    return f"unknown field {name}{where}{hint or '; --help lists all fields'}"


def _near_section(schema: type, name: str) -> tuple[str, str] | None:
    """The part of an unknown name that misspells a group, and that group; None: none is that near.

    Where the group is at fault its first field would be the wrong thing to correct.
    """
    groups = [prefix[:-1] for prefix in group_prefixes(schema)]
    parts = name.split(".")
    heads = [".".join(parts[: n + 1]) for n in range(len(parts))]
    unknown = next((head for head in heads if head not in groups), name)
    names = [*groups, *(leaf.name for leaf in leaves(schema))]
    beside = [known for known in names if known.count(".") == unknown.count(".")]
    near = difflib.get_close_matches(unknown, beside, n=1, cutoff=0.8)
    return (unknown, near[0]) if near and (near[0] in groups or unknown != name) else None
