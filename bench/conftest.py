"""`pytest bench --benchmark-only` collects every file here that holds a benchmark."""

from pathlib import Path

import pytest


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect files without the `test_` prefix; one named on the command line comes by itself."""
    if file_path.suffix != ".py" or parent.session.isinitpath(file_path):
        return None
    if "def test_" not in file_path.read_text(encoding="utf-8"):
        return None
    return pytest.Module.from_parent(parent, path=file_path)
