"""Reading a model: what its folder must be before, what its weights must be afterwards, its digest."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenkit.disk import why_missing
from tokenkit.models.peer_mla import register

if TYPE_CHECKING:
    from tokenkit.models.causal_lm import LoadOptions

EXPANDED = "byte_expansion_"
"""Begins the model type of an exported model with input-id expansion."""
INDEX = "model.safetensors.index.json"
SHOWN = 4
"""Names that an error lists, at most."""


def read_model(name_or_path: str, options: LoadOptions) -> Any:
    """Read a model's own class from safetensors; of a model of images and text the text part.

    Raises:
        FileNotFoundError, ValueError: see `load_causal_lm`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    check_path(name_or_path)
    quiet_off_terminal()
    origin = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    with _one_line(name_or_path, options):
        config = AutoConfig.from_pretrained(name_or_path, **origin)
    check_config(name_or_path, config)
    if str(config.model_type).startswith(EXPANDED) and not options.for_use:
        raise ValueError(
            f"{name_or_path!r} is a byte model with input-id expansion, which cannot be trained on, moved or "
            "teach: start from the model that it was made from, or resume its run"
        )
    how: dict[str, Any] = {
        **origin,
        "dtype": options.dtype,
        "attn_implementation": options.attn_implementation,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused below, by name
    }
    with _one_line(name_or_path, options):
        if (part := text_class(config)) is None:
            model, info = AutoModelForCausalLM.from_pretrained(name_or_path, **how)
        else:
            kind, how["config"] = part
            how["key_mapping"] = TEXT_NAMES
            print(f"{name_or_path}: of {config.model_type} the text part is read alone", file=sys.stderr)
            model, info = kind.from_pretrained(name_or_path, **how)
    if getattr(config, "text_config", None) is not None:
        model._weight_conversions = None  # saving would give the tensors their names in the whole model again
    if not has_own_code(model):
        # where the repository has code of its own too: what is written here needs none and holds none
        model.config.__dict__.pop("auto_map", None)
    check_weights(name_or_path, model, sorted(info["missing_keys"]), sorted(info["mismatched_keys"]))
    return model


def read_configuration(name_or_path: str, options: LoadOptions) -> Any:
    """Read the configuration of a model, of one of images and text that of the text part; no weights.

    Raises:
        FileNotFoundError, ValueError: see `load_causal_lm`.
    """
    from transformers import AutoConfig

    register()
    check_path(name_or_path)
    with _one_line(name_or_path, options):
        config = AutoConfig.from_pretrained(
            name_or_path, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    check_config(name_or_path, config)
    part = text_class(config)
    return config if part is None else part[1]


def blank_model(name_or_path: str, options: LoadOptions, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of its configuration alone, without memory and without weights.

    Raises:
        FileNotFoundError, ValueError: see `load_causal_lm`.
    """
    config = read_configuration(name_or_path, options)
    with _one_line(name_or_path, options), torch.device("meta"):
        return random_model(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=options.trust_remote_code
        )


def read_quantised(name_or_path: str, *, quantise: bool, trust_remote_code: bool) -> Any:
    """Read a model for use whose linear layers hold 8-bit numbers, by torchao.

    Args:
        name_or_path: a folder or hub name.
        quantise: the weights there are not quantised yet.
        trust_remote_code: run code that comes with it.

    Raises:
        ImportError: torchao is not installed.
    """
    from transformers import AutoModelForCausalLM

    how: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code, "use_safetensors": True}
    if quantise:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        how["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    quiet_off_terminal()
    return AutoModelForCausalLM.from_pretrained(name_or_path, **how).eval()


def stored_dtype(name_or_path: str, options: LoadOptions) -> torch.dtype:
    """Return the dtype that a model's configuration gives its weights; float32 where it gives none."""
    from transformers import AutoConfig

    register()
    config = AutoConfig.from_pretrained(
        name_or_path, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def stops(name_or_path: str, config: Any, options: LoadOptions) -> list[int]:
    """Return the ids at which a model stops to write: those of its generation_config.json, or of `config`."""
    from transformers import GenerationConfig

    said: Any = None
    with suppress(OSError, ValueError):  # many models have no such file
        said = GenerationConfig.from_pretrained(name_or_path, revision=options.revision).eos_token_id
    said = getattr(config, "eos_token_id", None) if said is None else said
    return sorted({*said} if isinstance(said, list) else {said} - {None})


def has_own_code(model: Any) -> bool:
    """Whether a model's class came with its folder, which `trust_remote_code` allowed to run."""
    return not type(model).__module__.startswith("transformers.")


def config_classes() -> Mapping[str, Any]:
    """Return the classes of configurations that transformers knows, and our own, by `model_type`."""
    from transformers import CONFIG_MAPPING

    register()
    classes: Mapping[str, Any] = CONFIG_MAPPING
    return classes


def random_model(config: Any, **how: Any) -> Any:
    """Return the causal language model of a configuration, its weights drawn from torch's generator."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, **how)


def model_from_config(like: Any, config: Any, **more: Any) -> Any:
    """Return a model of a configuration, as a plain user's `AutoModelForCausalLM` makes it.

    Args:
        like: of a model with code of its own, whose class is the one that has run already.
        config: what its configuration became.
        more: keyword arguments of `from_config`.
    """
    from transformers import AutoModelForCausalLM

    make = type(like)._from_config if has_own_code(like) else AutoModelForCausalLM.from_config
    return make(config, **more)


@contextmanager
def _one_line(name_or_path: str, options: LoadOptions | None) -> Iterator[None]:
    """Turn what transformers raises into one line."""
    try:
        yield
    except ImportError as error:
        wanted = None if options is None else options.attn_implementation
        what = "it" if wanted is None else f"{wanted!r} attention (sdpa needs no package)"
        raise ValueError(f"{name_or_path!r}: {what} cannot be used here: {error}") from error
    except Exception as error:  # safetensors, json, tokenizers and hub each raise their own kinds
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"{name_or_path!r} brings code of its own, which runs only with trust_remote_code: read it "
                "before you set that"
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        here = "" if Path(name_or_path).exists() else ", which is no folder here"
        raise ValueError(
            f"no causal language model could be read from {name_or_path!r}{here}: {reason}; expected a "
            "Hugging Face folder with config.json and *.safetensors, or the name of one on the hub"
        ) from error


def check_path(name_or_path: str) -> None:
    """Refuse a folder that holds no model as transformers writes one, before anything is read.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: the adapter of a model, or files that lead out of the folder.
    """
    path = Path(name_or_path)
    if why := why_missing(name_or_path):
        model, _, options = name_or_path.rpartition(":")
        why += f": {options!r} is an option of tokenizer_name" if model and Path(model).is_dir() else ""
        raise FileNotFoundError(f"model folder {name_or_path} {why}")
    if not path.is_dir():
        return
    if (path / "adapter_config.json").is_file():
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"{name_or_path} holds a PEFT adapter of {base!r}, not a model: merge it first (`tokenkit "
            "merge-lora`), and name the merged folder"
        )
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name_or_path} has no config.json: it is not a Hugging Face model folder")
    _json(path / "config.json")
    _check_index(path)


_LARGEST = {
    "num_hidden_layers": 2000,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "vocab_size": 2**24,
}
"""Far above every model there is: a file that says more is torn or hostile."""


def check_config(name_or_path: str, config: Any) -> None:
    """Refuse weights that are stored in other than their own numbers, and sizes that no model has.

    Raises:
        ValueError: naming the method of quantisation, or the size.
    """
    for name, largest in _LARGEST.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > largest:
            raise ValueError(
                f"{name} in the config.json of {name_or_path} must be at most {largest}, got {value:.6g}: it "
                "would be built for hours before its weights are read; correct the file"
            )
    found = getattr(config, "quantization_config", None)
    method = None
    if found is not None:
        read = found if isinstance(found, Mapping) else vars(found)
        method = str(getattr(read.get("quant_method"), "value", read.get("quant_method")) or "unnamed")
    for file, name in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if method is None and (Path(name_or_path) / file).is_file():
            method = name
    if method is not None:
        raise ValueError(
            f"{name_or_path} is a quantised model (method {method}): its weights cannot be trained or moved; "
            "name the folder that it was made from, or dequantise it first (model.dequantize(), then "
            "save_pretrained) and name that folder"
        )


def check_weights(name_or_path: str, model: nn.Module, missing: list[str], mismatched: list[Any]) -> None:
    """Refuse weights that were made at random because the file has none, or that are no numbers.

    Args:
        name_or_path: for the error.
        model: as it was loaded, whole.
        missing: parameters that no file holds.
        mismatched: those of another shape.

    Raises:
        ValueError: naming the tensors.
    """
    if missing:
        total = sum(1 for _ in model.parameters())
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} of the model's {total} tensors: {_list(missing)}; they "
            "would be made at random. Fetch or save the folder again; names that differ by a prefix are of "
            "another class of model"
        )
    if mismatched:
        raise ValueError(
            f"{name_or_path} holds tensors of other shapes than its config.json says: "
            f"{_list([str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in mismatched])}"
        )
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            low, high = tensor.detach().aminmax()  # either is NaN where one number is; no copy is made
            if not (torch.isfinite(low) and torch.isfinite(high)):
                rows = ~torch.isfinite(tensor.detach().flatten(1) if tensor.ndim > 1 else tensor[:, None])
                first = int(rows.any(-1).nonzero()[0]) if tensor.ndim else 0
                raise ValueError(
                    f"{name_or_path}: {name} holds NaN or infinity ({int(rows.sum())} numbers, the first in "
                    f"row {first}): the file is damaged, or the model diverged before it was saved"
                )


def text_class(config: Any) -> tuple[Any, Any] | None:
    """Return class and configuration of the language model in a model of images and text; None for others.

    None too where transformers itself reads the text part alone.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = getattr(config, "text_config", None)
    if text is None or isinstance(text, dict) or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    whole = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if whole is not None and whole.config_class is type(text):
        return None
    if getattr(config, "tie_word_embeddings", False):  # a head that the file has is kept all the same
        text.tie_word_embeddings = True
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], text


TEXT_NAMES = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?(?!lm_head\.)": "model.",
    r"^(?:model\.)?text_model\.(?:model\.)?(?!lm_head\.)": "model.",
}
"""How folders of images and text name the tensors of the text part, and how the text model does."""


def _check_index(folder: Path) -> None:
    path = folder / INDEX
    if not path.is_file():
        return
    files = _json(path).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{path} has no weight_map: it is no index of weight files")
    for name, file in files.items():
        # by its name alone: the hub's cache has links in the place of files
        if not isinstance(file, str) or re.fullmatch(r"[^/\\\0]+", file) is None or file in (".", ".."):
            raise ValueError(f"{path} looks for {name} in {file!r}: expected a file of the same folder")
    if lost := sorted({file for file in files.values() if not (folder / file).is_file()}):
        raise FileNotFoundError(f"{folder} lacks {len(lost)} of its weight files: {_list(lost)}")


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(read).__name__}")
    return read


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more


def quiet_off_terminal() -> None:
    """Let transformers draw its bars on a terminal only."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


_HEAD = 1 << 20  # bytes: the header of a safetensors file, names and shapes
_BLOCKS, _BLOCK = 64, 4096  # of the weights themselves, spread evenly: training moves all of them


def model_fingerprint(name_or_path: str, commit: str | None) -> str:
    """Return what tells two base models apart, for checkpoints that hold only what was trained.

    Args:
        name_or_path: a folder, whose configuration, names and sizes of weight files, their headers and a
            sample of their contents make the digest (SHA-256, hex); or a name on the hub.
        commit: of the hub's repository, which says it all; the digest of a folder does not need it.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return f"commit {commit}"
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD))
            for block in range(_BLOCKS if size > _HEAD else 0):
                file.seek(_HEAD + (size - _HEAD) * block // _BLOCKS)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
