import json

import pytest

from tokenkit.tokenization.chat.documents import Document, Message, document_from_row

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


@pytest.mark.parametrize("value", [True, False, 1, 0, 1.0])
@pytest.mark.parametrize("name", ["loss_weight", "weight", "train", "trainable", "loss", "loss_mask"])
def test_every_name_of_a_mask_is_heard(name, value):
    document = document_from_row({"messages": [HI[0], HI[1] | {name: value}]})
    assert document.messages[1].is_trained == bool(value)


def test_a_masked_message_is_not_trained_and_another_is_as_its_role_says():
    said = [HI[0] | {"mask": 0}, HI[1] | {"mask": 1}, HI[0] | {"mask": None}, HI[1] | {"mask": False}]
    document = document_from_row({"messages": said})
    assert [message.is_trained for message in document.messages] == [False, False, False, True]


def test_nulls_that_arrow_fills_in_are_no_keys():
    names = ("role", "content", "from", "value", "weight", "train", "tool_calls", "function_call", "thinking")
    said = [dict.fromkeys(names) | {"from": "human", "value": "Hi"}, dict.fromkeys(names) | HI[1]]
    row = {
        "messages": said,
        "conversations": None,
        "system": None,
        "tools": None,
        "history": None,
        "images": [],
    }
    assert document_from_row(row) == document_from_row({"messages": HI})


CALL = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "entry",
    [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": CALL | {"arguments": '{"a": 1}'}}]},
        {"role": "assistant", "tool_calls": '[{"name": "add", "arguments": {"a": 1, "b": null}}]'},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    ],
)
def test_calls_of_every_form_are_one(entry):
    (message,) = document_from_row({"messages": [entry]}).messages
    assert (message.role, message.content) == ("assistant", "")
    assert json.loads(message.calls) == [{"type": "function", "function": CALL}]


def test_what_stands_beside_a_conversation_is_part_of_it():
    tool = {"name": "add", "parameters": {}}
    row = {"conversations": HI, "system": "Be kind.", "tools": json.dumps([tool]), "history": [["a", "b"]]}
    document = document_from_row(row)
    assert [m.content for m in document.messages] == ["Be kind.", "a", "b", "Hi", "Hello"]
    assert json.loads(document.tools) == [{"type": "function", "function": tool}]
    spoken = [{"role": "system", "content": "Be brief."}, *HI]
    assert document_from_row({"messages": spoken, "system": "Be kind."}).messages[0].content == (
        "Be kind.\n\nBe brief."
    )


def test_earlier_turns_of_an_instruction_are_read():
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "S"}
    assert [m.content for m in document_from_row(row).messages] == ["S", "a", "b", "c", "d"]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_kept(key):
    assert document_from_row({"messages": [HI[0], HI[1] | {key: "Hm."}]}).messages[1].reasoning == "Hm."
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello"}]
    message = document_from_row({"messages": [{"role": "assistant", "content": parts}]}).messages[0]
    assert (message.reasoning, message.content) == ("Hm.", "Hello")


def test_rows_of_evaluations_are_questions_and_answers():
    shown = {"role": "system", "name": "example_assistant", "content": "4"}
    document = document_from_row({"input": [shown, HI[0]], "ideal": ["Hello", "Hey"]})
    assert [(m.role, m.content, m.is_trained) for m in document.messages] == [
        ("assistant", "4", False),
        ("user", "Hi", False),
        ("assistant", "Hello", True),
    ]
    assert document_from_row({"input": "Hi", "ideal": "Hello"}) == document_from_row({"messages": HI})


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
        ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "neither 0 nor 1"),
        ({"messages": [HI[0] | {"train": True, "weight": 0}]}, "masks disagree"),
        ({"messages": [HI[0] | {"images": ["a.png"]}]}, "something else than text"),
        ({"messages": HI, "images": ["a.png"]}, "something else than text"),
        ({"messages": HI, "tools": "x"}, "tools is not JSON"),
        ({"messages": HI, "tools": 3}, "tools is not a list"),
        ({"messages": HI, "chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs"),
        ({"messages": [HI[0] | {"tool_calls": [{"name": "f"}]}]}, "tool calls of a user"),
        ({"messages": [HI[1] | {"tool_calls": [{"x": 1}]}]}, "not a list of calls"),
        ({"messages": [HI[1] | {"thinking": 3}]}, "reasoning is not text"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "not a list of pairs"),
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
