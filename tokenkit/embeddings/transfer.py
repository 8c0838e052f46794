"""Give a model the rows of another tokenizer, made by one of `METHODS`.

A method reads both tokenizers and the old matrices and returns new matrices with `size` rows and a count of
rows by what they were made of. It changes nothing. A new one is a function and an entry in `METHODS`.

Dimensions: V new vocabulary, W old vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tokenkit.embeddings.auxiliary import Auxiliary
from tokenkit.embeddings.rows import (
    LABELS,
    Matching,
    Matrices,
    RowSources,
    chunks,
    copied_ids,
    from_lists,
    mean_row,
    need_something,
    row_sources,
)
from tokenkit.embeddings.similarity import anchored_sources, focus_weights, omp_weights
from tokenkit.models.causal_lm import effective_weight, head_bias

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """What methods may be told."""

    matching: Matching = field(default_factory=Matching)
    """Which tokens take a row of the old vocabulary as it is."""
    seed: int = 0
    """Of what is drawn at random."""
    auxiliary: Auxiliary | None = None
    """Where `focus` and `omp` compare tokens of the new vocabulary."""
    num_atoms: int = 16
    """Old rows that `omp` makes a new row of, at most."""
    hypernet: str | None = None
    """Folder of a trained hypernetwork."""


Method = Callable[["Tokenizer", "Tokenizer", Matrices, int, InitOptions], tuple[Matrices, dict[str, int]]]
"""(old tokenizer, new tokenizer, old matrices, rows, options) -> (new matrices, counts). A matrix that is
None stays None."""


def apply_sources(sources: RowSources, old: Matrices, size: int) -> tuple[Matrices, dict[str, int]]:
    """Make every matrix of the same sources."""

    def bias() -> Tensor | None:
        return None if old.bias_W is None else sources.rows(old.bias_W[:, None], size)[:, 0]

    output_VD = None if old.output_WD is None else sources.rows(old.output_WD, size)
    table_VE = None if old.table_WE is None else sources.rows(old.table_WE, size)
    made = Matrices(sources.rows(old.embedding_WD, size), output_VD, bias(), table_VE)
    return made, sources.report()


def fvt(
    old: Tokenizer, new: Tokenizer, matrices: Matrices, size: int, options: InitOptions
) -> tuple[Matrices, dict[str, int]]:
    """Fast vocabulary transfer: see `tokenkit.embeddings.rows`."""
    return apply_sources(row_sources(old, new, options.matching), matrices, size)


def mean(
    old: Tokenizer, new: Tokenizer, matrices: Matrices, size: int, options: InitOptions
) -> tuple[Matrices, dict[str, int]]:
    """Every row the mean of all old rows, but those of special tokens: what no knowledge of tokens gives."""
    return apply_sources(_copies(old, new, replace(options.matching, same_bytes=False)), matrices, size)


def overlap(
    old: Tokenizer, new: Tokenizer, matrices: Matrices, size: int, options: InitOptions
) -> tuple[Matrices, dict[str, int]]:
    """Copy what both vocabularies have; all other rows are the mean of all old rows."""
    return apply_sources(_copies(old, new, options.matching), matrices, size)


def random_normal(
    old: Tokenizer, new: Tokenizer, matrices: Matrices, size: int, options: InitOptions
) -> tuple[Matrices, dict[str, int]]:
    """Copy what both vocabularies have; draw other rows with each dimension's mean and deviation of old rows.

    Padding rows are the mean. The draw depends on the seed alone: input and output differ.
    """
    sources = _copies(old, new, options.matching)
    made, _ = apply_sources(sources, matrices, size)
    to_draw = torch.from_numpy(np.flatnonzero(sources.method_V == LABELS.index("mean_of_all")))
    generator = torch.Generator().manual_seed(options.seed)

    def draw(old_WD: Tensor, new_VD: Tensor) -> None:
        mean_D = mean_row(old_WD)
        square_D = sum(((part - mean_D).square().double().sum(0) for part in chunks(old_WD)), 0)
        std_D = torch.as_tensor(square_D / max(1, len(old_WD) - 1)).sqrt().to(mean_D.dtype)
        for ids in to_draw.split(max(1, 2**24 // old_WD.shape[1])):
            noise = torch.randn(len(ids), old_WD.shape[1], generator=generator, dtype=mean_D.dtype)
            new_VD[ids] = (mean_D + noise * std_D).to(new_VD.dtype)

    draw(matrices.embedding_WD, made.embedding_WD)
    if matrices.output_WD is not None and made.output_WD is not None:
        draw(matrices.output_WD, made.output_WD)
    if matrices.bias_W is not None and made.bias_W is not None:
        draw(matrices.bias_W[:, None], made.bias_W[:, None])
    if matrices.table_WE is not None and made.table_WE is not None:
        draw(matrices.table_WE, made.table_WE)
    report = sources.report()
    report["random"] = report.pop("mean_of_all")
    return made, report


def hypernet(
    old: Tokenizer, new: Tokenizer, matrices: Matrices, size: int, options: InitOptions
) -> tuple[Matrices, dict[str, int]]:
    """Let a trained network write the rows; the bias of a head and a table of layers are FVT's.

    See `tokenkit.embeddings.hypernet`.

    Raises:
        ValueError: no folder, a network of another model, or one that writes a head for a model that is tied.
    """
    from tokenkit.embeddings.hypernet_files import check_hypernet, hypernet_rows, load_hypernet

    if options.hypernet is None:
        raise ValueError("method hypernet needs a folder that `tokenkit train-hypernet` wrote: set hypernet")
    network, about = load_hypernet(Path(options.hypernet).expanduser())
    if network.writes > 1 and matrices.output_WD is None:
        raise ValueError(
            f"the hypernetwork in {options.hypernet} writes input and output rows, but the model's are tied: "
            "untie them (output_embeddings_mode=untie), or train it with output_embeddings_mode=preserve"
        )
    second = matrices.embedding_WD if matrices.output_WD is None else matrices.output_WD
    read = [matrices.embedding_WD, second][: network.reads]
    check_hypernet(network, about, read, old)
    made = hypernet_rows(network, old, new, read, size, options.matching)
    output_VD = made.output_VD if made.output_VD is not None else made.input_VD.clone()
    bias_V = None if matrices.bias_W is None else made.sources.rows(matrices.bias_W[:, None], size)[:, 0]
    table_VE = None if matrices.table_WE is None else made.sources.rows(matrices.table_WE, size)
    head_VD = None if matrices.output_WD is None else output_VD
    return Matrices(made.input_VD, head_VD, bias_V, table_VE), made.sources.report()


def _copies(old: Tokenizer, new: Tokenizer, matching: Matching) -> RowSources:
    """Special tokens and same bytes copied as `matching` says, the rest the mean of all."""
    need_something(old, new)
    copied = copied_ids(old, new, matching)
    return from_lists(copied.ids, copied.label_V)


def omp(
    old: Tokenizer, new: Tokenizer, matrices: Matrices, size: int, options: InitOptions
) -> tuple[Matrices, dict[str, int]]:
    """Orthogonal matching pursuit: see `tokenkit.embeddings.similarity`."""
    weigh = partial(omp_weights, num_atoms=options.num_atoms)
    sources = anchored_sources(old, new, options.matching, options.auxiliary, weigh)
    return apply_sources(sources, matrices, size)


def focus(
    old: Tokenizer, new: Tokenizer, matrices: Matrices, size: int, options: InitOptions
) -> tuple[Matrices, dict[str, int]]:
    """Sparsemax of similarities: see `tokenkit.embeddings.similarity`."""
    sources = anchored_sources(old, new, options.matching, options.auxiliary, focus_weights)
    return apply_sources(sources, matrices, size)


METHODS: dict[str, Method] = {
    "fvt": fvt,
    "mean": mean,
    "overlap": overlap,
    "random_normal": random_normal,
    "omp": omp,
    "focus": focus,
    "hypernet": hypernet,
}


if TYPE_CHECKING:
    from tokenkit.models.causal_lm import CausalLM
    from tokenkit.tokenization.tokenizer import Tokenizer

OutputEmbeddings = Literal["preserve", "untie", "tie", "combine"]


def transfer_vocabulary(
    model: CausalLM,
    old: Tokenizer,
    new: Tokenizer,
    *,
    pad_to_multiple_of: int = 1,
    output_embeddings: OutputEmbeddings = "preserve",
    method: str = "fvt",
    options: InitOptions | None = None,
) -> dict[str, int]:
    """Give `model`, whose tokenizer is `old`, rows for `new`, in place; return how many were made of what.

    Args:
        model: its embedding, its head and, where it has them, the bias of its head and the table of rows for
            every layer are replaced.
        old: the tokenizer that the model was trained with.
        new: the tokenizer that it gets.
        pad_to_multiple_of: the number of rows is rounded up to this; the rows beyond are padding.
        output_embeddings: "preserve" keeps a tied head tied; "untie" gives it rows of its own; "tie"
            makes any head the new input embedding; "combine" is "preserve", and each row of an untied head
            becomes the mean of the two rows made.
        method: a name of `METHODS`.
        options: what the method may be told.

    Raises:
        ValueError: `old` has more ids than the model has rows, shares nothing with `new`, the method
            cannot work with what it is given, or an argument is none of those above.
    """
    _check_words(method, output_embeddings, pad_to_multiple_of)
    matrices = old_matrices(model, old, untie=output_embeddings == "untie")
    size = -(-new.vocab_size // pad_to_multiple_of) * pad_to_multiple_of
    made, report = METHODS[method](old, new, matrices, size, options or InitOptions())
    output_VD = None if output_embeddings == "tie" else made.output_WD
    if output_embeddings == "combine" and output_VD is not None:
        output_VD = output_VD.lerp_(made.embedding_WD.to(output_VD.dtype), 0.5)
    model.replace_vocabulary(
        embedding_VD=made.embedding_WD,
        output_VD=output_VD,
        bias_V=made.bias_W,
        vocab_size=new.vocab_size,
        table_VE=made.table_WE,
    )
    return report


def _check_words(method: str, output_embeddings: str, pad_to_multiple_of: int) -> None:
    for name, word, words in (
        ("method", method, tuple(METHODS)),
        ("output_embeddings", output_embeddings, get_args(OutputEmbeddings)),
    ):
        if word not in words:
            raise ValueError(f"{name} must be one of {', '.join(words)}: got {word!r}")
    if pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be at least 1: got {pad_to_multiple_of}")


def old_matrices(model: CausalLM, old: Tokenizer, *, untie: bool = False) -> Matrices:
    """Return the rows of the model's real tokens, views of its parameters.

    Raises:
        ValueError: `old` has more ids than the model has rows.
    """
    embedding_WD = effective_weight(model.embedding).detach()
    if old.vocab_size > embedding_WD.shape[0]:
        raise ValueError(
            f"tokenizer {old.spec} has {old.vocab_size} ids but the model's embedding only "
            f"{embedding_WD.shape[0]} rows: name the tokenizer that the model was trained with"
        )
    output_WD, bias_W = effective_weight(model.output).detach(), head_bias(model.output)
    count = old.vocab_size
    return Matrices(
        embedding_WD[:count],
        None if model.is_tied and not untie else output_WD[:count],
        None if bias_W is None else bias_W.detach()[:count],
        None if model.layer_table is None else _table(effective_weight(model.layer_table).detach(), count),
    )


def _table(table_WE: Tensor, count: int) -> Tensor:
    """Return all layers' rows for `count` ids; those beyond the table read its row 0, as the body does."""
    lacking = count - len(table_WE)
    return table_WE[:count] if lacking <= 0 else torch.cat([table_WE, table_WE[:1].expand(lacking, -1)])
