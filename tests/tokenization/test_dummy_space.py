import pytest

from tokenkit.tokenization.backend import Prefix, find_prefix, with_prepended_space, without_prefix

PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def metaspace(**options):
    return {"type": "Metaspace", "replacement": "▁", **options}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "expected"),
    [
        (None, None, Prefix()),
        (
            {"type": "Sequence", "normalizers": [PREPEND, REPLACE]},
            None,
            Prefix("always", even_before_space=True),
        ),
        (None, metaspace(prepend_scheme="first"), Prefix("first")),
        (None, metaspace(prepend_scheme="never"), Prefix()),
        (None, metaspace(add_prefix_space=True), Prefix("always")),
        (None, {"type": "ByteLevel", "add_prefix_space": True}, Prefix("always")),
        (None, {"type": "ByteLevel", "add_prefix_space": False}, Prefix()),
        (
            None,
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace(add_prefix_space=True)],
            },
            Prefix("always", is_removable=False),
        ),
    ],
)
def test_the_prefix_is_read_from_the_pipeline(normalizer, pre_tokenizer, expected):
    document = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    assert find_prefix(document) == expected
    assert find_prefix(without_prefix(document)).scheme == "never"
    assert find_prefix(with_prepended_space(document)).scheme != "never"


def test_leaving_the_prefix_out_keeps_the_rest():
    document = {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, "pre_tokenizer": None}
    assert without_prefix(document)["normalizer"]["normalizers"] == [REPLACE]
