"""A folder with input-id expansion: its own class, the same with and without a cache."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.tiny import byte_level_bpe, tiny_model
from tokenkit.embeddings.transfer import transfer_vocabulary
from tokenkit.export.expanded import modeling_source
from tokenkit.export.huggingface import ExportRequest, export_huggingface
from tokenkit.models.causal_lm import CausalLM, LoadOptions, load_causal_lm
from tokenkit.models.expansion import InputExpansion
from tokenkit.models.lora import add_lora
from tokenkit.models.options import LoraOptions
from tokenkit.tokenization.expansion import expansion_tables
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.tokenization.written import ids_by_bytes

TEXTS = ["The cats sat on the mat", "naïve", "Once upon a time"]


def byte_student(architecture, folder, *, expand=True, vocab_size=300):
    old, new = load_tokenizer(str(byte_level_bpe(folder / "old", vocab_size))), load_tokenizer("byte")
    student = CausalLM(tiny_model(architecture), vocab_size)
    if expand:
        tables = expansion_tables(ids_by_bytes(old))
        old_WD = student.embedding.weight[:vocab_size]
        student.expansion = InputExpansion(student.embedding, tables, old_WD)
    transfer_vocabulary(student, old, new, pad_to_multiple_of=64)
    return student, new


def exported(student, new, folder):
    written = export_huggingface(student, None, new, ExportRequest(folder=folder))
    trust = student.expansion is not None
    model = AutoModelForCausalLM.from_pretrained(written, trust_remote_code=trust).eval()
    return model, AutoTokenizer.from_pretrained(written, padding_side="left", trust_remote_code=trust)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("expand", [True, False])
def test_generation_is_the_same_with_a_cache_without_and_in_a_batch(architecture, expand, tmp_path):
    student, new = byte_student(architecture, tmp_path, expand=expand)
    model, tokenizer = exported(student, new, tmp_path / "out")
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    together = model.generate(**batch, **options)
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt").input_ids
        ids_now = ids
        for _ in range(24):  # the plain definition: no cache, the student of training
            with torch.no_grad():
                states = student(ids_now)
                logits = states.hidden_BTD[:, -1] @ states.head.weight_VD[: new.vocab_size].T
                ids_now = torch.cat([ids_now, logits.argmax(-1)[:, None]], 1)
        cached = model.generate(ids, use_cache=True, **options)
        assert cached.tolist() == ids_now.tolist()
        assert model.generate(ids, use_cache=False, **options).tolist() == cached.tolist()
        assert together[row, batch.input_ids.shape[1] :].tolist() == cached[0, ids.shape[1] :].tolist()


def test_masked_ids_end_what_stands_before_them(tmp_path):
    model, _ = exported(*byte_student("llama", tmp_path), tmp_path / "out")
    ids = torch.tensor([list(b"the cats")])
    masked = torch.ones_like(ids)
    masked[0, :4] = 0
    alone = model.expand(ids[:, 4:])
    assert model.expand(ids, masked)[0].tolist() == [-1] * 4 + alone[0].tolist()
    assert model.expand(ids)[0, 4:].tolist() != alone[0].tolist()


def test_a_cache_without_expanded_ids_is_refused(tmp_path):
    model, _ = exported(*byte_student("llama", tmp_path), tmp_path / "out")
    ids = torch.tensor([list(b"the cats")])
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="expected expanded_ids beside a cache"):
            model(ids[:, 4:], past_key_values=cache)
        got = model(ids[:, 4:], past_key_values=cache, expanded_ids=model.expand(ids)[:, 4:]).logits
        torch.testing.assert_close(got, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)


def test_generation_looks_back_as_far_as_the_longest_token(tmp_path):
    student, new = byte_student("llama", tmp_path)
    model, _ = exported(student, new, tmp_path / "out")
    old = load_tokenizer(str(tmp_path / "old"))
    longest = max(ids_by_bytes(old), key=len)
    assert len(longest) == model.config.expansion_max_bytes
    ids = torch.tensor([list(b"zz" + longest)])
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1)
    assert inputs["input_ids"].shape == (1, 1)
    assert inputs["expanded_ids"].tolist() == [[ids_by_bytes(old)[longest]]]


@torch.no_grad()
def test_old_tokens_of_one_byte_each(tmp_path):
    student, new = byte_student("llama", tmp_path, vocab_size=258)
    assert student.expansion.max_bytes == 1
    model, _ = exported(student, new, tmp_path / "out")
    ids = torch.tensor([[*b"a cat", new.eos_id]])
    embedding, old = model.get_input_embeddings().weight, load_tokenizer(str(tmp_path / "old"))
    expected_TD = embedding[ids[0]]
    rows = [ids_by_bytes(old)[bytes([byte])] for byte in b"a cat"]
    expected_TD[:5] += student.expansion.old.weight[rows]
    got, expected = model(ids).logits, model(inputs_embeds=expected_TD[None]).logits
    torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_adapters_are_merged_beside_the_expansion(tmp_path):
    student, new = byte_student("llama", tmp_path)
    add_lora(student, LoraOptions(rank=4))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    model, _ = exported(student, new, tmp_path / "out")
    ids = torch.tensor([list(b"The cats sat on the mat")])
    states = student.eval()(ids)
    expected = states.hidden_BTD @ states.head.weight_VD[: new.vocab_size].T
    torch.testing.assert_close(model(ids).logits[..., : new.vocab_size], expected, rtol=1e-4, atol=1e-4)


def test_a_fresh_process_needs_no_tokenkit_and_says_what_it_needs(tmp_path):
    exported(*byte_student("llama", tmp_path), tmp_path / "out")
    program = (
        "import sys; sys.modules['tokenkit'] = None\n"
        "from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer\n"
        f"load = {{'trust_remote_code': bool(int(sys.argv[1]))}}\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, **load)\n"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path / 'out')!r}, **load)\n"
        "print(type(m).__name__, t('ab', add_special_tokens=False).input_ids)"
    )
    for trust, code in (("1", 0), ("0", 1)):
        done = subprocess.run(
            [sys.executable, "-c", program, trust],
            capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert ("ByteExpansionForCausalLM [97, 98]" in done.stdout) is (trust == "1")
        assert "You are using a model of type" not in done.stderr
    assert "trust_remote_code=True" in done.stderr


def test_an_expanded_folder_is_no_student_and_no_other_kind_of_model(tmp_path):
    exported(*byte_student("llama", tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match="byte model with input-id expansion"):
        load_causal_lm(str(tmp_path / "out"), 261, LoadOptions(trust_remote_code=True))
    with pytest.raises(ValueError, match="brings code of its own"):
        load_causal_lm(str(tmp_path / "out"), 261, LoadOptions())
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)  # the body would read bytes alone


def test_code_that_is_not_transformers_own_is_refused():
    class Mine(type(tiny_model())):
        pass

    with pytest.raises(ValueError, match="Mine is not part of transformers"):
        modeling_source(Mine(tiny_model().config))
