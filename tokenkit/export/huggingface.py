"""A trained student as a Hugging Face folder: weights, tokenizer, template, generation config, card.

The folder is written beside its final name, loaded back with the Auto classes, compared with the student
(logits, ids of a text) and only then renamed. `rehearse` tries before the first step what would be refused
after the last one: all but the weights.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenkit.disk import check_vacant
from tokenkit.errors import DataError, ExportError
from tokenkit.export.adapters import with_adapters
from tokenkit.export.card import CardFacts, model_card
from tokenkit.export.expanded import point_auto_classes, with_expansion
from tokenkit.export.tokenizer_folder import padding_id, sample_ids, write_tokenizer
from tokenkit.export.verification import verify
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.check import HeadForm, positions_from_padding
from tokenkit.models.expansion import InputExpansion
from tokenkit.models.peer_mla.deepseek import as_plain
from tokenkit.models.reading import has_own_code, model_from_config, quiet_off_terminal
from tokenkit.run.folder import staging_folder
from tokenkit.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
"""Settings of a generation that do not name ids of the old vocabulary: they are kept."""
EXPANSION = "expansion."
"""Begins the names of an expansion's rows in a state dict, here and in the exported weights."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What is written, and where."""

    folder: Path
    dtype: torch.dtype = torch.float32
    facts: CardFacts = field(default_factory=CardFacts)
    """What the model card says."""
    is_consumed: bool = False
    """Write the student itself, which keeps neither its memory nor its values: at no time are there two
    models. It must have `dtype` and no adapters, and
    `state` must be None."""
    is_verified: bool = False
    """Load the folder in a fresh process too, see `verify`."""
    max_shard_size: str = "5GB"
    """Of one file of weights."""


def rehearse(student: CausalLM, tokenizer: Tokenizer) -> None:
    """Write what a folder holds beside weights, read it back, and see that the weights would fit.

    Args:
        student: with the rows that it ends with, without adapters.
        tokenizer: the tokenizer that it ends with.

    Raises:
        DataError: what cannot be exported, and why.
    """
    _check_padding(student, tokenizer)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            brings_code = has_own_code(student.causal_lm)
            _check_shapes(student, tokenizer, folder, brings_code=brings_code)
            write_tokenizer(folder, tokenizer, has_own_class=brings_code)
    except (ExportError, ValueError) as error:
        reason = str(error).replace(f"{name}: ", "")
        raise DataError(
            f"the model cannot be exported with tokenizer {tokenizer.spec}: {reason}; nothing was trained"
        ) from error


def _check_shapes(student: CausalLM, tokenizer: Tokenizer, folder: Path, *, brings_code: bool) -> None:
    """Compare the student's tensors with those of a model that its configuration makes."""
    from transformers import AutoConfig

    own = student.causal_lm
    if brings_code and student.expansion is not None:
        raise ExportError("expand_input_ids needs a model of transformers' own, not one that brings its code")
    with torch.device("meta"):
        model = model_from_config(own, copy.deepcopy(student.config))
    set_generation(model, student, tokenizer)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = (type(student.config) if brings_code else AutoConfig).from_pretrained(folder)
    with torch.device("meta"):
        model = model_from_config(own, config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in own.state_dict().items()}
    if wrong := sorted(name for name in wanted | there if wanted.get(name) != there.get(name)):
        raise ExportError(
            f"its configuration, written and read, makes {wrong[0]} {wanted.get(wrong[0], 'absent')}, and "
            f"the model's is {there.get(wrong[0], 'absent')}"
        )


def _check_padding(student: CausalLM, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that gives the id of padding to text, where positions depend on that id."""
    pad = getattr(student.config, "pad_token_id", None)
    rows = student.embedding.weight.shape[0]
    if positions_from_padding(student) and not pad < rows:
        raise DataError(
            f"the model's positions depend on its pad_token_id, {pad}, and it would have {rows} rows: no "
            "smaller vocabulary can be given to it"
        )
    if student.form.reads_padding and tokenizer.pad_id != pad:
        raise DataError(
            f"the model computes something else at its pad_token_id, {pad}, and in tokenizer "
            f"{tokenizer.spec} padding is {tokenizer.pad_id}: take a tokenizer that pads with {pad}"
        )


def export_huggingface(
    student: CausalLM, state: Mapping[str, Tensor] | None, tokenizer: Tokenizer, request: ExportRequest
) -> Path:
    """Write `student` so that `AutoModelForCausalLM` and `AutoTokenizer` load it.

    Args:
        student: the model; its adapters, if any, are merged in a copy.
        state: full state dict of `student.model` gathered from all ranks, and that of its expansion with
            names that begin with EXPANSION; None: the student's own.
        tokenizer: the tokenizer that it ends with.
        request: see `ExportRequest`.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ExportError: loaded back, the folder gives other logits or other ids.
    """
    folder = request.folder
    check_vacant(folder, flag="export_to")
    weights, rows_WD = _parts_of_state(student, state)
    model = _own_model(student, weights, tokenizer, request)
    del weights  # they would keep the memory of a model that is consumed
    quiet_padding(model, tokenizer.vocab_size)
    set_generation(model, student, tokenizer)

    quiet_off_terminal()
    with staging_folder(folder) as staging:
        expansion = None
        if student.expansion is not None and rows_WD is not None:
            expansion = student.expansion.with_rows(model.get_input_embeddings(), rows_WD.to(request.dtype))
        written = model if expansion is None else with_expansion(model, expansion, staging)
        written.save_pretrained(staging, safe_serialization=True, max_shard_size=request.max_shard_size)
        if expansion is not None:
            point_auto_classes(staging)
        needs_code = expansion is not None or has_own_code(model)
        write_tokenizer(staging, tokenizer, has_own_class=needs_code)
        card = model_card(request.facts, needs_code=needs_code)
        (staging / "README.md").write_text(card, encoding="utf-8")
        if request.is_consumed:
            _check_consumed(staging, model, tokenizer, trusts_code=needs_code)
        else:
            _check(staging, (model, expansion), tokenizer, student.form, trusts_code=needs_code)
            if request.is_verified:
                verify(staging.absolute(), written.float(), tokenizer, trusts_code=needs_code)
    return folder


def _own_model(
    student: CausalLM, weights: Mapping[str, Tensor], tokenizer: Tokenizer, request: ExportRequest
) -> PreTrainedModel:
    """Return the model that is written, in its dtype."""
    if not request.is_consumed:
        return as_plain(merged_model(student, weights, tokenizer).to(request.dtype))
    assert student.expansion is None
    assert not hasattr(student.model, "peft_config")
    # no cast: that of the whole module would round rotary frequencies, which a loaded model has in float32
    assert student.causal_lm.dtype == request.dtype
    student.config.dtype = request.dtype
    return student.causal_lm.eval()


def _parts_of_state(
    student: CausalLM, state: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the state of `student.model`, and the rows of its expansion."""
    if state is None:
        state = dict(student.model.state_dict())
        if student.expansion is not None:
            state[f"{EXPANSION}old.weight"] = student.expansion.old.weight.detach()
    weights = dict(state)
    return weights, weights.pop(f"{EXPANSION}old.weight", None)


def merged_model(student: CausalLM, state: Mapping[str, Tensor], tokenizer: Tokenizer) -> PreTrainedModel:
    """Return a plain Hugging Face model with the student's weights in float32, adapters merged.

    Raises:
        ExportError: the state does not fit, or the merged model gives other log-probabilities.
    """
    # merged in 16 bits, adapters would be rounded twice
    model = model_from_config(student.causal_lm, copy.deepcopy(student.config), dtype=torch.float32)
    if not hasattr(student.model, "peft_config"):
        _load(model, state)
        return model.eval()
    (peft_config,) = student.model.peft_config.values()
    wrapped = with_adapters(model, peft_config)
    _load(wrapped, state)
    apart_T = _sample_logp(wrapped, tokenizer, student.form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, that it unties what it copied; it is tied again here
        merged = wrapped.merge_and_unload()
    if getattr(student.config, "tie_word_embeddings", False):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    _check_agreement(
        _sample_logp(merged, tokenizer, student.form), apart_T, "the model, its adapters merged,"
    )
    return merged


@torch.no_grad()
def quiet_padding(model: PreTrainedModel, vocab_size: int) -> None:
    """Give the rows of the head behind the last token their final values: the mean of all others.

    In training they take no probability, so nothing holds them down. Whoever loads the folder computes a
    softmax over all rows; a row that is the mean is never the largest there, and takes less than an
    average token (Jensen's inequality).
    """
    head = model.get_output_embeddings()
    for parameter in (head.weight, getattr(head, "bias", None)):
        if parameter is not None and len(parameter) > vocab_size:
            parameter[vocab_size:] = parameter[:vocab_size].mean(0)


def _load(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load strictly, but for the second name of a tied head, which a gathered state leaves out."""
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    own = dict(model.named_parameters(remove_duplicate=False))
    present = {id(parameter) for name, parameter in own.items() if name in state}
    lost = [name for name in missing if name in own and id(own[name]) not in present]
    if lost or unexpected:
        raise ExportError(
            f"the student's state does not fit its configuration: missing {lost}, {unexpected=}"
        )


def set_generation(model: PreTrainedModel, student: CausalLM, tokenizer: Tokenizer) -> None:
    """Sample as the student did, and stop where the new tokenizer says."""
    model.generation_config = saveable_generation(student.causal_lm.generation_config)
    pad_id = padding_id(tokenizer)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad_id}
    for key, value in ids.items():
        setattr(model.generation_config, key, value)
        if key != "pad_token_id" or not positions_from_padding(student):
            setattr(model.config, key, None if key == "pad_token_id" and _empties_padding(model) else value)
    ends = {tokenizer.eos_id, tokenizer.special_ids.get("end_turn")} - {None}
    if len(ends) > 1:  # an answer ends with its turn, not with the document
        model.generation_config.eos_token_id = sorted(ends)


def _empties_padding(model: PreTrainedModel) -> bool:
    """Whether loading sets the row of the padding id to 0 (Youtu), which may be that of EOS here."""
    probe = torch.nn.Embedding(2, 1, padding_idx=1)
    torch.nn.init.ones_(probe.weight)
    probe.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # as what a file holds
    with suppress(AttributeError):  # xLSTM's looks for the module's place in the model
        model._init_weights(probe)
    return not bool(probe.weight.all())


def saveable_generation(own: Any) -> Any:
    """Return the sampling that a model came with, in a form that transformers agrees to write.

    Some models (Llama 2) are published with settings that contradict each other: a temperature beside
    `do_sample: false`. What they generate is kept, so what is without effect there is left out.
    """
    from transformers import GenerationConfig

    values = {name: value for name in SAMPLING if (value := getattr(own, name, None)) is not None}
    if values.get("do_sample") is not True:
        values = {name: values[name] for name in ("repetition_penalty",) if name in values}
    return GenerationConfig(**values)


@torch.no_grad()
def _check(
    folder: Path,
    written: tuple[PreTrainedModel, InputExpansion | None],
    tokenizer: Tokenizer,
    form: HeadForm,
    *,
    trusts_code: bool,
) -> None:
    from transformers import AutoModelForCausalLM

    model, expansion = written
    # its code was written here, a moment ago: ours, or the student's, which has run already
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=trusts_code
    ).eval()
    ids_BT = sample_batch(loaded, tokenizer)
    logits_TV = loaded(input_ids=ids_BT, use_cache=False).logits[0, :, : tokenizer.vocab_size]
    got_T = logits_TV[:-1].log_softmax(-1).gather(-1, ids_BT[0, 1:, None])[:, 0]
    whole = None if expansion is None else expansion.float()
    expected_T = _sample_logp(model.float(), tokenizer, form, whole)
    _check_agreement(got_T, expected_T, f"{folder}: the model, loaded back,")
    if expansion is None:  # of every token, also those that the sample does not hold
        own_TV = model(input_ids=ids_BT, use_cache=False).logits[0, :, : tokenizer.vocab_size]
        _check_agreement(logits_TV.flatten(), own_TV.flatten(), f"{folder}: the model, loaded back,")


@torch.no_grad()
def _check_consumed(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, *, trusts_code: bool) -> None:
    """Compare as `_check` does, in the model's dtype; its memory is free before it is loaded again."""
    from transformers import AutoModelForCausalLM

    ids_BT = sample_batch(model, tokenizer)
    expected_TV, dtype = model(input_ids=ids_BT, use_cache=False).logits[0].float(), model.dtype
    model.to("meta")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, dtype=dtype, trust_remote_code=trusts_code
    ).eval()
    got_TV = loaded(input_ids=ids_BT, use_cache=False).logits[0].float()
    _check_agreement(got_TV.flatten(), expected_TV.flatten(), f"{folder}: the model, loaded back,")


def sample_batch(model: PreTrainedModel, tokenizer: Tokenizer) -> Tensor:
    """Return the ids of a text in several scripts, int64 [1, T], no more than the model has positions."""
    ids = sample_ids(tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None) or len(ids)
    return torch.from_numpy(ids[:limit]).long()[None]


@torch.no_grad()
def _sample_logp(
    model: PreTrainedModel, tokenizer: Tokenizer, form: HeadForm, expansion: InputExpansion | None = None
) -> Tensor:
    """Return the log-probability of each token of the sample, as the losses compute it."""
    ids_BT = sample_batch(model, tokenizer)
    causal_lm = CausalLM(model, tokenizer.vocab_size)
    causal_lm.form, causal_lm.expansion = form, expansion
    states = causal_lm(ids_BT)
    return linear_logprob(states.hidden_BTD[0, :-1], states.head, ids_BT[0, 1:]).logp_N


def _check_agreement(got_T: Tensor, expected_T: Tensor, what: str) -> None:
    error = (got_T - expected_T).abs().max().item() if len(got_T) else 0.0
    if not error <= 1e-3 * max(1.0, expected_T.abs().max().item()):
        raise ExportError(f"{what} is off by {error:.2e} nats")
