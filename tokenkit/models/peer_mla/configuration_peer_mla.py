"""The configuration of a PEER + MLA model in transformers' form."""

from difflib import get_close_matches
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .settings import MODEL, REFUSED, model_settings, peer_layers


class PeerMlaConfig(PreTrainedConfig):
    """What `settings.py` lists, as attributes, beside those of every configuration.

    Raises:
        ValueError: settings that cannot be, named with the rule.
    """

    model_type = "peer_mla"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, **given: Any):
        own = {key: value for key, value in given.items() if key in MODEL}
        others = {
            key: value for key, value in given.items() if key not in MODEL and key != "num_key_value_heads"
        }
        for key in others:  # transformers hands over what it likes, so only what looks like ours is refused
            is_near = not hasattr(PreTrainedConfig, key) and get_close_matches(key, MODEL, cutoff=0.7)
            if key in REFUSED or is_near:
                model_settings({key: None})
        for key, value in model_settings(own).items():
            setattr(self, key, value)
        self.num_key_value_heads = self.num_attention_heads
        super().__init__(**others)

    @property
    def layers_of_experts(self) -> list[int]:
        """Which layers have experts in the place of an MLP."""
        return peer_layers(vars(self))


AutoConfig.register("peer_mla", PeerMlaConfig, exist_ok=True)
PeerMlaConfig.register_for_auto_class()
