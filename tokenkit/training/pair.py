"""The tokenizers of a run, and what losses look up of two of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenkit.config import TrainConfig
from tokenkit.config.models import ModelSource
from tokenkit.errors import ConfigError, blaming_data
from tokenkit.kernels.projected_divergence import Projection, make_projection
from tokenkit.pairing.bias.bias import PairBiases
from tokenkit.pairing.bias.files import load_biases
from tokenkit.pairing.matching import TokenPairs, matching_tokens, projection_entries, published_pairs
from tokenkit.tokenization.spec import parse_spec
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer
from tokenkit.tokenization.written import ids_by_bytes


@dataclass(frozen=True, slots=True)
class Tokenizers:
    """The three tokenizers of a transfer; two of them are often the same."""

    old: Tokenizer
    """What the student was trained with."""
    target: Tokenizer
    """What the student ends with."""
    teacher: Tokenizer
    fingerprints: dict[str, str]
    """A digest of each, for the checkpoints."""


def load_tokenizers(config: TrainConfig, *, needs_teacher: bool = True) -> Tokenizers:
    """Load the tokenizers of student, target and teacher; a tokenizer that is named twice is loaded once.

    Without a teacher, the student's old one stands for its tokenizer.
    """
    old = tokenizer_of(config.student, config)
    target = target_of(config) or old
    teacher = old if config.teacher is None or not needs_teacher else tokenizer_of(config.teacher, config)
    digests = {one: one.fingerprint() for one in {old, target, teacher}}
    named = {"old": digests[old], "target": digests[target], "teacher": digests[teacher]}
    return Tokenizers(old, target, teacher, named)


def tokenizer_of(source: ModelSource, config: TrainConfig) -> Tokenizer:
    """Load the tokenizer that a model has; see `check_is_the_models_own`."""
    spec = source.tokenizer_name or source.pretrained_model_name_or_path
    tokenizer = _load(spec, config, revision=source.revision)
    if source.new_model is None:
        check_is_the_models_own(tokenizer, source)
    return tokenizer


def target_of(config: TrainConfig) -> Tokenizer | None:
    """Load the tokenizer that the student ends with; None: that which it has."""
    name, to_add = config.target.target_tokenizer_name, config.target.tokens_to_add
    if name is not None:
        return _load(name, config, tokens_to_add=to_add)
    if not to_add:
        return None
    student = config.student
    spec = student.tokenizer_name or student.pretrained_model_name_or_path
    return _load(spec, config, tokens_to_add=to_add, revision=student.revision)


def _load(spec: str, config: TrainConfig, **options: Any) -> Tokenizer:
    parsed = parse_spec(spec)  # a mistake in it is one of the configuration, all others are of the files
    with blaming_data():
        return load_tokenizer(parsed, trust_remote_code=config.run.trust_remote_code, **options)


def check_is_the_models_own(tokenizer: Tokenizer, source: ModelSource) -> None:
    """Refuse a tokenizer whose ids mean something else than those in the model's own folder.

    Raises:
        ConfigError: fewer than 99 % of the ids that both have are the same bytes.
    """
    folder = Path(source.pretrained_model_name_or_path)
    if source.tokenizer_name is None or not (folder / "tokenizer.json").is_file():
        return
    own = load_tokenizer(str(folder))
    common = min(own.vocab_size, tokenizer.vocab_size)
    is_text_V = ~(own.is_special_V[:common] | tokenizer.is_special_V[:common])
    ids = np.flatnonzero(is_text_V).tolist()
    same = sum(own.token_bytes[i] == tokenizer.token_bytes[i] for i in ids)
    if same < 0.99 * len(ids):
        raise ConfigError(
            f"tokenizer_name {source.tokenizer_name!r} is not the tokenizer of {folder}: only {same:,} of "
            f"{len(ids):,} ids mean the same text there; name the tokenizer that the model was trained with "
            "(one that it shall get is target_tokenizer_name of train and zett)"
        )


Columns = dict[str, Tensor]
"""`student_index` and `teacher_index`, int64 [P]."""


@dataclass(frozen=True)
class Pair:
    """Student and teacher tokenizer; everything else is found when a loss asks for it."""

    student: Tokenizer
    teacher: Tokenizer
    device: torch.device
    """Where tensors go."""
    mapping_path: str | None = None
    """What `tokenkit mined-mapping` wrote."""
    statistics_path: str | None = None
    """What `tokenkit pair-stats` wrote."""

    def matching(self) -> Columns:
        """Return the tokens of the same bytes or role."""
        return self._columns(matching_tokens(self.student, self.teacher))

    def published(self) -> Columns:
        """Return the tokens that TRL's GOLD takes for the same."""
        return self._columns(published_pairs(self.student, self.teacher))

    def _columns(self, pairs: TokenPairs) -> Columns:
        return {
            "student_index": torch.from_numpy(pairs.student_P).to(self.device),
            "teacher_index": torch.from_numpy(pairs.teacher_P).to(self.device),
        }

    @cached_property
    def biases(self) -> PairBiases:
        """The tokenisation biases of the pair; ValueError where they are another pair's."""
        if self.statistics_path is None:
            raise ValueError("tokenizer_pair_data_path is not set: make it with `tokenkit pair-stats`")
        with blaming_data():
            return load_biases(Path(self.statistics_path).expanduser(), self.teacher, self.student)

    def unbiased(self, threshold: float) -> Columns:
        """Return the tokens of the same bytes or role that have small tokenisation biases."""
        pairs = self.matching()
        is_small_P = self.biases.rule(threshold)(
            pairs["teacher_index"].cpu().numpy(), pairs["student_index"].cpu().numpy()
        )
        if not is_small_P.any():
            raise ValueError(
                f"no pair of tokens has tokenisation biases of at most {threshold}: raise "
                "tokenizer_pair_bias_threshold_side_path"
            )
        kept_P = torch.from_numpy(is_small_P).to(self.device)
        return {name: index_P[kept_P] for name, index_P in pairs.items()}

    def mapping(self) -> Tensor:
        """Return the mined mapping, int64 [V]; ValueError where it was mined for another pair."""
        if self.mapping_path is None:
            raise ValueError(
                "baseline_mined needs the option teacher_index: a teacher id for each student id"
            )
        with blaming_data():
            file = Path(self.mapping_path).expanduser()
            mapping_V = read_mapping(file, self.student.vocab_size, self.teacher.vocab_size)
            check_mapped_pair(file, self.student, self.teacher)
        return mapping_V.to(self.device)

    def nearest(self) -> Columns:
        """Return the mined pairs, each teacher id once: probabilities of what repeats add up to more than 1.

        Of several student ids with one nearest teacher id, the one that is written with its bytes counts,
        else the lowest.
        """
        mapping_V = self.mapping().cpu()
        student, teacher = self.student.token_bytes, self.teacher.token_bytes
        written = ids_by_bytes(self.student)
        is_same_V = torch.tensor(
            [
                student[s] == teacher[t] and written.get(student[s], s) == s
                for s, t in enumerate(mapping_V.tolist())
            ]
        )
        order_V = (~is_same_V).long().argsort(stable=True)
        winner: dict[int, int] = {}
        for s in order_V.tolist():
            winner.setdefault(int(mapping_V[s]), s)
        pairs = sorted((s, t) for t, s in winner.items())
        student_P, teacher_P = torch.tensor(pairs, device=self.device).unbind(1)
        return {"student_index": student_P.contiguous(), "teacher_index": teacher_P.contiguous()}

    def projection(self) -> Projection:
        """Return which of the teacher's tokens each student token goes to, with weights."""
        entries = projection_entries(self.student, self.teacher)
        student_M, teacher_M, weight_M = (torch.from_numpy(values_M) for values_M in entries)
        sizes = (self.student.vocab_size, self.teacher.vocab_size)
        return make_projection(student_M, teacher_M, weight_M, *sizes).to(self.device)

    def are_one(self) -> bool:
        """Whether both sides have the same tokenizer."""
        return self.student is self.teacher or self.student.fingerprint() == self.teacher.fingerprint()


def read_mapping(path: Path, vocab_size: int, teacher_vocab_size: int) -> Tensor:
    """Read a teacher id for each student id.

    Args:
        path: what `tokenkit mined-mapping` wrote, its folder or mapping.npy; or a .pt file with a tensor, or
            a folder with mapping.pt.
        vocab_size: of the student.
        teacher_vocab_size: of the teacher.

    Returns:
        int64 [vocab_size].

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file holds something else, or ids of other tokenizers.
    """
    file = path / "mapping.npy" if path.is_dir() else path
    if not file.exists() and (path / "mapping.pt").exists():
        file = path / "mapping.pt"
    if not file.is_file():
        raise FileNotFoundError(
            f"mined_mapping_path: {file} does not exist; make it with `tokenkit mined-mapping`"
        )
    try:
        if file.suffix == ".npy":
            mapping_V = torch.from_numpy(np.load(file, allow_pickle=False))
        else:
            mapping_V = torch.as_tensor(torch.load(file, weights_only=True))
    except Exception as error:  # of numpy, torch, or the format inside, each in words of its own
        if isinstance(error, OSError):
            raise
        raise ValueError(
            f"mined_mapping_path {file} must be an npy file, or a .pt file with a tensor, and is none: "
            "make it with `tokenkit mined-mapping`"
        ) from error
    if mapping_V.ndim != 1 or mapping_V.is_floating_point() or len(mapping_V) != vocab_size:
        raise ValueError(
            f"mined_mapping_path {file} must hold one teacher id for each of the student's {vocab_size} ids: "
            f"got {mapping_V.dtype} of shape {tuple(mapping_V.shape)}; was it mined for these tokenizers?"
        )
    low, high = int(mapping_V.min()), int(mapping_V.max())
    if low < 0 or high >= teacher_vocab_size:
        raise ValueError(
            f"mined_mapping_path {file} must hold ids of the teacher's {teacher_vocab_size}: got {low} to "
            f"{high}; was it mined for these tokenizers?"
        )
    return mapping_V.long()


def check_mapped_pair(path: Path, student: Tokenizer, teacher: Tokenizer) -> None:
    """Compare both tokenizers with those that the summary beside a mapping names, if there is one.

    Raises:
        ValueError: the mapping was mined for another pair.
    """
    summary = (path if path.is_dir() else path.parent) / "summary.json"
    if not summary.is_file():
        return
    about = json.loads(summary.read_text(encoding="utf-8"))
    for side, tokenizer in (("student", student), ("teacher", teacher)):
        mined = about.get(side, {})
        if mined.get("fingerprint", tokenizer.fingerprint()) != tokenizer.fingerprint():
            raise ValueError(
                f"mined_mapping_path {path} was mined for another {side} tokenizer "
                f"({mined.get('tokenizer')}), not for {tokenizer.spec}: make it for this pair with `tokenkit "
                "mined-mapping`"
            )
