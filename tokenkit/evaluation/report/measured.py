"""What a report measures of a run itself: its tokenizers and models on some of its text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenkit.config import TrainConfig, read_config
from tokenkit.data.mix import open_data, read_documents
from tokenkit.data.options import SourceOptions
from tokenkit.embeddings.rows import LABELS, copied_ids, ordinary_ids
from tokenkit.errors import ConfigError
from tokenkit.evaluation.opened import open_model
from tokenkit.evaluation.report.comparable import text_of
from tokenkit.evaluation.text_bits import bits_of_bytes, nats_of, summary
from tokenkit.export.card import public_name
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.options import BodyOptions
from tokenkit.pairing.align import align
from tokenkit.pairing.view import cells, visible
from tokenkit.tokenization.chat.documents import Document
from tokenkit.tokenization.chat.encode import encode_flat
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.written import writable_text
from tokenkit.training.build import build_models
from tokenkit.training.pair import Tokenizers, load_tokenizers

logger = logging.getLogger(__name__)

ALIGNED = 3
"""Documents that are shown aligned."""
ALIGNED_TOKENS = 60
TEACHER, BEFORE, AFTER = "teacher", "before", "after"


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How much is measured."""

    text: str | None = None
    """Measured in place of the run's held-out text."""
    texts: str | None = None
    """Folder of one file for each language."""
    documents: int = 16
    characters: int = 1000
    """Of a document."""
    samples: int = 3
    new_tokens: int = 40
    trust_remote_code: bool = False


def measure(folder: Path, options: Measures) -> dict[str, Any]:
    """Return what the report adds to `read_run`; what cannot be had is left out and named in `notes`."""
    found: dict[str, Any] = {"notes": []}
    with _noted(found, "nothing is measured"):
        config = read_config(TrainConfig, [folder / "config.yaml"], say=lambda _: None)
        if config.run.trust_remote_code and not options.trust_remote_code:
            raise ConfigError("the run trusted code that comes with its model: --trust-remote-code")
        tokenizers = load_tokenizers(config)
        texts: list[str] = []
        with _noted(found, "no text to measure"):
            texts = _texts(config, tokenizers, options)
        found |= _vocabulary(tokenizers)
        with _noted(found, "bytes per token"):
            called = _called(config, options)
            found["bytes_per_token"] = list(_per_language(tokenizers, {called: texts}, options.texts))
        text = text_of(_called(config, options), texts)
        if texts:
            found["alignments"] = list(_alignments(tokenizers, texts[:ALIGNED]))
            _models(found, folder, config, tokenizers, texts, options)
            if "by_class" in found:
                found["by_class"]["text"] = text
    return found


def _called(config: TrainConfig, options: Measures) -> str:
    """Return what the text is called that is measured."""
    named = options.text or config.evaluation.ppl_eval_data
    return "the run's held-out documents" if named is None else public_name(named)


@contextmanager
def _noted(found: dict[str, Any], what: str) -> Iterator[None]:
    """Let the report go on without a part, and say why it is missing."""
    try:
        yield
    except (ArithmeticError, OSError, ValueError, RuntimeError, LookupError) as error:
        found["notes"].append(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")


def _texts(config: TrainConfig, tokenizers: Tokenizers, options: Measures) -> list[str]:
    """Return the beginnings of the run's held-out documents, as all its tokenizers can write them."""
    named = options.text or config.evaluation.ppl_eval_data
    if named is not None:
        documents = read_documents(SourceOptions(path=named), options.documents)
    else:
        documents = open_data(config.data, config.run.seed)[1][: options.documents]
    found = []
    for document in documents:
        text = document.text or "\n".join(message.content for message in document.messages or ())
        text = text[: options.characters]
        found.append(writable_text(text, (tokenizers.target, tokenizers.teacher, tokenizers.old))[0])
    found = [text for text in found if text.strip()]
    if not found:
        raise ValueError("the run holds out no text: name some with --text")
    return found


def _vocabulary(tokenizers: Tokenizers) -> dict[str, Any]:
    """Return the overlap by bytes, and the ways in which new rows come about."""
    old, new = tokenizers.old, tokenizers.target
    sets = [{t.token_bytes[i] for i in ordinary_ids(t)} for t in (old, new)]
    shared = len(sets[0] & sets[1])
    found: dict[str, Any] = {
        "overlap": {
            "old": {"ids": old.vocab_size, "strings": len(sets[0])},
            "new": {"ids": new.vocab_size, "strings": len(sets[1])},
            "shared": shared,
            "share_of_new": shared / max(len(sets[1]), 1),
            "share_of_old": shared / max(len(sets[0]), 1),
        }
    }
    if new is not old:
        copied = copied_ids(old, new)
        counts = dict(zip(LABELS, np.bincount(copied.label_V, minlength=len(LABELS)).tolist(), strict=True))
        made = len(copied.to_make)
        counts["mean_of_all"] -= made
        counts["mean_of_pieces"] += made
        found["embeddings"] = {
            "counts": counts,
            "from": "counted again from both tokenizers: the run kept no count",
        }
    return found


def _per_language(
    tokenizers: Tokenizers, own: Mapping[str, Sequence[str]], folder: str | None
) -> Iterator[dict[str, Any]]:
    """Yield bytes for each token of old and new tokenizer, of the run's text and of each language."""
    named = {name: list(texts) for name, texts in own.items() if texts}
    if folder is not None:
        path = Path(folder).expanduser()
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        named |= {file.stem: [file.read_text(encoding="utf-8")[:8000]] for file in files}
    for name, parts in named.items():
        try:
            kept = [writable_text(text, (tokenizers.old, tokenizers.target))[0] for text in parts]
            size = sum(len(text.encode()) for text in kept)
            old, new = (
                size / max(sum(len(tokens.ids) for tokens in tokenizer.encode_batch(kept)), 1)
                for tokenizer in (tokenizers.old, tokenizers.target)
            )
        except ValueError as error:
            logger.warning("%s is left out of bytes per token: %s", name, error)
            continue
        if size:
            yield {"text": name, "bytes": size, "old": old, "new": new}


def _alignments(tokenizers: Tokenizers, texts: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Yield the cells of each document: the new tokenizer's tokens above the teacher's."""
    pair = tokenizers.target, tokenizers.teacher
    for text in texts:
        sides = encode_flat([Document(text=text)], pair, mode="direct_encode")
        chunks = align(*sides)
        strings = [
            [visible(tokenizer.token_bytes[i]) for i in side.ids_N.tolist()]
            for tokenizer, side in zip(pair, sides, strict=True)
        ]
        row = cells(strings[0], strings[1], chunks.student_N.tolist(), chunks.teacher_M.tolist())
        shown, kept = 0, []
        for cell in row:
            shown += max(len(cell.student), len(cell.teacher))
            if shown > ALIGNED_TOKENS:
                break
            kept.append({"student": cell.student, "teacher": cell.teacher, "chunk": cell.chunk})
        yield kept


def _models(
    found: dict[str, Any],
    folder: Path,
    config: TrainConfig,
    tokenizers: Tokenizers,
    texts: list[str],
    options: Measures,
) -> None:
    """Add bits per byte of teacher and student before and after, by class, and samples."""
    bits: dict[str, list[Any]] = {}
    tokens: dict[str, int] = {}
    opening = partial(open_model, dtype=torch.float32, trust_remote_code=options.trust_remote_code)

    def scored(name: str, model: CausalLM, tokenizer: Tokenizer) -> None:
        limit = getattr(model.config, "max_position_embeddings", None) or 512
        window = min(limit, 512)
        bits[name], tokens[name] = bits_of_bytes(
            nats_of(model), tokenizer, texts, window=window, stride=window // 2
        )

    taught = config.teacher or config.student
    with _noted(found, "the teacher is not measured"):
        spec = taught.tokenizer_name or taught.pretrained_model_name_or_path
        name = taught.pretrained_model_name_or_path
        with opening(name, tokenizer_name=spec) as opened:
            scored(TEACHER, opened.causal, opened.tokenizer)
    if tokenizers.target is not tokenizers.old:
        with _noted(found, "the student before training is not measured"), torch.no_grad():
            student = build_models(_plain(config), tokenizers, needs_teacher=False).student.eval()
            if student.projector is None:
                scored(BEFORE, student, tokenizers.target)
            del student
    with _noted(found, "the student is not measured"), opening(str(folder)) as opened:
        scored(AFTER, opened.causal, opened.tokenizer)
        found["samples"] = list(_samples(opened, texts, options))
    if bits:
        with _noted(found, "no bits per byte by class"):
            found["by_class"] = summary(texts, bits, tokens, samples=100, seed=0)


def _plain(config: TrainConfig) -> TrainConfig:
    """Return a configuration without what makes steps fast and needs a GPU."""
    training = replace(
        config.training,
        dtype="float32",
        body=BodyOptions(),
        gradient_checkpointing=False,
    )
    return replace(config, training=training)


def _samples(opened: Any, texts: Sequence[str], options: Measures) -> Iterator[dict[str, str]]:
    """Yield the most likely continuations of the first words of some documents."""
    tokenizer, limit = opened.tokenizer, opened.positions or 512
    for text in texts[: options.samples]:
        words = text.split(" ")
        prompt = " ".join(words[: max(1, min(8, len(words) // 2))])
        (side,) = encode_flat([Document(text=prompt)], (tokenizer,), mode="direct_encode_no_force_eos")
        ids = side.ids_N.tolist()[: max(1, limit - options.new_tokens)]
        new = min(options.new_tokens, limit - len(ids))
        written = opened.model.generate(
            torch.tensor([ids]),
            max_new_tokens=max(new, 1),
            do_sample=False,
            pad_token_id=tokenizer.pad_id or 0,
        )
        yield {"prompt": prompt, "text": tokenizer.decode(written[0, len(ids) :].tolist())}
