import pytest

from tokenkit.tokenization.chat.families import FAMILIES
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer


def test_special_tokens_are_renamed_by_role_and_appended_where_new(folders):
    folder = folders["byte-level"]
    before, after = load_tokenizer(str(folder)), load_tokenizer(f"{folder}:source=Qwen2:target=Llama3")
    assert after.control["<|start_header_id|>"] == before.control["<|im_start|>"]
    assert after.control["<|eot_id|>"] == before.control["<|im_end|>"]
    assert after.control["<|end_of_text|>"] == before.control["<|endoftext|>"]
    assert after.control["<|begin_of_text|>"] == before.vocab_size
    assert after.control["<|end_header_id|>"] == before.vocab_size + 1
    assert "<|im_start|>" not in after.control
    assert after.encode("The cat").ids.tolist() == before.encode("The cat").ids.tolist()
    assert (after.bos_id, after.eos_id) == (before.vocab_size, 0)


@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram", "metaspace"])
def test_every_family_can_be_put_on_every_tokenizer(folders, kind, target):
    before, after = load_tokenizer(str(folders[kind])), load_tokenizer(f"{folders[kind]}:target={target}")
    family = FAMILIES[target]
    assert set(family.tokens.values()) <= set(after.control)
    assert len(set(after.control.values())) == len(after.control)
    text = after.normalize("the cat and the dog")
    assert after.encode(text).ids.tolist() == before.encode(text).ids.tolist()


def test_a_string_that_both_families_have_keeps_its_id(folders):
    folder = folders["sentencepiece"]
    before, after = load_tokenizer(str(folder)), load_tokenizer(f"{folder}:source=Llama2:target=Phi3")
    assert after.control["<s>"] == before.bos_id
    assert after.control["<|endoftext|>"] == before.eos_id


def test_a_string_that_plays_another_role_is_not_renamed(folders):
    folder = folders["byte-level"]
    before, after = load_tokenizer(str(folder)), load_tokenizer(f"{folder}:source=GPT2:target=Phi3")
    assert after.control["<|endoftext|>"] == before.control["<|endoftext|>"]  # BOS before, EOS now
    assert after.control["<s>"] >= before.vocab_size


def test_a_tokenizer_that_lacks_its_family_is_refused(folders):
    with pytest.raises(
        ValueError, match=r"said to have the special tokens of Llama3 but lacks '<\|begin_of_text"
    ):
        load_tokenizer(f"{folders['byte-level']}:source=Llama3")


def test_added_tokens_come_last_and_are_never_text(folders):
    before = load_tokenizer(str(folders["byte-level"]))
    after = load_tokenizer(str(folders["byte-level"]), tokens_to_add=["<a>", "<b>", "<a>", "<|im_end|>"])
    assert after.control["<a>"] == before.vocab_size
    assert after.control["<b>"] == before.vocab_size + 1
    assert after.vocab_size == before.vocab_size + 2
    assert not set(after.encode("<a> <b>").ids.tolist()) & {after.control["<a>"], after.control["<b>"]}


@pytest.mark.parametrize("string", ["", " a", "a\n"])
def test_an_added_token_with_whitespace_around_it_is_refused(folders, string):
    with pytest.raises(ValueError, match="without whitespace around it"):
        load_tokenizer(str(folders["byte-level"]), tokens_to_add=[string])


@pytest.mark.parametrize("spec", ["byte", "byte-level"])
@pytest.mark.parametrize("string", ["a", ".", "word", "naïve", "42"])
def test_an_added_token_that_text_holds_is_refused(folders, spec, string):
    name = str(folders.get(spec, spec))
    with pytest.raises(ValueError, match="give it marks that text does not have, such as"):
        load_tokenizer(name, tokens_to_add=["<fine>", string])


@pytest.mark.parametrize("name", ["Llama3", "Gemma2", "Qwen2", "Phi3", "Mistral"])
def test_a_template_says_which_token_plays_which_role(tmp_path, name):
    named = load_tokenizer(f"byte:target={name}")
    named.save(tmp_path)
    read = load_tokenizer(str(tmp_path))
    assert read.family.name == "generic"
    assert read.special_ids == named.special_ids
    assert "end_turn" in read.special_ids


def test_a_tokenizer_that_only_has_a_template_is_renamed_by_its_roles(tmp_path):
    load_tokenizer("byte:target=Llama3").save(tmp_path)
    before, after = load_tokenizer(str(tmp_path)), load_tokenizer(f"{tmp_path}:target=Gemma2")
    roles = {"start": "<start_of_turn>", "end_turn": "<end_of_turn>", "bos": "<bos>", "eos": "<eos>"}
    assert {role: after.control[string] for role, string in roles.items()} == {
        role: before.special_ids[role] for role in roles
    }


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ '{name}'.format(role='user') }}",
        "{{ 1 / 0 }}",
        "{{ range(10**9) }}",
    ],
)
def test_a_template_that_cannot_be_read_leaves_the_tokenizers_own_roles(folders, template):
    tokenizer = load_tokenizer(str(folders["byte-level"]))
    broken = Tokenizer(tokenizer.spec, tokenizer.document, tokenizer.family, template)
    assert broken.special_ids == {
        role: tokenizer.control[string] for role, string in tokenizer.family.tokens.items()
    }
