"""Three real tokenizers through align, zett and a short training on conversations.

Each takes seconds: files of up to 33 MB are read, and a model is moved, trained, exported and loaded again.
So their vocabularies are cut to the first ids; all that is not vocabulary stays as it is.
"""

import functools
import json

import numpy as np
import pytest

from tokenkit import train
from tokenkit.commands import align, zett
from tokenkit.tokenization import tokenizer as byteify
from tokenkit.tokenization.chat.advice import differences
from tokenkit.tokenization.chat.encode import document_from_row, encode_documents

SPECS = {  # with what AutoTokenizer of the export cuts otherwise
    "gemma3": [],
    "pythia:target=Qwen2": ["messages with whitespace around them"],
    "tiktoken-o200k_base:target=Llama3": [],
}
KEPT = 1500


def shortened(source, folder):
    """Write a tokenizer with its first ids, all letters of ASCII and its special tokens."""
    document = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = document["model"]
    added = [token for token in document["added_tokens"] if "unused" not in token["content"]]
    named = {token["content"] for token in added}
    vocab = sorted(model["vocab"].items(), key=lambda item: item[1])
    kept = [string for string, i in vocab if i < KEPT or string in named]
    kept = list(
        dict.fromkeys([*kept, *(s for s, _ in vocab if len(s) == 1 and (s.isascii() or s == "▁")), *named])
    )
    model["vocab"] = {string: number for number, string in enumerate(kept)}
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    model["merges"] = [
        pair for pair in pairs if all(string in model["vocab"] for string in (*pair, "".join(pair)))
    ]
    document["added_tokens"] = sorted(
        (token | {"id": model["vocab"][token["content"]]} for token in added), key=lambda token: token["id"]
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return folder


TALK = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "Who sat on the mat, and naïvely?"},
    {"role": "assistant", "content": "The cat sat there.\n\nSo it was."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "It slept."},
]


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Read each tokenizer once: three verbs would read it three times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byteify, "load_tokenizer", functools.cache(byteify.load_tokenizer))
        yield


@pytest.mark.parametrize("spec", SPECS)
def test_a_real_tokenizer_goes_through_align_zett_and_training(shared_data, tmp_path, capsys, spec):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, _, family = spec.partition(":")
    model = str(shared_data / "models/stories260K")
    folder = shortened(shared_data / "tokenizers" / name, tmp_path / name)
    target = ":".join(filter(None, (str(folder), family)))
    teacher = f"{model}:source=Llama2"
    ours = byteify.load_tokenizer(target)
    assert align.main(["--student", target, "--teacher", teacher, "--text", "The cat sat on the mat."]) == 0
    flags = ["--model.pretrained-model-name-or-path", model, "--target-tokenizer-name", target]
    assert zett.main([*flags, "--output", str(tmp_path / "moved")]) == 0

    lines = [json.dumps({"messages": TALK[number % 2 :]}) for number in range(12)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = {
        "student.pretrained-model-name-or-path": model,
        "student.tokenizer-name": teacher,
        "teacher.pretrained-model-name-or-path": model,
        "teacher.tokenizer-name": teacher,
        "target-tokenizer-name": target,
        "data.dataset-name": tmp_path / "talks.jsonl",
        "data.num-workers": 0,
        "steps": 1,
        "batch-size": 2,
        "max-length-new": 64,
        "max-length-teacher": 128,
        "output-dir": tmp_path / "run",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert train.main([*arguments, "--losses", "clm", "alm_unconstrained"]) == 0

    loaded = AutoTokenizer.from_pretrained(tmp_path / "run/export")
    for talk in (TALK, TALK[1:]):
        ((tokens,),) = encode_documents([document_from_row({"messages": talk})], [ours])
        assert loaded.apply_chat_template(talk, return_dict=False) == tokens.ids.tolist()
        prompt = loaded.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=False)
        assert loaded.decode(tokens.ids.tolist()).startswith(loaded.decode(prompt))
    assert [found.sample for found in differences(ours)] == SPECS[spec]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")
    assert trained.get_input_embeddings().weight.shape[0] >= ours.vocab_size
    assert np.isfinite(trained.get_input_embeddings().weight.detach().numpy()).all()
