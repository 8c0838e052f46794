"""Students that bring a modelling file, allowed by trust_remote_code: exported with it, and read back."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import sentencepiece_bpe, tiny_folder
from tokenkit.commands.zett import main
from tokenkit.export.huggingface import rehearse
from tokenkit.models.causal_lm import LoadOptions, load_causal_lm
from tokenkit.tokenization.tokenizer import load_tokenizer

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    # where transformers puts code that is trusted
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    own = tmp_path / "own"
    tiny_folder(own)
    (own / "modeling_mine.py").write_text(CODE)
    config = json.loads((own / "config.json").read_text())
    names = {"AutoConfig": "MineConfig", "AutoModelForCausalLM": "MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    config["auto_map"] = {auto: f"modeling_mine.{name}" for auto, name in names.items()}
    (own / "config.json").write_text(json.dumps(config))
    return own


def test_a_model_with_code_of_its_own_is_moved_with_it(folder, tmp_path, capsys):
    target, moved = sentencepiece_bpe(tmp_path / "new"), tmp_path / "moved"
    words = ["--model.pretrained-model-name-or-path", str(folder), "--target-tokenizer-name", str(target)]
    words += ["--output-dir", str(moved)]
    assert main(words) != 0
    assert "brings code of its own, which runs only with trust_remote_code" in capsys.readouterr().err
    assert main([*words, "--trust-remote-code", "true"]) == 0
    assert (moved / "modeling_mine.py").read_text() == CODE
    assert "trust_remote_code=True" in (moved / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(moved, trust_remote_code=True)
    assert type(loaded).__name__ == "MineForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(moved, trust_remote_code=True)
    ids = tokenizer("the cats", return_tensors="pt").input_ids
    assert bool(torch.isfinite(loaded(ids).logits).all())


def test_the_export_of_such_a_model_is_rehearsed(folder):
    tokenizer = load_tokenizer(str(folder))
    student = load_causal_lm(str(folder), tokenizer.vocab_size, LoadOptions(trust_remote_code=True))
    rehearse(student, tokenizer)
