"""How text is generated. Torch is not imported: commands read these options before anything heavy."""

from __future__ import annotations

from dataclasses import dataclass

from tokenkit.errors import ConfigError, at_least


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The choice of each token, and when to end."""

    max_new_tokens: int = 256
    """Tokens that are written, at most; fewer where the model has fewer positions left."""

    temperature: float = 0.0
    """0: the likeliest token each time. Above: a token is drawn, and this divides the logits."""

    top_k: int | None = None
    """Draw from this many likeliest tokens. None: from all."""

    top_p: float | None = None
    """Draw from the fewest likeliest tokens that hold this share of the probability. None: from all."""

    num_beams: int = 1
    """Texts that are kept side by side, of which the likeliest is written at the end; 1: none but one."""

    stop: tuple[str, ...] = ()
    """Texts that end the writing where they appear; they are not written."""

    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        """Check the ranges, and what would not be read."""
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("temperature", self.temperature, 0)
        at_least("top_k", self.top_k, 1)
        at_least("num_beams", self.num_beams, 1)
        at_least("seed", self.seed, 0, 2**63 - 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}")
        if "" in self.stop:
            raise ConfigError("stop holds an empty text, which stands everywhere: leave it out")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise ConfigError(f"{name} is for drawing, and temperature 0 takes the likeliest: set both")
