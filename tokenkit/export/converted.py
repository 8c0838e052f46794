"""What all formats that a Hugging Face folder can be turned into have in common.

Each is written to a folder of its own, with the tokenizer, the configuration and a card beside it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenkit.errors import DataError
from tokenkit.export.card import public_name
from tokenkit.models.reading import EXPANDED

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "gguf": ("gguf",),
    "int8": ("torchao",),
    "int4": ("torchao",),
}
"""What a format needs beside torch and transformers."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".data", ".gguf")
"""Endings of files that hold weights, and are not copied."""
LARGEST_COPY = 256 * 2**20  # bytes; tokenizers of 262k tokens have 33 MB
EXPANSION_STAYS = (
    "is a byte model with input-id expansion, whose class comes with its folder, and {format} holds no code: "
    "train without expand_input_ids"
)


def check_packages(format: str) -> None:
    """Refuse a format whose packages are not installed, before anything is read.

    Raises:
        ModuleNotFoundError: naming the first that is missing.
    """
    for name in PACKAGES.get(format, ()):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"--format {format} needs {name}, which is not installed", name=name)


def check_source(name: str, config: Mapping[str, Any], format: str) -> None:
    """Refuse a model that the format cannot hold, by its config.json alone.

    Raises:
        DataError: naming the model and the reason.
    """
    if found := config.get("quantization_config"):
        method = found.get("quant_method", "unnamed") if isinstance(found, Mapping) else "unnamed"
        raise DataError(
            f"{name} is quantised already (method {method}): --format {format} starts from the model that it "
            "was made from"
        )
    if str(config.get("model_type", "")).startswith(EXPANDED):
        raise DataError(f"{name} {EXPANSION_STAYS.format(format=format)}")


def copy_beside(source: str, folder: Path) -> None:
    """Copy what a model's folder holds beside weights and card: tokenizer, template, configurations."""
    for path in sorted(Path(source).iterdir()):
        is_other = path.suffix in (*WEIGHTS, ".md") or path.name.endswith(".index.json")
        if path.is_file() and not is_other and path.name[0] != "." and path.stat().st_size <= LARGEST_COPY:
            shutil.copyfile(path, folder / path.name)


def write_card(
    folder: Path, source: tuple[str, str], *, library: str, what: str, usage: str, facts: Mapping[str, str]
) -> None:
    """Write the card of a converted model; licence, languages and training are those of the source's card.

    Args:
        folder: is written.
        source: what was named to be converted, and the folder in Hugging Face layout that was read for it.
        library: the name that the hub knows for what reads it.
        what: a sentence.
        usage: code.
        facts: name and value, in order.
    """
    from huggingface_hub import ModelCardData

    from tokenkit.export.card import inherited, told

    name, own = public_name(source[0]), inherited(source[1])
    sentence, lines = told(source[1])
    renamed = {"versions": "versions, training"}
    facts = {renamed.get(key, key): value for key, value in lines.items()} | dict(facts)
    what = f"{what} {sentence}".strip()
    data = ModelCardData(
        base_model=name,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["tokenkit", library],
        **own,
    )
    listed = "".join(f"- **{key}**: {value}\n" for key, value in facts.items())
    text = f"---\n{data.to_yaml()}\n---\n\n# {name}, {library}\n\n{what}\n\n{listed}\n```python\n{usage}```\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return a folder's config.json; empty where it has none that can be read, which is said later."""
    try:
        read = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
