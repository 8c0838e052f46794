"""The faults that tests show, and the table of them in docs/reliability.md.

    @fault("Disk full during a save", "path and free bytes are said", code=74, kept="the last checkpoint")
    def test_...

`python -m tests.faults.registry` rewrites the table. The decorator changes nothing: the table is read from
the source of the tests, so its arguments must be literal.
"""

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = (
    "<!-- the table begins; python -m tests.faults.registry rewrites it -->",
    "<!-- the table ends -->",
)


class Fault(NamedTuple):
    """One row of the table."""

    what: str
    happens: str
    code: int | str
    """What the process exits with; "-" where it goes on."""
    kept: str
    test: str


def fault(what, happens, *, code, kept):
    """Mark a test as the proof of a row."""
    return lambda function: function


def faults():
    """Return the rows, in the order of their files and lines."""
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "fault":
                    what, happens = map(ast.literal_eval, call.args)
                    rest = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
                    where = f"{file.relative_to(ROOT / 'tests')}: {node.name}"
                    found.append(Fault(what, happens, rest["code"], rest["kept"], where))
    return found


def table():
    """Return the table in Markdown."""
    rows = [
        f"| {x.what} | {x.happens} | {x.code} | {x.kept} | `{x.test.split(': ')[0]}` |"
        for x in sorted(faults(), key=lambda x: (x.test.split(": ")[0], x.what))
    ]
    head = ["| fault | what happens | exit | what is kept | shown in tests/ |", "|---|---|---|---|---|"]
    return "\n".join([BEGIN, "", *head, *rows, "", END])


def with_table(page):
    """Return the text of a page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    return before + table() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
