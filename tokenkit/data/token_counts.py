"""How often each token of some tokenizers occurs in one pass over data; the pass may be interrupted.

    FOLDER/counting.json   where the pass stands, and what it counts
    FOLDER/counting_N.npz  the counts at that point, after N documents

Both are replaced in one step each, the counts first under a name of their own: an interruption loses at
most the documents since the last save. Counts are of the content of local files, not of their names: a file
that changed is noticed by its digest, for one more read of it.

Dimensions: V vocabulary of one tokenizer.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from tokenkit.data.mix import local_files, open_data
from tokenkit.data.options import DataOptions, HeldoutOptions
from tokenkit.data.places import file_digest
from tokenkit.disk import write_durably
from tokenkit.tokenization.chat.documents import Document
from tokenkit.tokenization.tokenizer import Tokenizer

BATCH = 512  # documents that are encoded in one call, on all cores
SAVE_EVERY = 20  # batches
STATE = "counting.json"
Counts = NDArray[np.int64]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Counted:
    """A tokenizer and how much of the data it counts."""

    tokenizer: Tokenizer
    percent: float = 100.0
    """Share of the documents, chosen by a hash of their number."""

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 < self.percent <= 100:
            raise ValueError(f"subsample percent must lie in (0, 100]: got {self.percent}")

    def takes(self, number: int, seed: int) -> bool:
        """Whether document `number` is in the share; the same documents for every tokenizer of that share."""
        digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.percent / 100 * 2**64


def count_tokens(
    data: DataOptions,
    sides: Mapping[str, Counted],
    folder: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Counts]:
    """Return the counts [V] of each side's tokens over one pass of the data.

    Args:
        data: what is read; nothing is held out. Of a mix, the pass ends with its first data set.
        sides: tokenizers by name.
        folder: where the counts are kept. A pass that was interrupted goes on from there, one that is
            complete is not repeated.
        seed: chooses the documents of a share.
        progress: called with the number of documents that were read.

    Raises:
        ValueError: data or tokenizers other than those of the counts in `folder`, data that changed since,
            or data without a token.
        FileNotFoundError: data that does not exist.
    """
    about = _about(data, sides, seed)
    _check_same(folder, about)
    mix, _ = open_data(replace(data, heldout=HeldoutOptions(fraction=0, documents=0)), seed)
    counts = {name: np.zeros(side.tokenizer.vocab_size, np.int64) for name, side in sides.items()}
    state = _load(folder, counts)
    if state is not None:
        if progress is not None:
            progress(state["mix"]["documents"])
        mix.load_state_dict(state["mix"])
    batches, is_done = 0, state is not None and state["done"]
    while not is_done:
        documents: list[tuple[int, Document]] = []
        while len(documents) < BATCH and not is_done:
            number, document = mix.documents, next(mix)
            is_done = mix.epoch > 0  # that document was the first of the next pass
            documents += [] if is_done else [(number, document)]
        for name, side in sides.items():
            taken = [text for number, d in documents if side.takes(number, seed) for text in _texts(d)]
            counts[name] += _count(side.tokenizer, taken)
        batches += 1
        if is_done or batches % SAVE_EVERY == 0:
            _save(folder, {"about": about, "mix": mix.state_dict(), "done": is_done}, counts)
        if progress is not None:
            progress(len(documents))
    for name, count_V in counts.items():
        if not count_V.any():
            raise ValueError(
                f"no token of {name} occurs in the data: it has no text, or the share is too small"
            )
    return counts


def _texts(document: Document) -> list[str]:
    if document.text is not None:
        return [document.text]
    return [message.content for message in document.messages or () if message.content]


def _count(tokenizer: Tokenizer, texts: Sequence[str]) -> Counts:
    ids_N = tokenizer.encode_texts(texts).ids_N if texts else np.zeros(0, np.int64)
    return np.bincount(ids_N, minlength=tokenizer.vocab_size)


def _about(data: DataOptions, sides: Mapping[str, Counted], seed: int) -> dict[str, Any]:
    """What makes two passes the same."""
    return {
        "data": hashlib.sha256(repr(data).encode()).hexdigest(),
        "seed": seed,
        "sides": {name: [side.tokenizer.fingerprint(), side.percent] for name, side in sides.items()},
        "files": {str(file): file_digest(file) for file in local_files(data)},
    }


def _check_same(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse counts of anything else."""
    path = folder / STATE
    if not path.is_file():
        return
    counted = _state(path)["about"]
    other = [key for key in ("data", "seed", "sides") if counted.get(key) != about[key]]
    if other:
        raise ValueError(
            f"{folder} holds counts of other {' and '.join(other)}: give --output another folder, or move "
            "counting.json and its counts away"
        )
    then, now = counted.get("files", {}), about["files"]
    changed = sorted(name for name in {**then, **now} if then.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"{folder} holds counts of data that changed since: {', '.join(changed[:3])}"
            f"{' and more' if len(changed) > 3 else ''}; give --output another folder, or move counting.json "
            "and its counts away"
        )


def _load(folder: Path, counts: dict[str, Counts]) -> dict[str, Any] | None:
    """Read where a pass stands into `counts`; None if none was begun."""
    path = folder / STATE
    if not path.is_file():
        return None
    state = _state(path)
    try:
        with np.load(folder / state["counts"], allow_pickle=False) as stored:
            for name, count_V in counts.items():
                if stored[name].shape != count_V.shape:
                    raise ValueError(f"{name} has {stored[name].shape} counts, expected {count_V.shape}")
                counts[name] = stored[name]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise _damaged(folder / state["counts"]) from error
    return state


def _state(path: Path) -> dict[str, Any]:
    """Read where a pass stands."""
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name = f"counting_{state['mix']['documents']}.npz"
        if isinstance(state["about"], dict) and state["counts"] == name and "done" in state:
            return state
    except (ValueError, KeyError, TypeError):
        pass
    raise _damaged(path)


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"{path} does not hold the counts that an interrupted pass left: give --output another folder, or "
        f"move {STATE} and its counts away"
    )


def _save(folder: Path, state: dict[str, Any], counts: Mapping[str, Counts]) -> None:
    """Write counts under a name of their own, then the state that names them, then drop the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"counting_{state['mix']['documents']}.npz"
    content = io.BytesIO()
    np.savez(content, **dict(counts))  # type: ignore[arg-type]  # no name is allow_pickle
    write_durably(folder / name, content.getvalue())
    write_durably(folder / STATE, json.dumps({**state, "counts": name}).encode())
    for old in folder.glob("counting_*.npz"):
        if old.name != name:
            old.unlink()
