"""A GGUF file holds the model and the tokenizer: transformers, which reads it by code of its own, agrees."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from tests.tiny import TEXT, byte_level_bpe, sentencepiece_bpe, tiny_folder, tiny_model
from tokenkit.cli import main
from tokenkit.errors import DataError, ExitCode, ExportError
from tokenkit.export.gguf_file import GgufSource, compare, interleaved, read_vocabulary, tensors, write_gguf
from tokenkit.export.gguf_vocabulary import (
    BYTE,
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    gguf_vocabulary,
    merged_by_score,
    token_bytes,
)
from tokenkit.tokenization.tokenizer import load_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
WHOLE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "bpe": load_tokenizer(str(byte_level_bpe(folder / "bpe"))),
        "sentencepiece": load_tokenizer(str(sentencepiece_bpe(folder / "sentencepiece"))),
        "bytes": load_tokenizer("byte:target=Llama3"),
    }


def fields(folder):
    return GGUFReader(folder / "model.gguf").fields


@pytest.mark.parametrize(
    ("architecture", "kind", "changes"),
    [
        ("llama", "bpe", {}),
        ("llama", "sentencepiece", {"rope_parameters": LINEAR}),
        ("qwen2", "bytes", {}),
        ("qwen3", "bpe", {"tie_word_embeddings": True, "head_dim": 128}),  # transformers assumes that size
        ("mistral", "bytes", {"sliding_window": None}),
    ],
)
def test_transformers_reads_the_same_model(tokenizers, tmp_path, architecture, kind, changes):
    tokenizer = tokenizers[kind]
    model = tiny_model(architecture, vocab_size=tokenizer.vocab_size + 2, **changes)
    source = GgufSource(model=model, tokenizer=tokenizer, name="some model")
    write_gguf(source, tmp_path, "f32")
    ids_BT = torch.from_numpy(tokenizer.encode(TEXT[0]).ids).long()[None, :50]
    with torch.no_grad():
        wanted = model(input_ids=ids_BT).logits
        if changes.get("rope_parameters") == LINEAR:
            return  # transformers leaves the factor out
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
        torch.testing.assert_close(loaded(input_ids=ids_BT).logits, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "bytes"])
def test_every_token_is_there_with_its_bytes_and_its_type(tokenizers, tmp_path, kind):
    tokenizer = tokenizers[kind]
    model = tiny_model(vocab_size=tokenizer.vocab_size + 3)
    source = GgufSource(model=model, tokenizer=tokenizer, name="x", chat_template="{{ x }}", adds_bos=True)
    write_gguf(source, tmp_path, "f32")
    read = read_vocabulary(fields(tmp_path))
    assert read == gguf_vocabulary(tokenizer, tokenizer.vocab_size + 3)
    assert [token_bytes(read, i) for i in range(tokenizer.vocab_size)] == tokenizer.token_bytes
    assert read.types[-3:] == [UNUSED] * 3
    assert len(set(read.strings)) == len(read.strings)
    specials = np.isin(read.types[: tokenizer.vocab_size], (CONTROL, UNKNOWN))
    assert (specials == tokenizer.is_special_V).all()
    assert (read.types.count(BYTE) == 256) is (kind == "sentencepiece")
    assert (read.merges == []) is (kind != "bpe")
    assert ("tokenizer.ggml.merges" in fields(tmp_path)) is (
        kind != "sentencepiece"
    )  # bytes have none, said so
    assert fields(tmp_path)["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields(tmp_path)["tokenizer.chat_template"].contents() == "{{ x }}"
    assert fields(tmp_path)["tokenizer.ggml.bos_token_id"].contents() == tokenizer.bos_id


def test_llama_3_brings_the_factors_of_its_frequencies():
    model = tiny_model("llama", rope_parameters=LLAMA3)
    factors = dict(tensors(model))["rope_freqs.weight"]
    plain = 5e5 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-6)
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8)


def test_halves_of_a_head_alternate():
    rows = interleaved(torch.arange(8)[:, None], 2)
    assert rows[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("kind", "counts"),
    [("f16", {"F16": 16, "F32": 5}), ("bf16", {"BF16": 16, "F32": 5}), ("q8_0", {"Q8_0": 16, "F32": 5})],
)
def test_matrices_have_the_type_and_vectors_are_exact(tokenizers, tmp_path, kind, counts):
    model = tiny_model(vocab_size=300, intermediate_size=64)
    source = GgufSource(model=model, tokenizer=tokenizers["bpe"], name="x")
    assert write_gguf(source, tmp_path, kind) == counts


def test_rows_that_no_block_fits_stay_in_float16(tokenizers, tmp_path):
    model = tiny_model(vocab_size=300, intermediate_size=40)
    source = GgufSource(model=model, tokenizer=tokenizers["bpe"], name="x")
    assert write_gguf(source, tmp_path, "q8_0") == {"Q8_0": 14, "F16": 2, "F32": 5}


def test_a_tensor_or_token_that_changed_is_named(tokenizers, tmp_path):
    model = tiny_model(vocab_size=300)
    source = GgufSource(model=model, tokenizer=tokenizers["bpe"], name="x")
    write_gguf(source, tmp_path, "f32")
    other = dataclasses.replace(source, tokenizer=load_tokenizer("byte"))
    with pytest.raises(ExportError, match="token 0, read back, spells"):
        compare(tmp_path / "model.gguf", other, "f32")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ExportError, match=r"blk.1.ffn_up.weight, read back, is another tensor"):
        compare(tmp_path / "model.gguf", source, "f32")


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("gemma2", {}, "models of type llama, mistral, qwen2, qwen3, and this one is gemma2"),
        ("mistral", {"sliding_window": 16}, "attention within a sliding window"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rotary embeddings of type llama3"),
        ("llama", {"attention_bias": True}, "llama with biases"),
        ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
    ],
)
def test_a_model_of_another_shape_is_refused(tokenizers, tmp_path, architecture, changes, reason):
    model = tiny_model(architecture, **changes)
    with pytest.raises(DataError, match=reason):
        write_gguf(GgufSource(model=model, tokenizer=tokenizers["bpe"], name="x"), tmp_path, "f32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("bpe", {"pre_tokenizer": WHOLE}, "a rule that GGUF has no name"),
        ("sentencepiece", {"byte_fallback": False}, "BPE over metaspace strings"),
        ("sentencepiece", {"merges": "backwards"}, "merges in an order that no scores express"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tokenizers, tmp_path, kind, change, reason):
    document = json.loads(json.dumps(tokenizers[kind].document))
    if "byte_fallback" in change:
        document["model"] |= change
    elif "merges" in change:  # "the" is made of "t" and "he", and "th" merges before "he"
        document["model"]["merges"].reverse()
    else:
        document |= change
    with pytest.raises(DataError, match=reason):
        gguf_vocabulary(with_document(tokenizers[kind], document), 400)


def with_document(tokenizer, document):
    return type(tokenizer)(tokenizer.spec, document, tokenizer.family)


def test_of_two_neighbours_the_best_piece_merges_first():
    ids = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    assert merged_by_score("abc", ids, [0, 0, 0, -2, -1]) == ["a", "bc"]
    assert merged_by_score("abc", ids, [0, 0, 0, -1, -2]) == ["ab", "c"]


def test_text_added_to_a_vocabulary_is_matched_whole(tokenizers):
    document = json.loads(json.dumps(tokenizers["sentencepiece"].document))
    token = {"id": 400, "content": "▁▁", "single_word": False, "lstrip": False, "rstrip": False}
    document["added_tokens"].append({**token, "normalized": False, "special": False})
    read = gguf_vocabulary(with_document(tokenizers["sentencepiece"], document), 401)
    assert (read.strings[400], read.types[400]) == ("  ", USER_DEFINED)


def test_the_command_writes_a_folder_whose_file_is_read(tmp_path, capsys):
    tiny_folder(tmp_path / "model", num_hidden_layers=1)
    words = ["export", str(tmp_path / "model"), "--format", "gguf", "--outtype", "bf16"]
    assert main([*words, "--output", str(tmp_path / "file.gguf")]) == ExitCode.DONE
    assert "every tensor and every token read back" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "file").iterdir()) == ["README.md", "model.gguf"]
    assert fields(tmp_path / "file")["tokenizer.ggml.add_bos_token"].contents() is True
    assert str(tmp_path).encode() not in (tmp_path / "file" / "model.gguf").read_bytes()
    assert main([*words, "--output", str(tmp_path / "x"), "--dtype", "float16"]) == ExitCode.CONFIG
    assert "set gguf_type, not dtype" in capsys.readouterr().err
