"""Whether hidden states and head, as the losses multiply them, are the logits that the model itself gives.

    model(ids).logits  =  softcap(scale (transform(body(embedding(ids))) @ W.T + b))

What a configuration says of scale and softcap is a guess: architectures read one name in two ways, or not at
all. So each model is compared with itself once when it is loaded, in two forwards of 36 tokens: where the
guess is off, scale and transform are measured, and where nothing fits the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenkit.structs import Head, HiddenStates

if TYPE_CHECKING:
    from tokenkit.models.causal_lm import CausalLM

TOKENS = 12  # of each of the three rows
ROWS = 2**14  # of a head, in float32 at a time


@dataclass(frozen=True, kw_only=True)
class HeadForm:
    """How the logits follow from the body's last hidden states, beside weight and bias."""

    softcap: float | None = None
    scale: float = 1.0
    transform: str | None = None
    """Name of the module of the model that stands between body and head (ModernBERT's decoder)."""
    embedding_scale: float = 1.0
    """What the body multiplies the rows of ids with, but not embeddings that it is given (Falcon-H1)."""
    reads_padding: bool = False
    """Given ids, the model computes something else where the id is that of padding."""


@dataclass
class Seen:
    """What one forward of the whole model passed on."""

    head_input: Tensor | None = None
    between: dict[str, Tensor] = field(default_factory=dict)
    """What the modules outside of body and head gave, by name."""


def guess_form(config: Any) -> HeadForm:
    """Return what a configuration says; `settle` finds out whether it is so."""
    kind = getattr(config, "model_type", "")
    scale = 1.0
    if kind != "mpt":  # it has the field, and its code reads it nowhere
        scale *= getattr(config, "logit_scale", None) or 1.0
    if factor := getattr(
        config, "logits_scaling", None
    ):  # Granite divides by what HyperCLOVA multiplies with
        scale *= factor if kind == "hyperclovax" else 1 / factor
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    embedding_scale = getattr(config, "embedding_multiplier", None) if kind == "falcon_h1" else None
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadForm(softcap=softcap, scale=scale, embedding_scale=embedding_scale or 1.0)


@torch.no_grad()
def settle(model: CausalLM, name: str) -> None:
    """Compare a model with itself and set `model.form`, once, where it was loaded.

    Args:
        model: in evaluation mode, whole.
        name: of what was loaded, for the error.

    Raises:
        ValueError: it cannot be run from embeddings, gives no finite states, sees later tokens, or no form
            gives its logits.
    """
    kind = type(model.causal_lm).__name__
    ids_BT = _sample(model)
    with _plain_attention(model.causal_lm):
        try:
            logits_BTV, seen = _own_logits(model, ids_BT)
            states = model.before_transform(ids_BT)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{name}: {kind} cannot be run here on embeddings as a language model is ({reason[:200]}): "
                "this architecture is not supported"
            ) from error
        tolerance, hidden_BTD = _tolerance(model), states.hidden_BTD
        _check_hidden(f"{name}: ", kind, hidden_BTD, tolerance)
        count = min(model.vocab_size, logits_BTV.shape[-1])
        theirs_RV = logits_BTV[:2, :, :count].flatten(0, 1).float()
        guess, least = model.form, math.inf
        for embedding_scale in _embedding_scales(model):
            if embedding_scale != model.form.embedding_scale:
                model.form = replace(guess, embedding_scale=embedding_scale)
                hidden_BTD = model.before_transform(ids_BT).hidden_BTD
            for form in _forms(model, replace(states, hidden_BTD=hidden_BTD), seen, theirs_RV):
                rms, most = _difference(_logits(model, states.head, form, hidden_BTD[:2], count), theirs_RV)
                if rms <= tolerance and most <= 8 * tolerance:
                    padded_RV = _logits(model, states.head, form, hidden_BTD[2:], count)
                    rms, _ = _difference(padded_RV, logits_BTV[2, :, :count].float())
                    model.form = replace(form, reads_padding=rms > tolerance)
                    return
                least = min(least, rms)
    raise ValueError(
        f"{name}: the logits of {kind} are not those of its hidden states and head: they differ by "
        f"{least:.2g} of their own size (allowed {tolerance:.0e}), so every loss would be of another model; "
        "this architecture is not supported"
    )


@torch.no_grad()
def check_packing(model: CausalLM, rows: int, field: str = "pack") -> None:
    """Compare a document behind another one in its row with the same document alone.

    transformers builds the mask from positions: a document is where they rise by one. With that, eager, sdpa
    and flex attention take any number of rows; its flash attention looks at positions only in a batch of one
    row. What reads its neighbours otherwise than by attention (convolutions, recurrent states) sees across.

    Args:
        model: in evaluation mode, whole.
        rows: of a micro-batch.
        field: of the configuration, that asked for it.

    Raises:
        ValueError: they differ, or the attention keeps documents apart in single rows alone.
    """
    chosen = getattr(model.causal_lm.config, "_attn_implementation", None) or ""
    if "flash" in chosen and rows > 1:
        more = ", or raise gradient_accumulation_steps" if field == "pack" else f", or {field} to false"
        raise ValueError(
            f"{field}: {chosen} keeps documents apart only in micro-batches of one row, and these have "
            f"{rows}: set attn_implementation to sdpa or flex_attention{more}"
        )
    ids_BT = _sample(model)[:2]
    T = ids_BT.shape[1]
    packed_BT = ids_BT.reshape(1, -1).repeat(2, 1)  # a mask of one row might be shared by all
    position_BT = torch.arange(T, device=ids_BT.device).repeat(2)[None].repeat(2, 1)
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    lowest = min(types, key=lambda dtype: torch.finfo(dtype).bits)  # before it is placed, a body may be of 16
    mixed = torch.autocast(ids_BT.device.type, lowest, enabled=len(types) > 1)  # bits, what moves of 32
    with _plain_attention(model.causal_lm), mixed:
        try:
            together_TD = model(packed_BT, position_BT=position_BT).hidden_BTD[0, T:].float()
        except TypeError as error:
            kind = type(model.causal_lm).__name__
            raise ValueError(f"{field}: {kind} takes no positions ({error}): set {field} to false") from error
        alone_TD = model(ids_BT).hidden_BTD[1].float()
    off = (together_TD - alone_TD).abs().max() / alone_TD.abs().max().clamp(min=1e-30)
    if not off <= 16 * _tolerance(model):
        raise ValueError(
            f"{field}: documents of one row see each other in {type(model.causal_lm).__name__}: what it "
            f"computes for one behind another differs by {off:.2g} of its size; set {field} to false"
        )


def _sample(model: CausalLM) -> Tensor:
    """Return three rows of ids: over the whole vocabulary; with another second half; with the padding id."""
    pad = getattr(model.config, "pad_token_id", None)
    spread_T = torch.linspace(0, model.vocab_size - 1, TOKENS).round().long()
    if isinstance(pad, int):
        spread_T = torch.where(spread_T == pad, (pad + 1) % model.vocab_size, spread_T)
    ids_BT = spread_T[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))].repeat(3, 1)
    ids_BT[1, TOKENS // 2 :] = ids_BT[1, : TOKENS // 2].flip(0)
    if isinstance(pad, int) and 0 <= pad < model.vocab_size:
        ids_BT[2, 2::3] = pad
    return ids_BT.to(model.embedding.weight.device)


@contextmanager
def _plain_attention(causal_lm: Any) -> Iterator[None]:
    """Compute attention in the plain way: kernels for GPUs cannot run where a model is loaded."""
    chosen = getattr(causal_lm.config, "_attn_implementation", None)
    if chosen in (None, "eager", "sdpa"):
        yield
        return
    causal_lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(chosen)


def _own_logits(model: CausalLM, ids_BT: Tensor) -> tuple[Tensor, Seen]:
    """Run the whole model on ids, as its users will; return logits and what passed between its parts."""
    seen = Seen()
    output, inside = model.output, set(model.body.modules())

    def keep_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.head_input = args[0]

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                seen.between[name] = result

        return hook

    handles = [output.register_forward_pre_hook(keep_input)]
    for name, module in model.causal_lm.named_modules():
        if name and module not in inside and module is not output:
            handles.append(module.register_forward_hook(keep(name)))
    try:
        logits_BTV: Tensor = model.causal_lm(input_ids=ids_BT, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits_BTV, seen


def _embedding_scales(model: CausalLM) -> Iterator[float]:
    """Yield what a body may multiply the rows of ids with: the guess, then what its configuration names."""
    config = model.config
    values = [model.form.embedding_scale, 1.0, math.sqrt(model.embedding.weight.shape[1])]
    values += [
        getattr(config, name, None) or 1.0 for name in ("embedding_multiplier", "scale_emb", "embed_scale")
    ]
    yield from dict.fromkeys(float(value) for value in values)


def _tolerance(model: CausalLM) -> float:
    """Return the relative difference that the coarsest type in the model explains."""
    return max([2e-5, *(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())])


def _check_hidden(who: str, kind: str, hidden_BTD: Tensor, tolerance: float) -> None:
    if not hidden_BTD.isfinite().all():
        raise ValueError(
            f"{who}the hidden states of {kind} hold NaN or infinity: its weights are damaged, or too large "
            "for their type"
        )
    if not _is_causal(hidden_BTD, tolerance):
        raise ValueError(
            f"{who}what {kind} computes for a token depends on the tokens after it: this is an encoder "
            "(is_decoder is not set), not a causal language model"
        )


def _is_causal(hidden_BTD: Tensor, tolerance: float) -> bool:
    """Whether the first half of two rows, where they agree, is the same under different second halves.

    The median over places: rounding may send a token of a mixture of experts to another expert.
    """
    one_TD, two_TD = hidden_BTD[:2, : TOKENS // 2].float()
    off_T = (one_TD - two_TD).abs().amax(-1) / one_TD.abs().amax(-1).clamp(min=1e-30)
    return off_T.median().item() <= 16 * tolerance


def _forms(model: CausalLM, states: HiddenStates, seen: Seen, theirs_RV: Tensor) -> Iterator[HeadForm]:
    """Yield the guess, then what was measured: scale by least squares, transform by its output."""
    guess = model.form
    yield guess
    transforms: list[str | None] = [None]
    if seen.head_input is not None:
        for name, out in seen.between.items():
            if out.shape == seen.head_input.shape and torch.equal(out, seen.head_input):
                transforms.append(name)
    for transform in transforms:
        plain = HeadForm(transform=transform, embedding_scale=guess.embedding_scale)
        ours_RV = _logits(model, states.head, plain, states.hidden_BTD[:2], theirs_RV.shape[-1]).double()
        for softcap in dict.fromkeys((guess.softcap, *_softcaps(model), None)):
            wanted_RV = theirs_RV.double()
            if softcap is not None:
                wanted_RV = softcap * (wanted_RV / softcap).clamp(-1 + 1e-6, 1 - 1e-6).atanh()
            scale = ((wanted_RV * ours_RV).sum() / ours_RV.square().sum().clamp(min=1e-30)).item()
            yield replace(plain, softcap=softcap, scale=_written(scale, model))


def _softcaps(model: CausalLM) -> list[float]:
    """Return what a configuration names as a cap of something (RecurrentGemma, xLSTM: of logits)."""
    values = [value for name, value in model.config.to_dict().items() if "cap" in name]
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]


def _written(scale: float, model: CausalLM) -> float:
    """Return the number of the configuration, or one over it, that a measured scale stands for."""
    numbers = [
        float(value)
        for value in model.config.to_dict().values()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    ]
    near = [v for number in numbers for v in (number, 1 / number) if math.isclose(v, scale, rel_tol=2e-3)]
    return min([1.0, *near], key=lambda v: abs(v - scale)) if near or abs(scale - 1) < 2e-3 else scale


def _logits(model: CausalLM, head: Head, form: HeadForm, hidden_BTD: Tensor, count: int) -> Tensor:
    """Return the logits of the first `count` ids under a form, float32 [R, count]."""
    if form.transform is not None:
        hidden_BTD = model.causal_lm.get_submodule(form.transform)(hidden_BTD)
    hidden_RD = hidden_BTD.flatten(0, 1).float()
    weight_VD, bias_V = head.weight_VD[:count], head.bias_V
    if hidden_RD.shape[-1] != weight_VD.shape[-1]:
        return torch.full((len(hidden_RD), count), math.nan)
    logits_RV = torch.cat([hidden_RD @ part.float().T for part in weight_VD.split(ROWS)], -1)
    if bias_V is not None:
        logits_RV += bias_V[:count].float()
    logits_RV *= form.scale
    return logits_RV if form.softcap is None else form.softcap * (logits_RV / form.softcap).tanh()


def _difference(ours_RV: Tensor, theirs_RV: Tensor) -> tuple[float, float]:
    """Return how far logits are apart, relative to their size: by root mean square, and at most."""
    size = theirs_RV.square().mean().sqrt().clamp(min=1e-30)
    off_RV = (ours_RV - theirs_RV).abs()
    both = (off_RV.square().mean().sqrt() / size).item(), (off_RV / (theirs_RV.abs() + size)).max().item()
    return both if all(math.isfinite(value) for value in both) else (math.inf, math.inf)


def positions_from_padding(model: CausalLM) -> bool:
    """Whether positions depend on the id of padding (XGLM, RoBERTa): a part that is no embedding has it."""
    pad = getattr(model.config, "pad_token_id", None)
    parts = (m for m in model.body.modules() if not hasattr(m, "config") and not isinstance(m, nn.Embedding))
    return pad is not None and any(getattr(part, "padding_idx", None) == pad for part in parts)
