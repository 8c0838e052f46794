"""YAML is read as data, and written so that it reads the same."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenkit.config import ConfigError
from tokenkit.config.yaml_files import MAX_BYTES, dump_yaml, parse_yaml, read_yaml


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@settings(deadline=None)
@example("\x85", 0.0, 0)
@example("a\u2028b", 0.0, 0)
@given(st.text(max_size=20), st.floats(allow_nan=False, allow_infinity=False), st.integers())
def test_yaml_is_written_so_that_it_reads_the_same(text, number, integer):
    values = {"text": text, "number": number, "integer": integer, "list": [text, number], "none": None}
    assert parse_yaml(dump_yaml(values), "x") == values


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("5e-5", 5e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("2026-11-20", "2026-11-20"),
        ("1e", "1e"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written, value):
    got = parse_yaml(f"x: {written}", "here")["x"]
    assert (got, type(got)) == (value, type(value))


BILLION_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: !!python/object/apply:os.system ['true']", "not readable as YAML"),
        ("steps: 1\nsteps: 2", "line 2, column 1: not readable as YAML: the key 'steps' stands twice"),
        ("optimizer: {beta1: 0.1, beta1: 0.2}", "the key 'beta1' stands twice"),
        (BILLION_LAUGHS, "once its aliases are expanded"),
        ("a: &a [*a]", "once its aliases are expanded"),
        ("[" * 100_000, "not readable as YAML"),
        ("- 1", "must hold a mapping"),
        ("steps: [", "line 1"),
        ("? [a, b]\n: 1", "a key must be text"),
        ("x" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_hostile_yaml_is_one_clear_error(tmp_path, text, message):
    file = write(tmp_path, "a.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "a.yaml")
