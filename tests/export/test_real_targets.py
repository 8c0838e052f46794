"""Real tokenizers with another family's special tokens: what plain transformers makes of the export."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from tests.conftest import tokenizer_folder
from tests.tiny import byte_level_bpe, tiny_model
from tokenkit.embeddings.transfer import transfer_vocabulary
from tokenkit.export.huggingface import ExportRequest, export_huggingface
from tokenkit.models.causal_lm import CausalLM
from tokenkit.tokenization.chat.encode import Document, document_from_row, encode_documents
from tokenkit.tokenization.chat.families import FAMILIES
from tokenkit.tokenization.tokenizer import load_tokenizer

TALK = [
    {"role": "system", "content": "Be terse; naïve café."},
    {"role": "user", "content": "Add 1 + 1,\n\nthen say 東京 🙂."},
    {"role": "assistant", "content": "2\n    print('x')"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye."},
]
CASES = {  # spec: architecture of the exported model
    "llama3:target=Gemma2": "gemma2",
    "qwen2.5:source=Qwen2:target=Llama3": "qwen2",
    "smollm2": "llama",
    "llama2:source=Llama2:target=Qwen2": "llama",
    "phi-3-mini:target=Llama3": "phi3",
    "tinystories10k:target=Gemma2": "gpt2",
    "gpt2:target=Llama3": "llama",
    "llama2:conversion=byte:target=Qwen2": "llama",
    "bytelevel2k:target=Gemma2": "gemma2",
    "spm1k:source=Llama2:target=Qwen2": "llama",
}
ADDED = ["<|tool|>", "<think>"]


class Force(LogitsProcessor):
    """Lets a model write one token and no other."""

    def __init__(self, token_id):
        self.token_id = token_id

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token_id] = 0
        return forced


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    old = load_tokenizer(str(byte_level_bpe(tmp_path_factory.mktemp("old"))))

    @cache
    def export(spec):
        name, colon, options = spec.partition(":")
        new = load_tokenizer(f"{tokenizer_folder(name)}{colon}{options}", tokens_to_add=ADDED)
        width = {"n_embd": 8} if CASES[spec] == "gpt2" else {"hidden_size": 16, "intermediate_size": 8}
        student = CausalLM(tiny_model(CASES[spec], vocab_size=old.vocab_size, **width), old.vocab_size)
        transfer_vocabulary(student, old, new, pad_to_multiple_of=64)
        folder = tmp_path_factory.mktemp("export") / "out"
        export_huggingface(student, None, new, ExportRequest(folder=folder))
        return SimpleNamespace(
            folder=folder,
            new=new,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            model=AutoModelForCausalLM.from_pretrained(folder),
        )

    return export


@pytest.mark.parametrize("spec", CASES)
def test_special_tokens_are_those_of_the_target_family(exported, spec):
    out = exported(spec)
    family = FAMILIES[spec.rpartition("target=")[2]] if "target=" in spec else out.new.family
    for role in ("bos", "eos"):
        assert getattr(out.tokenizer, f"{role}_token") == family.tokens.get(role)
    padding = family.tokens.get("pad", family.tokens["eos"])  # none of these has a token that is named so
    assert out.tokenizer.pad_token == padding
    generation = out.model.generation_config
    assert generation.bos_token_id == out.model.config.bos_token_id == out.tokenizer.bos_token_id
    assert generation.pad_token_id == out.new.control[padding]
    strings = {family.tokens["eos"], out.new.chat.turns["assistant"].end[0].text.strip()}
    ends = generation.eos_token_id
    assert {ends} if isinstance(ends, int) else set(ends) == {out.new.control[s] for s in strings}


@pytest.mark.parametrize("spec", CASES)
def test_transformers_writes_a_conversation_as_training_did(exported, spec):
    out = exported(spec)
    ((tokens,),) = encode_documents([document_from_row({"messages": TALK})], [out.new])
    got = out.tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert got == tokens.ids.tolist()
    prompt = out.tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=False)
    if (
        spec == "gpt2:target=Llama3"
    ):  # its rule for spaces writes a last \n\n as one token, and as two before a word
        prompt = prompt[:-1]
    assert got[: len(prompt)] == prompt
    text = out.new.normalize(TALK[1]["content"])
    ((plain,),) = encode_documents([Document(text=text)], [out.new], mode="direct_encode_no_force_eos")
    assert out.tokenizer(text)["input_ids"] == plain.ids.tolist()
    left = out.tokenizer.decode(got, skip_special_tokens=True)
    assert not [string for string in out.new.control if string in left]


@pytest.mark.parametrize("spec", CASES)
def test_generation_stops_at_every_end_and_at_nothing_else(exported, spec):
    out = exported(spec)
    prompt = out.tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True, return_tensors="pt")
    ends = {out.new.eos_id, out.new.special_ids["end_turn"]}
    assert len(ends) == 2 - (spec == "smollm2")
    other = next(i for i in range(out.new.vocab_size) if i not in ends and not out.new.is_special_V[i])
    for token_id, length in [*((end, 1) for end in ends), (other, 4)]:
        written = out.model.generate(
            **prompt,
            max_new_tokens=4,
            do_sample=False,
            logits_processor=LogitsProcessorList([Force(token_id)]),
        )
        assert written[0, prompt["input_ids"].shape[1] :].tolist() == [token_id] * length


@pytest.mark.parametrize("spec", CASES)
def test_the_export_is_the_same_tokenizer_for_a_next_stage(exported, spec):
    out = exported(spec)
    read = load_tokenizer(str(out.folder))
    assert read.special_ids == {**read.special_ids, **out.new.special_ids}
    rows = [document_from_row({"messages": TALK}), Document(text=out.new.normalize(TALK[1]["content"]))]
    for mode in ("direct_encode", "surround_instruct"):
        ((ours, again), (text, text_again)) = encode_documents(rows, [out.new, read], mode=mode)
        for one, other in ((ours, again), (text, text_again)):
            assert one.ids.tolist() == other.ids.tolist()
            assert one.trained.tolist() == other.trained.tolist()
            assert one.byte_ends.tolist() == other.byte_ends.tolist()
