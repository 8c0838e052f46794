"""What a PEER + MLA model may be told, with defaults and checks. Imports nothing but the standard library.

    model_settings({"hidden_size": 768, "peer_config": {"num_experts": 1024, "product_key_dim": [32, 32]}})

returns every field, or raises one ValueError that names the field, the value and the rule.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

MODEL: dict[str, Any] = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "norm": "layer",
    "mlp": "plain",
    "use_peer": True,
    "peer_start_layer": 2,
    "peer_layers": None,
    "peer_config": None,
    "mla_config": None,
    "use_cache": True,
    "tie_word_embeddings": True,
}
PEER: dict[str, Any] = {
    "num_experts": 1048576,
    "num_experts_per_tok": 16,
    "num_heads": 8,
    "expert_hidden_size": 1,
    "product_key_dim": [1024, 1024],
    "query_dim": 256,
    "batch_norm_query": True,
    "query_norm": None,
    "gate": "softmax",
    "activation": "gelu",
    "share_keys": True,
    "share_experts": False,
    "log_expert_usage": False,
    "log_freq": 1000,
    "usage_threshold": 5.0,
    "optimizer": "adamw",
    "expert_lr": None,
    "sharding": "auto",
}
MLA: dict[str, Any] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "rope_theta": 10000.0,
    "rope_interleave": False,
    "latent_norm": "rms",
}
CHOICES = {
    "hidden_act": ("gelu", "relu", "silu"),
    "norm": ("layer", "rms"),
    "mlp": ("plain", "gated"),
    "peer_config.query_norm": ("none", "layer", "rms"),
    "peer_config.gate": ("softmax", "relu", "sigmoid"),
    "peer_config.activation": ("gelu", "relu", "silu"),
    "peer_config.optimizer": ("adamw", "rowwise_adam", "rowwise_adagrad"),
    "peer_config.sharding": ("auto", "columns", "gathered"),
    "mla_config.latent_norm": ("rms", "layer"),
}
NO_DROPOUT = "this model has no dropout: leave it out"
REFUSED = {
    "dropout": NO_DROPOUT,
    "hidden_dropout": NO_DROPOUT,
    "attention_dropout": NO_DROPOUT,
    "peer_config.dropout": NO_DROPOUT,
    "peer_config.expert_dropout": NO_DROPOUT,
    "mla_config.attention_dropout": NO_DROPOUT,
    "peer_config.exact_topk": "the best experts are always found exactly: leave it out",
    "peer_config.backend": "the device decides which kernels run: leave it out",
    "peer_config.norm_query": "say it as query_norm: none, layer or rms",
    "peer_config.norm_keys": "keys are not normed, since scores need their scale: leave it out",
    "peer_config.query_norm=batch": (
        "statistics of a batch would differ between processes, micro-batches and decoding: take layer, which "
        "is what batch_norm_query means"
    ),
}
"""What other implementations have and this one does not, a field or a value, and why."""
OPTIONAL = ("peer_layers", "peer_config.query_norm", "peer_config.expert_lr", "mla_config.q_lora_rank")
"""Fields that may be null."""
LARGEST = 2**31 - 1


def model_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a model; `given` are those that differ from the defaults.

    Raises:
        ValueError: an unknown key, a value that is none, or values that do not fit each other.
    """
    model = _filled(given, MODEL, "")
    model["peer_config"] = peer_settings(model["peer_config"] or {})
    model["mla_config"] = _filled(model["mla_config"] or {}, MLA, "mla_config.")
    if model["mla_config"]["qk_rope_head_dim"] % 2:
        raise ValueError(
            f"mla_config.qk_rope_head_dim must be even, got {model['mla_config']['qk_rope_head_dim']}: "
            "positions turn pairs of numbers"
        )
    layers = model["num_hidden_layers"]
    chosen = model["peer_layers"]
    if chosen is not None:
        whole = isinstance(chosen, list | tuple) and all(_is_whole(layer) for layer in chosen)
        if not whole or any(not 0 <= layer < layers for layer in chosen):
            raise ValueError(f"peer_layers must list layers from 0 to {layers - 1}, got {chosen!r}")
        model["peer_layers"] = sorted(set(chosen))
    elif model["use_peer"] and model["peer_start_layer"] >= layers:
        raise ValueError(
            f"peer_start_layer must be below num_hidden_layers, which is {layers}, got "
            f"{model['peer_start_layer']}: set use_peer to false for a model without PEER layers"
        )
    return model


def peer_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of the PEER layers.

    Raises:
        ValueError: see `model_settings`.
    """
    peer = _filled(given, PEER, "peer_config.")
    sizes = peer["product_key_dim"]
    if not isinstance(sizes, list | tuple) or not sizes or not all(_is_whole(n) and n > 0 for n in sizes):
        raise ValueError(
            "peer_config.product_key_dim must list how many keys each part has, as [1024, 1024], got "
            f"{sizes!r}"
        )
    peer["product_key_dim"] = sizes = list(sizes)
    if math.prod(sizes) != peer["num_experts"]:
        raise ValueError(
            f"peer_config.product_key_dim {sizes} multiplies to {math.prod(sizes)}, but num_experts is "
            f"{peer['num_experts']}: make the product the number of experts"
        )
    if peer["query_dim"] % len(sizes):
        raise ValueError(
            f"peer_config.query_dim must be divisible by the {len(sizes)} parts of product_key_dim, got "
            f"{peer['query_dim']}: each part of a key gets an equal part of the query"
        )
    if peer["num_experts_per_tok"] > min(sizes):
        raise ValueError(
            f"peer_config.num_experts_per_tok must be at most {min(sizes)}, the smallest of product_key_dim, "
            f"got {peer['num_experts_per_tok']}: more cannot be found in that part"
        )
    if peer["query_norm"] is None:
        peer["query_norm"] = "layer" if peer["batch_norm_query"] else "none"
    return peer


def peer_layers(model: Mapping[str, Any]) -> list[int]:
    """Return which layers are PEER layers, of all settings of a model."""
    if not model["use_peer"]:
        return []
    if model["peer_layers"] is not None:
        return list(model["peer_layers"])
    return list(range(model["peer_start_layer"], model["num_hidden_layers"]))


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'model_config'} must hold fields, got {given!r}")
    for key in given:
        if key not in defaults and prefix + str(key) in REFUSED:
            raise ValueError(f"{prefix}{key} is no setting of this model: {REFUSED[prefix + str(key)]}")
        if key not in defaults:
            close = difflib.get_close_matches(str(key), defaults, n=1)
            near = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(defaults)}"
            raise ValueError(f"{prefix}{key} is no setting of this model{near}")
    return {key: _value(prefix + key, given.get(key, default), default) for key, default in defaults.items()}


def _value(name: str, value: Any, default: Any) -> Any:
    """Return a value in the type of its default; YAML reads 5e-5 as a word."""
    if name in CHOICES and not (value is None and name in OPTIONAL):
        if value not in CHOICES[name]:
            reason = REFUSED.get(f"{name}={value}")
            raise ValueError(
                f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}"
                + ("" if reason is None else f": {reason}")
            )
        return value
    if value is None and (name in OPTIONAL or default is None):
        return None
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
    elif isinstance(default, float) or name == "peer_config.expert_lr":
        value = _number(name, value)
    elif isinstance(default, int):
        least = 0 if name == "peer_start_layer" else 1
        if not _is_whole(value) or not least <= value <= LARGEST:
            raise ValueError(f"{name} must be a whole number from {least} to {LARGEST}, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return number


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
