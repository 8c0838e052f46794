"""A model that nobody has trained: an architecture of transformers with weights drawn at random."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from tokenkit.errors import ConfigError, blaming_data, nearest
from tokenkit.models.causal_lm import CausalLM, LoadOptions
from tokenkit.models.check import settle
from tokenkit.models.reading import check_config, config_classes, random_model
from tokenkit.tokenization.tokenizer import load_tokenizer

OWN = "peer_mla"
PADDED_TO = 64
"""Rows of a vocabulary whose size nobody gave are a multiple of this."""


def architecture(settings: Mapping[str, Any]) -> Any:
    """Return the configuration of transformers that `settings` describe.

    Args:
        settings: as in a config.json: `model_type`, and what that architecture has; the rest is its default.

    Raises:
        ConfigError: no such architecture, a setting that it has not, or one that it refuses.
    """
    classes = config_classes()
    kind = str(settings.get("model_type"))
    if "model_type" not in settings or kind not in classes:
        raise ConfigError(
            f"from_config needs the model_type of an architecture that transformers has, got "
            f"{settings.get('model_type')!r}{nearest(kind, classes.keys())}"
        )
    schema = classes[kind]
    known = _settings_of(schema) if kind != OWN else None  # that one names what it does not know itself
    for name in settings:
        if known is not None and name not in known:
            raise ConfigError(f"from_config: {kind} has no setting {name!r}{nearest(name, known)}")
    try:
        config = schema(**{name: value for name, value in settings.items() if name != "model_type"})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"from_config: {kind} refuses these settings: {error}") from error
    except Exception as error:  # transformers checks the types of fields with errors of a library's own
        raise ConfigError(f"from_config: {kind} refuses these settings: {str(error).strip()}") from error
    check_config("from_config", config)
    return config


def _settings_of(schema: Any) -> set[str]:
    """Return the names that a configuration takes: its arguments, its fields, other names of them."""
    names = set(inspect.signature(schema.__init__).parameters) | set(getattr(schema, "attribute_map", {}))
    names |= set(schema().to_dict())
    return names | {"model_type", "rope_theta"}  # the base of rotation stands inside rope_parameters


def new_model(settings: Mapping[str, Any], vocab_size: int, **how: Any) -> Any:
    """Return the model of transformers, its weights drawn from torch's generator.

    Args:
        settings: see `architecture`; without a `vocab_size` it has as many rows as the tokenizer needs.
        vocab_size: ids of its tokenizer.
        how: keyword arguments of `from_config`, such as dtype.

    Raises:
        ConfigError: see `architecture`, or fewer rows than ids.
    """
    config = _with_rows(settings, vocab_size)
    try:
        return random_model(config, **how)
    except (ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"from_config: no model of {config.model_type} can be made: {reason}") from error


def _with_rows(settings: Mapping[str, Any], vocab_size: int) -> Any:
    """Return the configuration of a model with a row for every id."""
    config = architecture({"vocab_size": -(-vocab_size // PADDED_TO) * PADDED_TO, **settings})
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"from_config: vocab_size is {config.vocab_size}, and the tokenizer has {vocab_size} ids: raise "
            "it (rows beyond the tokenizer's take no probability), or leave it out"
        )
    return config


def ids_of(tokenizer_name: str, *, trust_remote_code: bool = False) -> int | None:
    """Return how many ids a tokenizer has; None where it is not on this machine and cannot be fetched.

    Raises:
        DataError: it is here and cannot be read.
    """
    with blaming_data():
        try:
            return load_tokenizer(tokenizer_name, trust_remote_code=trust_remote_code).vocab_size
        except FileNotFoundError:
            return None


def new_model_on_meta(settings: Mapping[str, Any], vocab_size: int | None) -> Any:
    """Return the model with parameters that have shapes and no memory.

    Args:
        settings: see `new_model`.
        vocab_size: ids of its tokenizer. None: nobody knows, and it has its own rows.

    Raises:
        ConfigError: see `new_model`.
    """
    import torch

    config = architecture(settings) if vocab_size is None else _with_rows(settings, vocab_size)
    with torch.device("meta"):
        return random_model(config)


def new_causal_lm(name: str, settings: Mapping[str, Any], vocab_size: int, options: LoadOptions) -> CausalLM:
    """Return a new model as `load_causal_lm` returns one that is read.

    Raises:
        ConfigError: see `new_model`.
        ValueError: an architecture that cannot be run as a language model is; see `check.settle`.
    """
    how = {"dtype": options.dtype, "attn_implementation": options.attn_implementation}
    model = CausalLM(new_model(settings, vocab_size, **how).eval(), vocab_size)
    settle(model, name)
    return model
