"""From the row of a data set to a document, by the fields that the user named or by the row's own shape."""

from __future__ import annotations

import string

from tokenkit.data.files import BadRow, Row
from tokenkit.data.options import SourceOptions
from tokenkit.tokenization.chat.documents import KNOWN_FIELDS, Document, document_from_row


def check_fields(first: Row, options: SourceOptions, name: str) -> None:
    """Refuse a data set whose first row lacks the fields that hold the text.

    Raises:
        ValueError: with the fields that it has.
    """
    wanted = _fields(options)
    if set(wanted) <= set(first) if wanted else set(KNOWN_FIELDS) & set(first):
        return
    expected = (
        "the field " + " and ".join(map(repr, wanted)) if wanted else f"one of {', '.join(KNOWN_FIELDS)}"
    )
    raise ValueError(
        f"data set {name}: expected rows with {expected}, but the first row has "
        f"{', '.join(map(str, first)) or 'no field'}: name the field with text_field or text_template"
    )


def _fields(options: SourceOptions) -> tuple[str, ...]:
    """Return the fields that a user named; none: the row's own shape decides."""
    if options.text_field is not None:
        return (options.text_field,)
    return tuple(name for _, name in _template(options.text_template or "") if name is not None)


def _template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal text, field name).

    Raises:
        ValueError: if a field is anything but a name: no positions, attributes, indices or formats.
    """
    parts = []
    for literal, name, format_spec, conversion in string.Formatter().parse(template):
        if name is not None and (not name.isidentifier() or format_spec or conversion):
            raise ValueError(
                "text_template may hold {name} of a field, and {{ for a brace: "
                f"got {name!r} in {template!r}"
            )
        parts.append((literal, name))
    return parts


def document_of(row: Row | BadRow, options: SourceOptions, max_bytes: int) -> Document:
    """Return the document of a row.

    Raises:
        ValueError: with a short reason, if it is none.
    """
    if isinstance(row, BadRow):
        raise ValueError(row.reason)
    if options.text_field is not None:
        value = _field(row, options.text_field)
        is_chat = isinstance(value, list)
        document = document_from_row({**row, "messages": value} if is_chat else {"text": value})
    elif options.text_template is not None:
        text = "".join(
            literal + ("" if name is None else _as_text(_field(row, name), name))
            for literal, name in _template(options.text_template)
        )
        document = document_from_row({"text": text})
    else:
        document = document_from_row(row)
    for text in (*document.says, document.tools or ""):
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise ValueError("not UTF-8") from None
        if size > max_bytes:
            raise ValueError("too long")
    return document


def _field(row: Row, name: str) -> object:
    if name not in row:
        raise ValueError(f"without the field {name!r}")
    return row[name]


def _as_text(value: object, name: str) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"without text in the field {name!r}")
