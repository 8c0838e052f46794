"""How many parameters a model has, by part, and how many of them a token meets.

    part       what                                            a token meets
    embedding  input embedding, and rows for every layer       its row; all where it is the head too
    attention  all of it                                       all
    mlp        dense layers, experts that every token takes    all
    router     what finds a token's experts: queries, keys     all
    experts    experts of which a token takes a few            these
    norm       norms outside of attention and router           all
    head       where it is not the embedding                   all
    other      the rest                                        all

Shapes are enough, so the model is made without memory, whatever its size.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenkit.errors import ConfigError

PARTS = ("embedding", "attention", "mlp", "router", "experts", "norm", "head", "other")


def read_shape(name: str, *, trust_remote_code: bool = False) -> Any:
    """Return a model without memory, of a YAML file with a `model_config`, a folder, or a name on the hub.

    Raises:
        ConfigError, ValueError: a configuration that cannot be.
        FileNotFoundError: no such file or folder.
    """
    import torch

    from tokenkit.config.yaml_files import read_yaml
    from tokenkit.models.causal_lm import LoadOptions
    from tokenkit.models.peer_mla import PeerMlaConfig, PeerMlaForCausalLM
    from tokenkit.models.peer_mla.settings import model_settings
    from tokenkit.models.reading import blank_model

    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        options = LoadOptions(trust_remote_code=trust_remote_code)
        return blank_model(str(path) if path.exists() else name, options)
    given = read_yaml(path)
    if "model_config" in given:
        given = given["model_config"] or {}
    elif not given or "student" in given:
        raise ConfigError(f"{path} has no model_config: give a file of `tokenkit pretrain`, or a folder")
    config = PeerMlaConfig(**model_settings(given))
    with torch.device("meta"):
        return PeerMlaForCausalLM(config)


def count_parameters(model: Any) -> dict[str, Any]:
    """Return total and active parameters, whole and by part, and by layer.

    Args:
        model: a Hugging Face causal language model, on any device.
    """
    share = share_of_experts(model.config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    parts = {part: {"total": 0, "active": 0} for part in PARTS}
    layers: dict[int, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter is embedding.weight:
            part, active = "embedding", parameter.numel() if tied else parameter.shape[-1]
        elif head is not None and any(parameter is own for own in head.parameters()):
            part, active = "head", parameter.numel()
        else:
            part, active = part_of(name), parameter.numel()
            if part == "embedding":
                active = parameter.shape[-1]
            elif part == "experts":
                active = round(parameter.numel() * share)
        add(parts[part], parameter.numel(), active)
        if (found := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}")) is not None:
            add(layers.setdefault(int(found[1]), {"total": 0, "active": 0}), parameter.numel(), active)
    parts = {part: numbers for part, numbers in parts.items() if numbers["total"]}
    total, active = (sum(numbers[key] for numbers in parts.values()) for key in ("total", "active"))
    return {
        "model_type": model.config.model_type,
        "total": total,
        "active": active,
        "active_share": active / total,
        "parts": parts,
        "layers": [{"layer": index, **layers[index]} for index in sorted(layers)],
    }


def add(numbers: dict[str, int], total: int, active: int) -> None:
    """Add to a pair of sums."""
    numbers["total"] += total
    numbers["active"] += active


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to, by the names of the modules that hold it."""
    modules = name.split(".")[:-1]
    words = " ".join(modules)
    if "shared_expert" in words and "shared_experts" not in modules[1:2]:
        return "mlp"  # of every token; a table that PEER layers share stands beside the layers
    if re.search(r"(^| )(shared_)?experts( |$)", words):
        return "experts"
    if re.search(r"query_proj|query_norm|(^| )keys( |$)|router|(^| )gate( |$)", words):
        return "router"
    if re.search(r"attn|attention", words) and "norm" not in modules[-1]:
        return "attention"
    if re.search(r"attn|attention", " ".join(modules[:-1])):
        return "attention"
    if re.search(r"norm|(^| )ln_", modules[-1] if modules else ""):
        return "norm"
    if re.search(r"mlp|feed_forward|ffn", words):
        return "mlp"
    return "embedding" if re.search(r"embed|(^| )w[tp]e( |$)", words) else "other"


def share_of_experts(config: Any) -> float:
    """Return which share of the experts a token takes, at most: PEER heads may choose the same one."""
    if getattr(config, "model_type", "") == "peer_mla":
        peer = config.peer_config
        return float(min(1.0, peer["num_heads"] * peer["num_experts_per_tok"] / peer["num_experts"]))
    experts = [getattr(config, n, None) for n in ("num_local_experts", "n_routed_experts", "num_experts")]
    count = next((n for n in experts if isinstance(n, int) and n), None)
    taken = getattr(config, "num_experts_per_tok", None)
    return 1.0 if count is None or not isinstance(taken, int) else min(1.0, taken / count)


def draw(found: dict[str, Any]) -> bytes:
    """Return a PNG of the parts."""
    from tokenkit.evaluation.bars import draw_bars

    unit = 1e9 if found["total"] >= 1e9 else 1e6
    parts = found["parts"]
    series = {
        key: [numbers[key] / unit for numbers in parts.values()] for key in ("total", "active")
    }  # fmt: skip
    return draw_bars(list(parts), series, f"parameters, {'billions' if unit == 1e9 else 'millions'}")


def table(found: dict[str, Any]) -> str:
    """Return what the command prints."""
    lines = [f"{'part':12s}{'total':>18s}{'active per token':>18s}"]
    lines += [f"{part:12s}{n['total']:18,d}{n['active']:18,d}" for part, n in found["parts"].items()]
    lines.append(f"{'all':12s}{found['total']:18,d}{found['active']:18,d}")
    lines.append(f"a token meets {found['active_share']:.2%} of the parameters")
    return "\n".join(lines)
