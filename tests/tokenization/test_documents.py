import json

import pytest

from tokenkit.tokenization.documents import Document, Message, document_from_row

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_messages_keep_their_roles():
    document = document_from_row({"messages": [{"role": "system", "content": "Be kind."}, *HI]})
    assert [(m.role, m.content, m.is_trained) for m in document.messages] == [
        ("system", "Be kind.", False),
        ("user", "Hi", False),
        ("assistant", "Hello", True),
    ]


def test_conversations_with_from_and_value_are_messages():
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert document_from_row(row) == document_from_row({"messages": HI})


@pytest.mark.parametrize("key", ["text", "value"])
def test_content_may_be_a_list_of_texts(key):
    content = [{"type": "text", key: "Hel"}, {"type": "text", key: "lo"}]
    document = document_from_row({"messages": [HI[0], {"role": "assistant", "content": content}]})
    assert document.messages[1].content == "Hello"


def test_a_weight_decides_what_is_trained():
    row = {"messages": [{**HI[0], "loss_weight": 1.0}, {**HI[1], "loss_weight": 0.0}]}
    assert [m.is_trained for m in document_from_row(row).messages] == [True, False]


def test_a_prompt_and_its_completion_are_a_pair():
    document = document_from_row({"prompt": "1+1=", "completion": "2"})
    assert document == Document(messages=(Message("user", "1+1="), Message("assistant", "2")), is_pair=True)
    assert document_from_row({"prompt": HI[:1], "completion": HI[1:]}) == document_from_row({"messages": HI})


def test_alpaca_rows_put_the_input_behind_the_instruction():
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Be terse."}
    messages = document_from_row(row).messages
    assert [(m.role, m.content) for m in messages] == [
        ("system", "Be terse."),
        ("user", "Add.\n1, 2"),
        ("assistant", "3"),
    ]
    assert (
        document_from_row({"instruction": "Add.", "input": "", "output": "3"}).messages[0].content == "Add."
    )


def test_plain_text_is_text():
    assert document_from_row({"text": "Hi", "meta": 1}) == Document(text="Hi")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": 3}, "'text' is not text"),
        ({"text": None}, "'text' is not text"),
        ({"text": " \n"}, "empty document"),
        ({"body": "x"}, "no field text, messages"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": "Hi"}, "not a list of messages"),
        ({"messages": ["Hi"]}, "not a mapping"),
        ({"messages": [{"role": "king", "content": "x"}]}, "unknown role 'king'"),
        ({"messages": [{"role": "user"}]}, "a message without text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "something else than text"),
        ({"messages": [{"role": "user", "content": "x", "weight": "high"}]}, "weight is not a number"),
        ({"messages": [{"role": "user", "content": ""}]}, "empty document"),
        ({"prompt": "x"}, "'response' is not text"),
        ("text", "a row is a mapping"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(row, reason):
    with pytest.raises(ValueError, match=reason):
        document_from_row(row)


def test_a_document_is_text_or_messages():
    with pytest.raises(ValueError, match="either text or messages"):
        Document()


def test_the_real_chat_files_can_be_read(shared_data):
    counts = {}
    for path in sorted((shared_data / "chat").iterdir()):
        text = path.read_text()
        rows = (
            json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        )
        counts[path.name] = sum(1 for row in rows if document_from_row(row))
    assert len(counts) == 4
    assert min(counts.values()) > 50
