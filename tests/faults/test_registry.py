"""docs/reliability.md holds the table that the tests give."""

from tests.faults import registry


def test_the_table_of_the_page_is_that_of_the_tests():
    page = registry.PAGE.read_text(encoding="utf-8")
    assert registry.with_table(page) == page, "run python -m tests.faults.registry"


def test_each_row_says_all_and_breaks_no_table():
    rows = registry.faults()
    assert len(rows) > 10
    assert all("|" not in f"{row.what}{row.happens}{row.kept}" and row.what and row.happens for row in rows)
    assert len({row.what for row in rows}) == len(rows), "a fault stands twice"
