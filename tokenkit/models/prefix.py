"""The first layers of a model alone: embedding, a few transformer layers, no head.

    ids -> embedding -> layers 1 .. n -> hidden states

Embeddings can be fitted to the layers that read them long before a head is involved: what lies above layer
n is neither run nor differentiated, and the cost of a step falls with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tokenkit.models.causal_lm import CausalLM, Vocabulary
from tokenkit.models.collect import collecting
from tokenkit.structs import HiddenStates


def prefix_states(
    model: CausalLM, ids_BT: Tensor, n_layers: int, vocabulary: Vocabulary | None = None
) -> HiddenStates:
    """Run the embedding and the first `n_layers` layers on right-padded ids.

    Args:
        model: left as it was found.
        ids_BT: int64 token ids of `vocabulary`, or of the model's own when it is None.
        n_layers: at least 1, at most as many as the model has.
        vocabulary: embedding to use instead of the model's own.

    Returns:
        `hidden_BTD` is what layer `n_layers` gives to the next one: no final norm.

    Raises:
        ValueError: the model has fewer layers.
    """
    source = model.own() if vocabulary is None else vocabulary
    embedded_BTD = source.embedding(ids_BT)
    kinds = frozenset({"layers"})
    with first_layers(model, n_layers) as layers, collecting(layers[-1:], kinds, model.config) as found:
        last_BTD = model.run_body(source, ids_BT, embedded_BTD)
    # FSDP2 looks for a gradient at the end of the body to gather the weights of its layers again
    hidden_BTD = found.layers_BTD[0] + 0 * last_BTD[:1, :1].sum()
    return HiddenStates(hidden_BTD, source.head())


@contextmanager
def first_layers(model: CausalLM, n_layers: int) -> Iterator[list[nn.Module]]:
    """Let the body have its first `n_layers` layers only; yield them.

    A body walks along its own list of layers, whatever its architecture: the list is cut, and whole again
    afterwards. Parameters and their gradients stay where they are.

    Raises:
        ValueError: `n_layers` is below 1 or above the number of layers.
    """
    layers = model.layers
    if not 1 <= n_layers <= len(layers):
        raise ValueError(f"n_prefix_layers must lie in 1..{len(layers)}, the model's layers, got {n_layers}")
    whole = dict(layers.named_children())
    kept = list(layers)[:n_layers]
    for name in list(whole)[n_layers:]:
        del layers._modules[name]
    try:
        yield kept
    finally:
        layers._modules.clear()
        layers._modules.update(whole)
