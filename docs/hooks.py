"""What the site has beside docs/*.md: the pages of the root, the notebook, and the API page.

Links that leave docs/ lead to those pages; a link to another file of the repository becomes its name.
"""

import ast
import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {  # file of the repository: page of the site
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "tests/data/README.md": "tests_data.md",
}
NOTEBOOK = "examples/first_loss.ipynb"
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
SECTIONS = {  # first part of a module's name: heading, in this order
    "tokenization": "Tokenizers and batches",
    "data": "Tokenizers and batches",
    "integrations": "Models and trainers",
    "models": "Models and trainers",
    "losses": "Losses",
    "kernels": "Operations",
    "structs": "Records",
}


def public_names() -> dict[str, str]:
    """Return the names that `tokenkit` offers, and the module of each, without importing it."""
    tree = ast.parse((ROOT / "tokenkit" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PLACES":
            return ast.literal_eval(node.value)
    raise ValueError("tokenkit/__init__.py has no table PLACES of its public names")


def written_in(place: str, name: str) -> str:
    """Return the module where a name is written, in place of a room that hands it on."""
    room = ROOT / place.replace(".", "/") / "__init__.py"
    if room.is_file():
        for node in ast.parse(room.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
                return str(node.module).removeprefix("tokenkit.")
    return place


def api_page() -> str:
    """Return the page that mkdocstrings fills from docstrings: every public name, by section."""
    places = public_names()
    lines = [
        "# API",
        "",
        "What `import tokenkit` offers, from the docstrings. These names are stable ([what that means]"
        "(index.md#which-names-are-stable)); each is found when it is asked for, the import loads nothing.",
        "A tensor's name ends in the [letters of its shape](architecture.md#letters-of-the-shapes).",
        "",
    ]
    for heading in dict.fromkeys(SECTIONS.values()):
        lines += [f"## {heading}", ""]
        for name, place in places.items():
            if SECTIONS[place.split(".")[0]] == heading:
                # read from kernels/ itself: a folder without __init__.py within a package is not found
                operation = heading == "Operations"
                lines += [
                    f"::: {written_in(place, name)}.{name}" if operation else f"::: tokenkit.{name}",
                    "",
                ]
    return "\n".join(lines)


def notebook_page() -> str:
    """Return the notebook as Markdown: its texts, its code, and the output that it was saved with."""
    parts = []
    for cell in json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            shown = output.get("text") or output.get("data", {}).get("text/plain") or []
            parts.append(f"```text\n{''.join(shown).rstrip()}\n```")
    return "\n\n".join(parts) + f"\n\nThis page is `{NOTEBOOK}`; a test runs it.\n"


def on_files(files, config):
    """Add the pages that do not lie in docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relinked(text, posixpath.dirname(source))))
    files.append(File.generated(config, "api.md", content=api_page()))
    files.append(File.generated(config, "first_loss.md", content=notebook_page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn a page's links out of docs/ into links within the site."""
    return relinked(markdown, "docs") if page.file.src_uri not in PAGES.values() else markdown


def relinked(text: str, folder: str) -> str:
    """Return a text of a folder of the repository with links as they are on the site."""

    def link(match: re.Match[str]) -> str:
        label, address = match.groups()
        target, _, anchor = address.partition("#")
        if re.match(r"[a-z]+:", address) or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        anchor = f"#{anchor}" if anchor else ""
        if path in PAGES:
            return f"{label}({PAGES[path]}{anchor})"
        if path == NOTEBOOK:
            return f"{label}(first_loss.md)"
        if path.startswith("docs/"):
            return f"{label}({path.removeprefix('docs/')}{anchor})"
        return label[1:-1]  # a file of the repository that is no page

    fences = re.split(r"(^```.*?^```[ ]*$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in fences)
