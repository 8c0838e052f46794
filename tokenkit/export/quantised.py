"""A model whose linear layers hold 8-bit numbers, in Hugging Face layout: transformers loads it with torchao.

Each row of a matrix has one scale; embedding and head keep their own numbers. torchao is imported here
alone, and late: it slows what is imported after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tokenkit.errors import ExportError
from tokenkit.evaluation.text_bits import bits_of_bytes, nats_of
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.reading import read_quantised

if TYPE_CHECKING:
    from tokenkit.evaluation.opened import Opened

USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer  # and torchao installed

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
"""


@dataclass(frozen=True)
class Quantised:
    """What became of a model."""

    bytes_before: int
    """Of its weights."""
    bytes_after: int
    """Of the files of weights."""
    error: float
    """The largest difference of a logit to the model before."""
    bits_before: float | None = None
    """Bits per byte of the text."""
    bits_after: float | None = None

    def facts(self) -> dict[str, str]:
        """Return what a card says."""
        found = {
            "size": f"{self.bytes_before / 1e6:.1f} MB of weights before, {self.bytes_after / 1e6:.1f} after",
            "largest difference of a logit": f"{self.error:.2g}",
        }
        if self.bits_before is not None and self.bits_after is not None:
            found["bits per byte"] = f"{self.bits_before:.4f} before, {self.bits_after:.4f} after"
        return found


def write_int8(opened: Opened, folder: Path, texts: Sequence[str]) -> Quantised:
    """Write `opened` with 8-bit matrices, load it as anybody does, and compare.

    Args:
        opened: a model in its own numbers.
        folder: gets config.json and the weights; other files of the model may be there already.
        texts: on which bits per byte are measured before and after; may be none.

    Raises:
        ExportError: loaded back, the folder gives other logits than what was written.
    """
    from tokenkit.export.huggingface import sample_batch

    trusts = opened.trust_remote_code
    ids_BT = sample_batch(opened.model, opened.tokenizer)
    with torch.no_grad():
        before_BTV = opened.model(input_ids=ids_BT).logits.float()
        made = read_quantised(opened.folder, quantise=True, trust_remote_code=trusts)
        made.save_pretrained(folder)
        wanted_BTV = made(input_ids=ids_BT).logits.float()
        del made
        loaded = read_quantised(str(folder), quantise=False, trust_remote_code=trusts)
        got_BTV = loaded(input_ids=ids_BT).logits.float()
    if not torch.equal(got_BTV, wanted_BTV):
        error = float((got_BTV - wanted_BTV).abs().max())
        raise ExportError(f"{folder}: the quantised model, loaded back, is off by {error:.2e}")
    causal = CausalLM(loaded, opened.tokenizer.vocab_size)
    causal.form = opened.causal.form
    weights = sum(p.numel() * p.element_size() for p in opened.model.parameters())
    return Quantised(
        bytes_before=weights,
        bytes_after=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        error=float((got_BTV - before_BTV).abs().max()),
        bits_before=_bits(opened.causal, opened, texts),
        bits_after=_bits(causal.eval(), opened, texts),
    )


def _bits(model: CausalLM, opened: Opened, texts: Sequence[str]) -> float | None:
    """Return the bits per byte of some texts; None: there are none."""
    if not texts:
        return None
    window = min(512, opened.positions or 512)
    bits, _ = bits_of_bytes(nats_of(model), opened.tokenizer, texts, window=window, stride=window // 2)
    scored = [float(bit) for document in bits for bit in document if bit == bit]
    return sum(scored) / len(scored)
