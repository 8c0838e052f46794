"""The shape of a hypernetwork, as configurations and files spell it. Imports no torch: `--help` reads it."""

import math
from dataclasses import dataclass
from typing import Literal

Architecture = Literal["identity", "linear", "mlp", "transformer"]


@dataclass(frozen=True, kw_only=True)
class HypernetOptions:
    """A network that writes embedding rows. Training has none until one of these fields is set."""

    architecture: Architecture = "transformer"
    """identity: no network; linear: one projection of mean, first and last piece of a token; mlp:
    feed-forward blocks between; transformer: blocks over all pieces."""

    num_layers: int = 1
    """Blocks of `mlp` and `transformer`."""

    num_heads: int = 8
    """Attention heads of `transformer`; they must divide the width of the embeddings."""

    residual: bool = True
    """Write the difference from a row, at first 0; false: the row itself."""

    residual_alpha: float = 1.0
    """Weight of that difference."""

    use_attention: bool = True
    """Attend over the pieces of a token."""

    use_attention_mask: bool = True
    """Leave padding out of the attention; it is then not computed at all."""

    shared: bool = True
    """One network for input and output embeddings, where two are written."""

    def __post_init__(self) -> None:
        """Check what does not depend on the model."""
        for name in ("num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"hypernet.{name} must be at least 1, got {getattr(self, name)}")
        if not (self.residual_alpha and math.isfinite(self.residual_alpha)):
            raise ValueError(
                f"hypernet.residual_alpha must be finite and not 0, got {self.residual_alpha}: to have no "
                "network set hypernet.architecture to identity"
            )
