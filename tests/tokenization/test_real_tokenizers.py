"""Every tokenizer of tests/data and of the data beside the repository against the tokenizers library."""

import functools

import pytest
from tokenizers import Tokenizer as RustTokenizer

from tests.conftest import OWN_DATA, SHARED_DATA, tokenizer_folder
from tests.tokenization.test_tokenizer import check_spells
from tokenkit.tokenization.chat.advice import explain_template
from tokenkit.tokenization.chat.encode import document_from_row, encode_documents
from tokenkit.tokenization.tokenizer import Tokenizer, canonical_text, load_tokenizer

FOLDERS = {
    str(path.parent.relative_to(root)): path.parent
    for root in (OWN_DATA, SHARED_DATA)
    for room in ("tokenizers", "models")
    for path in sorted(root.glob(f"{room}/*/tokenizer.json"))
}
ODD = [
    "👩‍👩‍👧‍👦 ZWJ, e\u0301 and \u212b, ﬁ",
    "a\r\nb\r\n\r\n\tdef f(x):\n\t\treturn x  # 12345\n",
    "  two leading, trailing  ",
    "\x00\x7f\u00a0\u2028x",
    "@-@ <unk> = = </s> <s> <|endoftext|> <pad> <|im_start|>user [INST] <tool_call> <extra_id_0> <0x0A>",
]


@functools.cache
def load(spec: str) -> Tokenizer:
    name, colon, options = spec.partition(":")
    return load_tokenizer(f"{tokenizer_folder(name)}{colon}{options}")


@functools.cache
def load_found(name: str) -> Tokenizer:
    return load_tokenizer(str(FOLDERS[name]))


@functools.cache
def texts() -> list[str]:
    own = (OWN_DATA / "text/scripts.txt").read_text(encoding="utf-8").splitlines()
    if not SHARED_DATA.is_dir():
        return [*own, *ODD]
    scripts = [path.read_text()[1000:1900] for path in sorted((SHARED_DATA / "text/udhr").glob("*.txt"))]
    wikitext = (SHARED_DATA / "text/wikitext2.valid.txt").read_text()
    return [*scripts, *(wikitext[at : at + 900] for at in range(0, 27_000, 900)), *own, *ODD]


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_the_originals_and_their_bytes_spell_the_text(name):
    tokenizer = load_found(name)
    original = RustTokenizer.from_file(str(FOLDERS[name] / "tokenizer.json"))
    original.no_truncation()
    compared = 0
    for text in texts():
        canonical = canonical_text(text, tokenizer)
        check_spells(tokenizer, canonical)
        if not any(string in text for string in tokenizer.control):
            assert (
                tokenizer.encode(canonical).ids.tolist()
                == original.encode(text, add_special_tokens=False).ids
            )
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("name", FOLDERS)
def test_every_id_has_bytes(name):
    tokenizer = load_found(name)
    assert all(tokenizer.token_bytes)
    pairs = zip(tokenizer.token_bytes, tokenizer.is_special_V, strict=True)
    ordinary = [raw for raw, is_special in pairs if not is_special]
    assert len(set(ordinary)) >= len(ordinary) - 130  # a byte piece and the character spell the same


TALK = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is 15 + 27?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "Naïve 日本?\n\nPlease."},
    {"role": "assistant", "content": "def f():\n    return 1"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"numbers": [15, 27], "say": "é"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
WORK = [
    TALK[1],
    {"role": "assistant", "content": "I add.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "42", "name": "add"},
    {"role": "tool", "content": "it's 42", "name": "add"},
    TALK[2],
]
THOUGHT = [
    TALK[1],
    {"role": "assistant", "content": "<think>\nCarry.\n</think>\n\n42"},
    TALK[3],
    {"role": "assistant", "content": "<think>Well</think>1"},
]
OWN = ["bytelevel2k", "bytelevel2k:target=Qwen2", "spm1k:target=Llama3"]
CONVERSATIONS = {
    "with a system text": {"messages": TALK},
    "without one": {"messages": TALK[1:]},
    "calls": {"messages": WORK},
    "tools": {"messages": WORK, "tools": [TOOL]},
    "tools, system": {"messages": [TALK[0], *WORK], "tools": [TOOL]},
    "thinking": {"messages": THOUGHT},
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize(
    "name", ["llama3", "qwen2.5", "qwen2.5-sub8000", "phi-3-mini", "smollm2", "smollm2:target=Qwen2", *OWN]
)
def test_conversations_are_written_as_the_exported_template_does(name, kind):
    row = CONVERSATIONS[kind]
    tokenizer = load(name)
    document = document_from_row(row)
    writes_calls = "qwen" in name or "target" in name
    if kind in ("calls", "tools", "tools, system") and not writes_calls:
        with pytest.raises(ValueError, match="does not write tool calls"):
            encode_documents([document], [tokenizer])
        return
    ((tokens,),) = encode_documents([document], [tokenizer])
    assert tokens.ids.tolist() == hugging_face(name).apply_chat_template(
        row["messages"], tools=row.get("tools"), tokenize=True, return_dict=False
    )
    said = b"".join(tokenizer.token_bytes[i] for i in tokens.ids[tokens.trained]).decode()
    answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    at = [said.replace(" ", "").find(answer.replace(" ", "")) for answer in answers]
    assert at == sorted(at)
    assert at[0] == 0
    assert "15 + 27?" not in said


@functools.cache
def hugging_face(name: str):
    """What a user loads: the files as they are, or those that we export."""
    from transformers import AutoTokenizer

    if ":" in name:
        return load(name).to_huggingface()
    return AutoTokenizer.from_pretrained(tokenizer_folder(name))


@pytest.mark.parametrize(
    "spec",
    ["llama2:source=Llama2", "mistral-v0.1:source=Mistral", "llama2:source=TinyLlama", "spm1k:source=Llama2"],
)
def test_sentencepiece_templates_are_cut_as_the_rendered_text_is(spec):
    from transformers import PreTrainedTokenizerFast

    tokenizer = load(spec)
    messages = [("user", "Hi there"), ("assistant", "Hello you"), ("user", "4 + 4?"), ("assistant", "8")]
    rows = [{"role": role, "content": content} for role, content in messages]
    ((tokens,),) = encode_documents([document_from_row({"messages": rows})], [tokenizer])
    hugging_face = tokenizer.to_huggingface()
    assert isinstance(hugging_face, PreTrainedTokenizerFast)
    assert tokens.ids.tolist() == hugging_face.apply_chat_template(rows, tokenize=True, return_dict=False)


def test_marks_that_join_a_line_break_of_the_template_are_said():
    own, family = (explain_template(load(f"qwen2.5{target}")) or "" for target in ("", ":target=GPT2"))
    assert "what a tool says" in own
    assert "messages that end in a mark" not in own
    assert "messages that end in a mark" in family
