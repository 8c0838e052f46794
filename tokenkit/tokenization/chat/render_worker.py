"""A process of its own that renders chat templates: what it may use of time and memory is limited.

`rendering.py` starts it by its path, so it imports nothing of tokenkit. One JSON object per line comes in
(`template`, `messages`, `tools`, `add_generation_prompt`, `names`, `max_chars`), one goes out (`text` or
`error`). The environment is the one that transformers renders chat templates with.
"""

import contextlib
import datetime
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY_BYTES = 1 << 30
SECONDS = 2.0  # of processor time for one conversation
TODAY = datetime.datetime(2024, 7, 26)
"""What a template that asks for the date is told: training on another day reads the same."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks answers for those who ask, and writes what stands inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the body as it stands."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def refuse(message: str) -> None:
    """Raise what a template says of messages that it does not write."""
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """Write JSON without HTML's escapes, which Jinja's own filter puts in."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


@functools.lru_cache(maxsize=64)
def compiled(template: str) -> jinja2.Template:
    """Return the program of a template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(template)


def render(job: dict[str, Any]) -> str:
    """Return what one job's template writes."""
    program = compiled(job["template"])
    written: list[str] = []
    size = 0
    blocks = program.generate(
        messages=job["messages"],
        tools=job["tools"],
        documents=None,
        add_generation_prompt=job["add_generation_prompt"],
        **job["names"],
    )
    for block in blocks:
        written.append(block)
        size += len(block)
        if size > job["max_chars"]:
            raise ValueError(f"more than {job['max_chars']} characters are written")
    return "".join(written)


def answer(line: bytes) -> dict[str, str]:
    """Return the answer to one line: a template is a program, and may raise anything."""
    try:
        return {"text": render(json.loads(line))}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {"error": f"it fails: {said[:200]}"}


def limit() -> Callable[[float], Any]:
    """Limit the memory of this process, and return what sets the clock of one job (0: stops it)."""
    try:
        import resource
        import signal
    except ImportError:  # Windows: the process that waits for us has a clock of its own
        return lambda seconds: None
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # The signal's own action ends this process, inside a long operation too.
    return lambda seconds: signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Answer until the other side is gone."""
    clock = limit()
    for line in sys.stdin.buffer:
        clock(SECONDS)
        said = answer(line)
        try:
            out = json.dumps(said).encode()
        except (MemoryError, ValueError):
            out = b'{"error": "it writes text that cannot be handed over"}'
        clock(0)
        sys.stdout.buffer.write(out + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
