"""What other programs spell in another shape, where the name is the same: lists, tags, names of files."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tokenkit.config.schema import leaves
from tokenkit.config.yaml_files import load_yaml
from tokenkit.errors import ConfigError
from tokenkit.losses.options import ALIASES, NAMES
from tokenkit.tokenization.spec import TokenizerSpec, parse_spec

Given = dict[str, Any]


def translate(schema: type, given: Given, from_files: Collection[str] = ()) -> list[str]:
    """Change values, in place, to the shape that `schema` has for them; return what to say about it.

    Args:
        schema: the configuration.
        given: values by canonical name, as they were written.
        from_files: names of those that a file gave.
    """
    names = {leaf.name for leaf in leaves(schema)}
    for name in PER_LOSS:
        if isinstance(given.get(name), Mapping):
            _keep_losses(given, name, name in from_files)
    return [
        f"tokenkit: {note}"
        for needed, change in CHANGES.items()
        if needed in names and given.get(needed) is not None and (note := change(given)) is not None
    ]


PER_LOSS = ("loss_weights", "loss_schedules", "uncertainty_s_init")


def _keep_losses(given: Given, name: str, is_of_file: bool) -> None:
    """A mapping by losses follows the losses of the run: another name of one is that one, and a file, which
    serves several runs, may name losses that this one has not."""
    losses = given.get("losses")
    if isinstance(losses, str):
        losses = [losses]
    if not isinstance(losses, list | tuple):
        return
    here = {ALIASES.get(str(loss), loss): loss for loss in losses}
    given[name] = {
        here.get(ALIASES.get(key, key), key): value
        for key, value in given[name].items()
        if not is_of_file or key not in NAMES or ALIASES.get(key, key) in here
    }


def _split_target(given: Given) -> str | None:
    """A student's tokenizer with a `:target=` is two: the one that it has, and the one that it gets."""
    text = given["student.tokenizer_name"]
    if not isinstance(text, str) or "${" in text or given.get("target_tokenizer_name") is not None:
        return None
    try:
        spec = parse_spec(text)
    except ValueError:
        return None  # said later, where it is loaded
    if spec.target is None:
        return None
    own = str(TokenizerSpec(spec.name_or_path, spec.source))
    given["student.tokenizer_name"], given["target_tokenizer_name"] = own, text
    return f"student.tokenizer_name {text} is read as {own}, and as target_tokenizer_name {text}"


def _join_patterns(given: Given) -> None:
    """Several patterns are one that has them as alternatives."""
    value = given["model_lora_target_regex"]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        given["model_lora_target_regex"] = (
            value[0] if len(value) == 1 else "|".join(f"(?:{p})" for p in value)
        )


def _join_ranges(given: Given) -> None:
    """Several ranges of layers are one text with commas."""
    value = given["model_lora_layers"]
    if isinstance(value, str) and value.startswith("["):
        try:
            value = load_yaml(value, "model_lora_layers")
        except ConfigError:
            return
    if isinstance(value, list) and value and all(isinstance(item, str | int) for item in value):
        given["model_lora_layers"] = ",".join(map(str, value))


def _find_mapping(given: Given) -> str | None:
    """`mapping.pt` in a folder that `tokenkit mined-mapping` wrote is its mapping.npy."""
    value = given["mined_mapping_path"]
    path = Path(str(value)).expanduser()
    if path.suffix != ".pt" or path.exists():
        return None
    here = path.with_suffix(".npy")
    if not here.is_file():
        return None
    given["mined_mapping_path"] = str(here)
    return f"mined_mapping_path {value} does not exist, and {here} is read"


CHANGES: dict[str, Callable[[Given], str | None]] = {
    "student.tokenizer_name": _split_target,
    "model_lora_target_regex": _join_patterns,
    "model_lora_layers": _join_ranges,
    "mined_mapping_path": _find_mapping,
}
"""By the field that may need it: what changes the values, and says so where another would be surprised."""
