"""A model with input-id expansion as a Hugging Face class of its own, which comes with the folder.

The folder holds `modeling_byte_expansion.py`, which imports torch and transformers alone, and its
`config.json` has a `model_type` that transformers does not know: without `trust_remote_code=True` loading
stops, where a plain architecture would be loaded without the expansion, and be wrong.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokenkit.models.expansion import TABLES, InputExpansion
from tokenkit.models.reading import EXPANDED
from tokenkit.tokenization.expansion import expand, index_of_pairs, names_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULE = "modeling_byte_expansion"
MODELING = '''"""{model} over bytes: a byte is embedded together with the longest old token that ends there.

    embedded_t = byte_embedding(id_t) + old_embedding(expanded_t)

Ids below 256 are bytes. All others (special tokens, padding) have no expansion and end what stands
before them. With a cache, `generate` hands over the expansion of the new bytes as `expanded_ids`.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import {config}, {model}

NONE = -1
BYTES = 256


class ByteExpansionConfig({config}):
    """The configuration of {model}, and the sizes of the expansion."""

    model_type = "{model_type}"
    expansion_rows: int = 1
    expansion_blocks: int = 1
    expansion_edges: int = 1
    expansion_max_bytes: int = 1


{expand}

class ByteExpansion(nn.Module):
    """The old embedding, and the trie of reversed old tokens."""

    def __init__(self, embedding, config):
        super().__init__()
        self.old = copy.deepcopy(embedding)
        weight = embedding.weight
        shape = (config.expansion_rows, weight.shape[1])
        self.old.weight = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        self.old.num_embeddings, self.old.padding_idx = config.expansion_rows, None
        blocks, edges = config.expansion_blocks, config.expansion_edges
        for name, length in (("block_key_P", blocks), ("edge_key_E", edges), ("token_E", edges)):
            self.register_buffer(name, torch.zeros(length, dtype=torch.int64))

    def forward(self, expanded_ids):
        added = self.old(expanded_ids.clamp(min=0))
        return torch.where((expanded_ids >= 0)[..., None], added, 0)


class ByteExpansionForCausalLM({model}):
    """{model} with the expansion added to its input embeddings."""

    config_class = ByteExpansionConfig

    def __init__(self, config):
        super().__init__(config)
        self.expansion = ByteExpansion(self.get_input_embeddings(), config)
        self.post_init()

    def expand(self, input_ids, attention_mask=None):
        """Return the old token of each byte, -1 where there is none; masked ids are no bytes."""
        if attention_mask is not None and attention_mask.ndim == 2:
            mask = attention_mask[:, -input_ids.shape[1] :].to(input_ids.device, torch.bool)
            input_ids = torch.where(mask, input_ids, NONE)
        tables = self.expansion.block_key_P, self.expansion.edge_key_E, self.expansion.token_E
        return expand(input_ids, *tables, self.config.expansion_max_bytes)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        expanded_ids=None,
        **kwargs,
    ):
        """As {model}; `expanded_ids` is computed from `input_ids` where these are the whole text."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            if expanded_ids is None:
                if past_key_values is not None and past_key_values.get_seq_length() > 0:
                    raise ValueError(
                        "expected expanded_ids beside a cache: the old tokens of these bytes begin in text "
                        "that is not in input_ids; call expand(all ids)[:, -new:], or use generate()"
                    )
                expanded_ids = self.expand(input_ids, attention_mask)
            inputs_embeds = self.get_input_embeddings()(input_ids) + self.expansion(expanded_ids)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Add the expansion of the ids that are run now, from as far back as a token may begin."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if inputs.get("input_ids") is not None:
            length = inputs["input_ids"].shape[1]
            window = input_ids[:, -(length + self.config.expansion_max_bytes - 1) :]
            inputs["expanded_ids"] = self.expand(window, kwargs.get("attention_mask"))[:, -length:]
        return inputs
'''


def modeling_source(model: PreTrainedModel) -> str:
    """Return the code of the class that adds the expansion to `model`'s.

    Raises:
        ValueError: the model's class is not one of transformers' own.
    """
    import transformers

    names = {"model": type(model).__name__, "config": type(model.config).__name__}
    for name in names.values():
        if not hasattr(transformers, name):
            raise ValueError(
                f"a model with expand_input_ids is exported as a subclass of its own class, and {name} is "
                "not part of transformers: train without expand_input_ids"
            )
    functions = (names_at, index_of_pairs, expand)
    source = "\n\n".join(inspect.getsource(function) for function in functions)
    model_type = f"{EXPANDED}{model.config.model_type}"
    return MODELING.format(**names, model_type=model_type, expand=source)


def with_expansion(model: PreTrainedModel, expansion: InputExpansion, folder: Path) -> PreTrainedModel:
    """Return `model` as the class that expands, its code written to `folder`.

    Args:
        model: plain, its weights are shared with the result.
        expansion: whole, not sharded.
        folder: gets `modeling_byte_expansion.py`.
    """
    path = folder / f"{MODULE}.py"
    path.write_text(modeling_source(model), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{MODULE}_{model.config.model_type}", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    config = module.ByteExpansionConfig(**values)
    config.expansion_rows = len(expansion.old.weight)
    config.expansion_blocks = len(expansion.block_key_P)
    config.expansion_edges = len(expansion.token_E)
    config.expansion_max_bytes = expansion.max_bytes
    result: PreTrainedModel = module.ByteExpansionForCausalLM(config).to(model.dtype)
    result.load_state_dict({**model.state_dict(), **_tensors(expansion)})
    result.generation_config = model.generation_config
    return result.eval()


def _tensors(expansion: InputExpansion) -> Mapping[str, Tensor]:
    tables = {f"expansion.{name}": getattr(expansion, name) for name in TABLES}
    return {"expansion.old.weight": expansion.old.weight.detach(), **tables}


def point_auto_classes(folder: Path) -> None:
    """Name the folder's own classes in its config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": f"{MODULE}.ByteExpansionConfig",
        "AutoModelForCausalLM": f"{MODULE}.ByteExpansionForCausalLM",
    }
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
