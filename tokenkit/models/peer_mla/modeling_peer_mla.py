"""A PEER + MLA language model in transformers' form.

    x = x + attention(norm(x));  x = x + mlp(norm(x))        mlp: an MLP, or the experts of a PEER layer

Names of parameters are those of DeepSeek-V3, so a model without PEER layers, with RMS norms and gated MLPs,
is one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import LatentAttention, make_norm, turns
from .configuration_peer_mla import PeerMlaConfig
from .experts import ExpertLayer, ExpertTables


class PeerMlaMLP(nn.Module):
    """down(act(up x)) with biases, or down(act(gate x) ⊙ up x) without."""

    def __init__(self, config: PeerMlaConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp == "plain"
        if not bias:
            self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)
        self.act = getattr(nn.functional, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, D]."""
        if hasattr(self, "gate_proj"):
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act(self.up_proj(x)))


class PeerMlaDecoderLayer(GradientCheckpointingLayer):
    """Attention, then an MLP or experts."""

    def __init__(self, config: PeerMlaConfig, layer_idx: int):
        super().__init__()
        self.has_experts = layer_idx in config.layers_of_experts
        self.input_layernorm = make_norm(config.norm, config.hidden_size, config.layer_norm_eps)
        self.self_attn = LatentAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config.norm, config.hidden_size, config.layer_norm_eps)
        self.mlp = ExpertLayer(config) if self.has_experts else PeerMlaMLP(config)

    def forward(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Tensor | None, past_key_values: Any = None,
        shared: ExpertTables | None = None,
    ) -> Tensor:  # fmt: skip
        """Return [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, mask, past_key_values)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed, shared) if self.has_experts else self.mlp(normed))


class PeerMlaPreTrainedModel(PreTrainedModel):
    """What both models below share."""

    config_class = PeerMlaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["PeerMlaDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Scores begin with a spread of about 1, and so do the numbers that experts see."""
        super()._init_weights(module)
        if isinstance(module, ExpertTables):
            for table in (module.down, module.up):
                init.normal_(table, std=table.shape[-1] ** -0.5)
        elif isinstance(module, nn.ParameterList):  # the keys: of its owner transformers asks nothing
            for key in module:
                init.normal_(key, std=key.shape[-1] ** -0.5)


class PeerMlaModel(PeerMlaPreTrainedModel):
    """Embedding and layers."""

    def __init__(self, config: PeerMlaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([PeerMlaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config.norm, config.hidden_size, config.layer_norm_eps)
        shares = config.peer_config["share_experts"] and config.layers_of_experts
        self.shared_experts = ExpertTables(config) if shares else None
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states [B, T, D], and all where asked for; arguments as everywhere."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        mla = self.config.mla_config
        cos_sin = turns(position_ids, mla["qk_rope_head_dim"], mla["rope_theta"])
        states = [x]
        for layer in self.layers:
            x = layer(x, cos_sin, mask, past_key_values=past_key_values, shared=self.shared_experts)
            states.append(x)
        x = states[-1] = self.norm(x)
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if asked else None,
        )


class PeerMlaForCausalLM(PeerMlaPreTrainedModel, GenerationMixin):
    """The model under a head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PeerMlaConfig):
        super().__init__(config)
        self.model = PeerMlaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits of the last `logits_to_keep` places (0: all), and the loss where there are labels."""
        found = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
            use_cache=use_cache, output_hidden_states=kwargs.pop("output_hidden_states", None),
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
        )


AutoModel.register(PeerMlaConfig, PeerMlaModel, exist_ok=True)
AutoModelForCausalLM.register(PeerMlaConfig, PeerMlaForCausalLM, exist_ok=True)
PeerMlaModel.register_for_auto_class("AutoModel")
PeerMlaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
