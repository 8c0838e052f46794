"""`tokenkit report`: one page about one or several runs.

tokenkit report RUN --output report.html
tokenkit report RUN OTHER --output report.html --texts FOLDER --quick
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.errors import ConfigError, at_least

ALIASES = {"output_path": "output", "run": "runs", "eval": "results"}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one page about runs: what they did, what their models are worth, how they were made."""

    runs: tuple[str, ...]
    """Folders of runs, done or not; several stand side by side."""

    output: str
    """The page, NAME.html; NAME.json and NAME.md are written beside it. None of them may exist."""

    quick: bool = False
    """Load no model and no tokenizer: what the folders say alone."""

    text: str | None = None
    """File, folder or hub name of text to measure. None: the run's own held-out text."""

    texts: str | None = None
    """Folder of text files, one for each language: bytes per token of each."""

    results: tuple[str, ...] = ()
    """Files of lm-eval's results: of one run all, of several one for each, in their order."""

    documents: int = 16
    """Documents that are measured, at most."""

    characters: int = 1000
    """Of each of them, from its beginning."""

    samples: int = 3
    """Documents whose first words the model goes on with."""

    new_tokens: int = 40
    """Of each sample."""

    trust_remote_code: bool = False
    """Run code that comes with the models, as the runs did."""

    def __post_init__(self) -> None:
        """Check what can be checked before anything is read."""
        for name in ("documents", "characters", "new_tokens"):
            at_least(name, getattr(self, name), 1)
        at_least("samples", self.samples, 0)
        if not self.runs or len(set(self.runs)) < len(self.runs):
            raise ConfigError(f"runs must name each run once, got {list(self.runs)}")
        if len(self.runs) > 1 and len(self.results) > len(self.runs):
            raise ConfigError(
                f"results names {len(self.results)} files for {len(self.runs)} runs: give one for each"
            )
        output = Path(self.output).expanduser()
        if output.suffix != ".html":
            raise ConfigError(f"output must end in .html, got {self.output}")
        for path in (output, output.with_suffix(".json"), output.with_suffix(".md")):
            if path.exists():
                raise FileExistsError(f"{path} exists: give another --output, or move the file away")
        for name, places in (("runs", self.runs), ("texts", (self.texts,))):
            for place in places:
                if place is not None and not Path(place).expanduser().is_dir():
                    raise FileNotFoundError(f"{name}: {place} is no folder")
        text = None if self.text is None else Path(self.text).expanduser()
        if text is not None and text.suffix and not text.exists():  # names on the hub have none
            raise FileNotFoundError(f"text: {self.text} does not exist")
        for place in self.results:
            if not Path(place).expanduser().is_file():
                raise FileNotFoundError(f"results: {place} is no file")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    named = next((n for n, word in enumerate(words) if word.startswith("-") or "=" in word), len(words))
    words = [*(["--runs", *words[:named]] if named else []), *words[named:]]

    def reported() -> None:
        report(parse_command_line(ReportConfig, words, program="tokenkit report", aliases=ALIASES))

    return run(reported)


def report(config: ReportConfig) -> None:
    """Gather, measure, write.

    Raises:
        FileNotFoundError: a folder holds no run.
    """
    from tokenkit.evaluation.report.writing import gather, write

    measures = None
    if not config.quick:
        from tokenkit.evaluation.report.measured import Measures

        names = ("text", "texts", "documents", "characters", "samples", "new_tokens", "trust_remote_code")
        measures = Measures(**{name: getattr(config, name) for name in names})
    folders = [Path(name).expanduser() for name in config.runs]
    found = gather(folders, [Path(name).expanduser() for name in config.results], measures)
    for one in found["runs"]:
        for note in one["notes"]:
            print(f"{one['name']}: {note}", file=sys.stderr)
    for line in found["differences"]:
        print(line, file=sys.stderr)
    page, *others = write(found, Path(config.output).expanduser())
    print(f"wrote {page}, and beside it {', '.join(path.name for path in others)}")


if __name__ == "__main__":
    raise SystemExit(main())
