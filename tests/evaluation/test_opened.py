"""One way to a model, whatever holds it: what is opened computes what was trained."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.commands.test_export import configured, lora_run, root  # noqa: F401
from tests.export.test_expanded import byte_student, exported
from tokenkit.errors import ConfigError, DataError
from tokenkit.evaluation.opened import open_model
from tokenkit.tokenization.tokenizer import load_tokenizer

IDS = torch.arange(20)[None] + 40


def logits(causal):
    states = causal(IDS)
    return states.hidden_BTD @ states.head.weight_VD.T


@pytest.fixture
def cut_run(lora_run, tmp_path):  # noqa: F811
    """The run as it was before its end."""
    shutil.copytree(lora_run, tmp_path / "cut", ignore=shutil.ignore_patterns("export", "outcome.json"))
    return tmp_path / "cut"


def test_a_run_its_checkpoint_and_its_export_are_one_model(lora_run, cut_run):  # noqa: F811
    found = {}
    for name in (lora_run, lora_run / "export", cut_run, cut_run / "step_4", cut_run / "checkpoints"):
        with open_model(str(name), dtype=torch.float32) as opened:
            found[name] = logits(opened.causal)
            assert opened.hf_tokenizer("the cat").input_ids[-1] in opened.tokenizer.encode("the cat").ids
            own = opened.model(IDS).logits
            torch.testing.assert_close(own, found[name], rtol=1e-4, atol=1e-4)
            assert opened.model.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] > IDS.shape[1]
    first, *others = found.values()
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_byte_model_with_expansion_opens_where_its_code_is_trusted(architecture, tmp_path):
    student, new = byte_student(architecture, tmp_path)
    exported(student, new, tmp_path / "out")
    with open_model(str(tmp_path / "out"), trust_remote_code=True) as opened:
        wanted, got = student(IDS), opened.causal(IDS)
        torch.testing.assert_close(got.hidden_BTD, wanted.hidden_BTD, rtol=1e-4, atol=1e-5)
        assert opened.causal.expansion.old.weight is opened.model.expansion.old.weight
    with pytest.raises(DataError, match="trust_remote_code"), open_model(str(tmp_path / "out")):
        pass


def test_rows_beyond_the_tokenizer_are_padding_up_to_a_size_that_padding_has(tmp_path, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for rows, said in (
        (320, ""),
        (600, "261 ids and the model 600 rows: the last 339 are taken for padding"),
    ):
        folder = str(tmp_path / str(rows))
        LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes)).save_pretrained(folder)
        load_tokenizer("byte").save(tmp_path / str(rows))
        capsys.readouterr()
        with open_model(folder):
            assert said in (err := capsys.readouterr().err)
            assert ("padding" in err) == bool(said)
        with open_model(folder, tokenizer_name="byte"):
            assert "are taken for padding" in capsys.readouterr().err, "named by the user: always said"
    LlamaForCausalLM(LlamaConfig(vocab_size=1400, **sizes)).save_pretrained(folder)
    with pytest.raises(DataError, match="1,400 rows, more than padding explains"), open_model(folder):
        pass


def test_another_tokenizer_and_places_that_hold_nothing(root, tmp_path):  # noqa: F811
    shutil.copytree(root / "model", tmp_path / "copy")
    with open_model(str(tmp_path / "copy"), tokenizer_name=str(root / "model")) as opened:
        got = opened.hf_tokenizer("the cat", add_special_tokens=False).input_ids
        assert got == opened.tokenizer.encode("the cat").ids.tolist()
        assert opened.positions == opened.model.config.max_position_embeddings
    with (
        pytest.raises(ConfigError, match="is not the tokenizer of"),
        open_model(str(tmp_path / "copy"), tokenizer_name=str(root / "target")),
    ):
        pass
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "step_3"):
        with pytest.raises((FileNotFoundError, DataError), match=name.name), open_model(str(name)):
            pass
