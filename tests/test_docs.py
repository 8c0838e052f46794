"""What the documentation shows, works: code blocks run, links lead somewhere, and every field is described.

A block that cannot run has, on the line above it, `<!-- not run: why -->`.
`python -m tests.test_docs` rewrites the tables of docs/configuration.md from the dataclasses.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.warm import warm_commands
from tokenkit.config import ALIASES, TrainConfig
from tokenkit.config.later import feature_of, spell
from tokenkit.config.schema import heading, leaves
from tokenkit.config.values import describe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run: \S.* -->")
SECONDS = 120


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    runs: bool


def blocks(page):
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        above = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        line = text.count("\n", 0, match.start()) + 1
        yield Block(str(page.relative_to(ROOT)), line, match[1], match[2], not MARK.fullmatch(above.strip()))


BLOCKS = [block for page in PAGES for block in blocks(page)]
RUNNABLE = [block for block in BLOCKS if block.runs and block.language in ("python", "bash")]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def commands():
    """The folder of `python` and `tokenkit`."""
    with warm_commands(ENVIRONMENT) as folder:
        yield folder


def run(block, folder, commands):
    """Run a block where the repository's folders are at hand but files that it writes stay away from them."""
    for name in ("configs", "examples", "docs", "bench", "tests"):
        (folder / name).symlink_to(ROOT / name)
    script = folder / f"block.{block.language}"
    script.write_text(block.code, encoding="utf-8")
    start = [commands / "python"] if block.language == "python" else ["bash", "-euo", "pipefail"]
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = ENVIRONMENT | {"PATH": path}
    return subprocess.run(
        [*start, script], cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS, check=False
    )


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: f"{block.page}:{block.line}")
def test_a_code_block_runs(block, tmp_path, commands):
    result = run(block, tmp_path, commands)
    assert result.returncode == 0, f"{block.page}:{block.line}\n{result.stderr[-2000:]}"


def test_the_notebook_gives_what_it_shows(tmp_path, commands):
    """Its cells, as one script."""
    cells = json.loads((ROOT / "examples" / "first_loss.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    result = run(Block("first_loss.ipynb", 0, "python", code, True), tmp_path, commands)
    assert result.returncode == 0, result.stderr[-2000:]
    shown = ["".join(output["text"]) for cell in cells for output in cell.get("outputs", [])]
    assert shown[-1] in result.stdout  # the alignment; rounding may differ elsewhere
    before, after = (float(re.search(rf"{word}: ([\d.]+)", result.stdout)[1]) for word in ("before", "after"))
    assert after < 0.7 * before


def test_every_block_says_its_language():
    assert [f"{b.page}:{b.line}" for b in BLOCKS if not b.language] == []


def test_no_page_is_left_with_an_open_block():
    fences = {page.name: len(re.findall(r"^```", page.read_text(encoding="utf-8"), re.M)) for page in PAGES}
    assert [name for name, count in fences.items() if count % 2] == []


def links(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    broken = []
    for link in links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def test_every_page_of_docs_is_in_the_index_and_in_the_site():
    index, site = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/index.md", "mkdocs.yml"))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert [name for name in sorted(pages) if f"({name})" not in index] == []
    assert [name for name in sorted(pages) if f": {name}\n" not in site] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 120


def configuration_tables():
    """One table per group of fields, in the order of the dataclasses."""
    others = {name: alias for alias, name in ALIASES.items()}
    by_group = {}
    for leaf in leaves(TrainConfig):
        title = leaf.name.rpartition(".")[0] or leaf.group.__name__.removesuffix("Options")
        by_group.setdefault(title, []).append(leaf)
    lines = []
    for title, fields in by_group.items():
        lines += [f"### {title}", "", heading(fields[0]), ""]
        lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
        for leaf in fields:
            later = feature_of(leaf.name)
            notes = [f"Also: `{others[leaf.name]}`."] if leaf.name in others else []
            notes += [f"*Comes with {later}.*"] if later else []
            default = "required" if leaf.is_required else f"`{spell(leaf.default)}`"
            cells = [f"`{leaf.name}`", describe(leaf.type), default, " ".join([leaf.help, *notes])]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


START, END = "<!-- fields: begin -->\n", "<!-- fields: end -->"
CONFIGURATION = ROOT / "docs" / "configuration.md"


def test_the_tables_of_fields_are_those_of_the_code():
    text = CONFIGURATION.read_text(encoding="utf-8")
    written = text[text.index(START) + len(START) : text.index(END)]
    assert written.strip() == configuration_tables().strip(), "run python -m tests.test_docs"


def rewrite():
    text = CONFIGURATION.read_text(encoding="utf-8")
    head, tail = text[: text.index(START) + len(START)], text[text.index(END) :]
    CONFIGURATION.write_text(f"{head}\n{configuration_tables()}\n{tail}", encoding="utf-8")


if __name__ == "__main__":
    rewrite()
