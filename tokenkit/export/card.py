"""The model card of an exported folder: what the hub reads of it, and what a person does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.disk import is_path

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TRAINED = (
    "The weights were adapted to the tokenizer in this folder by training with tokenkit (PyTorch): {losses}."
)
MOVED = (
    "The rows of its vocabulary were made anew for the tokenizer in this folder by tokenkit (PyTorch), "
    "without any training."
)
NEW = "The weights were trained from random ones with tokenkit (PyTorch): {losses}."
MERGED = "Adapters were merged into the weights by tokenkit (PyTorch)."


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What is known of an exported model. Paths are cut to names: a card is published."""

    base: str = ""
    """Folder or hub name of the model that it was made from; empty: of none, where it was trained."""
    teacher: str | None = None
    """Folder or hub name of another model that taught it."""
    losses: tuple[str, ...] = ()
    """What it was trained with; empty: it was not."""
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Further folders, files or hub names that went into it, by what they were."""
    lines: Mapping[str, str] = field(default_factory=dict)
    """Further lines, in order, as they are."""
    command: Sequence[str] = ()
    """The words of the command that made it."""
    is_moved: bool = True
    """Its vocabulary is another than the base's."""
    title: str | None = None
    bits_per_byte: float | None = None
    """Of the exported model, on held-out text."""


def public_name(location: str) -> str:
    """Return what a model, tokenizer or data set is called, without where it lies on this machine.

    A spec of a tokenizer keeps what follows its name. The export of a run is called as the run.
    """
    name, colon, rest = location.partition(":")
    path = Path(name).expanduser()
    if not (is_path(name) or path.exists()):
        return location
    path = path.resolve()
    return (path.parent.name if path.name == "export" else path.name) + colon + rest


def model_card(facts: CardFacts, *, needs_code: bool = False, adapter_rows: int | None = None) -> str:
    """Return the text of a model card.

    Args:
        facts: what is known.
        needs_code: the folder has a class of its own.
        adapter_rows: of a folder with adapters alone, how many rows its base model must have.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    base, own = public_name(facts.base) if facts.base else "", inherited(facts.base)
    is_new = not base and bool(facts.losses)
    change = "moved to another tokenizer" if facts.is_moved else "with adapters merged"
    change = "trained from nothing" if is_new else change
    title = facts.title or (f"{base}, {change}" if base else f"A model {change}")
    results = None
    if facts.bits_per_byte is not None:
        results = [
            EvalResult(
                task_type="text-generation", dataset_type="held-out-text", dataset_name="held-out text",
                metric_type="bits_per_byte", metric_name="bits per byte",
                metric_value=round(facts.bits_per_byte, 4),
            )
        ]  # fmt: skip
    data = ModelCardData(
        base_model=base or None,
        library_name="transformers" if adapter_rows is None else "peft",
        pipeline_tag="text-generation",
        tags=[
            "tokenkit",
            *(["tokenizer-transfer"] if facts.is_moved and not is_new else []),
            *(["distillation"] if _is_distilled(facts) else []),
        ],
        model_name=title if results else None,
        eval_results=results,
        **own,
    )
    return str(
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{_body(facts, needs_code, adapter_rows)}")
    )


def _is_distilled(facts: CardFacts) -> bool:
    return any(loss not in ("clm", "sft") for loss in facts.losses)


def _body(facts: CardFacts, needs_code: bool, adapter_rows: int | None) -> str:
    code = ", trust_remote_code=True" if needs_code else ""
    what = MOVED if facts.is_moved else MERGED
    if facts.losses:
        what = (TRAINED if facts.base else NEW).format(losses=", ".join(facts.losses))
    if any(loss.startswith("alm") for loss in facts.losses):
        what += " ALM: Minixhofer et al. 2025, arXiv:2503.20083."
    listed = "".join(f"- **{name}**: {value}\n" for name, value in _lines(facts).items())
    if adapter_rows is not None:
        return (
            f"{what} This folder holds adapters for the model that it was made from.\n\n{listed}\n"
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{public_name(facts.base)}")\n'
            f"base.resize_token_embeddings({adapter_rows})\n"
            'model = PeftModel.from_pretrained(base, ".")\n```\n'
        )
    return (
        f"{what}\n\n{listed}\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("."{code})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("."{code})\n```\n'
    )


def _lines(facts: CardFacts) -> dict[str, str]:
    named = {"made from": [facts.base], "teacher": [facts.teacher or ""], **facts.sources}
    public = {what: ", ".join(public_name(one) for one in names if one) for what, names in named.items()}
    lines = {what: names for what, names in public.items() if names} | dict(facts.lines)
    if facts.command:
        words = shlex.join(_published(word) for word in facts.command)
        lines["command"] = f"`{words.replace('`', '')}`"
    return lines


def _published(word: str) -> str:
    """Return a word of a command without where its files lie."""
    flag, equals, value = word.partition("=") if "=" in word else ("", "", word)
    return flag + equals + public_name(value)


def inherited(base: str) -> dict[str, Any]:
    """Return licence and languages as the card in the base model's folder says; of a hub model, nothing."""
    path = Path(base).expanduser() / "README.md"
    if not base or not path.is_file():
        return {}
    card = _read(path)
    if card is None:
        return {}
    names = ("license", "license_name", "license_link", "language")
    found = {name: getattr(card.data, name, None) for name in names}
    return {name: value for name, value in found.items() if value}


def told(folder: str) -> tuple[str, dict[str, str]]:
    """Return the sentence and the lines of a card that tokenkit wrote into a folder; of others, none."""
    path = Path(folder).expanduser() / "README.md"
    card = _read(path) if path.is_file() else None
    if card is None or "tokenkit" not in (getattr(card.data, "tags", None) or ()):
        return "", {}
    paragraphs = card.text.strip().split("\n\n")
    lines = re.findall(r"^- \*\*(.+?)\*\*: (.+)$", card.text, re.MULTILINE)
    return next((p for p in paragraphs if p[:1] not in "#-`"), ""), dict(lines)


def _read(path: Path) -> ModelCard | None:
    """Return a card, None where somebody wrote one that cannot be read: it is not worth a run."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except Exception:  # of yaml and the hub's library, each in kinds of its own
        return None
