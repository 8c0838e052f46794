"""Train a hypernetwork on tokenizers that are drawn anew every few steps, under a frozen model.

    every `resample_every` steps   a tokenizer from the texts at hand, and how the old one writes its tokens
    every step                     rows = hypernetwork(old rows of the pieces)
                                   clm      nats per byte of the frozen model with these rows
                                   lexical  squared distance from the old rows, of tokens that both have
                                   loss = clm + lexical_weight * lexical
    first `identity_steps`         loss = squared distance of all rows to FVT's (the warm-up)

Distances are means over tokens and numbers, in units of the variance of the old matrix.

Source: Minixhofer et al., "Zero-Shot Tokenizer Transfer", 2024 (arXiv:2405.07883), section 3.
Dimensions: V sampled tokens, W old tokens, D hidden size, B texts, T positions, N trained tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokenkit.embeddings.hypernet import Hypernet, Surfaces, mean_rows, surfaces
from tokenkit.embeddings.hypernet_options import HypernetSchedule, SamplerOptions
from tokenkit.embeddings.rows import LABELS, RowSources, from_lists, write_with
from tokenkit.embeddings.unigram_sampler import (
    SampledTokenizer,
    distractors,
    sample_tokenizer,
)
from tokenkit.errors import NonFiniteError
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.models.causal_lm import CausalLM, effective_weight, head_bias
from tokenkit.objective.weights import Objective
from tokenkit.optim import LearningRate, build_optimizer
from tokenkit.optim_options import OptimizerOptions
from tokenkit.structs import Batch, Head, LossTerm, Side
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.written import ids_by_bytes
from tokenkit.training.requests import Request, StudentHalf, TeacherHalf
from tokenkit.training.step import Stage, StepReport

IDENTITY = "identity"
"""The loss of the warm-up, and its phase in metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class SampledVocabulary:
    """A sampled tokenizer, seen by the hypernetwork. Id 0 is the BOS, where the old tokenizer has one."""

    tokenizer: SampledTokenizer
    surfaces: Surfaces
    same_V: Tensor
    """int64, the old id of a token that both have; -1 of others."""
    lead: int
    """Special tokens in front of the sampled ones: 0 or 1."""


class Writer:
    """How the old tokenizer writes byte strings; remembers them, as sampled tokenizers share most tokens."""

    def __init__(self, old: Tokenizer):
        self.old, self.by_bytes = old, ids_by_bytes(old)
        self._known: dict[bytes, list[int]] = {}

    def sources(self, strings: Sequence[bytes]) -> RowSources:
        """Return the pieces of each string, behind those of the BOS where the old tokenizer has one."""
        new = list({raw for raw in strings if raw not in self._known and raw not in self.by_bytes})
        self._known.update(zip(new, write_with(self.old, new, self.by_bytes), strict=True))
        bos = [] if self.old.bos_id is None else [[self.old.bos_id]]
        ids = [*bos, *([self.by_bytes[r]] if r in self.by_bytes else self._known[r] for r in strings)]
        names = ["special"] * len(bos)
        names += ["same_bytes" if r in self.by_bytes else "mean_of_pieces" for r in strings]
        method_V = np.array([LABELS.index(name) for name in names], np.uint8)
        method_V[[not pieces for pieces in ids]] = LABELS.index("mean_of_all")
        return from_lists(ids, method_V)

    def vocabulary(
        self, tokenizer: SampledTokenizer, more: Sequence[bytes], max_pieces: int
    ) -> SampledVocabulary:
        """Return the vocabulary of a sampled tokenizer and of tokens that no text has."""
        strings = [token.encode() for token in tokenizer.tokens]
        own = set(strings)
        strings += [raw for raw in more if raw not in own]
        lead = int(self.old.bos_id is not None)
        same = [-1] * lead + [self.by_bytes.get(raw, -1) for raw in strings]
        found = surfaces(self.sources(strings), max_pieces)
        return SampledVocabulary(tokenizer, found, torch.tensor(same), lead)


class Predicted:
    """A model's vocabulary with predicted rows; in the place of a `Vocabulary`."""

    def __init__(self, model: CausalLM, input_VD: Tensor, output_VD: Tensor, bias_V: Tensor | None):
        self._model, self._input_VD = model, input_VD
        self._head = replace(model.head(), weight_VD=output_VD, bias_V=bias_V, vocab_size=None)

    def embedding(self, ids_BT: Tensor) -> Tensor:
        """Return the embedded tokens; a model that scales its embeddings does so here too."""
        embedded: Tensor = functional_call(self._model.embedding, {"weight": self._input_VD}, (ids_BT,))
        return embedded

    def per_layer(self, ids_BT: Tensor) -> Tensor | None:
        """Return None; of a model whose layers have rows of their own nobody predicts those: ValueError."""
        if self._model.layer_table is not None:
            raise ValueError(
                "this model gives each layer embeddings of its own (embed_tokens_per_layer), which a "
                "hypernetwork does not write: use another model, or zett with method fvt"
            )
        return None

    def head(self) -> Head:
        """Return the head as the kernels take it."""
        return self._head


def old_matrices(model: CausalLM, old: Tokenizer) -> list[Tensor]:
    """Return the rows that a hypernetwork reads: one matrix of a tied model, otherwise input and output.

    Raises:
        ValueError: a tokenizer with more ids than rows.
    """
    matrices = [effective_weight(model.embedding), effective_weight(model.output)]
    if old.vocab_size > len(matrices[0]):
        raise ValueError(
            f"tokenizer {old.spec} has {old.vocab_size} ids but the model's embedding only "
            f"{len(matrices[0])} rows: name the tokenizer that the model was trained with"
        )
    return [m.detach()[: old.vocab_size].float() for m in matrices[: 1 if model.is_tied else 2]]


@dataclass(frozen=True, slots=True)
class Counted:
    """What a loss sums over, known before the network runs."""

    count: Tensor


class HypernetTrainer(nn.Module):
    """A hypernetwork under a frozen model, asked as a `Distillation` is: counts first, losses then.

    `draw` makes the batch of a step. What it drew, a vocabulary and texts in it, is what is asked about next.

    Args:
        model: frozen here, and set to evaluation; where it is, the rest is computed too.
        old: its tokenizer.
        hypernet: what is trained.
        texts: endless.
        options: how long, and towards what.
        sampler: how tokenizers are drawn.
    """

    def __init__(
        self,
        model: CausalLM,
        old: Tokenizer,
        hypernet: Hypernet,
        texts: Iterator[str],
        options: HypernetSchedule,
        sampler: SamplerOptions,
    ):
        super().__init__()
        self.model, self.hypernet, self.options = model.requires_grad_(False).eval(), hypernet, options
        self.sampler = sampler
        self.model.embedding.padding_idx = None  # ids are those of sampled tokenizers
        self.old_matrices, self.writer, self.texts = old_matrices(model, old), Writer(old), texts
        bias_W = head_bias(model.output)
        self.bias_W = None if bias_W is None else bias_W.detach()[: old.vocab_size]
        self.generator = random.Random(options.seed)
        self.pieces = [old.token_bytes[i] for i in self.writer.by_bytes.values()]
        self.device = self.old_matrices[0].device
        self._vocabulary: SampledVocabulary | None = None
        self._pool: list[str] = []
        self._drawn_with = self.generator.getstate()

    def draw(self, step: int) -> Batch:
        """Return the texts of `step`, counted from 0, under the tokenizer of that step.

        In the warm-up nothing reads texts: their rows are empty.

        Raises:
            ValueError: none of the texts has two tokens.
        """
        if step % self.options.resample_every == 0 or not self._pool:
            self._pool = list(islice(self.texts, self.sampler.texts))
            self._drawn_with = self.generator.getstate()
            self._vocabulary = self._sampled(self.generator)
        elif self._vocabulary is None:  # resumed: draw it again, as it was drawn
            generator = random.Random()
            generator.setstate(self._drawn_with)
            self._vocabulary = self._sampled(generator)
        vocabulary, ids = self._vocabulary, [[0]]
        if step >= self.options.identity_steps:
            texts = self.generator.sample(self._pool, min(self.options.batch_size, len(self._pool)))
            encoded = vocabulary.tokenizer.encode_batch(texts)
            lead, length = vocabulary.lead, self.options.max_length
            ids = [([0] * lead + [i + lead for i in one])[:length] for one in encoded]
            if max(map(len, ids)) < 2:
                raise ValueError(
                    f"none of the {len(texts)} texts of a step has two tokens: give longer texts, or a "
                    "larger batch_size"
                )
        longest = max(map(len, ids))
        ids_BT = torch.tensor([one + [0] * (longest - len(one)) for one in ids], device=self.device)
        length_B = torch.tensor([len(one) for one in ids], device=self.device)
        side = Side(ids_BT, length_B, torch.arange(longest, device=self.device) < length_B[:, None])
        return Batch(side, side, {})

    def forward(self, request: Request[Any]) -> Any:
        """Answer the halves of a step; see `requests`."""
        match request:
            case TeacherHalf(batch):
                return self._counts(batch.student)
            case StudentHalf(batch, prepared):
                return self._losses(batch.student, prepared)
        raise TypeError(f"no request of a hypernetwork: {type(request).__name__}")

    def measuring(self, *, is_prefix: bool = False) -> list[str]:
        """Return no loss: none divides by a scale of the whole step."""
        return []

    def _counts(self, side: Side) -> dict[str, Counted]:
        one = torch.ones((), device=self.device)
        if side.ids_BT.shape[1] < 2:
            return {IDENTITY: Counted(one)}
        vocabulary = self._now
        target_N = side.ids_BT[:, 1:][side.trained_BT[:, 1:]]
        tokens = vocabulary.tokenizer.tokens
        num_bytes = sum(len(tokens[i - vocabulary.lead].encode()) for i in target_N.tolist())
        return {"clm": Counted(one * num_bytes), "lexical": Counted(one)}

    def _losses(self, side: Side, prepared: Mapping[str, Counted]) -> dict[str, LossTerm]:
        vocabulary = self._now
        rows = self.hypernet(vocabulary.surfaces, self.old_matrices)
        which = [min(index, len(self.old_matrices) - 1) for index in range(len(rows))]
        if IDENTITY in prepared:
            means = [mean_rows(vocabulary.surfaces, matrix) for matrix in self.old_matrices]
            distance = self._distance([(r, means[i]) for r, i in zip(rows, which, strict=True)])
            return {IDENTITY: LossTerm(distance, prepared[IDENTITY].count)}
        is_same_V = vocabulary.same_V >= 0
        same = vocabulary.same_V[is_same_V]
        lexical = self._distance(
            [(r[is_same_V], self.old_matrices[i][same]) for r, i in zip(rows, which, strict=True)]
        )
        return {
            "clm": LossTerm(self._nats(vocabulary, rows, side), prepared["clm"].count),
            "lexical": LossTerm(lexical, prepared["lexical"].count),
        }

    def _distance(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        scale = self.hypernet.scale_I
        terms = [
            ((new - old) / scale[min(i, len(scale) - 1)]).square().mean()
            for i, (new, old) in enumerate(pairs)
            if new.numel()
        ]
        return torch.stack(terms).mean() if terms else pairs[0][0].sum()

    def figures(self, report: StepReport) -> dict[str, float]:
        """Return what a line of metrics says beside a report: clm in bits, the size of the vocabulary."""
        if "clm" not in report.losses:
            return {}
        bits = report.losses["clm"] / math.log(2)
        return {"bits_per_byte/sampled": bits, "tokens": len(self._now.tokenizer.tokens)}

    def progress(self) -> dict[str, Any]:
        """Return what draws the tokenizer of now again, and those to come; JSON."""
        generators = {"generator": self.generator.getstate(), "drawn_with": self._drawn_with}
        return {"pool": self._pool, **generators}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Continue where `progress` was taken."""
        self._pool, self._vocabulary = list(state["pool"]), None
        version, internal, gauss = state["drawn_with"]
        self._drawn_with = (version, tuple(internal), gauss)
        version, internal, gauss = state["generator"]
        self.generator.setstate((version, tuple(internal), gauss))

    @property
    def _now(self) -> SampledVocabulary:
        assert self._vocabulary is not None, "nothing was drawn"
        return self._vocabulary

    def _sampled(self, generator: random.Random) -> SampledVocabulary:
        tokenizer = sample_tokenizer(self._pool, self.sampler, generator)
        number = generator.randint(0, self.sampler.distractors)
        more = distractors(self.pieces, number, 6, generator)
        found = self.writer.vocabulary(tokenizer, more, self.hypernet.max_pieces)
        return replace(found, surfaces=found.surfaces.to(self.device), same_V=found.same_V.to(self.device))

    def _nats(self, vocabulary: SampledVocabulary, rows: Sequence[Tensor], side: Side) -> Tensor:
        """Return the nats of all scored tokens, differentiable."""
        bias_V = None if self.bias_W is None else mean_rows(vocabulary.surfaces, self.bias_W[:, None])[:, 0]
        states = self.model(side.ids_BT, Predicted(self.model, rows[0], rows[-1], bias_V))
        if not bool(states.hidden_BTD.isfinite().all()):
            raise NonFiniteError(
                "the model's hidden states are not finite under the predicted rows: lower learning_rate"
            )
        is_trained_BT = side.trained_BT[:, 1:]
        target_N = side.ids_BT[:, 1:][is_trained_BT]
        return -linear_logprob(states.hidden_BTD[:, :-1][is_trained_BT], states.head, target_N).logp_N.sum()


def stages(trainer: HypernetTrainer, optimizer: OptimizerOptions) -> tuple[Stage, ...]:
    """Return the warm-up, where there is one, and the main stage: one optimizer, one learning rate over both.

    Args:
        trainer: what is trained.
        optimizer: how fast.
    """
    options = trainer.options
    rate = LearningRate(optimizer, options.steps, options.warmup_steps)
    first = min(options.identity_steps, options.steps)
    one = build_optimizer(trainer.hypernet.named_parameters(), optimizer)
    main = Stage(
        objective=Objective(["clm", "lexical"], [1.0, options.lexical_weight], None, options.steps),
        optimizer=one,
        learning_rate=lambda step: rate(step + first),
        first_step=first,
    )
    if not first:
        return (main,)
    warm_up = Objective([IDENTITY], None, None, first)
    return Stage(name=IDENTITY, objective=warm_up, optimizer=one, learning_rate=rate), main
