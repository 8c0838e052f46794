"""Keep keys and passwords out of logs, records and other people's servers."""

from __future__ import annotations

import logging
import os
import re
import sys
from contextlib import suppress
from typing import Any

HIDDEN = "[redacted]"

# whole words only: `tokens_to_add` and `TOKENIZERS_PARALLELISM` are no secrets
_SECRET_WORD = re.compile(
    r"(?:api|access|private|secret|auth)?key|token|secrets?|password|passwd|passwort|passw|pass|passphrase|pat"
    r"|credentials?|creds?|auth|authorization|bearer|jwt|cookie|webhook|private"
)
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}\b|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bsk-(?=[\w-]*[A-Za-z0-9]{16})[\w-]{20,}"  # words with hyphens (multi-task-..., sk-...) are none
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}"
    r"|\bAIza[\w-]{35}|\bey[JK][\w-]{10,}\.[\w-]{10,}\.[\w-]*|\bnpm_\w{30,}|\bpypi-[\w-]{30,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password of an address
)
_SHORTEST_SECRET = 8  # characters; hiding "true" or "1" would black out ordinary text


def is_secret_name(name: str) -> bool:
    """Whether a variable or a field of this name usually holds a credential, wherever the word stands."""
    spelled = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # of openaiKey too
    words = [word.rstrip("0123456789").lower() for word in re.split(r"[^A-Za-z0-9]+", spelled)]
    # PWD and OLDPWD name folders
    return any(map(_SECRET_WORD.fullmatch, words)) or "pwd" in words[1:]


def has_secret(text: str) -> bool:
    """Whether a text holds a well-known key, or the value of one of this process's secret variables."""
    return redact(text) != text


def redact(text: str, longest: int | None = None) -> str:
    """Return `text` without the values of this process's secret variables, and without well-known keys.

    Args:
        text: what shall be seen by others.
        longest: characters of what is left; the middle of a longer text is left out.
    """
    for name, value in os.environ.items():
        is_path = value.startswith(("/", "~", "./", "../"))  # where a secret lies, as in SSH_AUTH_SOCK
        if len(value) >= _SHORTEST_SECRET and not is_path and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    text = _SECRET_VALUE.sub(HIDDEN, text)
    return text if longest is None else shortened(text, longest)


def shortened(text: str, longest: int) -> str:
    """Leave the middle of a long text out, and say so."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def redact_config(value: Any, name: str = "") -> Any:
    """Return a configuration with every field that is named like a secret, or looks like one, hidden."""
    if isinstance(value, dict):
        return {key: redact_config(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact_config(entry, name) for entry in value]
    if isinstance(value, str):
        return HIDDEN if value and is_secret_name(name) else redact(value)
    return value


class RedactingFilter(logging.Filter):
    """Redact each log record. Add it to handlers: filters of a logger do not see its children's records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record; every record passes."""
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True


def complain(line: str) -> None:
    """Write a line to standard error, redacted; that it may lie on the disk that is full hides no error."""
    with suppress(OSError, ValueError):
        print(redact(line), file=sys.stderr, flush=True)


def redact_logs() -> None:
    """Redact every log record of this process where it is made, whatever handlers there are or will be."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return
    hide = RedactingFilter()

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        hide.filter(record)
        return record

    make_redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_redacted)
