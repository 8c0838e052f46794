"""Give a model the rows of another tokenizer, made by one of `METHODS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from tokenkit.embeddings.methods import METHODS, InitOptions
from tokenkit.embeddings.rows import Matrices
from tokenkit.models.causal_lm import effective_weight, head_bias

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
