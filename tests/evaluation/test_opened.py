"""One way to a model, whatever holds it: what is opened computes what was trained."""

import shutil

import pytest
import torch

from tests.commands.test_export import configured, lora_run, root  # noqa: F401
from tests.export.test_expanded import byte_student, exported
from tokenkit.errors import DataError
from tokenkit.evaluation.opened import open_model

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


def test_another_tokenizer_and_places_that_hold_nothing(root, tmp_path):  # noqa: F811
    shutil.copytree(root / "model", tmp_path / "copy")
    with open_model(str(tmp_path / "copy"), tokenizer_name=str(root / "model")) as opened:
        got = opened.hf_tokenizer("the cat", add_special_tokens=False).input_ids
        assert got == opened.tokenizer.encode("the cat").ids.tolist()
        assert opened.positions == opened.model.config.max_position_embeddings
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "step_3"):
        with pytest.raises((FileNotFoundError, DataError), match=name.name), open_model(str(name)):
            pass
