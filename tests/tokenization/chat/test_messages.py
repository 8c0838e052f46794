"""Rows that could lose a part of what they say: it is read, or the row is refused."""

import json

import pytest

from tokenkit.data.files import read_rows
from tokenkit.data.options import BadRowOptions
from tokenkit.tokenization.chat.documents import document_from_row

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"name": "add", "arguments": {"a": 1}}
OTHER = {"name": "sub", "arguments": {"a": 1}}


def deep(depth):
    value = {}
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "completion": "Hello", "images": ["a.png"]}, "something else than text"),
        ({"prompt": "Hi", "response": "Hello", "audio": {"path": "a.wav"}}, "something else than text"),
        ({"input": "Hi", "ideal": "Hello", "image": "a.png"}, "something else than text"),
        ({"prompt": "Hi", "completion": "Hello", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"prompt": [ASK], "completion": []}, "neither text nor messages"),
        ({"prompt": [ASK], "chosen": [SAY]}, "neither text nor messages"),
        ({"messages": [ASK, SAY | {"thinking": "a", "reasoning": "b"}]}, "reasonings disagree"),
        (
            {"messages": [ASK, SAY | {"content": [{"type": "thinking", "thinking": "a"}], "reasoning": "b"}]},
            "reasonings disagree",
        ),
        (
            {"messages": [ASK, SAY | {"tool_calls": [{"function": CALL}], "function_call": OTHER}]},
            "disagree",
        ),
        ({"messages": [ASK, SAY], "tools": [{"name": "f", "parameters": deep(4000)}]}, "too deeply"),
        ({"messages": [ASK, SAY], "tools": json.dumps([deep(400)])}, "too deeply"),
        ({"messages": [ASK, SAY | {"tool_calls": [CALL | {"arguments": deep(4000)}]}]}, "too deeply"),
        (
            {"messages": [ASK, SAY | {"tool_calls": [CALL | {"arguments": json.dumps(deep(400))}]}]},
            "too deeply",
        ),
        ({"messages": [ASK, SAY], "tools": [{"name": "f", "parameters": b"x"}]}, "not JSON"),
    ],
)
def test_what_would_be_lost_is_refused(row, reason):
    with pytest.raises(ValueError, match=reason):
        document_from_row(row)


def test_a_file_of_deep_tools_is_a_file_with_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ASK, SAY], "tools": [deep(450)]}) + "\n")
    (row,) = read_rows(path, None, BadRowOptions())
    with pytest.raises(ValueError, match="too deeply"):
        document_from_row(row)


def calls_of(entry):
    _, message = document_from_row({"messages": [ASK, entry]}).messages
    return [call["function"] for call in json.loads(message.calls)]


def test_a_null_that_json_says_is_an_argument_and_one_of_arrow_is_none():
    said = CALL | {"arguments": '{"a": 1, "b": null}'}
    assert calls_of(SAY | {"tool_calls": [said]}) == [{"name": "add", "arguments": {"a": 1, "b": None}}]
    filled = CALL | {"arguments": {"a": 1, "b": None}}
    assert calls_of(SAY | {"tool_calls": [filled]}) == [CALL]
    tool = {"name": "f", "parameters": {"default": None}}
    text, table = (
        document_from_row({"messages": [ASK, SAY], "tools": tools}) for tools in (json.dumps([tool]), [tool])
    )
    assert '"default": null' in text.tools
    assert "default" not in table.tools


@pytest.mark.parametrize(
    "entry",
    [
        SAY | {"tool_calls": [{"function": CALL}], "function_call": CALL},
        SAY | {"function_call": json.dumps(CALL)},
        SAY | {"function_call": CALL, "tool_calls": []},
        {"from": "function_call", "value": '{"a": 1}', "name": "add"},
    ],
)
def test_one_call_under_several_names(entry):
    assert calls_of(entry) == [CALL]


@pytest.mark.parametrize("nothing", ["null", "", {}, {"name": None}])
def test_no_call_is_no_call(nothing):
    (_, message) = document_from_row({"messages": [ASK, SAY | {"function_call": nothing}]}).messages
    assert message.calls is None


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_text_has_several_names(name):
    for row in ({"messages": [ASK, SAY]}, {"prompt": "Hi", "completion": "Hello"}):
        first = document_from_row(row | {name: "Be kind."}).messages[0]
        assert (first.role, first.content) == ("system", "Be kind.")


@pytest.mark.parametrize("prompt", ["Hi", [ASK], ASK])
@pytest.mark.parametrize("completion", ["Hello", [SAY], SAY])
def test_a_prompt_and_its_completion_are_text_or_messages_each(prompt, completion):
    document = document_from_row({"prompt": prompt, "completion": completion})
    assert document.messages == document_from_row({"messages": [ASK, SAY]}).messages
