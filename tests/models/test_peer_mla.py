"""The PEER + MLA model: what it computes, what it keeps, and where it can be read.

Faults tried, each caught here: a mask that shows the future; keys that are left as memory was; a decode whose
scale counts the latent's width; positions of a chunk that begin at 0; tables no gradient reaches.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from tests.tiny import byte_level_bpe
from tokenkit.export.huggingface import ExportRequest, export_huggingface
from tokenkit.models.causal_lm import CausalLM, LoadOptions, load_causal_lm
from tokenkit.models.peer_mla import PeerMlaConfig, PeerMlaForCausalLM
from tokenkit.models.peer_mla.attention import LatentAttention, turns
from tokenkit.models.peer_mla.deepseek import as_deepseek
from tokenkit.models.peer_mla.experts import ExpertLayer, plain_experts, plain_topk
from tokenkit.tokenization.tokenizer import load_tokenizer

PEER = {
    "num_experts": 144, "product_key_dim": [12, 12], "num_experts_per_tok": 4, "num_heads": 2,
    "query_dim": 16,
}  # fmt: skip
MLA = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16,
}  # fmt: skip
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "peer_start_layer": 1, "max_position_embeddings": 128,
}  # fmt: skip


def tiny_config(**changes):
    peer, mla = changes.pop("peer_config", {}), changes.pop("mla_config", {})
    return PeerMlaConfig(**{**SIZES, "peer_config": PEER | peer, "mla_config": MLA | mla, **changes})


def tiny_peer(**changes):
    torch.manual_seed(0)
    model = PeerMlaForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for layer in model.model.layers:  # at the beginning attention is nearly uniform
            for projection in (layer.self_attn.kv_a_proj_with_mqa, layer.self_attn.kv_b_proj):
                projection.weight.mul_(8)
    return model.eval()


VARIANTS = {
    "guide": {},
    "no q lora, interleaved": {"mla_config": {"q_lora_rank": None, "rope_interleave": True}},
    "layer norms, 3-d keys": {
        "mla_config": {"latent_norm": "layer"},
        "peer_config": {"num_experts": 120, "product_key_dim": [4, 5, 6], "query_dim": 24},
    },
    "per-head keys, relu gate, two neurons, shared tables": {
        "peer_config": {
            "share_keys": False, "gate": "relu", "activation": "silu", "expert_hidden_size": 2,
            "share_experts": True, "query_norm": "none",
        },
    },
    "rms, gated": {"norm": "rms", "mlp": "gated", "hidden_act": "silu", "peer_layers": [1]},
}  # fmt: skip
EVERY_VARIANT = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture
def ids():
    return torch.randint(300, (2, 13), generator=torch.Generator().manual_seed(1))


@EVERY_VARIANT
@torch.no_grad()
def test_no_token_sees_a_later_one(changes, ids):
    model = tiny_peer(**changes)
    other = ids.clone()
    other[:, 8:] = other[:, 8:].flip(1)
    mask = torch.ones_like(ids)
    for more in ({}, {"attention_mask": mask}):
        one, two = model(ids, **more).logits, model(other, **more).logits
        assert torch.equal(one[:, :8], two[:, :8])
        assert (one[:, 8:] - two[:, 8:]).abs().max() > 1e-3


@EVERY_VARIANT
@torch.no_grad()
def test_token_by_token_is_the_whole_at_once(changes, ids):
    """One token reads the cache without expanding it: the scale must be that of the expanded form."""
    model = tiny_peer(**changes)
    whole = model(ids, use_cache=False).logits
    cache, steps = DynamicCache(), []
    for t in range(ids.shape[1]):
        steps.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    latent, key = cache.layers[0].keys, cache.layers[0].values
    assert latent.shape == (2, 1, 13, 16)
    assert key.shape == (2, 1, 13, 8)


@torch.no_grad()
def test_a_prompt_in_pieces_is_the_prompt(ids):
    model, cache = tiny_peer(), DynamicCache()
    whole = model(ids, use_cache=False).logits
    pieces = [
        model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([5, 1, 4, 3], 1)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(ids):
    model = tiny_peer()
    whole = model(ids[:1]).logits
    padded = torch.cat([torch.full((1, 4), 7), ids[:1]], 1)
    mask = (torch.arange(17) >= 4).long()[None]
    positions = (torch.arange(17) - 4).clamp_min(0)[None]
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)
    alone = model.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 13:]
    beside = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(beside[:, 17:], alone)


@EVERY_VARIANT
def test_generation_is_the_same_with_a_cache_and_without(changes, ids):
    model = tiny_peer(**changes)
    for how in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **how}
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@EVERY_VARIANT
def test_every_parameter_is_trained(changes, ids):
    model = tiny_peer(**changes).train()
    many = torch.randint(300, (8, 32))
    model(many, labels=many).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_every_parameter_is_drawn_anew_and_the_same_from_one_seed(monkeypatch):
    """transformers passes over a module of ours that owns no parameter itself."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        one, two = tiny_peer(), tiny_peer()
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        assert first.isfinite().all(), name
        assert torch.equal(first, second), name


@torch.no_grad()
def test_experts_are_reached_and_their_gates_have_a_spread():
    """At the beginning: nearly all experts by some token, the best of a head well above its last."""
    layer = tiny_peer(
        peer_config={"num_experts": 1024, "product_key_dim": [32, 32], "num_experts_per_tok": 16}
    )
    layer = layer.model.layers[1].mlp
    expert, gate = layer.route(torch.randn(2000, 32))
    assert len(expert.unique()) > 0.9 * 1024
    assert (gate.amax(-1) / gate.amin(-1)).median() > 2


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rank", [None, 24])
@torch.no_grad()
def test_attention_is_that_of_deepseek_with_the_same_weights(interleave, rank):
    config = tiny_config(mla_config={"rope_interleave": interleave, "q_lora_rank": rank})
    theirs_config = DeepseekV3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, rope_interleave=interleave,
        **{k: v for k, v in MLA.items() if k != "q_lora_rank"}, q_lora_rank=rank,
    )  # fmt: skip
    theirs_config._attn_implementation = "sdpa"
    theirs, ours = DeepseekV3Attention(theirs_config, 0).eval(), LatentAttention(config, 0).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    x, positions = torch.randn(2, 9, 32), torch.arange(9)[None] + 3
    cos, sin = turns(positions, 8, 10000.0)
    expected, _ = theirs(x, (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)), None)
    for absorb in (False, True):
        got = ours(x, (cos, sin), None, absorb=absorb)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_without_experts_it_is_deepseek_where_that_is_exact(ids, tmp_path):
    model = tiny_peer(use_peer=False, norm="rms", mlp="gated", hidden_act="silu", layer_norm_eps=1e-6)
    theirs = as_deepseek(model)
    assert type(theirs) is DeepseekV3ForCausalLM
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"PEER layers \(1, 2\).*norm layer.*mlp plain"):
        as_deepseek(tiny_peer())


@torch.no_grad()
def test_a_saved_folder_comes_back_tied_and_bit_for_bit(ids, tmp_path):
    model = tiny_peer()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PeerMlaForCausalLM
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()


def test_a_saved_folder_runs_in_plain_transformers(ids, tmp_path):
    """Its code comes along and needs torch and transformers alone; saved again from there, too."""
    model = tiny_peer()
    model.save_pretrained(tmp_path / "one")
    program = (
        "import sys; sys.modules['tokenkit'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "one = AutoModelForCausalLM.from_pretrained('one', trust_remote_code=True)\n"
        "one.save_pretrained('two')\n"
        "two = AutoModelForCausalLM.from_pretrained('two', trust_remote_code=True)\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        "torch.save(two(ids).logits.detach(), 'logits.pt')\n"
        "print(two.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist())\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-5)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert json.loads(done.stdout) == expected.tolist()


@torch.no_grad()
def test_the_lines_for_plain_transformers_are_those_of_the_kernels():
    layer = tiny_peer(peer_config={"expert_hidden_size": 2, "gate": "sigmoid"}).model.layers[1].mlp
    x = torch.randn(300, 32)
    expert, gate = layer.route(x)
    query = layer.query_norm(layer.query_proj(x).unflatten(-1, (2, -1)))
    plain_expert, plain_gate = plain_topk(query, list(layer.keys), 4, "sigmoid")
    torch.testing.assert_close(plain_expert, expert)
    torch.testing.assert_close(plain_gate, gate)
    got = plain_experts(x, *layer.experts(), expert.flatten(1), gate.flatten(1), "gelu")
    torch.testing.assert_close(got, layer(x[None])[0], rtol=1e-5, atol=1e-5)


def test_it_is_a_causal_lm_of_ours(ids, tmp_path):
    tiny_peer(vocab_size=320).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), 300, LoadOptions())
    assert isinstance(model, CausalLM)
    assert len(model.layers) == 3
    assert model.is_tied
    states = model(ids, collect=frozenset({"layers"}))
    with torch.no_grad():
        expected = model.causal_lm(ids).logits[..., :300]
    torch.testing.assert_close(
        states.hidden_BTD @ states.head.weight_VD[:300].T, expected, rtol=1e-5, atol=1e-5
    )
    assert len(states.layers_BTD) == 3


@pytest.mark.parametrize("exact", [False, True])
def test_an_export_needs_its_code_unless_it_is_deepseek(exact, ids, tmp_path):
    changes = {"use_peer": False, "norm": "rms", "mlp": "gated", "hidden_act": "silu"} if exact else {}
    byte_level_bpe(tmp_path / "tokenizer")
    student = CausalLM(tiny_peer(**changes), 300)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    export_huggingface(student, None, tokenizer, ExportRequest(folder=tmp_path / "export"))
    assert (tmp_path / "export" / "modeling_peer_mla.py").exists() != exact
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=not exact)
    assert type(loaded).__name__ == ("DeepseekV3ForCausalLM" if exact else "PeerMlaForCausalLM")
    with torch.no_grad():
        expected = student.causal_lm(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_recomputed_layers_give_the_same_gradients_and_are_counted_once(ids):
    def gradients(recompute):
        model = tiny_peer().train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        layer = model.model.layers[1].mlp
        layer.usage = torch.zeros(144, dtype=torch.int64), torch.zeros(144, dtype=torch.int64)
        model(ids, labels=ids).loss.backward()
        assert layer.usage[0].sum() == ids.numel() * 8
        return [p.grad for p in model.parameters()]

    for one, two in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, two)


def test_a_layer_of_experts_is_one_graph_under_compile(ids):
    """2 s of tracing: nothing else runs the whole layer so."""

    def gradients(compiles):
        model = tiny_peer(num_hidden_layers=1, peer_start_layer=0).train()
        if compiles:
            model.model.layers[0].compile(backend="aot_eager", fullgraph=True)
        model(ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters()]

    for one, two in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, two)


def test_autocast_to_bfloat16_trains(ids):
    model = tiny_peer().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_decodes(ids):
    model = tiny_peer().to(torch.bfloat16)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 16)


def test_auto_config_knows_it_and_layers_of_experts_can_be_chosen():
    config = AutoConfig.for_model("peer_mla", **SIZES, peer_config=PEER, peer_layers=[2, 0])
    assert config.layers_of_experts == [0, 2]
    kinds = [type(layer.mlp) is ExpertLayer for layer in PeerMlaForCausalLM(config).model.layers]
    assert kinds == [True, False, True]
