"""The way of `train(config)`: which functions call which over the borders of modules, counted while it runs.

    python -m tests.walk            one line: calls, modules, returns
    python -m tests.walk --list     and each call, in the order of its first time

A call is a pair of functions (caller, callee) in two modules of tokenkit, counted once however often it
happens; to read a property is no call, nor is what an import makes. A return is a call into a module that the
way has been in before: a reader goes back there. The way begins with a configuration that was read and ends
with the export: three steps of CLM and ALM on a tiny model with adapters, a checkpoint and held-out text.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]


class Walk:
    """Calls over the borders of modules, in the order of their first time."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str], None] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Take what `sys.setprofile` sees."""
        if event != "call" or (callee := name_of(frame)) is None:
            return
        caller = frame.f_back
        while caller is not None and (found := name_of(caller)) is None:
            if caller.f_code.co_name == "<module>":
                return  # an import: what it makes is no step of the way
            caller = caller.f_back  # a library between: whoever called it
        if caller is not None and found is not None and found.split(":")[0] != callee.split(":")[0]:
            self.calls.setdefault((found, callee))

    def counts(self) -> tuple[int, int, int]:
        """Return calls, modules, returns."""
        seen: set[str] = set()
        returns = 0
        for caller, callee in self.calls:
            seen.add(caller.split(":")[0])
            returns += (module := callee.split(":")[0]) in seen
            seen.add(module)
        return len(self.calls), len(seen), returns


def name_of(frame: FrameType) -> str | None:
    """Return `module:function` of tokenkit, without what is nested in it; None for all others."""
    module = frame.f_globals.get("__name__", "")
    function = frame.f_code.co_qualname.partition(".<")[0]
    is_body = not frame.f_code.co_flags & inspect.CO_OPTIMIZED  # of a module or a class
    is_written = not frame.f_code.co_filename.startswith("<")  # not by dataclass or NamedTuple
    owner = type(frame.f_locals.get("self"))
    member = inspect.getattr_static(owner, frame.f_code.co_name, None)
    is_read = isinstance(member, property | cached_property)
    is_ours = module.startswith("tokenkit.") and is_written and not is_body and not is_read
    return f"{module.removeprefix('tokenkit.')}:{function}" if is_ours else None


def walk(folder: Path) -> Walk:
    """Run the training in `folder`."""
    from tests.tiny import TEXT, byte_level_bpe, sentencepiece_bpe, tiny_model
    from tokenkit.config import TrainConfig, parse_command_line
    from tokenkit.training.loop import train

    for name, make in (("student", byte_level_bpe), ("target", sentencepiece_bpe)):
        make(folder / name)
    tiny_model("llama", vocab_size=320).save_pretrained(folder / "student")
    (folder / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    words = {
        "--student.pretrained-model-name-or-path": folder / "student",
        "--target-tokenizer-name": folder / "target",
        "--data.dataset-name": folder / "text.txt",
        "--steps": 3,
        "--batch-size": 2,
        "--max-length-new": 64,
        "--max-length-teacher": 64,
        "--train-model-mode": "lora",
        "--output-dir": folder / "run",
    }
    flags = [str(word) for pair in words.items() for word in pair]
    config = parse_command_line(
        TrainConfig, [*flags, "--losses", "clm", "alm_unconstrained"], program="tests.walk"
    )
    found = Walk()
    sys.setprofile(found)
    try:
        code = train(config)
    finally:
        sys.setprofile(None)
    assert code == 0
    return found


def run() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="every call too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = walk(Path(folder))
    if arguments.list:
        print("\n".join(f"{caller} -> {callee}" for caller, callee in found.calls))
    print("{} calls between {} modules, {} returns".format(*found.counts()))


if __name__ == "__main__":
    run()
