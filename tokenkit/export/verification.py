"""What a process of its own, which imports transformers alone, makes of an exported folder."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenkit.errors import ExportError
from tokenkit.export import fresh_process
from tokenkit.export.tokenizer_folder import sample_ids
from tokenkit.tokenization.vocabulary import vocabulary_strings
from tokenkit.tokenization.written import writable_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenkit.tokenization.tokenizer import Tokenizer

STRINGS = 1000
ALPHABET = (
    "abcdefgh eestann  THEIR 0123456789 .,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`\n\t\r éßñøœ жизнь δέλτα "
    "中文字符 日本 한국어 🙂🏳️‍🌈 العربية हिन्दी"
)
"""What random strings are drawn from."""
SECONDS = 3600.0  # a model of many gigabytes is read from a slow disk in less


@torch.no_grad()
def verify(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, *, trusts_code: bool) -> None:
    """Load a folder in a fresh process, and compare with what was written.

    Compared are the logits of a text in several scripts, the string of every id, the ids and the decoded text
    of 1,000 random strings; `pipeline("text-generation")` must write something.

    What was compared, and how well it agrees, is said on standard error.

    Args:
        folder: as it was exported.
        model: what was written, in float32.
        tokenizer: that of the model.
        trusts_code: the folder has a class of its own.

    Raises:
        ExportError: naming what differs, or with the last line of what the process said.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    ids = sample_ids(tokenizer)[:limit].tolist()
    texts = random_texts(tokenizer, STRINGS)
    prompt = next((text for text in texts if text.strip()), "a")[:8]
    found = _asked(folder, {"ids": ids, "texts": texts, "prompt": prompt}, trusts_code=trusts_code)
    rows = tokenizer.vocab_size
    wanted_TV = model(input_ids=torch.tensor([ids])).logits[0, :, :rows]
    error = float((torch.tensor(found["logits"])[:, :rows] - wanted_TV).abs().max())
    if not error <= 1e-3 * max(1.0, float(wanted_TV.abs().max())):
        raise ExportError(f"{folder}: in a fresh process, the logits are off by {error:.2e}")
    encoded = tokenizer.encode_batch(texts)
    for text, tokens, got, decoded in zip(texts, encoded, found["ids"], found["texts"], strict=True):
        own = tokens.ids.tolist()
        if got != own or decoded.removeprefix(" ") != tokenizer.decode(own).removeprefix(" "):
            raise ExportError(
                f"{folder}: in a fresh process, {text!r} becomes {got} and {decoded!r}, not {own}"
            )
    strings = vocabulary_strings(tokenizer.document["model"])
    strings = strings | {
        token["content"]: token["id"] for token in tokenizer.document.get("added_tokens") or ()
    }
    for string, token_id in strings.items():
        if (theirs := found["tokens"][token_id]) != string:
            raise ExportError(f"{folder}: in a fresh process, token {token_id} is {theirs!r}, not {string!r}")
    if not found["generated"].startswith(prompt):
        raise ExportError(f"{folder}: in a fresh process, the pipeline writes {found['generated']!r}")
    for line in (
        f"logits of {len(ids)} tokens of text, {rows:,} of each: within {error:.1e}",
        f"{len(strings):,} tokens: each id has its string",
        f"{len(texts):,} random texts: the same ids, and the same text back",
        f"pipeline: {prompt!r} becomes {found['generated']!r}",
    ):
        print(f"verified in a fresh process: {line}", file=sys.stderr)


def random_texts(tokenizer: Tokenizer, count: int) -> list[str]:
    """Return canonical strings of letters of many scripts, spaces and signs, none with a special token."""
    draw = random.Random(0)
    letters = list(ALPHABET)
    drawn = ["".join(draw.choices(letters, k=draw.randint(1, 30))) for _ in range(count)]
    texts = [writable_text(text, [tokenizer])[0] for text in drawn]
    return [text for text in texts if text and not any(string in text for string in tokenizer.control)]


def _asked(folder: Path, questions: Mapping[str, Any], *, trusts_code: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tokenkit-") as name:
        asked, said = Path(name) / "questions.json", Path(name) / "answers.json"
        asked.write_text(json.dumps(questions), encoding="utf-8")
        program = [sys.executable, "-P", fresh_process.__file__]
        words = [str(folder), str(asked), str(said), "1" if trusts_code else "0"]
        ended = subprocess.run(
            [*program, *words], capture_output=True, text=True, timeout=SECONDS, check=False, cwd=name
        )
        if ended.returncode or not said.is_file():
            reason = next(reversed(ended.stderr.strip().splitlines()), f"exit code {ended.returncode}")
            raise ExportError(f"{folder}: a fresh process does not load it: {reason}")
        answers: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
        return answers
