"""From the configuration to the losses of a run: each one's options, and what it reads of the tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenkit.config import TrainConfig
from tokenkit.config.errors import blaming_data
from tokenkit.config.objective import Latents
from tokenkit.kernels.projected_divergence import make_projection
from tokenkit.losses import (
    AlmOptions,
    ClmOptions,
    DskdOptions,
    GoldJsOptions,
    GoldOptions,
    GoldRules,
    LatentsOptions,
    Loss,
    MinedOptions,
    SidePathOptions,
    UldOptions,
    XTokenOptions,
    resolve,
)
from tokenkit.pairing.bias import PairBiases
from tokenkit.pairing.bias_files import load_biases
from tokenkit.pairing.matching import TokenPairs, matching_tokens, projection_entries, published_pairs
from tokenkit.structs import ChunkKind
from tokenkit.tokenization.byteify import Tokenizer
from tokenkit.tokenization.written import ids_by_bytes
from tokenkit.training.distillation import ActiveLoss

CHUNKS: dict[str, ChunkKind] = {"naive": "unconstrained", "space": "space"}


@dataclass(frozen=True, slots=True)
class _Source:
    """What options are made of."""

    config: TrainConfig
    student: Tokenizer
    teacher: Tokenizer
    device: torch.device

    @property
    def workspace(self) -> dict[str, Any]:
        return {"workspace_bytes": self.config.training.loss_workspace_mib * 2**20}

    @property
    def temperatures(self) -> dict[str, Any]:
        baseline = self.config.objective.baseline
        return {"temperature": baseline.kd_temp, "teacher_temperature": baseline.teacher_temperature}

    @property
    def divergence(self) -> dict[str, Any]:
        baseline = self.config.objective.baseline
        return {
            "divergence": baseline.divergence,
            "skew": baseline.skew_lambda,
            "alpha": baseline.adaptive_kl_alpha,
        }

    def pairs(self, find: Callable[[Tokenizer, Tokenizer], TokenPairs] = matching_tokens) -> dict[str, Any]:
        """Tokens of the same bytes or role, or what `find` finds."""
        pairs = find(self.student, self.teacher)
        return {
            "student_index": torch.from_numpy(pairs.student_P).to(self.device),
            "teacher_index": torch.from_numpy(pairs.teacher_P).to(self.device),
        }

    def unbiased_pairs(self) -> dict[str, Any]:
        """Of the tokens of the same bytes or role, those with small tokenisation biases."""
        pairs = self.pairs()
        threshold = self.config.objective.side_path.tokenizer_pair_bias_threshold_side_path
        rule = read_biases(self.config, self.teacher, self.student).rule(threshold)
        is_small_P = rule(pairs["teacher_index"].cpu().numpy(), pairs["student_index"].cpu().numpy())
        if not is_small_P.any():
            raise ValueError(
                f"no pair of tokens has tokenisation biases of at most {threshold}: raise "
                "tokenizer_pair_bias_threshold_side_path"
            )
        kept_P = torch.from_numpy(is_small_P).to(self.device)
        return {name: index_P[kept_P] for name, index_P in pairs.items()}

    def mapping(self) -> Tensor:
        """The mined mapping, [V]."""
        path = self.config.objective.mined_mapping_path
        assert path is not None, "the configuration was checked"
        with blaming_data():
            file = Path(path).expanduser()
            mapping_V = read_mapping(file, self.student.vocab_size, self.teacher.vocab_size)
            check_mapped_pair(file, self.student, self.teacher)
        return mapping_V.to(self.device)


def active_losses(
    config: TrainConfig, student: Tokenizer, teacher: Tokenizer, device: torch.device
) -> list[ActiveLoss]:
    """Look the losses up, and give each its options, tensors among them on `device`.

    Raises:
        ValueError, FileNotFoundError: no such loss, or a mined mapping that cannot be read or does not fit.
    """
    source = _Source(config, student, teacher, device)
    active = []
    for name in config.objective.losses:
        loss = resolve(name)
        make = _MAKERS.get(loss.options, lambda source, loss: loss.options())
        active.append(ActiveLoss(name, loss, make(source, loss)))
    return active


def read_biases(config: TrainConfig, teacher: Tokenizer, student: Tokenizer) -> PairBiases:
    """Read what `tokenkit pair-stats` wrote for this pair."""
    path = config.objective.alm.tokenizer_pair_data_path
    assert path is not None, "the configuration was checked"
    with blaming_data():
        return load_biases(Path(path).expanduser(), teacher, student)


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


def _alm(source: _Source, loss: Loss) -> AlmOptions:
    assert loss.chunks is not None
    return AlmOptions(**source.config.objective.alm.options(loss.chunks), **source.workspace)


def _side_path(source: _Source, loss: Loss) -> SidePathOptions:
    options = source.config.objective.side_path
    pairs = {
        "exact_match": source.pairs,
        "bias_threshold": source.unbiased_pairs,
        "mined": lambda: _mined_pairs(source),
    }[options.side_path_mapping_mode]
    return SidePathOptions(**pairs(), distance_fn=options.side_path_distance_fn, **source.workspace)


def _mined_pairs(source: _Source) -> dict[str, Any]:
    """Return the mined pairs, each teacher id once: probabilities of what repeats add up to more than 1.

    Of several student ids with one nearest teacher id, the one that is written with its bytes counts, else
    the lowest.
    """
    mapping_V = source.mapping().cpu()
    student, teacher = source.student.token_bytes, source.teacher.token_bytes
    written = ids_by_bytes(source.student)
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
    student_P, teacher_P = torch.tensor(pairs, device=source.device).unbind(1)
    return {"student_index": student_P.contiguous(), "teacher_index": teacher_P.contiguous()}


def latents_options(options: Latents) -> LatentsOptions:
    """Return the options of `alm_latents`, and of the loss of a prefix stage."""
    return LatentsOptions(
        align=options.latents_to_align,
        normalization=options.latents_normalization,
        chunks=CHUNKS[options.latents_chunks],
        project=options.latents_do_project,
    )


def _dskd(source: _Source, loss: Loss) -> DskdOptions:
    baseline = source.config.objective.baseline
    return DskdOptions(
        causal=baseline.dskd_use_causal_attention_mask,
        **source.divergence,
        **source.temperatures,
        **source.workspace,
    )


def _xtoken(source: _Source, loss: Loss) -> XTokenOptions:
    entries = projection_entries(source.student, source.teacher)
    student_M, teacher_M, weight_M = (torch.from_numpy(values_M) for values_M in entries)
    sizes = (source.student.vocab_size, source.teacher.vocab_size)
    projection = make_projection(student_M, teacher_M, weight_M, *sizes)
    return XTokenOptions(projection.to(source.device), **source.temperatures, **source.workspace)


def _uld(source: _Source, loss: Loss) -> UldOptions:
    baseline = source.config.objective.baseline
    return UldOptions(
        temperature=baseline.kd_temp,
        exact=baseline.exact_sort,
        extended=baseline.uld_extended,
        **source.workspace,
    )


def _gold(source: _Source, loss: Loss) -> GoldOptions:
    baseline = source.config.objective.baseline
    return GoldOptions(
        GoldRules(**baseline.gold.rules()),
        exact=baseline.exact_sort is not False,
        **(source.pairs(published_pairs) if baseline.gold.uld_use_hybrid_loss else {}),
        **source.workspace,
    )


def _gold_js(source: _Source, loss: Loss) -> GoldJsOptions:
    exact = source.config.objective.baseline.exact_sort
    return GoldJsOptions(**source.pairs(), exact=exact, **source.temperatures, **source.workspace)


def _mined(source: _Source, loss: Loss) -> MinedOptions:
    return MinedOptions(source.mapping(), **source.divergence, **source.temperatures, **source.workspace)


_MAKERS: dict[Any, Callable[[_Source, Loss], Any]] = {
    ClmOptions: lambda source, loss: ClmOptions(**source.workspace),
    AlmOptions: _alm,
    SidePathOptions: _side_path,
    LatentsOptions: lambda source, loss: latents_options(source.config.objective.latents),
    UldOptions: _uld,
    MinedOptions: _mined,
    DskdOptions: _dskd,
    GoldOptions: _gold,
    GoldJsOptions: _gold_js,
    XTokenOptions: _xtoken,
}
"""By the class of a loss's options."""
