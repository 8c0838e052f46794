"""`tokenkit export --format ...`: a model in another format than Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenkit.config.paths import check_opened
from tokenkit.disk import blaming_disk, check_vacant

if TYPE_CHECKING:
    from tokenkit.commands.export import ExportConfig
    from tokenkit.evaluation.opened import Opened


def convert(config: ExportConfig, output: Path) -> None:
    """Open the model, write it in its new format, compare what the new format computes, and name it.

    Raises:
        FileExistsError: the output is not empty.
        ModuleNotFoundError: a package of the format is missing.
        DataError: the model cannot be read, or the format cannot hold it.
        ExportError: what was written computes something else.
    """
    check_vacant(output)
    from tokenkit.export.converted import check_packages, check_source, read_config

    check_packages(config.format)
    name = config.checkpoint_path
    check_opened("checkpoint_path", name)
    check_source(name, read_config(Path(name).expanduser()), config.format)
    from tokenkit.run.folder import staging_folder

    with blaming_disk(output), staging_folder(output) as staging, _opened(config) as opened:
        check_source(name, read_config(opened.folder), config.format)  # of a run
        said = WRITERS[config.format](config, opened, staging)
    print(f"{name}: {output} ({said})")


def _opened(config: ExportConfig) -> AbstractContextManager[Opened]:
    import torch

    from tokenkit.evaluation.opened import open_model
    from tokenkit.training.exporting import Places

    places = Places(
        base_model=config.base_model,
        base_tokenizer=config.base_tokenizer,
        target_tokenizer_name=config.target_tokenizer_name,
    )
    dtype: torch.dtype | Literal["auto"] = torch.float32 if config.format in IN_FLOAT32 else "auto"
    return open_model(
        config.checkpoint_path, dtype=dtype, trust_remote_code=config.trust_remote_code, places=places
    )


def _onnx(config: ExportConfig, opened: Opened, folder: Path) -> str:
    from tokenkit.export.converted import copy_beside, write_card
    from tokenkit.export.onnx_graph import write_onnx

    name = config.checkpoint_path
    error, usage = write_onnx(opened.model, name, folder, use_cache=config.options.use_cache)
    copy_beside(opened.folder, folder)
    cache = (
        ": its cache is an input, which is empty at first, and an output" if config.options.use_cache else ""
    )
    write_card(
        folder,
        (name, opened.folder),
        library="onnx",
        what=f"The model as an ONNX graph with dynamic axes, written by tokenkit (PyTorch){cache}.",
        usage=usage,
        facts=_versions("torch", "onnx", "onnxruntime") | {"largest difference of a logit": f"{error:.1e}"},
    )
    return f"logits of onnxruntime within {error:.1e} of torch's"


def _gguf(config: ExportConfig, opened: Opened, folder: Path) -> str:
    import torch

    from tokenkit.export.card import public_name
    from tokenkit.export.converted import write_card
    from tokenkit.export.gguf_file import FILE, USAGE, GgufSource, write_gguf
    from tokenkit.export.options import GgufType

    name, theirs = config.checkpoint_path, opened.hf_tokenizer
    kinds: dict[torch.dtype, GgufType] = {torch.float16: "f16", torch.bfloat16: "bf16"}
    kind = config.options.gguf_type or kinds.get(opened.model.dtype, "f32")
    first = theirs("a")["input_ids"][0]
    template = theirs.chat_template
    source = GgufSource(
        model=opened.model,
        tokenizer=opened.tokenizer,
        name=public_name(name),
        chat_template=template if isinstance(template, str) else None,
        adds_bos=first == opened.tokenizer.bos_id,
    )
    counts = write_gguf(source, folder, kind)
    said = ", ".join(f"{count} tensors in {dtype.lower()}" for dtype, count in sorted(counts.items()))
    size = f"{(folder / FILE).stat().st_size / 1e6:.1f} MB"
    write_card(
        folder,
        (name, opened.folder),
        library="gguf",
        what="The model and its tokenizer as a GGUF file, written by tokenkit (PyTorch).",
        usage=USAGE,
        facts=_versions("torch", "gguf") | {"tensors": said, "size": size},
    )
    return f"{said}, {size}; every tensor and every token read back"


def _int8(config: ExportConfig, opened: Opened, folder: Path) -> str:
    from tokenkit.export.converted import copy_beside, write_card
    from tokenkit.export.quantised import USAGE, write_int8

    copy_beside(opened.folder, folder)  # what is written next has the configuration anew
    facts = write_int8(opened, folder, _texts(config, opened)).facts()
    write_card(
        folder,
        (config.checkpoint_path, opened.folder),
        library="transformers",
        what="The model with the matrices of its linear layers in 8 bits (torchao, weights only), written by "
        "tokenkit (PyTorch).",
        usage=USAGE,
        facts=_versions("torch", "transformers", "torchao") | facts,
    )
    return "; ".join(f"{name}: {value}" for name, value in facts.items())


def _texts(config: ExportConfig, opened: Opened) -> list[str]:
    """Return the documents on which bits per byte are measured; none where no text is named."""
    if config.options.text is None:
        return []
    from tokenkit.data.mix import read_documents
    from tokenkit.data.options import SourceOptions
    from tokenkit.tokenization.written import writable_text

    documents = read_documents(SourceOptions(path=config.options.text), DOCUMENTS)
    texts = [writable_text(document.text, [opened.tokenizer])[0] for document in documents if document.text]
    return [text for text in texts if text]


def _versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    from tokenkit import __version__

    return {"versions": ", ".join([f"tokenkit {__version__}", *(f"{p} {version(p)}" for p in packages)])}


DOCUMENTS = 64
"""Of the text that bits per byte are measured on, at most."""
IN_FLOAT32 = ("onnx",)
"""Formats that are made of a model in float32; others take it as it is stored."""
WRITERS: Mapping[str, Callable[[ExportConfig, Opened, Path], str]] = {
    "onnx": _onnx,
    "gguf": _gguf,
    "int8": _int8,
}
"""What writes each format to a folder, and says in a few words how it was checked."""
