"""A model is compared with itself when it is loaded: equal, measured, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.architectures import randomise, tiny
from tests.tiny import tiny_model
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.models.causal_lm import CausalLM, LoadOptions, load_causal_lm
from tokenkit.models.check import settle

IDS = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(1))


def loaded(model, folder, vocab_size=300, **options):
    model.save_pretrained(folder)
    return load_causal_lm(str(folder), vocab_size, LoadOptions(**options))


def check_equal(causal_lm):
    logits = causal_lm.causal_lm(input_ids=IDS, use_cache=False).logits[..., : causal_lm.vocab_size].float()
    states = causal_lm(IDS)
    got = linear_logprob(states.hidden_BTD.flatten(0, 1), states.head, IDS.flatten()).logp_N
    expected = logits.log_softmax(-1).gather(-1, IDS[..., None]).flatten()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


SPECIAL = {
    "cohere": {"scale": 0.25},
    "granite": {"scale": 1 / 3},
    "minicpm3": {"scale": 8.0},
    "hyperclovax": {"scale": 3.0},
    "falcon_h1": {"scale": 0.7, "embedding_scale": 2.5},
    "mpt": {"scale": 1.0},
    "gemma2": {"softcap": 8.0},
    "recurrent_gemma": {"softcap": 30.0},
    "modernbert-decoder": {"transform": "lm_head"},
    "phi": {},
    "gemma3n_text": {"softcap": 8.0},
    "gemma4_text": {"softcap": 8.0},
    "llama4_text": {},
}


@pytest.mark.parametrize("kind", SPECIAL)
@torch.no_grad()
def test_logits_are_those_of_hidden_states_and_head(kind, tmp_path):
    causal_lm = loaded(tiny(kind), tmp_path)
    for name, value in SPECIAL[kind].items():
        found = getattr(causal_lm.form, name)
        assert found == value if isinstance(value, str) else found == pytest.approx(value), name
    check_equal(causal_lm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cohere", "gemma2", "hyperclovax", "qwen2_moe"])
def test_sixteen_bits_are_told_from_a_wrong_head(kind, dtype, tmp_path):
    assert loaded(tiny(kind), tmp_path, dtype=dtype).form == loaded(tiny(kind), tmp_path).form


class Scaled(nn.Linear):
    """A head that does to its output what no configuration says."""

    after: staticmethod

    def forward(self, hidden_ND):
        return self.after(super().forward(hidden_ND))


def with_head(after, folder):
    """Load a Llama whose head does more than to multiply."""
    model = randomise(tiny_model("llama", tie_word_embeddings=False))
    causal_lm = CausalLM(model, 300)
    model.lm_head.__class__, model.lm_head.after = Scaled, after
    settle(causal_lm, str(folder))
    return causal_lm


@torch.no_grad()
def test_a_scale_that_no_name_tells_is_measured(tmp_path):
    causal_lm = with_head(lambda z: 1.37 * z, tmp_path)
    assert causal_lm.form.scale == pytest.approx(1.37, rel=1e-5)
    check_equal(causal_lm)


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z + 0.05,  # takes no part in a softmax, but is not what is computed here
        lambda z: torch.cat([z[..., :7], z[..., 7:8] - 1, z[..., 8:]], -1),  # one token alone
        lambda z: z.abs(),
        lambda z: 5 * torch.tanh(z / 5),  # a cap that the configuration does not name
        lambda z: z * torch.nan,
    ],
)
def test_what_cannot_be_told_is_refused_with_its_size(after, tmp_path):
    with pytest.raises(ValueError, match=r"the logits of LlamaForCausalLM are not .* differ by") as caught:
        with_head(after, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "electra", "camembert", "xlnet"])
def test_an_encoder_is_no_decoder(kind, tmp_path):
    with pytest.raises(ValueError, match="depends on the tokens after it"):
        loaded(tiny(kind), tmp_path)


def test_the_comparison_leaves_the_model_and_the_generator_as_they_were(tmp_path):
    causal_lm = loaded(tiny("gemma2", attn_implementation="eager"), tmp_path)
    again = {name: tensor.clone() for name, tensor in causal_lm.state_dict().items()}
    torch.manual_seed(3)
    settle(causal_lm, "again")
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert drawn == torch.rand(1)
    assert all(torch.equal(again[name], tensor) for name, tensor in causal_lm.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in causal_lm.modules())
    assert not any(parameter.grad is not None for parameter in causal_lm.parameters())


def rewritten(folder, change):
    """Save a model whose file of weights was changed, and return its folder."""
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(folder)
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file(change(state), path, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "lm_head.weight"}, "lacks 1 .* lm_head.weight"),
        (lambda s: {k: v for k, v in s.items() if "layers.1.mlp.up" not in k}, "layers.1.mlp.up_proj.weight"),
        (lambda s: {f"x.{k}": v for k, v in s.items()}, "lacks 21 of the model's 21 tensors"),
        (lambda s: {**s, "model.norm.weight": torch.ones(31)}, "model.norm.weight"),
        (lambda s: {**s, "lm_head.weight": s["lm_head.weight"].index_fill(0, torch.tensor(7), torch.nan)},
         "lm_head.weight holds NaN or infinity .32 numbers, the first in row 7"),
        (lambda s: {**s, "model.norm.weight": torch.full((32,), torch.inf)}, "model.norm.weight holds NaN"),
    ],
)  # fmt: skip
def test_weights_that_are_missing_or_no_numbers_are_named(change, named, tmp_path):
    with pytest.raises(ValueError, match=named) as caught:
        load_causal_lm(rewritten(tmp_path, change), 300, LoadOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "of next year"])
def test_quantised_folders_are_refused_by_name(method, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}})
    )
    with pytest.raises(ValueError, match=f"quantised model .method {method}.*dequantise"):
        load_causal_lm(str(tmp_path), 300, LoadOptions())


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_to_be_merged_first(beside, tmp_path):
    if beside:
        tiny_model().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ValueError, match=r"PEFT adapter of 'some/base'.*merge"):
        load_causal_lm(str(tmp_path), 300, LoadOptions())


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/x.safetensors", "..", "a\\b.safetensors", 7]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(file, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], first: file}}))
    with pytest.raises(ValueError, match="expected a file of the same folder"):
        load_causal_lm(str(tmp_path), 300, LoadOptions())


def test_a_shard_that_is_absent_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of its weight files: {lost.name}"):
        load_causal_lm(str(tmp_path), 300, LoadOptions())
