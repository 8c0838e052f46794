import pytest
import torch

from tests.tiny import ARCHITECTURES, tiny_model
from tokenkit.kernels.reference.linear_logprob import linear_logprob
from tokenkit.models.causal_lm import CausalLM, LoadOptions, load_causal_lm

IDS = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(1))


def logp_of_next(model: CausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    states = model(ids_BT)
    return linear_logprob(
        states.hidden_BTD[:, :-1].flatten(0, 1), states.head, ids_BT[:, 1:].flatten()
    ).logp_N


def logp_by_logits(model, ids_BT: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids_BT).logits.float()[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).flatten()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_hidden_states_under_the_head_are_the_models_own_logits(architecture, tied):
    model = tiny_model(architecture, tie_word_embeddings=tied)
    wrapped = CausalLM(model, 300)
    assert wrapped.is_tied == tied
    torch.testing.assert_close(logp_of_next(wrapped, IDS), logp_by_logits(model, IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_body_runs_under_a_copy_of_its_old_vocabulary_after_the_new_one_moved_in(architecture):
    model = CausalLM(tiny_model(architecture), 300)
    before = model(IDS).hidden_BTD
    old = model.vocabulary()
    model.replace_vocabulary(torch.randn(64, 32), None, None, vocab_size=50)
    torch.testing.assert_close(model(IDS, old).hidden_BTD, before)
    assert model(IDS % 50).head.weight_VD.shape == (64, 32)
    assert not any(parameter.requires_grad for parameter in old.parameters())


def test_padding_on_the_right_changes_no_real_position():
    model = CausalLM(tiny_model(), 300)
    padded = torch.cat([IDS, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded).hidden_BTD[:, :11], model(IDS).hidden_BTD)


def test_padding_rows_of_the_vocabulary_take_no_probability():
    model = tiny_model()
    short = CausalLM(model, 200)
    ids = IDS % 200
    logits = model(input_ids=ids).logits.float()[:, :-1, :200]
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
    torch.testing.assert_close(logp_of_next(short, ids), expected, atol=1e-5, rtol=1e-5)


def test_tied_stays_tied_and_untied_gets_its_own_matrix():
    model = CausalLM(tiny_model(tie_word_embeddings=True), 300)
    model.replace_vocabulary(torch.randn(64, 32), None, None, vocab_size=64)
    assert model.is_tied
    assert model.config.tie_word_embeddings
    model.replace_vocabulary(torch.randn(64, 32), torch.randn(64, 32), None, vocab_size=64)
    assert not model.is_tied
    assert not model.config.tie_word_embeddings


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(ValueError, match="301 ids but the model's embedding only 300 rows"):
        CausalLM(tiny_model(), 301)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "no causal language"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_causal_lm(str(tmp_path), 10, LoadOptions())
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no causal language model could be read"):
        load_causal_lm(str(tmp_path), 300, LoadOptions())


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="no/such/folder does not exist"):
        load_causal_lm("./no/such/folder", 10, LoadOptions())


def test_a_tokenizers_option_behind_a_folder_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="'target=Qwen2' is an option of tokenizer_name"):
        load_causal_lm(f"{tmp_path}:target=Qwen2", 10, LoadOptions())
