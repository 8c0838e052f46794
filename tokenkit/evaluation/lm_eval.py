"""The model that lm-eval asks: its requests are answered from hidden states, without logits.

    lm = language_model(ModelScorer(opened), opened.hf_tokenizer, Asking(batch_size=8), world)
    lm_eval.simple_evaluate(lm, tasks=["arc_easy"])

A request of log-likelihood is a context and a continuation. Their tokens are one row of a batch; of its
hidden states those before the continuation's tokens go through `linear_logprob`, which says log p of each,
and whether any other token is more likely. Where the tokens that one request reads begin those of another,
one row serves both: the answers of one token to one question (lm-eval's own class shares these), or a text
and its beginning.

All processes are asked everything; each runs its share of the batches, and all hear all answers. So the
scores are those of one process, and lm-eval need not know.

Tokens, lengths and what is cut are as in lm-eval's `HFLM`, so that scores are the same; but a continuation
that is longer than what the model can read is scored in pieces, where `HFLM` stops.

Dimensions: B rows, T positions, N scored tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from tokenkit.config.benchmarks import LmEval
from tokenkit.evaluation.scorer import Scorer
from tokenkit.parallel import World
from tokenkit.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4  # of English under a subword tokenizer: what a length in tokens is in bytes
DEFAULT_LENGTH = 2048  # tokens, where a model names no limit: as in HFLM
DEFAULT_NEW_TOKENS = 256  # where a task names none: as in HFLM
NAMES_OF_LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Pair = tuple[Any, list[int], list[int]]
"""The texts of a request (None: of a part of one), its context's tokens, its continuation's tokens."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How requests become tokens and batches."""

    batch_size: int = 8
    """Rows of a batch."""
    max_length: int | None = None
    """Tokens that are read at once, at most. None: the scorer's positions."""
    add_bos: bool | None = None
    """Begin with BOS where there is one. None: as the tokenizer does by itself."""
    bytes_per_token: int = 1
    """Multiplies lengths that a task or a user gives in tokens: for tokenizers whose tokens are bytes."""
    seed: int = 0
    """Of what is drawn; each batch begins with it and its own number, so that processes do not matter."""


def asking_of(options: LmEval, tokenizer: Tokenizer, *, seed: int = 0) -> Asking:
    """Return what options say of requests, for a model of this tokenizer."""
    length_V = tokenizer.byte_length_V
    return Asking(
        batch_size=options.batch_size,
        max_length=options.max_length,
        add_bos=options.forces_bos,
        bytes_per_token=BYTES_PER_TOKEN if int(length_V.max()) <= 1 else 1,
        seed=seed,
    )


class _Row(NamedTuple):
    """What the model reads for one request, and for those that read the same or its beginning."""

    ids: list[int]
    asked: list[_Piece]


class _Piece(NamedTuple):
    """A request, or a part of one: what is read, and which tokens come out one position later."""

    number: int
    """Of the request."""
    ids: list[int]
    targets: list[int]


def language_model(scorer: Scorer, tokenizer: Any, asking: Asking, world: World) -> Any:
    """Return the object of lm-eval's class `LM` that answers with `scorer`.

    Args:
        scorer: the model.
        tokenizer: of transformers: text becomes the tokens that lm-eval's own class would make.
        asking: how.
        world: the processes that share the work; all of them ask the same.
    """
    from lm_eval.api.model import TemplateLM

    kind: Any = type("TokenkitLM", (_Answers, TemplateLM), {})
    return kind(scorer, tokenizer, asking, world)


class _Answers:
    """The methods that lm-eval calls. `TemplateLM`, which stands behind, makes tokens of texts."""

    backend = "causal"
    rank, world_size = 0, 1
    """For lm-eval, which would divide documents: here batches are divided."""

    def __init__(self, scorer: Scorer, tokenizer: Any, asking: Asking, world: World):
        self.scorer, self.tokenizer, self.asking, self.world = scorer, tokenizer, asking, world

    @property
    def device(self) -> torch.device:
        """Where lm-eval would put tensors of its own."""
        return self.scorer.device

    @property
    def eot_token_id(self) -> int | None:
        """The end of a text."""
        found: int | None = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ValueError(
                "the tokenizer has neither BOS nor EOS, so a text without a context cannot be scored: choose "
                "other tasks, or give the tokenizer one of them"
            )
        return int(eos if bos is None else bos)

    @property
    def max_length(self) -> int:
        """Tokens that are read at once."""
        known, wanted = self.scorer.positions, self.asking.max_length
        if wanted is None:
            return known or DEFAULT_LENGTH
        wanted *= self.asking.bytes_per_token
        return min(wanted, known or wanted)

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's results."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation as text, in the tokenizer's template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, with BOS where it is wanted and not written already."""
        tokenizer, bos = self.tokenizer, self.tokenizer.bos_token_id
        wanted = add_special_tokens
        if wanted is None:
            is_written = bos is not None and string.startswith(tokenizer.decode([bos]))
            wanted = False if is_written else self.asking.add_bos
        options = {} if wanted is None else {"add_special_tokens": wanted}
        ids: list[int] = tokenizer.encode(string, verbose=False, **options)
        is_missing = add_special_tokens is None and wanted and bos is not None and ids[:1] != [bos]
        return [bos, *ids] if is_missing else ids

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return log p of each continuation, nats, and whether greedy decoding would write it."""
        from lm_eval.api.model import TemplateLM

        answers: list[tuple[float, bool]] = TemplateLM.loglikelihood(self, requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Return log p of each whole text, nats, read in windows that score each token once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        owners, pairs = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for context, continuation in map(make_disjoint_window, windows):
                owners.append(number)
                pairs.append((None, context, continuation))
        sums = [0.0] * len(requests)
        for number, answer in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            sums[number] += answer[0]
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """Return log p of each continuation in nats, and whether greedy decoding would write it."""
        pieces = [piece for number, pair in enumerate(requests) for piece in self._pieces(number, pair)]
        if len(pieces) > len(requests):
            cut = {piece.number for piece in pieces if len(piece.targets) < len(requests[piece.number][2])}
            words = "continuations of more than the %d tokens that are read at once, scored in pieces: %d"
            logger.warning(words, self.max_length, len(cut))
        rows = sorted(_shared_rows(pieces), key=lambda row: -len(row.ids))  # the largest batch comes first
        logps, are_top = [0.0] * len(requests), [True] * len(requests)
        for number, logp, is_top in self._divided(rows, lambda _, batch: self._score(batch)):
            logps[number] += logp
            are_top[number] &= is_top
        return list(zip(logps, are_top, strict=True))

    def _pieces(self, number: int, pair: Pair) -> Iterator[_Piece]:
        """Cut a request into inputs that fit: one, but for continuations that are longer."""
        _, context, continuation = pair
        whole, limit = context + continuation, self.max_length
        step = len(continuation) if len(continuation) <= limit else max(1, limit // 2)
        ends = range(len(context) + step, len(whole), step) if step else ()
        for begin, end in pairwise([len(context), *ends, len(whole)]):
            yield _Piece(number, whole[max(0, end - 1 - limit) : end - 1], whole[begin:end])

    def _score(self, rows: Sequence[_Row]) -> list[tuple[int, float, bool]]:
        """Run one batch; return number, log p, whether it is greedy, of each piece in it."""
        ids_BT = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.int64)
        numbers, places, targets, lengths = [], [], [], []
        for index, row in enumerate(rows):
            ids_BT[index, : len(row.ids)] = torch.tensor(row.ids)
            for piece in row.asked:
                first = len(piece.ids) - len(piece.targets)
                places += [(index, first + step) for step in range(len(piece.targets))]
                targets += piece.targets
                numbers.append(piece.number)
                lengths.append(len(piece.targets))
        device = self.scorer.device
        at_N2 = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).to(device)
        target_N = torch.tensor(targets, dtype=torch.int64, device=device)
        logp_N, is_top_N = self.scorer.score(ids_BT.to(device), (at_N2[:, 0], at_N2[:, 1]), target_N)
        parts = zip(logp_N.cpu().split(lengths), is_top_N.cpu().split(lengths), strict=True)
        return [
            (number, float(logp.double().sum()), bool(is_top.all()))
            for number, (logp, is_top) in zip(numbers, parts, strict=True)
        ]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Return what the model writes behind each context, up to a stop string."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            writing = self._writing(requests[numbers[0]].args[1])
            room = self.max_length - writing.options["max_new_tokens"]
            prompts = [(number, self.tok_encode(requests[number].args[0])[-room:]) for number in numbers]
            prompts.sort(key=lambda prompt: -len(prompt[1]))
            for number, text in self._divided(prompts, partial(self._write, writing)):
                texts[number] = text
        return texts

    def _writing(self, given: Mapping[str, Any]) -> _Writing:
        """Read what a task says of its answers."""
        options = dict(given)
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        if self.eot_token_id is not None:
            until.append(self.tokenizer.decode([self.eot_token_id]))
        lengths = [options.pop(name) for name in NAMES_OF_LENGTH if name in options]
        wanted = (lengths[0] if lengths else DEFAULT_NEW_TOKENS) * self.asking.bytes_per_token
        most = max(1, self.max_length // 2)
        if wanted > most:
            logger.warning(
                "answers have at most %d tokens, not %d: the model reads %d", most, wanted, self.max_length
            )
        temperature = float(options.pop("temperature", None) or 0)
        draws = bool(options.pop("do_sample", temperature > 0)) and temperature != 0
        options |= {"do_sample": draws, "max_new_tokens": min(wanted, most)}
        return _Writing(
            [stop for stop in until if stop], options | ({"temperature": temperature} if draws else {})
        )

    def _write(self, writing: _Writing, index: int, prompts: Sequence[tuple[int, list[int]]]) -> list[Any]:
        """Run one batch; return [number, text] of each prompt in it."""
        tail = 4 + max((len(stop.encode()) for stop in writing.until), default=0)

        def is_done(ids: Sequence[int]) -> bool:
            text = self.tokenizer.decode(ids[-tail:])
            return any(stop in text for stop in writing.until)

        device = self.scorer.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.asking.seed + index)
            written = self.scorer.generate([ids for _, ids in prompts], is_done, writing.options)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        cut = [reduce(lambda text, stop: text.split(stop)[0], writing.until, text) for text in texts]
        return [[number, text] for (number, _), text in zip(prompts, cut, strict=True)]

    def _divided(self, items: Sequence[Any], run: Callable[[int, Sequence[Any]], list[Any]]) -> list[Any]:
        """Run batches, each on one process, and return what all of them found on every one.

        Each process runs as many as the others, where there are too few the last one again: the forward of a
        model that is sharded is a collective.
        """
        size, world = self.asking.batch_size, self.world
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        found = []
        for start in range(0, len(batches), world.world_size):
            index = start + world.rank
            answers = run(index, batches[min(index, len(batches) - 1)])
            found += answers if index < len(batches) else []
        return [answer for part in world.gather(found) for answer in part]


class _Writing(NamedTuple):
    """How answers are written."""

    until: list[str]
    options: dict[str, Any]


def _shared_rows(pieces: Sequence[_Piece]) -> list[_Row]:
    """Let pieces that read the beginning of what another reads share its row."""
    rows: list[_Row] = []
    before: list[int] = []
    for piece in sorted(pieces, key=lambda piece: piece.ids, reverse=True):  # behind what it begins
        if not rows or before[: len(piece.ids)] != piece.ids:
            rows.append(_Row(piece.ids, []))
        rows[-1].asked.append(piece)
        before = piece.ids
    return rows
