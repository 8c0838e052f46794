"""The chat template (Jinja) of a family: its turns, and what a message may hold beside its text.

Tool calls, definitions of tools and reasoning have no form of a family's own. All families write them in one
way, as text: a call in `<tool_call>`, reasoning in `<think>`, the definitions behind the system text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenkit.tokenization.chat.families import BOS, EOS, Family

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

_TOOLS = (
    "{%- if tools %}{%- set ns.tools = '# Tools\\n\\nThese functions can be called:\\n<tools>' %}"
    "{%- for tool in tools %}{%- set ns.tools = ns.tools + '\\n' + (tool | tojson) %}{%- endfor %}"
    "{%- set ns.tools = ns.tools + '\\n</tools>\\n\\nA call is an object with name and arguments:\\n"
    '<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>\' %}{%- endif %}'
)
_CALLS = (
    "{%- set ns.calls = '' %}{%- for call in message['tool_calls'] or [] %}"
    "{%- set function = call['function'] or call %}{%- set arguments = function['arguments'] %}"
    "{%- set ns.calls = ns.calls + ('\\n' if content or ns.calls else '') + '<tool_call>\\n{\"name\": '"
    " + (function['name'] | tojson) + ', \"arguments\": '"
    " + (arguments if arguments is string else (arguments | tojson)) + '}\\n</tool_call>' %}{%- endfor %}"
)
_REASONING = (
    "{%- set reasoning = message['reasoning_content'] or '' %}"
    "{%- set reasoning = '<think>\\n' + (reasoning | trim) + '\\n</think>\\n\\n' if reasoning else '' %}"
)
_FORGET_TOOLS = "{%- set ns.tools = '' %}"


def has_own_template(tokenizer: Tokenizer) -> bool:
    """Whether messages are written with the template of the tokenizer's files, not with a family's turns."""
    return not tokenizer.family.turns and tokenizer.chat_template is not None


def exported_template(tokenizer: Tokenizer) -> str | None:
    """Return the chat template of a saved tokenizer: the one that messages are written with."""
    return template_of_family(tokenizer.family) if tokenizer.family.turns else tokenizer.chat_template


def template_of_family(family: Family) -> str:
    """Write the chat template whose rendering is what `encode_documents` writes for the family."""
    trim = " | trim" if family.trims_content else ""
    parts = [
        "{%- set ns = namespace(system='', tools='', calls='', turns=0, asked=0) %}",
        _TOOLS,
        _writes(_quoted(family.tokens[BOS])) if family.writes_bos else "",
        _when("ns.tools and messages[0]['role'] != 'system'", _system(family, "ns.tools", trim)),
        "{%- for message in messages %}{%- set content = message['content'] or '' %}",
        _when(
            "message['role'] == 'system'",
            _system(family, "(content + ('\\n\\n' + ns.tools if ns.tools else ''))", trim),
        ),
        _when(
            "message['role'] == 'user'",
            _turn(family, "user", "(ns.system + content)", trim) + "{%- set ns.system = '' %}",
        ),
        _when("message['role'] == 'tool'", _turn(family, "tool", "content", trim)),
        _when(
            "message['role'] == 'assistant'",
            _REASONING + _CALLS + _turn(family, "assistant", "(reasoning + content + ns.calls)", trim),
        ),
        "{%- endfor %}",
    ]
    if "system" not in family.turns:
        parts.append(_when("ns.system", _turn(family, "user", "(ns.system | trim)", trim)))
    answer = _quoted("".join(piece.text for piece in family.turns["assistant"].header))
    parts.append(_when("add_generation_prompt", _writes(answer)))
    if family.ends_chat_with_eos:
        parts.append(_when("not add_generation_prompt", _writes(_quoted(family.tokens[EOS]))))
    return "".join(parts)


def _system(family: Family, text: str, trim: str) -> str:
    """Write a system text: a turn, or what the user's next message takes in."""
    if "system" in family.turns:
        return _turn(family, "system", text, trim) + _FORGET_TOOLS
    return f"{{%- set ns.system = ns.system + {text} + '\\n\\n' %}}{_FORGET_TOOLS}"


def _turn(family: Family, role: str, text: str, trim: str) -> str:
    """Write a turn; a role that the family lacks is the user's."""
    turn = family.turns.get(role, family.turns["user"])
    header = _quoted("".join(piece.text for piece in turn.header))
    if turn is family.turns["user"] and family.repeats_bos:
        header = f"({_quoted(family.tokens[BOS])} if ns.turns else '') + {header}"
    # Where a question's end opens the answer, its space is the answer's, and is written if there is one.
    ends = {name: "".join(piece.text for piece in own.end) for name, own in family.turns.items()}
    space = ends["user"][len(ends["user"].rstrip(" ")) :] if not family.turns["assistant"].header else ""
    if role == "assistant" and space:
        header = f"({_quoted(space)} if ns.asked else '') + {header}"
    end = ends.get(role, ends["user"])
    is_asked = turn is family.turns["user"]
    writes = _writes(f"{header} + ({text}{trim}) + {_quoted(end.removesuffix(space) if is_asked else end)}")
    return writes + f"{{%- set ns.turns = 1 %}}{{%- set ns.asked = {int(is_asked)} %}}"


def _writes(expression: str) -> str:
    return f"{{{{- {expression} }}}}"


def _when(condition: str, body: str) -> str:
    return f"{{%- if {condition} %}}{body}{{%- endif %}}"


def _quoted(text: str) -> str:
    """Write a string as Jinja does: JSON's escapes are a part of Jinja's."""
    return json.dumps(text, ensure_ascii=False)
