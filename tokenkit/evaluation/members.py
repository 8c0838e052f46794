"""The members of an ensemble: opened, compared with the first, and what they need for a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenkit.errors import ConfigError, blaming_data
from tokenkit.evaluation.byte_shares import Floats
from tokenkit.evaluation.ensemble import Ensemble, Member
from tokenkit.evaluation.opened import finished_export, is_training, open_model
from tokenkit.evaluation.text_bits import bits_of_bytes
from tokenkit.losses.score import scored_tokens, select_rows
from tokenkit.structs import Side
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer
from tokenkit.training.pair import check_mapped_pair, read_mapping

if TYPE_CHECKING:
    from tokenkit.config.models import ModelSource


@contextmanager
def open_members(
    sources: Sequence[ModelSource], mappings: Sequence[str | None], **how: Any
) -> Iterator[list[Member]]:
    """Open models that are asked as one. Their tokenizers are compared before a model is loaded.

    Args:
        sources: the pivot first.
        mappings: of each what `tokenkit mined-mapping` wrote, with the pivot as student; None: it shares the
            pivot's tokenizer.
        how: what `open_model` takes.

    Raises:
        ConfigError: a tokenizer is not the pivot's, and there is no mapping.
        DataError, FileNotFoundError: what `open_model` raises, or a mapping of other tokenizers.
    """
    names = [source.pretrained_model_name_or_path for source in sources]
    trust = bool(how.get("trust_remote_code"))
    early = [tokenizer_before(source, trust_remote_code=trust) for source in sources]
    if early[0] is not None:
        for k, tokenizer in enumerate(early[1:], 1):
            if tokenizer is not None:
                map_of(mappings[k], (early[0], tokenizer), (names[0], names[k]))
    with ExitStack() as held:
        opened = [
            held.enter_context(open_model(name, tokenizer_name=source.tokenizer_name, **how))
            for name, source in zip(names, sources, strict=True)
        ]
        first = opened[0].tokenizer
        maps = [
            map_of(m, (first, o.tokenizer), (names[0], o.name)) for m, o in zip(mappings, opened, strict=True)
        ]
        yield [
            Member(one, None if map_V is None else map_V.to(one.device))
            for one, map_V in zip(opened, maps, strict=True)
        ]


def tokenizer_before(source: ModelSource, *, trust_remote_code: bool) -> Tokenizer | None:
    """Return a model's tokenizer without the model; None: only its export will have it."""
    path = str(Path(source.pretrained_model_name_or_path).expanduser())
    folder = finished_export(path)
    if source.tokenizer_name is None and folder is None and is_training(path):
        return None
    spec = source.tokenizer_name or str(folder or source.pretrained_model_name_or_path)
    with blaming_data():
        return load_tokenizer(spec, trust_remote_code=trust_remote_code)


def map_of(path: str | None, pair: tuple[Tokenizer, Tokenizer], names: tuple[str, str]) -> Tensor | None:
    """Return a member's id for each id of the pivot; None: they are the same.

    Args:
        path: what was mined for the two; None: nothing.
        pair: tokenizers of the pivot and the member.
        names: of the two models, for an error.

    Raises:
        ConfigError: they differ, and there is no mapping.
        DataError, FileNotFoundError: the mapping is not one of these tokenizers.
    """
    pivot, own = pair
    if path is not None:
        with blaming_data():
            check_mapped_pair(Path(path).expanduser(), *pair)
            return read_mapping(Path(path).expanduser(), pivot.vocab_size, own.vocab_size)
    if same_ids(pivot, own):
        return None
    raise ConfigError(
        f"{names[0]} and {names[1]} have different tokenizers ({_difference(pivot, own)}): move one to the "
        "other's with `tokenkit zett` or `tokenkit train`, or map ids with `tokenkit mined-mapping "
        "--target-tokenizer-name FIRST --teacher-tokenizer-name SECOND`, and name what it writes in "
        "baseline_mined_mapping_paths"
    )


def same_ids(pivot: Tokenizer, own: Tokenizer) -> bool:
    """Whether each id means the same under both, whatever their families and templates."""
    return pivot.token_bytes == own.token_bytes and pivot.control == own.control


def _difference(pivot: Tokenizer, own: Tokenizer) -> str:
    if pivot.vocab_size != own.vocab_size:
        return f"{pivot.vocab_size} and {own.vocab_size} ids"
    pairs = zip(pivot.token_bytes, own.token_bytes, strict=True)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return "other special tokens"
    return f"id {place} is {pivot.token_bytes[place]!r} and {own.token_bytes[place]!r}"


def bits_of_ensemble(
    ensemble: Ensemble, texts: Sequence[str], *, window: int, stride: int, batch: int
) -> tuple[list[list[Floats]], int]:
    """Return the bits of each byte of each text, of the ensemble and then of each member, in one pass.

    Args:
        ensemble: in evaluation mode.
        texts, window, stride, batch: see `bits_of_bytes`.

    Returns:
        the bits, and the number of tokens.
    """
    of_members: list[Tensor] = []  # [K, B, T] of each batch, in its order

    def together(side: Side) -> Tensor:
        found = nats_of_all(ensemble, side)
        of_members.append(found[1:])
        return found[0]

    how = {"window": window, "stride": stride, "batch": batch}
    tokenizer = ensemble.pivot.tokenizer
    bits, count = bits_of_bytes(together, tokenizer, texts, **how)
    result = [bits]
    for k in range(len(ensemble.members)):
        again = (batch[k] for batch in of_members)
        result.append(bits_of_bytes(partial(_next, again), tokenizer, texts, **how)[0])
    return result, count


def _next(batches: Iterator[Tensor], side: Side) -> Tensor:
    return next(batches)


def nats_of_all(ensemble: Ensemble, side: Side) -> Tensor:
    """Return [1 + K, B, T] −log p of each token that the loss mask keeps: the ensemble's, the members'."""
    rows = select_rows(side, scored_tokens(side))
    B, T = rows.shape
    device = ensemble.device
    row_N = rows.row_N.to(device)
    at = torch.div(row_N, T, rounding_mode="floor"), row_N % T
    found = ensemble.likelihoods(side.ids_BT.to(device), at, rows.target_N.to(device), asks_top=False)
    assert found.members_KN is not None
    logp = torch.cat([found.logp_N[None].float(), found.members_KN.float()])
    placed = logp.new_zeros(len(logp), B * T + 1).index_copy(1, row_N + 1, logp)
    return -placed[:, :-1].view(-1, B, T)
