import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenization.tiny import CHATML, byte_level, write
from tokenkit.structs import UNPAIRED
from tokenkit.tokenization.chat.encode import (
    ChatTemplateMode,
    Document,
    Message,
    document_from_row,
    encode_documents,
)
from tokenkit.tokenization.chat.families import FAMILIES
from tokenkit.tokenization.tokenizer import load_tokenizer

TALK = Document(
    messages=(
        Message("system", "Be terse."),
        Message("user", "1 + 1?"),
        Message("assistant", "2"),
        Message("user", "Thanks, </s> naïve"),
        Message("assistant", "Bye"),
    )
)


def spelled(tokenizer, tokens):
    """Each token's bytes and end."""
    pieces = [tokenizer.token_bytes[i].decode(errors="replace") for i in tokens.ids]
    return list(zip(pieces, tokens.byte_ends.tolist(), strict=True))


def without_names(tokenizer, tokens):
    """The same, leaving out the letters of role names."""
    pairs = zip(spelled(tokenizer, tokens), tokens.special, strict=True)
    return [pair for pair, is_special in pairs if not (is_special and pair[0].isalpha())]


def families(*names):
    return [load_tokenizer(f"byte:target={name}") for name in names]


def encode(document, tokenizers, **options):
    (tokens,) = encode_documents([document], tokenizers, **options)
    return tokens


def test_pieces_that_say_the_same_share_an_end():
    llama, gemma = families("Llama3", "Gemma2")
    student, teacher = encode(Document(text="Hi"), [llama, gemma])
    assert without_names(llama, student) == [
        ("<|begin_of_text|>", 1),
        ("<|start_header_id|>", 2),
        ("<|end_header_id|>", 3),
        ("\n", 3),
        ("\n", 4),
        ("<|eot_id|>", 5),
        ("<|start_header_id|>", 6),
        ("<|end_header_id|>", 7),
        ("\n", 7),
        ("\n", 8),
        ("H", 9),
        ("i", 10),
        ("<|eot_id|>", 11),
    ]
    assert without_names(gemma, teacher) == [
        ("<bos>", 1),
        ("<start_of_turn>", 2),
        ("\n", 4),
        ("<end_of_turn>", 5),
        ("\n", UNPAIRED),  # Llama 3 writes nothing after a turn
        ("<start_of_turn>", 6),
        ("\n", 8),
        ("H", 9),
        ("i", 10),
        ("<end_of_turn>", 11),
        ("\n", UNPAIRED),
    ]


def test_a_piece_that_says_several_things_ends_with_the_last():
    phi, qwen = families("Phi3", "Qwen2")
    student, teacher = encode(TALK, [phi, qwen])
    assert spelled(phi, student)[:3] == [("<|system|>", 0), ("\n", 3), ("B", 4)]
    assert spelled(qwen, teacher)[0] == ("<|im_start|>", 1)
    assert spelled(phi, student)[-1] == ("<|endoftext|>", UNPAIRED)


def test_closing_a_question_opens_the_answer_where_a_family_says_both_at_once():
    llama2, qwen = families("Llama2", "Qwen2")
    student, teacher = encode(Document(messages=TALK.messages[1:3]), [llama2, qwen])
    by_end = dict(zip(spelled(llama2, student), student.trained, strict=True))
    # [INST] 3 units, "1 + 1?" 6, then END_TURN and the three of the answer's header.
    assert ("]", 13) in by_end
    assert ("2", 14) in by_end
    assert by_end["</s>", 15]
    assert ("<s>", UNPAIRED) in by_end  # Qwen has none
    (start,) = (e for s, e in spelled(qwen, teacher) if s == "2")
    assert start == 14


def test_closing_a_question_opens_no_second_question():
    llama2, llama3 = families("Llama2", "Llama3")
    student, teacher = encode(
        Document(messages=(Message("user", "1"), Message("user", "2"))), [llama2, llama3]
    )
    # BOS, three of a header, "1", END_TURN; the second question begins behind it, at 6.
    assert [e for s, e in spelled(llama2, student) if s in "]12"] == [4, 5, 6, 9, 10, 11]
    assert [e for s, e in spelled(llama3, teacher) if s in "12"] == [5, 10]


def test_whitespace_that_a_special_token_swallows_is_not_written(folders, tmp_path):
    document = json.loads((folders["byte-level"] / "tokenizer.json").read_text())
    for token in document["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_end|>"
    swallowing = load_tokenizer(str(write(tmp_path, document, chat_template=CHATML)))
    other = load_tokenizer("byte:target=Qwen2")
    student, teacher = encode(TALK, [swallowing, other])
    assert spelled(swallowing, student)[-1][0] == "<|im_end|>"
    assert spelled(other, teacher)[-1] == ("\n", UNPAIRED)


def test_a_template_that_trims_is_noticed(folders, tmp_path):
    document = json.loads((folders["byte-level"] / "tokenizer.json").read_text())
    trimming = CHATML.replace("message['content']", "message['content'] | trim")
    assert load_tokenizer(str(write(tmp_path, document, chat_template=trimming))).chat.trims_content


def test_a_one_sided_bos_has_no_partner():
    llama, qwen = families("Llama3", "Qwen2")
    student, teacher = encode(Document(text="Hi"), [llama, qwen], mode="direct_encode")
    assert spelled(llama, student) == [
        ("<|begin_of_text|>", UNPAIRED),
        ("H", 1),
        ("i", 2),
        ("<|end_of_text|>", 3),
    ]
    assert spelled(qwen, teacher) == [("H", 1), ("i", 2), ("<|endoftext|>", 3)]
    assert student.special.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("direct_encode", ["<bos>", "H", "i", "<eos>"]),
        ("direct_encode_no_force_eos", ["<bos>", "H", "i"]),
        ("direct_encode_no_force_bos", ["H", "i", "<eos>"]),
        ("direct_encode_no_force_bos_no_force_eos", ["H", "i"]),
    ],
)
def test_direct_modes_write_text_between_bos_and_eos(mode, expected):
    (gemma,) = families("Gemma2")
    (tokens,) = encode(Document(text="Hi"), [gemma], mode=mode)
    assert [s for s, _ in spelled(gemma, tokens)] == expected
    assert tokens.trained.all()


def test_only_answers_and_their_ends_are_trained():
    for name in FAMILIES:
        (tokenizer,) = families(name)
        (tokens,) = encode(TALK, [tokenizer])
        trained = "".join(
            s for (s, _), t in zip(spelled(tokenizer, tokens), tokens.trained, strict=True) if t
        )
        end = "".join(
            piece.text for piece in FAMILIES[name].turns["assistant"].end if "end_turn" in piece.atoms
        )
        assert trained.replace(" ", "").removesuffix("<|endoftext|>" if name == "Phi3" else "") == (
            f"2{end}Bye{end}".replace(" ", "")
        )


def test_all_tokens_are_trained_when_asked():
    (tokens,) = encode(TALK, families("Qwen2"), loss_mask_mode="all")
    assert tokens.trained.all()


def test_plain_text_as_an_answer_follows_an_empty_question():
    (qwen,) = families("Qwen2")
    (tokens,) = encode(Document(text="Hi"), [qwen])
    text = "".join(s for s, _ in spelled(qwen, tokens))
    assert text == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    trained = [s for (s, _), t in zip(spelled(qwen, tokens), tokens.trained, strict=True) if t]
    assert trained == ["H", "i", "<|im_end|>"]


def test_a_completion_is_trained_and_its_prompt_is_not():
    row = document_from_row({"prompt": "one tw", "completion": "o three"})
    (tokens,) = encode(row, families("Gemma2"), mode="direct_encode")
    assert tokens.trained.tolist() == [False] * 7 + [True] * 8
    (tokens,) = encode(row, families("Gemma2"))
    assert tokens.trained.sum() == len("o three") + 1


def test_without_a_template_a_conversation_is_one_text_whose_answers_are_trained(tokenizers):
    pair = (load_tokenizer("byte:target=Gemma2"), tokenizers["sentencepiece"])  # the second has no template
    options = {"mode": "direct_encode", "use_chat_template": False}
    tokens, _ = encode(TALK, pair, **options)
    text = bytes(tokens.ids[~tokens.special].tolist()).decode()
    assert text == "Be terse.\n1 + 1?\n2\nThanks, </s> naïve\nBye"
    trained = [s for (s, _), t in zip(spelled(pair[0], tokens), tokens.trained, strict=True) if t]
    assert trained == ["2", "\n", "B", "y", "e", "<eos>"]
    (tokens,) = encode(TALK, pair[:1], **options, loss_mask_mode="all")
    assert tokens.trained.all()


def test_the_end_of_a_text_is_trained_if_its_last_message_is():
    asked = Document(messages=(Message("assistant", "a"), Message("user", "b")))
    (tokens,) = encode(asked, families("Gemma2"), mode="direct_encode", use_chat_template=False)
    assert tokens.trained.tolist() == [False, True, True, False, False]  # BOS, a, line break, b, EOS


def test_surrounding_a_text_needs_the_template():
    with pytest.raises(ValueError, match="choose a direct mode"):
        encode(TALK, families("Gemma2"), use_chat_template=False)


def test_a_completion_that_starts_inside_a_token_is_trained_from_the_next(tokenizers):
    tokenizer = tokenizers["byte-level"]
    whole = tokenizer.encode("the cat").ids.tolist()
    row = document_from_row({"prompt": "th", "completion": "e cat"})
    (tokens,) = encode(row, [tokenizer], mode="direct_encode_no_force_eos")
    assert tokens.ids.tolist() == whole
    assert not tokens.trained[0]
    assert tokens.trained[-1]


def test_a_prompt_that_a_tokenizer_changes_ends_where_its_changed_text_does(tokenizers):
    row = document_from_row({"prompt": "cafe\u0301  is", "completion": " nice"})
    sides = encode(row, (load_tokenizer("byte"), tokenizers["unigram"]), mode="direct_encode_no_force_eos")
    byte = sides[0]
    assert bytes(byte.ids[byte.trained].tolist()) == b" nice"


def test_a_system_message_that_one_side_cannot_write_goes_to_the_user_on_both():
    gemma, llama = families("Gemma2", "Llama3")
    student, teacher = encode(TALK, [gemma, llama])
    for tokenizer, tokens in ((gemma, student), (llama, teacher)):
        text = "".join(s for s, _ in spelled(tokenizer, tokens))
        assert "Be terse.\n\n1 + 1?" in text
        assert "system" not in text


def test_what_tools_say_is_said_by_the_user():
    messages = (Message("user", "Look."), Message("tool", "42"), Message("assistant", "It is 42."))
    (qwen,) = families("Qwen2")
    (tokens,) = encode(Document(messages=messages), [qwen])
    assert "<|im_start|>user\n42<|im_end|>" in "".join(s for s, _ in spelled(qwen, tokens))


def test_families_that_trim_do_so_on_both_sides():
    llama, qwen = families("Llama3", "Qwen2")
    document = Document(messages=(Message("user", " Hi "), Message("assistant", "\nHello\n")))
    for tokenizer, tokens in zip((llama, qwen), encode(document, [llama, qwen]), strict=True):
        text = "".join(s for s, _ in spelled(tokenizer, tokens))
        assert "\nHi<" in text
        assert "\nHello<" in text
    (tokens,) = encode(document, [qwen])
    assert "\n Hi <" in "".join(s for s, _ in spelled(qwen, tokens))


def test_both_sides_read_the_same_canonical_text(tokenizers):
    byte, collapsing = load_tokenizer("byte"), tokenizers["unigram"]
    document = Document(text="cafe\u0301  is\nnice ")
    for pair in ((byte, collapsing), (collapsing, byte)):
        sides = encode(document, pair, mode="direct_encode_no_force_bos_no_force_eos")
        assert {int(tokens.byte_ends[-1]) for tokens in sides} == {len("café is nice".encode())}


def test_special_token_strings_in_messages_are_text():
    (qwen,) = families("Qwen2")
    document = Document(messages=(Message("user", "<|im_end|>"), Message("assistant", "</s><|im_start|>")))
    (tokens,) = encode(document, [qwen])
    assert [s for s, _ in spelled(qwen, tokens)].count("<|im_end|>") == 2


ALL_FAMILIES = list(itertools.permutations(FAMILIES, 2))


@given(
    pair=st.sampled_from(ALL_FAMILIES),
    contents=st.lists(st.text(st.sampled_from("ab \n<é日"), max_size=6), min_size=1, max_size=4),
    roles=st.permutations(["system", "user", "assistant", "user"]),
    mode=st.sampled_from(ChatTemplateMode.__args__),
)
@settings(deadline=None)
def test_axes_of_any_two_families_agree(byte_families, pair, contents, roles, mode):
    if not any(content.strip() for content in contents):
        return
    messages = tuple(Message(role, content) for role, content in zip(roles, contents, strict=False))
    tokenizers = [byte_families[name] for name in pair]
    student, teacher = encode(Document(messages=messages), tokenizers, mode=mode)
    for tokenizer, tokens in zip(tokenizers, (student, teacher), strict=True):
        ends = tokens.byte_ends[tokens.byte_ends != UNPAIRED]
        assert (np.diff(ends) >= 0).all()
        assert (tokens.special[tokens.byte_ends == UNPAIRED]).all()
        assert (
            len({len(field) for field in (tokens.ids, tokens.byte_ends, tokens.special, tokens.trained)}) == 1
        )
        assert tokens.ids.max() < tokenizer.vocab_size
    # Text lies at the same place on both sides, byte by byte, and so do the last pieces.
    assert text_bytes(student) == text_bytes(teacher)
    assert student.byte_ends.max() == teacher.byte_ends.max()


def text_bytes(tokens):
    """The bytes of the texts and their places, leaving out a template's space that a text took over."""
    starts = np.maximum.accumulate([0, *tokens.byte_ends])[:-1]
    rows = zip(tokens.ids.tolist(), starts, tokens.byte_ends.tolist(), tokens.special, strict=True)
    return [(token_id, end) for token_id, start, end, is_special in rows if not is_special and end > start]


@pytest.fixture(scope="module")
def byte_families():
    return {name: load_tokenizer(f"byte:target={name}") for name in FAMILIES}


def test_templates_derived_from_jinja_are_those_of_the_family(tokenizers):
    derived = tokenizers["byte-level"].chat
    assert derived.turns.items() >= FAMILIES["Qwen2"].turns.items()
    assert not derived.trims_content


def test_a_tokenizer_without_a_template_refuses_messages_but_not_text(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    with pytest.raises(ValueError, match="no chat template: name a family with ':target='"):
        encode(TALK, [tokenizer])
    (tokens,) = encode(Document(text="the cat"), [tokenizer], mode="direct_encode")
    assert tokens.ids[[0, -1]].tolist() == [tokenizer.bos_id, tokenizer.eos_id]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "it fails: no"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "once and in order"),
        ("{{ unclosed", "cannot be read"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused(tmp_path, template, message):
    folder = byte_level(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text())
    write(folder, document, chat_template=template)
    with pytest.raises(ValueError, match=message):
        encode(TALK, [load_tokenizer(str(folder))])


def test_documents_that_cannot_be_written_are_refused(tokenizers):
    with pytest.raises(ValueError, match="valid Unicode"):
        encode(Document(text="a\ud800"), [tokenizers["unigram"]], mode="direct_encode")
    with pytest.raises(ValueError, match="empty document"):  # nothing but the mark for a space
        encode(Document(text="▁"), [tokenizers["unigram"]], mode="direct_encode")
    with pytest.raises(ValueError, match="chat_template_mode is one of"):
        encode(TALK, families("Qwen2"), mode="direct")
    with pytest.raises(ValueError, match="loss_mask_mode is one of"):
        encode(TALK, families("Qwen2"), loss_mask_mode="some")
