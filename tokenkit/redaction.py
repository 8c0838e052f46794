"""Keep keys and passwords out of logs, records and other people's servers."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

HIDDEN = "[redacted]"

# whole words only: `tokens_to_add` and `TOKENIZERS_PARALLELISM` are no secrets
_SECRET_NAME = re.compile(r"(?i)(?:^|[_.-])(?:api_?key|key|token|secret|password|passwd|passw|credentials?)$")
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}\b|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}\b"
)
_SHORTEST_SECRET = 8  # characters; hiding "true" or "1" would black out ordinary text


def redact(text: str) -> str:
    """Return `text` without the values of this process's secret variables, and without well-known keys."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    return _SECRET_VALUE.sub(HIDDEN, text)


def redact_config(value: Any, name: str = "") -> Any:
    """Return a configuration with every field that is named like a secret, or looks like one, hidden."""
    if isinstance(value, dict):
        return {key: redact_config(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact_config(entry, name) for entry in value]
    if isinstance(value, str):
        return HIDDEN if value and _SECRET_NAME.search(name) else redact(value)
    return value


class RedactingFilter(logging.Filter):
    """Redact each log record. Add it to handlers: filters of a logger do not see its children's records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record; every record passes."""
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True
