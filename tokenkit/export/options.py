"""Options of the formats that a model is converted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GgufType = Literal["f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """What one format alone asks for."""

    gguf_type: GgufType | None = None
    """Of the matrices of a GGUF file. None: as the weights are stored."""

    text: str | None = None
    """Of int8: file of documents whose bits per byte are measured before and after, 64 at most."""

    use_cache: bool = True
    """Of onnx: keys and values are inputs and outputs of the graph; a past of length 0 begins a text."""

    dynamic_axes: bool = True
    """Of onnx: any number of documents and tokens. There is no graph of fixed sizes."""

    device: str = "cpu"
    """Without effect: what is written is the same on every device."""
