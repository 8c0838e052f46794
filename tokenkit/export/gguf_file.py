"""A Llama- or Qwen-shaped model and its tokenizer as one GGUF file, read back and compared.

Names of tensors are those of the `gguf` package's own map. Llama's rotary embedding turns neighbouring
numbers of a head there, and halves of it here: rows of its queries and keys change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenkit.errors import DataError, ExportError
from tokenkit.export.gguf_vocabulary import (
    CONTROL,
    UNKNOWN,
    UNUSED,
    GgufVocabulary,
    gguf_vocabulary,
    token_bytes,
    unknown_id,
)

if TYPE_CHECKING:
    from tokenkit.export.options import GgufType
    from tokenkit.tokenization.tokenizer import Tokenizer

FILE = "model.gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model types of transformers, and what GGUF calls them."""
BLOCK = 32  # numbers of q8_0 that share a scale
ROPE = ("default", "linear", "llama3")
"""Kinds of rotary embedding that are written; the last for Llama alone."""

USAGE = """from transformers import AutoModelForCausalLM  # or any program on llama.cpp

model = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf")
"""


@dataclass(frozen=True)
class GgufSource:
    """What is written."""

    model: Any
    """Of transformers, on the CPU."""
    tokenizer: Tokenizer
    name: str
    """As people call it."""
    chat_template: str | None = None
    adds_bos: bool = False
    """A text begins with BOS."""


def check_architecture(name: str, config: Any) -> None:
    """Refuse a model that is not shaped as GGUF's Llama or Qwen, by its configuration.

    Raises:
        DataError: naming what is different.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise DataError(
            f"{name}: GGUF is written of models of type {', '.join(ARCHITECTURES)}, and this one is {kind}"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    known = ROPE if ARCHITECTURES[kind] == "llama" else ROPE[:2]
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    windows |= kind == "mistral" and (config.sliding_window or np.inf) < config.max_position_embeddings
    reasons = {
        f"rotary embeddings of type {rope}": rope not in known,
        "attention within a sliding window": windows,
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
        "biases": kind == "llama" and (config.attention_bias or config.mlp_bias),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise DataError(f"{name}: no GGUF is written of {kind} with {' and '.join(found)}")


def write_gguf(source: GgufSource, folder: Path, kind: GgufType) -> dict[str, int]:
    """Write model.gguf, read it back, and compare every tensor and every token.

    Args:
        source: model and tokenizer.
        folder: gets the file.
        kind: of the matrices; vectors are float32. Of q8_0, a matrix whose rows are no multiple of 32 is
            float16.

    Returns:
        How many tensors have which type.

    Raises:
        DataError: a model or tokenizer that GGUF cannot hold.
        ExportError: read back, a tensor or a token is another.
    """
    check_architecture(source.name, source.model.config)
    vocabulary = gguf_vocabulary(source.tokenizer, source.model.get_input_embeddings().weight.shape[0])
    writer = _writer(folder / FILE, ARCHITECTURES[source.model.config.model_type])
    _add_settings(writer, source, kind)
    _add_vocabulary(writer, source, vocabulary)
    counts: dict[str, int] = {}
    for name, values in tensors(source.model):
        quantised, dtype = _stored(values, kind)
        writer.add_tensor(name, quantised, raw_dtype=dtype)
        counts[dtype.name] = counts.get(dtype.name, 0) + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare(folder / FILE, source, kind)
    return counts


def tensors(model: Any) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield every tensor of the file by its name there, in float32.

    Raises:
        DataError: a parameter that the format has no name for.
    """
    import gguf

    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    known = {name: enum for enum, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    for own, parameter in model.named_parameters():  # a tied head once
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise DataError(f"GGUF has no name for {own} of a model of type {config.model_type}")
        values = parameter.detach().float()
        if architecture == "llama" and (heads := _heads(own, config)):
            values = interleaved(values, heads)
        yield name, values.contiguous().numpy()
    if (factors := _rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Return rows of queries or keys so that the halves of each head alternate: 0, K/2, 1, K/2 + 1, ..."""
    size = len(rows) // heads
    order = torch.arange(size).view(2, size // 2).T.reshape(-1)
    return rows.unflatten(0, (heads, size))[:, order].flatten(0, 1)


def _heads(name: str, config: Any) -> int:
    """Return how many heads the rows of a parameter belong to; 0: they are not turned."""
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else 0


def _rope_factors(model: Any) -> NDArray[np.float32] | None:
    """Return what Llama 3 divides its rotary frequencies by, as the model computes them."""
    rope = model.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    found_F = model.base_model.rotary_emb.inv_freq.double()
    plain_F = rope["rope_theta"] ** -(torch.arange(len(found_F), dtype=torch.float64) / len(found_F))
    factors: NDArray[np.float32] = (plain_F / found_F).float().numpy()
    return factors


def _stored(values: NDArray[np.float32], kind: GgufType) -> tuple[NDArray[Any], Any]:
    """Return a tensor in the type that it is stored in."""
    import gguf

    types = gguf.GGMLQuantizationType
    dtype = getattr(types, kind.upper())
    if values.ndim < 2:
        dtype = types.F32
    elif dtype == types.Q8_0 and values.shape[-1] % BLOCK:
        dtype = types.F16
    return gguf.quants.quantize(values, dtype), dtype


def _writer(path: Path, architecture: str) -> Any:
    import gguf

    class Writer(gguf.GGUFWriter):
        """Writes an empty list of strings too: bytes have no merges, and readers want to see that."""

        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            array = gguf.GGUFValueType.ARRAY
            if vtype == array and len(val) == 0:
                head = self._pack("I", vtype) if add_vtype else b""
                empty: bytes = head + self._pack("I", gguf.GGUFValueType.STRING) + self._pack("Q", 0)
                return empty
            packed: bytes = super()._pack_val(val, vtype, add_vtype, sub_type)
            return packed

    return Writer(path, architecture)


def _add_settings(writer: Any, source: GgufSource, kind: GgufType) -> None:
    import gguf

    config = source.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(source.name)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(source.model.get_input_embeddings().weight.shape[0])
    writer.add_rope_dimension_count(head)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_vocabulary(writer: Any, source: GgufSource, vocabulary: GgufVocabulary) -> None:
    import gguf

    tokenizer = source.tokenizer
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.strings)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    else:
        # not add_token_merges, which leaves an empty list out
        writer.add_key_value(gguf.Keys.Tokenizer.MERGES, vocabulary.merges, gguf.GGUFValueType.ARRAY)
    ids = {
        writer.add_bos_token_id: tokenizer.bos_id,
        writer.add_eos_token_id: tokenizer.eos_id,
        writer.add_pad_token_id: tokenizer.pad_id,
        writer.add_unk_token_id: unknown_id(tokenizer),
        writer.add_eot_token_id: tokenizer.special_ids.get("end_turn"),
    }
    for add, token_id in ids.items():
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(source.adds_bos)
    writer.add_add_eos_token(False)
    if source.chat_template:
        writer.add_chat_template(source.chat_template)


def compare(path: Path, source: GgufSource, kind: GgufType) -> None:
    """Read a file back and compare every tensor and the bytes of every token.

    Raises:
        ExportError: naming the first that differs.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, values in tensors(source.model):
        tensor = found.pop(name, None)
        quantised, dtype = _stored(values, kind)
        wanted = gguf.quants.dequantize(quantised, dtype)
        got = None if tensor is None else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if got is None or got.shape != values.shape or not np.array_equal(got, wanted):
            raise ExportError(f"{path.name}: {name}, read back, is another tensor")
        scale = max(float(abs(values).max()), 1e-30)
        if not float(abs(got - values).max()) <= scale / 100:
            raise ExportError(f"{path.name}: {name} loses more than a hundredth of its largest number")
    if found:
        raise ExportError(f"{path.name}: unexpected tensors {sorted(found)[:3]}")
    _compare_tokens(path.name, source.tokenizer, read_vocabulary(reader.fields))


def read_vocabulary(fields: Mapping[str, Any]) -> GgufVocabulary:
    """Return the vocabulary that the fields of a file hold."""

    def of(name: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.ggml.{name}")
        return default if field is None else field.contents()

    return GgufVocabulary(
        of("model"), of("pre"), of("tokens"), of("token_type"), of("scores", []), of("merges", []),
        bool(of("add_space_prefix", False)),
    )  # fmt: skip


def _compare_tokens(file: str, tokenizer: Tokenizer, vocabulary: GgufVocabulary) -> None:
    for token_id, raw in enumerate(tokenizer.token_bytes):
        kind = vocabulary.types[token_id]
        is_special = kind in (CONTROL, UNKNOWN, UNUSED)
        spelled = token_bytes(vocabulary, token_id)
        if is_special != bool(tokenizer.is_special_V[token_id]) or (kind != UNUSED and spelled != raw):
            raise ExportError(f"{file}: token {token_id}, read back, spells {spelled!r} instead of {raw!r}")
    if any(kind != UNUSED for kind in vocabulary.types[tokenizer.vocab_size :]):
        raise ExportError(f"{file}: more tokens than the tokenizer has")
