"""Input-id expansion as a module: byte embeddings plus those of the longest old tokens that end there.

    embedded_t = byte_embedding(id_t) + old_embedding(expanded_t)      expanded: tokenization/expansion.py

The second term is 0 where no old token ends.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tokenkit.tokenization.expansion import ExpansionTables, expand

TABLES = ("block_key_P", "edge_key_E", "token_E")
"""The arrays of `ExpansionTables`."""


class InputExpansion(nn.Module):
    """The old input embedding, and the tables that say which of its rows each byte adds.

    Args:
        embedding: the model's input embedding, for what its class does to a row (Gemma's scales it).
        tables: of the old vocabulary.
        old_WD: the old rows, those of padding left out; they are copied.

    The tables are no part of the state: they are made from the old tokenizer, whose fingerprint a
    checkpoint holds.
    """

    block_key_P: Tensor
    edge_key_E: Tensor
    token_E: Tensor

    def __init__(self, embedding: Any, tables: ExpansionTables, old_WD: Tensor):
        super().__init__()
        self.old = copy.deepcopy(embedding)
        self.old.weight = nn.Parameter(old_WD.detach().clone())
        self.old.num_embeddings, self.old.padding_idx = len(old_WD), None
        self.max_bytes = tables.max_bytes
        for name in TABLES:
            self.register_buffer(name, torch.from_numpy(getattr(tables, name)), persistent=False)

    @classmethod
    def of_exported(cls, written: Any, max_bytes: int) -> InputExpansion:
        """Return the expansion of a model as it was exported; rows and tables are the same tensors."""
        expansion = cls.__new__(cls)
        nn.Module.__init__(expansion)
        expansion.old, expansion.max_bytes = written.old, max_bytes
        for name in TABLES:
            expansion.register_buffer(name, getattr(written, name), persistent=False)
        return expansion

    def with_rows(self, embedding: Any, old_WD: Tensor) -> InputExpansion:
        """Return the same expansion with other rows, on the CPU: whole where this one's are sharded."""
        arrays = {name: getattr(self, name).cpu().numpy() for name in TABLES}
        return InputExpansion(embedding, ExpansionTables(**arrays, max_bytes=self.max_bytes), old_WD)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return what is added to the byte embeddings, [B, T, D] of the old matrix's dtype.

        Args:
            ids_BT: int64 ids of the byte tokenizer; a row begins where its document does.
        """
        expanded_BT = expand(ids_BT, self.block_key_P, self.edge_key_E, self.token_E, self.max_bytes)
        added_BTD: Tensor = self.old(expanded_BT.clamp(min=0))
        return torch.where((expanded_BT >= 0)[..., None], added_BTD, 0)
