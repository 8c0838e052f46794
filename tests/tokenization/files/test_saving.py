import pytest

from tokenkit.tokenization.chat.encode import Document, document_from_row, encode_documents
from tokenkit.tokenization.chat.families import FAMILIES
from tokenkit.tokenization.tokenizer import load_tokenizer

TEXT = "The cat: naïve café\n    x = 1"
TALK = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]
KINDS = ("byte-level", "sentencepiece", "unigram", "metaspace")
SPECS = [
    *KINDS,
    "byte-level:target=Llama3",
    "byte-level:source=Qwen2:target=Gemma2",
    "byte-level:target=Phi3",
    "byte-level:conversion=byte",
    "sentencepiece:conversion=manual_add_prefix_space",
    "sentencepiece:source=Llama2",
    "sentencepiece:source=TinyLlama",
    "sentencepiece:source=Mistral:target=Llama3",
    "unigram:target=Gemma2",
    *(f"byte:target={name}" for name in ("GPT2", "Llama2", "Phi3", "Llama3")),
    "byte",
]


def reload(tokenizer, folder):
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("spec", SPECS)
def test_a_saved_tokenizer_reads_and_writes_the_same_ids(folders, tmp_path, spec):
    kind, *options = spec.split(":")
    name = ":".join([str(folders[kind]) if kind in folders else kind, *options])
    tokenizer = load_tokenizer(name, tokens_to_add=["<|mine|>"])
    loaded = reload(tokenizer, tmp_path)
    text = tokenizer.normalize(TEXT)

    assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).ids.tolist()
    for string, token_id in tokenizer.control.items():
        assert loaded(string, add_special_tokens=False)["input_ids"] == [token_id]
    assert len(loaded) == tokenizer.vocab_size
    assert loaded.eos_token_id == tokenizer.eos_id
    assert loaded.bos_token_id == tokenizer.bos_id

    ((tokens,),) = encode_documents([Document(text=text)], [tokenizer], mode="direct_encode_no_force_eos")
    assert loaded(text)["input_ids"] == tokens.ids.tolist()
    if tokenizer.family.turns or tokenizer.chat_template:
        ((tokens,),) = encode_documents([document_from_row({"messages": TALK})], [tokenizer])
        assert loaded.apply_chat_template(TALK, tokenize=True, return_dict=False) == tokens.ids.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_of_a_family_can_be_read_back(tmp_path, name):
    tokenizer = load_tokenizer(f"byte:target={name}")
    tokenizer.save(tmp_path)
    derived = load_tokenizer(str(tmp_path))
    row = document_from_row({"messages": TALK})
    ((own,),) = encode_documents([row], [tokenizer])
    ((read,),) = encode_documents([row], [derived])
    assert read.ids.tolist() == own.ids.tolist()
    assert read.trained.tolist() == own.trained.tolist()


def test_a_generation_prompt_opens_the_answer(tmp_path):
    loaded = reload(load_tokenizer("byte:target=Gemma2"), tmp_path)
    text = loaded.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert text == "<bos><start_of_turn>user\nBe terse.\n\n1 + 1?<end_of_turn>\n<start_of_turn>model\n"


def test_a_manual_prefix_is_not_saved_where_it_would_come_back_elsewhere(folders, tmp_path):
    tokenizer = load_tokenizer(f"{folders['byte-level']}:conversion=manual_add_prefix_space")
    with pytest.raises(ValueError, match="added tokens that are text"):
        tokenizer.save(tmp_path)


def test_saving_over_a_tokenizer_is_refused(tmp_path):
    tokenizer = load_tokenizer("byte")
    tokenizer.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a tokenizer"):
        tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
