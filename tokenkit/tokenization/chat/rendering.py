"""Chat templates (Jinja) at work: in a process of their own, with limits of time, memory and output.

A template comes with a tokenizer, from anywhere, and is a program. It runs in the sandbox that transformers
runs it in, and a loop without end or a text of gigabytes ends that process, not the run.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenkit.errors import TemplateError

WALL_SECONDS = 60.0  # a busy machine may let the process wait; beyond this it is ended
MAX_CHARS = 1_000_000  # beyond eight times what goes in
MAX_TEMPLATE_CHARS = 1_000_000


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    names: Mapping[str, str],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Return what a template writes of a conversation, as `apply_chat_template` of transformers does.

    Args:
        template: Jinja.
        messages: dicts of JSON values.
        names: `bos_token` and others.
        tools: definitions, or None.
        add_generation_prompt: open an answer at the end.

    Raises:
        TemplateError: the template fails, writes too much, or takes too long.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateError(f"it has {len(template)} characters, more than {MAX_TEMPLATE_CHARS}")
    content = json.dumps([messages, tools])
    job = {
        "template": template,
        "messages": messages,
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
        "names": dict(names),
        "max_chars": MAX_CHARS + 8 * len(content),
    }
    said = _worker().ask(json.dumps(job).encode() + b"\n")
    if "error" in said:
        raise TemplateError(said["error"])
    return said["text"]


class _Worker:
    """The process, started when first asked and again after a template ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def ask(self, line: bytes) -> dict[str, str]:
        with self._lock:
            process = self._running()
            clock = threading.Timer(WALL_SECONDS, process.kill)
            clock.start()
            try:
                return self._exchange(process, line)
            finally:
                clock.cancel()

    def close(self) -> None:
        """End the process, if it is ours: a process that was forked from us runs this too when it ends."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            if not sys.executable:
                raise TemplateError("no Python is found to run it in: sys.executable is empty")
            path = Path(__file__).with_name("render_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C and signals to a group are for the run; this ends with it
            )
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, str]:
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        try:
            process.stdin.write(line)
            process.stdin.flush()
            said = process.stdout.readline()
        except OSError:
            said = b""
        if said.endswith(b"\n"):
            return json.loads(said)
        self._process = None
        process.kill()
        process.communicate()
        if process.returncode > 0:  # it never began: an import fails
            return {"error": f"the process that runs it ended with code {process.returncode}"}
        from tokenkit.tokenization.chat.render_worker import MEMORY_BYTES, SECONDS

        limits = f"{SECONDS:g} seconds of processor time or {MEMORY_BYTES >> 20} MiB"
        return {"error": f"it was stopped: it takes more than {limits}"}


_workers: dict[int, _Worker] = {}


def _worker() -> _Worker:
    """Return the worker of this process: one that was forked does not share its parent's."""
    pid = os.getpid()
    if pid not in _workers:
        _workers.clear()
        _workers[pid] = _Worker()
        atexit.register(_workers[pid].close)
    return _workers[pid]
