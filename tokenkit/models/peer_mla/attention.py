"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), whose cache is one latent per token.

    q        = W_UQ norm(W_DQ x), or W_Q x           per head [q_n, q_r]; q_r is turned by its position
    [c, k_r] = W_DKV x,  c = norm(c)                 k_r is turned, and one for all heads; (c, k_r) is cached
    expanded [k_n, v] = W_UKV c                      o = softmax(σ [q_n, q_r] · [k_n, k_r]) v
    absorbed q̃ = q_nᵀ W_UK,  W_UKV = [W_UK, W_UV]    o = W_UV (softmax(σ (q̃ · c + q_r · k_r)) c)

σ = (d_n + d_r)^-½ in both. Expanded is for many tokens at once; absorbed reads nothing but the cache, and is
for one new token. Parameters have the names and shapes of transformers' `DeepseekV3Attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

LATENT_EPS = 1e-6


class WideRMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight, as LayerNorm is under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed x."""
        return super().forward(x.to(self.weight.dtype))


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """Return LayerNorm ("layer"), RMSNorm ("rms") or nothing ("none") over the last dimension."""
    if kind == "none":
        return nn.Identity()
    return nn.LayerNorm(width, eps=eps) if kind == "layer" else WideRMSNorm(width, eps=eps)


def turns(position_ids: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each position's angles, float32 [B, T, width / 2]."""
    place = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32)
    angle = position_ids[..., None].float() * theta ** (-place / width)
    return angle.cos(), angle.sin()


def turn(x: Tensor, cos_sin: tuple[Tensor, Tensor], interleave: bool) -> Tensor:
    """Turn pairs of x [B, heads, T, width] by their positions.

    Pairs are the two halves, or neighbours (`interleave`); results stand in two halves either way.
    """
    cos, sin = (part[:, None] for part in cos_sin)
    one, two = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, -1)
    one, two = one.float(), two.float()
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x.dtype)


class LatentAttention(nn.Module):
    """One layer's attention."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        mla, hidden = config.mla_config, config.hidden_size
        self.heads, self.layer_idx = config.num_attention_heads, layer_idx
        self.nope, self.rope, self.value = (
            mla["qk_nope_head_dim"], mla["qk_rope_head_dim"], mla["v_head_dim"]
        )  # fmt: skip
        self.rank, self.interleave = mla["kv_lora_rank"], mla["rope_interleave"]
        self.scale = (self.nope + self.rope) ** -0.5
        queries = self.heads * (self.nope + self.rope)
        if mla["q_lora_rank"] is None:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, mla["q_lora_rank"], bias=False)
            self.q_a_layernorm = make_norm(mla["latent_norm"], mla["q_lora_rank"], LATENT_EPS)
            self.q_b_proj = nn.Linear(mla["q_lora_rank"], queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = make_norm(mla["latent_norm"], self.rank, LATENT_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)

    def forward(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any = None,
        absorb: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """Return [B, T, D].

        Args:
            x: hidden states [B, T, D].
            cos_sin: of `turns`, for the positions of x.
            mask: bool (true: sees it) or added to the scores, [B or 1, 1, T, all tokens]; None: causal.
            cache: a `transformers.Cache`; gets (latent, turned key) of x.
            absorb: whether to read the cache without expanding it; None: where one token comes.
        """
        B, T = x.shape[:2]
        wide = (
            self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
            if hasattr(self, "q_a_proj")
            else self.q_proj(x)
        )
        query, turned = wide.view(B, T, self.heads, -1).transpose(1, 2).split([self.nope, self.rope], -1)
        latent, key = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], -1)
        latent = self.kv_a_layernorm(latent)[:, None]
        turned, key = turn(turned, cos_sin, self.interleave), turn(key[:, None], cos_sin, self.interleave)
        if cache is not None:
            latent, key = cache.update(latent, key, self.layer_idx)
        if mask is None and 1 < T < latent.shape[2]:
            mask = torch.ones(T, latent.shape[2], dtype=torch.bool, device=x.device).tril(latent.shape[2] - T)
        if absorb is None:
            # a wrapped projection (LoRA) is more than its weight
            absorb = T == 1 and not self.training and type(self.kv_b_proj) is nn.Linear
        attend = self._absorbed if absorb else self._expanded
        return self.o_proj(attend(query, turned, latent, key, mask).transpose(1, 2).reshape(B, T, -1))

    def _expanded(
        self, query: Tensor, turned: Tensor, latent: Tensor, key: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return [B, heads, T, v] with keys and values of every head."""
        B, _, S, _ = latent.shape
        wide = self.kv_b_proj(latent[:, 0]).view(B, S, self.heads, -1).transpose(1, 2)
        keys, values = wide.split([self.nope, self.value], -1)
        keys = torch.cat([keys, key.expand(-1, self.heads, -1, -1)], -1)
        return scaled_dot_product_attention(
            torch.cat([query, turned], -1), keys, values, attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1, scale=self.scale,
        )  # fmt: skip

    def _absorbed(
        self, query: Tensor, turned: Tensor, latent: Tensor, key: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return [B, heads, T, v] with the latents as the one key and value of all heads."""
        B, H, T, _ = query.shape
        weight = self.kv_b_proj.weight.view(H, self.nope + self.value, self.rank)
        to_key, to_value = weight.split([self.nope, self.value], 1)
        wide = torch.cat([torch.einsum("bhtn,hnr->bhtr", query, to_key), turned], -1)
        if mask is None and T > 1:
            mask = torch.ones(T, latent.shape[2], dtype=torch.bool, device=query.device).tril()
        if mask is not None and T > 1:
            mask = mask.repeat(*[1] * (mask.ndim - 2), H, 1)
        # the heads stand where queries of one head would: nothing is copied for each of them
        found = scaled_dot_product_attention(
            wide.reshape(B, 1, H * T, -1),
            torch.cat([latent, key], -1),
            latent,
            attn_mask=mask,
            scale=self.scale,
        )
        return torch.einsum("bhtr,hvr->bhtv", found.view(B, H, T, self.rank), to_value)
