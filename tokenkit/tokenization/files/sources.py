"""The files of a tokenizer, from a folder or a hub name, as plain data."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.disk import is_path, why_missing
from tokenkit.tokenization.files.sentencepiece_model import check_is_no_pointer, sentencepiece_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
HUB_PATTERNS = ["tokenizer*", "*token*.json", "*.model", "vocab.*", "merges.txt", "config.json", "*.jinja"]
ROLES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class TokenizerFiles:
    """What defines a tokenizer on disk."""

    document: dict[str, Any]
    """tokenizer.json."""
    config: dict[str, Any]
    """tokenizer_config.json, filled up from special_tokens_map.json."""
    chat_template: str | None

    def special_strings(self) -> dict[str, str]:
        """The strings of BOS, EOS, PAD and UNK, by role, where the tokenizer names them."""
        named = {role: _content(self.config.get(f"{role}_token")) for role in ROLES}
        return {role: string for role, string in named.items() if string}


def read_files(name_or_path: str, *, revision: str | None, trust_remote_code: bool) -> TokenizerFiles:
    """Read the files of a local tokenizer folder, or of a hub repository through its client's cache.

    A SentencePiece model alone is read as it stands; other files (vocab.json and merges.txt, a repository's
    own code) are converted by transformers.

    Raises:
        FileNotFoundError: no such folder, or the hub does not know or cannot deliver the name.
        ValueError: the files are not those of a fast tokenizer and cannot be converted.
    """
    folder = _folder(name_or_path, revision)
    config: dict[str, Any] = {}
    for file in reversed(CONFIG_FILES):
        if (folder / file).is_file():
            config.update(
                {key: value for key, value in _read_json(folder / file).items() if value is not None}
            )
    model_file = next((folder / file for file in SENTENCEPIECE_FILES if (folder / file).is_file()), None)
    if (folder / "tokenizer.json").is_file():
        document = _read_json(folder / "tokenizer.json")
    elif model_file is not None:
        document = sentencepiece_document(model_file)
        config.setdefault(
            "add_bos_token", True
        )  # what transformers assumes of such a folder, if it has a BOS
    else:
        document = _converted(folder, name_or_path, revision, trust_remote_code)
    if not isinstance(document.get("model"), dict):
        raise ValueError(f"{folder / 'tokenizer.json'} has no 'model': it is not a tokenizers file")
    return TokenizerFiles(document, config, _chat_template(folder, config))


def huggingface_tokenizer(name_or_path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub repository as transformers has it."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name_or_path, trust_remote_code=trust_remote_code
    )
    return tokenizer


def read_object(tokenizer: Any) -> tuple[str, TokenizerFiles]:
    """Read a tokenizer of transformers as it would be saved: what was changed since it was loaded counts.

    Returns:
        its name, and its files.
    """
    if not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(
            "a tokenizer is given by name or path, or as a tokenizer of transformers: got "
            f"{type(tokenizer).__name__}"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = read_files(folder, revision=None, trust_remote_code=False)
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__, files


def _folder(name_or_path: str, revision: str | None) -> Path:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.name == "tokenizer.json" and path.is_file():
        return path.parent
    if path.exists():
        raise ValueError(f"a tokenizer is a folder or a hub name: {name_or_path} is a file")
    if is_path(name_or_path):
        raise FileNotFoundError(f"there is no tokenizer folder {name_or_path}: check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:
        if why := why_missing(name_or_path):
            raise FileNotFoundError(f"tokenizer {name_or_path!r}: a folder of that name {why}") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"tokenizer {name_or_path!r} is neither a folder nor a readable hub repository ({reason}): "
            "check the name, the network and the token"
        ) from error


@contextmanager
def well_formed(name: str) -> Iterator[None]:
    """Name the tokenizer whose files are JSON, but not of the form that the tokenizers library writes.

    Raises:
        ValueError: a part is missing, is of another type, or is nested too deeply to be read.
    """
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"tokenizer {name}: its files are nested too deeply: fetch it again") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"tokenizer {name}: its files are not of the tokenizers library's form "
            f"({type(error).__name__}: {error}): fetch it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    check_is_no_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the tokenizer again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object: got {type(value).__name__}")
    return value


def _converted(folder: Path, name: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    if not (folder / "vocab.json").is_file() and not trust_remote_code:
        if (export := folder / "export").is_dir():
            raise FileNotFoundError(
                f"{folder} is the folder of a run, and its tokenizer is in {export}: name that"
            )
        files = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(
            f"{folder} must hold tokenizer.json, {', '.join(SENTENCEPIECE_FILES)} or vocab.json: got {files}"
        )
    if trust_remote_code and (revision is None or len(revision) != 40) and not Path(name).is_dir():
        raise ValueError(
            f"trust_remote_code runs the code of {name!r}: pass a 40-digit commit as revision "
            f"(got {revision!r})"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, use_fast=True, local_files_only=True
        )
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError, KeyError) as error:
        raise ValueError(f"transformers cannot turn {folder} into a fast tokenizer: {error}") from error
    return json.loads(backend.to_str())


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error}): fetch the tokenizer again") from error
    template = config.get("chat_template")
    if isinstance(template, list) and all(_is_named_template(entry) for entry in template):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is None or isinstance(template, str):
        return template
    raise ValueError(
        f"chat_template in {folder / 'tokenizer_config.json'} is text, or a list of objects with 'name' and "
        f"'template', both text: got {type(template).__name__}. Mend the file, or write the template into "
        f"{file.name} beside it"
    )


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
