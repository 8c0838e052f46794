"""A `Tokenizer` as a Hugging Face tokenizer, so that a trained model can be used without tokenkit.

A family that has no chat template (Jinja) of its own gets one, of its turns and of what a message may hold
beside its text. Tool calls, definitions of tools and reasoning have no form of their own: all families write
them in one way, as text: a call in `<tool_call>`, reasoning in `<think>`, the definitions behind the system
text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.tokenization.backend import build, with_prepended_space
from tokenkit.tokenization.chat.families import BOS, EOS, Family
from tokenkit.tokenization.chat.special_tokens import leading_tokens
from tokenkit.tokenization.vocabulary import with_entries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tokenkit.tokenization.tokenizer import Tokenizer

_ROLES = ("bos", "eos", "pad", "unk")


def to_huggingface(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the transformers tokenizer with the same ids, special tokens and chat template.

    It writes BOS in front of a text where `encode_documents` does.

    Raises:
        ValueError: the tokenizers library would number a special token differently, or cannot express
            the manual prefix.
    """
    from transformers import PreTrainedTokenizerFast

    document = {**tokenizer.document, "post_processor": _post_processor(tokenizer)}
    document |= {"truncation": None, "padding": None, "model": {**document["model"]}}
    if document["model"].get("dropout"):
        document["model"]["dropout"] = None  # ids of training were read without it: see `explain_saving`
    if tokenizer.prefix.is_manual:
        if tokenizer.vocabulary.text_added:
            raise ValueError(
                f"tokenizer {tokenizer.spec} has added tokens that are text: a saved one would put a space "
                "behind each, so leave ':conversion=manual_add_prefix_space' out"
            )
        document = with_prepended_space(document)
    backend = build(document)
    added = document.get("added_tokens") or []
    if _misnumbered(backend, added):
        # the library numbers added tokens behind a hole anew, unless the model has them
        backend = build({**document, "model": with_entries(document["model"], added)})
    for string, token_id in _misnumbered(backend, added).items():
        raise ValueError(
            f"added token {string!r} has id {token_id} but would be saved as "
            f"{backend.token_to_id(string)}: the vocabulary has a hole before it"
        )
    tokens = tokenizer.family.tokens
    names = {f"{role}_token": tokens[role] for role in _ROLES if tokens.get(role) in tokenizer.control}
    result = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    result.chat_template = exported_template(tokenizer)
    return result


def _misnumbered(backend: Any, added: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {
        token["content"]: token["id"]
        for token in added
        if backend.token_to_id(token["content"]) != token["id"]
    }


def explain_saving(tokenizer: Tokenizer) -> str | None:
    """Return how the saved tokenizer reads text otherwise than its files or training do; None: as they do."""
    notes = []
    if dropout := tokenizer.document["model"].get("dropout"):
        notes.append(f"BPE dropout of {dropout} is off while training, and in the tokenizer that is saved")
    words = [string for string in tokenizer.control if string.isalnum()]
    if words:
        named = ", ".join(map(repr, words[:5])) + (", ..." if len(words) > 5 else "")
        notes.append(
            f"special tokens that are words ({named}): in training a text spells them out, while the "
            "saved tokenizer reads them as special wherever they stand, as all do in transformers"
        )
    return f"tokenizer {tokenizer.spec}: {'; '.join(notes)}" if notes else None


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template for `AutoTokenizer`.

    Raises:
        FileExistsError: the folder holds a tokenizer already.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        raise FileExistsError(f"{folder} already holds a tokenizer.json: choose another folder")
    to_huggingface(tokenizer).save_pretrained(str(folder))
    # The class that every transformers with fast tokenizers has; newer ones write the name of its successor.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return what writes BOS: the tokenizer's own where it does that, or a template."""
    own = tokenizer.document.get("post_processor")
    bos = tokenizer.family.tokens.get("bos")
    writes_bos = tokenizer.family.writes_bos and bos is not None and bos in tokenizer.control
    is_own = tokenizer.spec.target is None and tokenizer.spec.conversion != "byte"
    if is_own and (not writes_bos or bos in leading_tokens(own)):
        return own
    if not writes_bos or bos is None:
        return None
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }


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
