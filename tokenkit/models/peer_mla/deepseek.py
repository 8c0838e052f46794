"""A model without PEER layers as transformers' DeepSeek-V3, where both compute the same."""

from __future__ import annotations

from typing import Any


def differences(config: Any) -> list[str]:
    """Return what of a `PeerMlaConfig` DeepSeek-V3 has not, in words; none: the two are one model."""
    found = []
    if config.layers_of_experts:
        found.append(f"PEER layers ({', '.join(map(str, config.layers_of_experts))}); set use_peer to false")
    if config.norm != "rms":
        found.append(f"norm {config.norm}; set rms")
    if config.mlp != "gated":
        found.append(f"mlp {config.mlp}; set gated")
    if config.mla_config["latent_norm"] != "rms":
        found.append(f"mla_config.latent_norm {config.mla_config['latent_norm']}; set rms")
    return found


def as_plain(model: Any) -> Any:
    """Return a model as a class of transformers' own where it is exactly one, and any other as it is."""
    own = model.config.model_type == "peer_mla" and not differences(model.config)
    return as_deepseek(model) if own else model


def as_deepseek(model: Any) -> Any:
    """Return a `DeepseekV3ForCausalLM` over the same tensors.

    Raises:
        ValueError: the model is not one of DeepSeek-V3, with what is different.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = model.config
    if found := differences(config):
        raise ValueError(f"the model is no DeepSeek-V3, which has none of: {'; '.join(found)}")
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "initializer_range", "hidden_act", "use_cache", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    mla = dict(config.mla_config)
    del mla["latent_norm"]
    theirs = DeepseekV3Config(
        **{name: getattr(config, name, None) for name in same},
        num_key_value_heads=config.num_attention_heads,
        rms_norm_eps=config.layer_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": mla.pop("rope_theta")},
        first_k_dense_replace=config.num_hidden_layers,
        **mla,
    )
    import torch

    with torch.device("meta"):
        made = DeepseekV3ForCausalLM(theirs)
    made.load_state_dict(model.state_dict(), assign=True)
    made.model.rotary_emb = type(made.model.rotary_emb)(theirs)
    made.tie_weights()
    made.generation_config = model.generation_config
    return made.train(model.training)
