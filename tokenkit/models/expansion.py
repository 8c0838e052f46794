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


class InputExpansion(nn.Module):
    """The old input embedding, and the tables that say which of its rows each byte adds.

    Args:
        embedding: the model's input embedding, for what its class does to a row (Gemma's scales it).
        tables: of the old vocabulary.
        old_WD: the old rows, those of padding left out; they are copied.

    The tables are no part of the state: they are made from the old tokenizer, whose fingerprint a
    checkpoint holds.
    """

    edge_key_E: Tensor
    token_E: Tensor

    def __init__(self, embedding: Any, tables: ExpansionTables, old_WD: Tensor):
        super().__init__()
        self.old = copy.deepcopy(embedding)
        self.old.weight = nn.Parameter(old_WD.detach().clone())
        self.old.num_embeddings, self.old.padding_idx = len(old_WD), None
        self.max_bytes = tables.max_bytes
        self.register_buffer("edge_key_E", torch.from_numpy(tables.edge_key_E), persistent=False)
        self.register_buffer("token_E", torch.from_numpy(tables.token_E), persistent=False)

    def with_rows(self, embedding: Any, old_WD: Tensor) -> InputExpansion:
        """Return the same expansion with other rows, on the CPU: whole where this one's are sharded."""
        tables = ExpansionTables(self.edge_key_E.cpu().numpy(), self.token_E.cpu().numpy(), self.max_bytes)
        return InputExpansion(embedding, tables, old_WD)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return what is added to the byte embeddings, [B, T, D] of the old matrix's dtype.

        Args:
            ids_BT: int64 ids of the byte tokenizer; a row begins where its document does.
        """
        expanded_BT = expand(ids_BT, self.edge_key_E, self.token_E)
        added_BTD: Tensor = self.old(expanded_BT.clamp(min=0))
        return torch.where((expanded_BT >= 0)[..., None], added_BTD, 0)
