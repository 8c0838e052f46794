"""What a user may say about text, in the words for it. Nothing here loads torch."""

from typing import Literal

ChatTemplateMode = Literal[
    "surround_instruct",
    "direct_encode",
    "direct_encode_no_force_eos",
    "direct_encode_no_force_bos",
    "direct_encode_no_force_bos_no_force_eos",
]
LossMaskMode = Literal["assistant", "all"]
SpecialTokensMode = Literal["identity", "ignore", "ignore_pad"]

SPACE_BYTES = {"space": b" ", "tab": b"\t", "newline": b"\n"}
SPACE_MASK_PARTS = (*SPACE_BYTES, "special")
"""Of `space_mask_mode`, joined with `+`."""
