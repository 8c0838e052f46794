"""Run `python` and `tokenkit` of a script in forks of a process that has imported torch and transformers.

A start of its own costs each process 2 to 5 s. Only packages of others are imported beforehand: each fork
imports tokenkit itself. What a fork does not show, an import that is missing where another did it by chance,
is for the tests that start processes (`test_cli.py`, `test_layers.py`) and for the examples.

`python -m tests.warm FOLDER` writes both commands to the folder and serves them until it is killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "torch._dynamo", "torch.distributed.checkpoint.state_dict", "triton", "matplotlib.figure", "peft",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
)  # fmt: skip
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    job = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(job).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(job)
    sys.exit((server.recv(1) or b"\\x01")[0])
"""


@contextmanager
def warm_commands(environment: dict[str, str]) -> Iterator[Path]:
    """Give a folder for PATH; every process that came of it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        command = [sys.executable, "-m", "tests.warm", folder]
        options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "start_new_session": True}
        with subprocess.Popen(command, **options) as server:
            try:
                assert server.stdout.readline() == b"ready\n", "the warm process did not start"
                yield Path(folder)
            finally:
                os.killpg(server.pid, signal.SIGKILL)


def serve(folder: Path) -> None:
    """Fork for every connection. One fork waits for the other and reports its exit code."""
    for name in IMPORTED:
        importlib.import_module(name)
    address = str(folder / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    for name in ("python", "tokenkit"):
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=address, name=name))
        (folder / name).chmod(0o755)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of a process with threads hangs"
    gc.freeze()  # else each fork's collections touch, and so copy, all that is shared
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks that report
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            break
        connection.close()
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    job = connection.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)
    worker = os.fork()
    if worker:
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        connection.sendall(bytes([code if code >= 0 else 128 - code]))
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    run(*json.loads(job))


def run(name: str, words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be that command, in its folder and environment."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if name == "tokenkit":
        sys.argv = ["tokenkit", *words]
        sys.exit(importlib.import_module("tokenkit.cli").main())
    kind, *rest = words
    sys.path[0] = folder
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-":
        sys.argv = words
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), main.__dict__)
    elif kind.startswith("-"):
        os.execv(sys.executable, [sys.executable, *words])
    else:
        sys.argv, sys.path[0] = words, str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
