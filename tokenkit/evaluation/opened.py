"""A model for use, out of any place that holds one: how every command after training gets its model.

with open_model("run", dtype=torch.float32) as opened:
    opened.model.generate(...)                     the Hugging Face model
    opened.causal(ids_BT).head                     the same weights, as hidden states and head
    opened.tokenizer, opened.hf_tokenizer          the byte-level view, and that of transformers
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tokenkit.config.models import ModelSource
from tokenkit.errors import ConfigError, DataError, ExitCode, blaming_data
from tokenkit.export.huggingface import ExportRequest, export_huggingface
from tokenkit.models.causal_lm import DTYPES, CausalLM, LoadOptions, load_causal_lm
from tokenkit.models.reading import read_configuration
from tokenkit.run.ending import read_outcome
from tokenkit.run.redaction import complain
from tokenkit.tokenization.files.sources import huggingface_tokenizer
from tokenkit.tokenization.tokenizer import Tokenizer, load_tokenizer
from tokenkit.training.exporting import Places, facts_of, restore
from tokenkit.training.pair import check_is_the_models_own

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Opened:
    """A model that is used, not changed."""

    name: str
    """As it was asked for."""
    folder: str
    """The folder or hub name that was read."""
    causal: CausalLM
    """Hidden states and head, in evaluation mode; with the expansion of a byte model that has one."""
    tokenizer: Tokenizer
    tokenizer_spec: str
    trust_remote_code: bool

    @property
    def model(self) -> Any:
        """The Hugging Face model over the same weights: `generate` works."""
        return self.causal.causal_lm

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = self.causal.embedding.weight.device
        return device

    @property
    def positions(self) -> int | None:
        """The tokens that it reads at most; None: its configuration names no limit."""
        limit = getattr(self.causal.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @cached_property
    def hf_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as transformers has it: the folder's, or the one that was named in its place."""
        if self.tokenizer_spec != self.folder:
            return self.tokenizer.to_huggingface()
        return huggingface_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)


@contextmanager
def open_model(
    name: str,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    tokenizer_name: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    places: Places | None = None,
) -> Iterator[Opened]:
    """Open a model in evaluation mode, without gradients.

    The model of a run that is not done, or of a checkpoint, is first written as `tokenkit export` writes it,
    to a folder that goes at the end: what is used here is what would be handed on.

    Args:
        name: a folder in Hugging Face layout, a name on the hub, a run's folder, or one of its checkpoints.
        dtype: of the weights; "auto": as they are stored.
        tokenizer_name: spec of its tokenizer (docs/tokenizer_specs.md). None: the one that lies beside it.
        trust_remote_code: run code that comes with the model or its tokenizer. Byte models with input-id
            expansion come with code.
        device: where it goes.
        places: where the files that a run began with lie now.

    Raises:
        FileNotFoundError: there is no such folder, or it holds neither a model nor a run.
        CheckpointError: a checkpoint is torn, or its base model or tokenizers are others now.
        ConfigError: a run whose model brings code that is not trusted here, or a `tokenizer_name` whose ids
            mean other text than those of the tokenizer beside the model.
        DataError: a model or tokenizer that cannot be read, or a tokenizer with more ids than the model has
            rows, or with far fewer.
    """
    placed = _usable(device)
    with tempfile.TemporaryDirectory(prefix="tokenkit-") as scratch:
        folder, trusts = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name, False
        if (run := finished_export(folder)) is not None:
            folder = str(run)
        elif is_training(folder):
            folder, trusts = _written(folder, places or Places(), Path(scratch), trust_remote_code), True
        trust = trust_remote_code or trusts
        spec = tokenizer_name or folder
        with blaming_data():
            if not Path(folder).is_dir():  # of a name that leads nowhere the model is missing first
                read_configuration(folder, LoadOptions(trust_remote_code=trust))
            tokenizer = load_tokenizer(spec, trust_remote_code=trust)
            if spec != folder:
                own = ModelSource(pretrained_model_name_or_path=folder, tokenizer_name=spec)
                check_is_the_models_own(tokenizer, own)
            options = LoadOptions(dtype=dtype, trust_remote_code=trust, for_use=True)
            causal = load_causal_lm(folder, tokenizer.vocab_size, options)
        _compare_rows(name, tokenizer.vocab_size, causal, is_named=spec != folder)
        causal.eval().requires_grad_(False).to(placed)
        yield Opened(name, folder, causal, tokenizer, spec, trust)


def _compare_rows(name: str, ids: int, causal: CausalLM, *, is_named: bool) -> None:
    """Say where a model has more rows than its tokenizer has ids; refuse more than any padding explains."""
    rows = causal.embedding.weight.shape[0]
    said = f"the tokenizer has {ids:,} ids and the model {rows:,} rows"
    if rows - ids > max(MOST_PADDING, rows // 8):
        raise DataError(f"{name}: {said}, more than padding explains: it is the tokenizer of another model")
    if rows > ids and (is_named or rows - ids >= USUAL_PADDING):
        complain(f"tokenkit: {name}: {said}: the last {rows - ids:,} are taken for padding")


USUAL_PADDING = 256
"""Rows: as many are passed over without a word, since sizes are rounded up to a multiple."""
MOST_PADDING = 1024
"""Rows beyond the tokenizer's that even a small model may have; of a large one an eighth (phi-2 has 905)."""


def _usable(device: torch.device | str) -> torch.device:
    """Return a device that is here; ConfigError for all others."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {found}, and this machine shows {torch.cuda.device_count()} GPUs: set cpu"
        )
    return found


def finished_export(name: str) -> Path | None:
    """Return the model that a run wrote at its end; None where this is no run, or one that is not done."""
    export = Path(name) / "export"
    if not (export / "config.json").is_file() or (Path(name) / "config.json").is_file():
        return None
    if not (Path(name) / "checkpoints").is_dir():
        return export
    said = read_outcome(Path(name)).get("outcome")
    return export if said == ExitCode.DONE.name.lower() else None


def is_training(name: str) -> bool:
    """Whether a path is that of a run or checkpoint; also one that is missing and named as they are."""
    path = Path(name)
    if (path / "config.json").is_file():
        return False
    is_run = (path / "checkpoints").is_dir() or path.name == "checkpoints"
    return is_run or (path / "manifest.json").is_file() or path.name.startswith("step_")


def _written(name: str, places: Places, scratch: Path, trust_remote_code: bool) -> str:
    """Write the model of a run or checkpoint, and return its folder."""
    found = restore(name, places, trust_remote_code=trust_remote_code)
    dtype = DTYPES[found.settings.training.dtype]
    request = ExportRequest(folder=scratch / "model", dtype=dtype, facts=facts_of(found))
    return str(export_huggingface(found.student, found.state, found.tokenizer, request))
