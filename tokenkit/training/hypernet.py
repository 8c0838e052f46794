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
from tokenkit.kernels import deferred
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.models.causal_lm import CausalLM, effective_weight, head_bias
from tokenkit.optim import LearningRate, set_learning_rate
from tokenkit.run.state import State
from tokenkit.structs import Head
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.tokenization.written import ids_by_bytes


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


class HypernetTrainer:
    """A hypernetwork, its optimizer and the texts that it is trained on.

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

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of `step`, counted from 0, and what to report of it."""
        if step % self.options.resample_every == 0 or not self._pool:
            self._pool = list(islice(self.texts, self.sampler.texts))
            self._drawn_with = self.generator.getstate()
            self._vocabulary = self._sampled(self.generator)
        elif self._vocabulary is None:  # resumed: draw it again, as it was drawn
            generator = random.Random()
            generator.setstate(self._drawn_with)
            self._vocabulary = self._sampled(generator)
        vocabulary = self._vocabulary
        rows = self.hypernet(vocabulary.surfaces, self.old_matrices)
        which = [min(index, len(self.old_matrices) - 1) for index in range(len(rows))]
        if step < self.options.identity_steps:
            means = [mean_rows(vocabulary.surfaces, matrix) for matrix in self.old_matrices]
            distance = self._distance([(r, means[i]) for r, i in zip(rows, which, strict=True)])
            return distance, {"loss/identity": float(distance.detach())}
        is_same_V = vocabulary.same_V >= 0
        same = vocabulary.same_V[is_same_V]
        lexical = self._distance(
            [(r[is_same_V], self.old_matrices[i][same]) for r, i in zip(rows, which, strict=True)]
        )
        clm, bits = self._clm(vocabulary, rows)
        return clm + self.options.lexical_weight * lexical, {
            "loss/clm": float(clm.detach()),
            "loss/lexical": float(lexical.detach()),
            "bits_per_byte/sampled": bits,
            "tokens": len(vocabulary.tokenizer.tokens),
        }

    def _distance(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        scale = self.hypernet.scale_I
        terms = [
            ((new - old) / scale[min(i, len(scale) - 1)]).square().mean()
            for i, (new, old) in enumerate(pairs)
            if new.numel()
        ]
        return torch.stack(terms).mean() if terms else pairs[0][0].sum()

    def state_dict(self) -> dict[str, Any]:
        """Return what draws the tokenizer of now again, and those to come; JSON."""
        generators = {"generator": self.generator.getstate(), "drawn_with": self._drawn_with}
        return {"pool": self._pool, **generators}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._pool, self._vocabulary = list(state["pool"]), None
        version, internal, gauss = state["drawn_with"]
        self._drawn_with = (version, tuple(internal), gauss)
        version, internal, gauss = state["generator"]
        self.generator.setstate((version, tuple(internal), gauss))

    def _sampled(self, generator: random.Random) -> SampledVocabulary:
        tokenizer = sample_tokenizer(self._pool, self.sampler, generator)
        number = generator.randint(0, self.sampler.distractors)
        more = distractors(self.pieces, number, 6, generator)
        found = self.writer.vocabulary(tokenizer, more, self.hypernet.max_pieces)
        return replace(found, surfaces=found.surfaces.to(self.device), same_V=found.same_V.to(self.device))

    def _clm(self, vocabulary: SampledVocabulary, rows: Sequence[Tensor]) -> tuple[Tensor, float]:
        """Return nats per byte, differentiable, and the same in bits."""
        texts = self.generator.sample(self._pool, min(self.options.batch_size, len(self._pool)))
        encoded = vocabulary.tokenizer.encode_batch(texts)
        lead, length = vocabulary.lead, self.options.max_length
        ids = [([0] * lead + [i + lead for i in one])[:length] for one in encoded]
        longest = max(map(len, ids))
        if longest < 2:
            raise ValueError(
                f"none of the {len(texts)} texts of a step has two tokens: give longer texts, or a larger "
                "batch_size"
            )
        ids_BT = torch.tensor([one + [0] * (longest - len(one)) for one in ids], device=self.device)
        length_B1 = torch.tensor([[len(one)] for one in ids], device=self.device)
        is_token_BT = torch.arange(longest, device=self.device) < length_B1
        bias_V = None if self.bias_W is None else mean_rows(vocabulary.surfaces, self.bias_W[:, None])[:, 0]
        predicted = Predicted(self.model, rows[0], rows[-1], bias_V)
        states = self.model(ids_BT, predicted)
        if not bool(states.hidden_BTD.isfinite().all()):
            raise NonFiniteError(
                "the model's hidden states are not finite under the predicted rows: lower learning_rate"
            )
        is_trained_BT = is_token_BT[:, 1:]
        target_N = ids_BT[:, 1:][is_trained_BT]
        logp_N = linear_logprob(states.hidden_BTD[:, :-1][is_trained_BT], states.head, target_N).logp_N
        num_bytes = sum(len(vocabulary.tokenizer.tokens[i - lead].encode()) for i in target_N.tolist())
        nats = -logp_N.sum() / num_bytes
        return nats, float(nats.detach()) / math.log(2)


def take_step(trainer: HypernetTrainer, state: State, rate: LearningRate) -> dict[str, float]:
    """Run the step that is next, and return its figures.

    Raises:
        NonFiniteError: a loss that is not finite; nothing was updated.
    """
    optimizer = state.optimizer
    assert optimizer is not None
    set_learning_rate(optimizer, rate(state.step))
    loss, figures = trainer.loss(state.step)
    if not math.isfinite(float(loss.detach())):
        raise NonFiniteError(
            f"the loss of step {state.step + 1} is {float(loss.detach())}: lower learning_rate"
        )
    deferred.raise_found()
    optimizer.zero_grad()
    loss.backward()
    limit = rate.options.max_grad_norm or math.inf
    norm = nn.utils.clip_grad_norm_(trainer.hypernet.parameters(), limit)
    optimizer.step()
    figures = {**figures, "grad_norm": float(norm), "learning_rate": rate(state.step)}
    state.step += 1
    return figures
