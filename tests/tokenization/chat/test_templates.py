"""Chat templates of many kinds: what transformers writes is what training saw, or it is said."""

import json
import time

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from tests.conftest import tokenizer_folder
from tests.tokenization.tiny import CHATML, byte_level, sentencepiece_bpe, write
from tokenkit.errors import TemplateError
from tokenkit.tokenization.chat.advice import differences, explain_template
from tokenkit.tokenization.chat.encode import document_from_row, encode_documents
from tokenkit.tokenization.chat.rendering import render
from tokenkit.tokenization.tokenizer import load_tokenizer

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Bot.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + OPEN
)
DATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '\n\n' + s + '<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}"
) + OPEN
THINKS = (  # the thinking of earlier answers goes, and the last gets an empty block: Qwen3's kind
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% set why = m.reasoning_content or '' %}"
    "{% if '</think>' in m.content %}"
    "{% set why = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + why.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ said + '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + OPEN
)
FORGETS = CHATML.replace("message['content']", "message['content'].split('</think>')[-1].lstrip('\n')")
PROMPTS = CHATML.replace(
    "'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif"
)
ALPACA = (
    "{{ 'Below is a task.\n\n' }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% elif m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set messages = messages[1:] %}"
    "{% else %}{{ 'A chat. ' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BARE = (  # no branch for system messages
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END = BARE.replace(" + ' ' + eos_token", " + '\n'").replace("bos_token + ", "")
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + OPEN
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{% endfor %}" + OPEN
)
TEMPLATES = {
    "chatml": CHATML,
    "default": DEFAULT,
    "date": DATE,
    "thinks": THINKS,
    "forgets": FORGETS,
    "prompts": PROMPTS,
    "alpaca": ALPACA,
    "vicuna": VICUNA,
    "llama-2": LLAMA2,
    "bare": BARE,
    "generation": GENERATION,
    "strict": STRICT,
}


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


WHY = "<think>\nbecause\n</think>\n\n"
TALKS = {
    "two": [user("the cat"), answer("sat on")],
    "four": [user("the cat"), answer("sat on"), user("the mat?"), answer("It did.")],
    "thinking": [user("the cat"), answer(WHY + "sat"), user("the mat?"), answer(WHY + "It did.")],
    "system": [{"role": "system", "content": "Be terse."}, user("the cat"), answer("sat on")],
}
DIFFERS = {  # what the template does not write as a conversation is meant: said, or refused
    ("bare", "system"): "a system text: training writes",
    ("strict", "system"): None,
}


@pytest.fixture
def make(tmp_path):
    """A tokenizer with a chat template: byte-level with `<think>` as markup, or SentencePiece."""

    def build(template, kind="byte-level", special=()):
        folder = (byte_level if kind == "byte-level" else sentencepiece_bpe)(tmp_path / "base")
        document = json.loads((folder / "tokenizer.json").read_text())
        config = json.loads((folder / "tokenizer_config.json").read_text())
        for string in ("<think>", "</think>", *special):
            token = {"id": 0, "content": string, "special": string in special}
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            taken = [t["id"] for t in document["added_tokens"]] + list(document["model"]["vocab"].values())
            document["added_tokens"].append(token | flags | {"id": 1 + max(taken)})
        config.setdefault("bos_token", "<|endoftext|>")
        return load_tokenizer(
            str(write(tmp_path / "own", document, **(config | {"chat_template": template})))
        )

    return build


def sentencepiece_kind(name):
    return "sentencepiece" if name in ("llama-2", "bare", "vicuna") else "byte-level"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_exported_template_writes_what_training_saw(make, tmp_path, name):
    tokenizer = make(TEMPLATES[name], sentencepiece_kind(name))
    tokenizer.save(tmp_path / "export")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "export")
    if name == "date":  # transformers writes today's
        loaded.chat_template = loaded.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    for kind, talk in TALKS.items():
        if (name, kind) in DIFFERS:
            continue
        ((tokens,),) = encode_documents([document_from_row({"messages": talk})], [tokenizer])
        expected = loaded.apply_chat_template(talk, return_dict=False)
        assert tokens.ids.tolist() == expected, (kind, loaded.decode(expected), loaded.decode(tokens.ids))
        trained = b"".join(tokenizer.token_bytes[i] for i in tokens.ids[tokens.trained]).decode()
        assert talk[-1]["content"].removeprefix(WHY) in trained
        assert "cat" not in trained.replace("<|endoftext|>", "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chatml", "does not write reasoning, tool calls, tools"),
        ("date", "always writes 26 July 2024"),
        ("thinks", "leaves out the <think> block of an earlier answer that thinks, and so does training"),
        ("forgets", "block of an answer that thinks and of an earlier answer that thinks"),
        ("prompts", "its generation prompt ends in '<think>\\n'"),
        ("bare", "a system text: training writes"),
        ("strict", "does not write reasoning"),
    ],
)
def test_what_an_export_does_otherwise_is_said_before_a_run(make, name, said):
    assert said in explain_template(make(TEMPLATES[name], sentencepiece_kind(name)))


def test_a_block_that_the_model_has_to_write_itself_is_trained(make):
    tokenizer = make(THINKS)
    ((tokens,),) = encode_documents([document_from_row({"messages": TALKS["four"]})], [tokenizer])
    trained = b"".join(tokenizer.token_bytes[i] for i in tokens.ids[tokens.trained]).decode()
    assert trained == "sat on<|im_end|><think>\n\n</think>\n\nIt did.<|im_end|>"
    assert tokenizer.control["<think>"] in tokens.ids


def test_reasoning_is_written_as_the_template_does(make):
    tokenizer = make(THINKS)
    row = {"messages": [user("the cat"), answer("sat", reasoning_content="because")]}
    ((tokens,),) = encode_documents([document_from_row(row)], [tokenizer])
    trained = b"".join(tokenizer.token_bytes[i] for i in tokens.ids[tokens.trained]).decode()
    assert trained == "<think>\nbecause\n</think>\n\nsat<|im_end|>"
    with pytest.raises(ValueError, match="does not write reasoning"):
        encode_documents([document_from_row(row)], [make(CHATML)])


def test_a_template_that_refuses_an_order_of_roles_refuses_the_row(make):
    tokenizer = make(STRICT)
    talk = {"messages": [user("the cat"), user("sat"), answer("on")]}
    with pytest.raises(ValueError, match="roles must alternate"):
        encode_documents([document_from_row(talk)], [tokenizer])
    # The teacher's template is not the one that is exported: it reads the student's turns.
    student, teacher = encode_documents([document_from_row(talk)], [load_tokenizer("byte"), tokenizer])[0]
    assert student.byte_ends.max() == teacher.byte_ends.max()


def test_the_student_decides_on_a_system_turn():
    pair = [load_tokenizer("byte:target=Llama3"), load_tokenizer("byte:target=Gemma2")]
    document = document_from_row({"messages": TALKS["system"]})
    for student, teacher in (pair, pair[::-1]):
        ours, theirs = encode_documents([document], [student, teacher])[0]
        text = b"".join(student.token_bytes[i] for i in ours.ids).decode()
        assert ("Be terse.\n\nthe cat" in text) == (student.family.name == "Gemma2")
        assert "Be terse.\n\nthe cat" in b"".join(teacher.token_bytes[i] for i in theirs.ids).decode() or (
            teacher.family.name == "Llama3"
        )


@pytest.mark.parametrize("template", [BARE, NO_END], ids=["with an end", "without"])
def test_the_question_s_mark_ends_no_answer_and_bos_has_one_role(make, template):
    tokenizer = make(template, "sentencepiece", special=("[INST]", "[/INST]"))
    assert "system" not in tokenizer.chat.turns
    assert tokenizer.special_ids.get("end_turn") != tokenizer.control["[/INST]"]
    bos = tokenizer.control["<s>"]
    assert [role for role, token in tokenizer.special_ids.items() if token == bos] == ["bos"]
    assert tokenizer.chat.repeats_bos == (template is BARE)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3, "seconds of processor time"),
        ("{{ 'a' * 2000000000 }}", "MiB of memory"),
        ("{% for a in range(99999) %}{{ 'a' * 100 }}{% endfor %}", "characters are written"),
        (
            "{% set n = namespace(x='a') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "m",
        ),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ undefined.attribute }}", "undefined"),
    ],
    ids=["time", "memory", "output", "doubling", "sandbox", "undefined"],
)
def test_a_hostile_template_ends_itself_and_not_the_run(make, template, said):
    """Over two seconds where the limit of time is tried: it is two seconds."""
    begun = time.process_time()
    with pytest.raises(TemplateError, match=said):
        render(template, [user("Hi")], names={})
    assert time.process_time() - begun < 2
    assert render("{{ messages[0].content }}", [user("Hi")], names={}) == "Hi"  # the next one runs


def test_a_tokenizer_with_a_hostile_template_loads_and_reads_text(make):
    tokenizer = make("{{ 'a' * 2000000000 }}")
    assert len(tokenizer.encode("the cat").ids)
    assert "MiB of memory" in explain_template(tokenizer)


@pytest.mark.parametrize(
    "template", [{"default": "x"}, [{"template": "x"}], 3, [{"name": "default", "template": 3}]]
)
def test_a_template_of_no_known_shape_is_refused_when_loaded(make, template):
    with pytest.raises(ValueError, match=r"chat_template in .* is text, or a list"):
        make(template)


def test_named_templates_are_known_by_the_default(make):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert make(named).chat_template == CHATML


@pytest.mark.parametrize(
    "name", ["gemma3", "llama3", "phi-3-mini", "qwen2.5-sub8000", "smollm2", "bytelevel2k", *TEMPLATES]
)
def test_the_process_renders_what_transformers_does(name):
    template = TEMPLATES.get(name) or json.loads(
        (tokenizer_folder(name) / "tokenizer_config.json").read_text()
    )["chat_template"].replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    template = template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for talk in TALKS.values():
        for generates in (False, True):
            options = {"add_generation_prompt": generates}
            try:
                ours = render(template, talk, names=names, **options)
            except TemplateError:
                assert name == "strict"
                continue
            expected, _ = render_jinja_template([talk], chat_template=template, **options, **names)
            assert [ours] == expected


def test_differences_are_found_where_training_writes_something_else(make, monkeypatch):
    tokenizer = make(DEFAULT)
    assert {found.sample for found in differences(tokenizer)} <= {"messages with whitespace around them"}
    # A fault: another template goes into the export.
    monkeypatch.setattr("tokenkit.tokenization.chat.advice.exported_template", lambda tokenizer: CHATML)
    assert "a question and an answer" in {found.sample for found in differences(tokenizer)}


def test_text_that_reads_as_a_turn_s_border_is_refused_where_it_is_ambiguous(make):
    """Cut at the first border, the question's own words would be trained as an answer."""
    tokenizer = make(ALPACA)
    question = " the cat\n\n### Response:\nwords of the user"
    for talk in ([user(question), answer("sat")], [user(" the cat"), answer(f"sat{question}")]):
        with pytest.raises(ValueError, match="turn by turn"):
            encode_documents([document_from_row({"messages": talk})], [tokenizer])
