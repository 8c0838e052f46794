"""What users ask for of a plain Hugging Face model, put together of several rooms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenkit.data.collate import AlignedCollator
from tokenkit.embeddings import transfer
from tokenkit.evaluation.bits_per_byte import HeldoutBatch, heldout_batches, summed_bits
from tokenkit.export.card import CardFacts
from tokenkit.export.huggingface import ExportRequest
from tokenkit.export.huggingface import export_huggingface as write_folder
from tokenkit.integrations.forward import hidden_states, unwrapped
from tokenkit.losses.base import make_loss as make
from tokenkit.losses.score import token_nats
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.check import settle
from tokenkit.parallel import World
from tokenkit.tokenization.chat.documents import Document, document_from_row
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.training.pair import Pair

if TYPE_CHECKING:
    from tokenkit.embeddings.transfer import InitOptions, OutputEmbeddings
    from tokenkit.losses.base import Loss


def transfer_vocabulary(
    model: nn.Module,
    old_tokenizer: Any,
    new_tokenizer: Any,
    *,
    method: str = "fvt",
    pad_to_multiple_of: int = 1,
    output_embeddings: OutputEmbeddings = "preserve",
    options: InitOptions | None = None,
) -> dict[str, int]:
    """Give a model embeddings for another tokenizer, in place, without training.

    Fast vocabulary transfer (Gee et al., 2022) copies the rows of tokens that both tokenizers have, and gives
    every other token the mean of the rows of the pieces that the old tokenizer writes it with.

    Args:
        model: a Hugging Face `...ForCausalLM`, or a `CausalLM`.
        old_tokenizer: the one that it was trained with: a Hugging Face tokenizer, a folder, a hub name or a
            spec (docs/tokenizer_specs.md).
        new_tokenizer: the one that it gets.
        method: "fvt", "mean", "overlap", "random_normal", "omp", "focus" or "hypernet" (docs/zett.md).
        pad_to_multiple_of: the number of rows is rounded up to this; the rows beyond are padding.
        output_embeddings: "preserve", "untie", "tie" or "combine"; see `embeddings.transfer`.
        options: what the method may be told.

    Returns:
        How many rows were made of what.

    Raises:
        ValueError: the old tokenizer has more ids than the model has rows or shares nothing with the new
            one, or an argument is none of those above. That a tokenizer with fewer ids is another model's
            cannot be seen.
    """
    old, new = load_tokenizer(old_tokenizer), load_tokenizer(new_tokenizer)
    return transfer.transfer_vocabulary(
        _causal_lm(model, old.vocab_size),
        old,
        new,
        method=method,
        pad_to_multiple_of=pad_to_multiple_of,
        output_embeddings=output_embeddings,
        options=options,
    )


def export_huggingface(
    model: nn.Module, tokenizer: Any, folder: str | Path, *, dtype: torch.dtype | None = None, **facts: Any
) -> Path:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, and load it back to compare.

    Args:
        model: a Hugging Face `...ForCausalLM`, with or without PEFT adapters (merged in a copy), or a
            `CausalLM`.
        tokenizer: its tokenizer now, as for `transfer_vocabulary`.
        folder: must not exist, or be empty.
        dtype: of the weights that are written, such as `torch.bfloat16`; None: the model's.
        facts: what the model card says; see `export.card.CardFacts` (base, teacher, losses, title, ...).

    Raises:
        FileExistsError: the folder is not empty.
        TypeError: a dtype by its name.
        ExportError: loaded back, the folder gives other logits or other ids.
    """
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"dtype must be a torch.dtype, such as torch.bfloat16: got {dtype!r}")
    ours = load_tokenizer(tokenizer)
    student = _causal_lm(model, ours.vocab_size)
    dtype = student.causal_lm.dtype if dtype is None else dtype
    request = ExportRequest(folder=Path(folder).expanduser(), dtype=dtype, facts=CardFacts(**facts))
    return write_folder(student, None, ours, request)


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str | Mapping[str, Any]],
    *,
    max_length: int = 512,
    batch_size: int = 8,
) -> float:
    """Return the bits that a model needs for a byte of text: comparable between tokenizers.

    Args:
        model: a Hugging Face `...ForCausalLM`; put in evaluation mode meanwhile.
        tokenizer: its own, as for `transfer_vocabulary`.
        texts: strings, or rows as data sets have them (docs/data.md). Empty strings have no bits, nor bytes.
        max_length: tokens of a document; what is behind them is not scored, nor counted.
        batch_size: documents in one forward.

    Returns:
        −Σ log2 p(token) / Σ bytes, over the tokens of text that have something before them; see
        `evaluation.byte_shares`. `tokenkit bits-per-byte` gives the same for documents within one window.

    Raises:
        ValueError: no text, none that the tokenizer can write, or one longer than the model has positions.
    """
    if isinstance(texts, str | Mapping):
        raise TypeError(f"texts must be several documents: got one {type(texts).__name__}; put it in a list")
    ours = load_tokenizer(tokenizer)
    rows = [text for text in texts if text != ""]
    if not rows:
        raise ValueError("texts holds no text: give at least one document that is not empty")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1: got {batch_size}")
    documents = [Document(text=row) if isinstance(row, str) else document_from_row(row) for row in rows]
    collator = AlignedCollator(ours, max_length_student=max_length, max_length_teacher=max_length)
    batches = heldout_batches(documents, collator, batch_size)
    _check_positions(model, max(len(heldout.batch.student.ids_BT[0]) for heldout in batches), max_length)
    device = unwrapped(model).get_input_embeddings().weight.device
    alone = World(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)

    def nats(heldout: HeldoutBatch) -> Tensor:
        side = heldout.batch.student.map(lambda tensor: tensor.to(device))
        states = hidden_states(model, side.ids_BT, vocab_size=ours.vocab_size)
        found = (token_nats(states, side).cpu() * heldout.shares[0]).sum()
        return found.expand(2)  # one model is both sides

    with _evaluating(model):
        bits, _, num_bytes = summed_bits(nats, batches, alone)
    return bits / num_bytes


def _check_positions(model: nn.Module, longest: int, max_length: int) -> None:
    limit = getattr(unwrapped(model).config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"max_length is {max_length}, but the model has {limit} positions: set max_length to at most "
            f"{limit}"
        )


def make_loss(
    name: str,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    *,
    device: torch.device | str = "cpu",
    mined_mapping: str | Path | None = None,
    pair_statistics: str | Path | None = None,
    **options: Any,
) -> Loss[Any]:
    """Return a loss by its name, with what it looks up of two tokenizers: pairs of tokens, a projection.

    Call it as the drop-in forms are called: `loss(student, teacher, batch).mean.backward()`. What it trains
    beside the models (`baseline_dskd`, `alm_latents` with `project`) is made by `loss.modules` and given as
    the fourth argument; a `Distiller` does that by itself.

    Args:
        name: of docs/losses.md ("clm", "alm_unconstrained", "baseline_xtoken", ...), or `module:function`.
        student_tokenizer: as for `transfer_vocabulary`. None: the loss looks nothing up.
        teacher_tokenizer: None: the student's.
        device: where what is looked up goes.
        mined_mapping: what `tokenkit mined-mapping` wrote, for `baseline_mined`.
        pair_statistics: what `tokenkit pair-stats` wrote, for a side path over unbiased pairs.
        options: fields of the loss's options, as its drop-in form has them.

    Raises:
        ValueError: no such loss or option, or tokenizers that it needs and that are not given.
    """
    if student_tokenizer is None:
        return make(name, None, **options)
    student = load_tokenizer(student_tokenizer)
    teacher = student if teacher_tokenizer is None else load_tokenizer(teacher_tokenizer)
    paths = (None if path is None else str(path) for path in (mined_mapping, pair_statistics))
    return make(name, Pair(student, teacher, torch.device(device), *paths), **options)


def _causal_lm(model: nn.Module, vocab_size: int) -> CausalLM:
    """Return the model as the rooms take it, compared with itself once."""
    if isinstance(model, CausalLM):
        return model
    inner = unwrapped(model)
    ours = CausalLM(inner, vocab_size)
    with _evaluating(inner):
        settle(ours, type(ours.causal_lm).__name__)
    return ours


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every module back in its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
