"""A causal language model as one ONNX graph, with its key-value cache as inputs and outputs.

One graph serves all calls: a past of length 0 is the prefill, and a past of any length a step of decoding.

    input_ids [B, T]  attention_mask [B, P + T]  position_ids [B, T]          int64
    past_key_values.0.key [B, H, P, K]  past_key_values.0.value ...           float32, P may be 0
    -> logits [B, T, V]  present.0.key [B, H, P + T, K]  present.0.value ...
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenkit.disk import is_disk_trouble
from tokenkit.errors import DataError, ExportError, is_out_of_memory

GRAPH = "model.onnx"
LARGEST_FILE = 2**30
"""Bytes of weights above which they are a file of their own: a graph alone may have 2 GiB at most."""
TOLERANCE = 1e-4
"""Of logits, times the largest of them where that is above 1."""
SHAPES = ((1, 1), (1, 7), (3, 20), (2, 33))
"""Documents and tokens of what is compared."""
LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Kinds of a cache's layers that are keys and values."""

USAGE = """import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("model.onnx")
ids = tokenizer("Once upon a time", return_tensors="np").input_ids.astype(np.int64)
positions = np.arange(ids.shape[1])[None]
feed = {{"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}}
{past}print(tokenizer.decode(session.run(["logits"], feed)[0][0, -1].argmax()))
"""
PAST = (
    "empty = np.zeros((1, {heads}, 0, {size}), np.float32)  # nothing before; `present` goes in here next\n"
    'feed |= {{i.name: empty for i in session.get_inputs() if i.name.startswith("past")}}\n'
)

Cache = list[tuple[Tensor, Tensor]]


class _Cached(nn.Module):
    """A model whose cache comes in and goes out as a list of keys and values."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.cache = type(_cache(model))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Cache) -> Any:
        """Return the logits, and the cache with the new tokens."""
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=self.cache(past),
            use_cache=True, **_positions(self.model, position_ids),
        )  # fmt: skip
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


class _Plain(nn.Module):
    """A model without a cache."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Return the logits."""
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
            **_positions(self.model, position_ids),
        )  # fmt: skip
        logits: Tensor = out.logits
        return logits


def _positions(model: Any, position_ids: Tensor) -> dict[str, Tensor]:
    """Return the argument that most models take, and those with biases in place of positions do not."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": position_ids} if takes else {}


@torch.no_grad()
def _cache(model: Any) -> Any:
    """Return the cache of two tokens; None: the model has none of that name."""
    ids_BT = torch.zeros(1, 2, dtype=torch.long)
    return getattr(model(input_ids=ids_BT, use_cache=True), "past_key_values", None)


def cache_sizes(model: Any, name: str) -> list[tuple[int, int, int]]:
    """Return heads, size of a key and size of a value of each layer's cache.

    Raises:
        DataError: a cache that holds something else (a state), or none.
    """
    layers = getattr(_cache(model), "layers", None)
    kinds = sorted({type(layer).__name__ for layer in layers or ()})
    if not kinds or not set(kinds) <= set(LAYERS):
        raise DataError(
            f"{name}: a model of type {model.config.model_type} keeps {', '.join(kinds) or 'a state'} where "
            "others keep keys and values, and no graph is written of that; --use-cache false writes one "
            "without a cache"
        )
    assert layers is not None
    return [(la.keys.shape[1], la.keys.shape[3], la.values.shape[3]) for la in layers]


def write_onnx(model: Any, name: str, folder: Path, *, use_cache: bool) -> tuple[float, str]:
    """Write `model` as a graph with dynamic axes, run it with onnxruntime, and compare its logits.

    Args:
        model: of transformers, in float32, on the CPU.
        name: of it, for errors.
        folder: gets model.onnx, and model.onnx.data where the weights are large.
        use_cache: with keys and values as inputs and outputs.

    Returns:
        The largest difference of a logit, and code that runs the graph.

    Raises:
        DataError: a model that cannot be written.
        ExportError: onnxruntime computes something else.
    """
    sizes = cache_sizes(model, name) if use_cache else []
    arguments, shapes = _example(model.config.vocab_size, sizes, use_cache)
    graph = (_Cached if use_cache else _Plain)(model).eval()
    inputs, outputs = _names(len(sizes))
    with _one_line(name, model.config.model_type), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph, arguments, dynamo=True, dynamic_shapes=shapes, input_names=inputs, output_names=outputs,
            verbose=False,
        )  # fmt: skip
    assert program is not None
    _without_places(program.model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(str(folder / GRAPH), external_data=size > LARGEST_FILE)
    del program
    error = compare(model, folder / GRAPH, sizes)
    past = PAST.format(heads=sizes[0][0], size=sizes[0][1]) if sizes else ""
    return error, USAGE.format(past=past)


def _without_places(model: Any) -> None:
    """Leave out where in the code of this machine each node comes from: half of a small file."""
    for graph in (model.graph, *model.functions.values()):
        for value in (*graph.inputs, *graph.outputs):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def _names(layers: int) -> tuple[list[str], list[str]]:
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)]
    return inputs, ["logits", *(f"present.{part}" for part in parts)]


def _example(vocab_size: int, sizes: Sequence[tuple[int, int, int]], use_cache: bool) -> tuple[Any, Any]:
    """Return arguments that no size of which is 0, 1 or another's, and which of their axes vary."""
    B, P, T = 2, 3 if use_cache else 0, 4
    ids_BT = torch.arange(B * T).view(B, T) % vocab_size
    mask_BS = torch.ones(B, P + T, dtype=torch.long)
    axis = torch.export.Dim.DYNAMIC
    arguments: list[Any] = [ids_BT, mask_BS, (torch.arange(T) + P).expand(B, T)]
    shapes: list[Any] = [{0: axis, 1: axis}] * 3
    if use_cache:
        arguments.append([(torch.ones(B, H, P, K), torch.ones(B, H, P, L)) for H, K, L in sizes])
        shapes.append([({0: axis, 2: axis}, {0: axis, 2: axis}) for _ in sizes])
    return tuple(arguments), tuple(shapes)


def compare(model: Any, path: Path, sizes: Sequence[tuple[int, int, int]]) -> float:
    """Return the largest difference of a logit between torch and onnxruntime, over several shapes.

    With a cache each text is also read in three parts, the last of them one token, and padded on the left.

    Raises:
        ExportError: the difference is above the tolerance.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    limit = getattr(model.config, "max_position_embeddings", None) or 64
    generator, largest, scale = torch.Generator().manual_seed(0), 0.0, 1.0
    for B, T in SHAPES:
        T = min(T, limit)
        ids_BT = torch.randint(model.config.vocab_size, (B, T), generator=generator)
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[0, : T // 3 if B > 1 else 0] = 0
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits_BTV = model(
                input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **_positions(model, position_BT)
            ).logits
        wanted_NV = logits_BTV[mask_BT.bool()].numpy()
        scale = max(scale, float(abs(wanted_NV).max()))
        for cuts in [(T,), (T // 2, T - 1, T)] if sizes and T > 1 else [(T,)]:
            got_BTV = _run(session, (ids_BT, mask_BT, position_BT), sizes, cuts)
            largest = max(largest, float(abs(got_BTV[mask_BT.bool().numpy()] - wanted_NV).max()))
    if not largest <= TOLERANCE * scale:
        raise ExportError(f"{path.name}: onnxruntime's logits are off by {largest:.2e}, of {scale:.2e}")
    return largest


def _run(
    session: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    sizes: Sequence[tuple[int, int, int]],
    cuts: Sequence[int],
) -> NDArray[np.float32]:
    """Return the logits of a text that is read part by part, each behind the cache of the one before."""
    ids, mask, positions = (tensor.numpy() for tensor in inputs)
    B = len(ids)
    past = [np.zeros((B, H, 0, size), np.float32) for H, *pair in sizes for size in pair]
    known, logits, begin = {entry.name for entry in session.get_inputs()}, [], 0
    for end in cuts:
        values = [ids[:, begin:end], mask[:, :end], positions[:, begin:end], *past]
        feed = dict(zip(_names(len(sizes))[0], values, strict=True))
        part, *past = session.run(None, {key: value for key, value in feed.items() if key in known})
        logits.append(part)
        begin = end
    return np.concatenate(logits, 1)


@contextlib.contextmanager
def _one_line(name: str, model_type: str) -> Iterator[None]:
    """Say in one line that torch cannot write a model."""
    try:
        yield
    except Exception as error:  # of torch.export, of the translation, and of the model's own code
        if is_out_of_memory(error) or is_disk_trouble(error):
            raise
        cause = error.__cause__ or error
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise DataError(
            f"{name}: torch {torch.__version__} writes no ONNX graph of model type {model_type}: {reason}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from naming packages that it could use, on standard error."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
