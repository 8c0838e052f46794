"""`tokenkit zett`: zero-shot transfer, a model with another tokenizer without any training.

tokenkit zett --model.pretrained-model-name-or-path MODEL --target-tokenizer-name gpt2 --output FOLDER
tokenkit zett ... --compare --ppl-eval-data text.txt --output FOLDER
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.models import ModelSource
from tokenkit.embeddings.options import MethodName
from tokenkit.errors import ConfigError, at_least, blaming_data, names_a_folder
from tokenkit.models.options import Dtype
from tokenkit.options import flat

if TYPE_CHECKING:
    from tokenkit.data.mix import Document
    from tokenkit.embeddings.transfer import InitOptions, OutputEmbeddings
    from tokenkit.models.causal_lm import CausalLM
    from tokenkit.tokenization.tokenizer import Tokenizer

    Tokenizers = tuple[Tokenizer, Tokenizer]

MAX_PADDING = 2**16
ALIASES = {"source_model": "model", "target_tokenizer": "target_tokenizer_name"}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which rows are made, and of what."""

    extend_output_embeddings: bool = True
    """Make rows of the head from the old head. false: the head is tied to the new input embedding."""

    combine_output_embed_with_input: bool = False
    """Each row of an untied head becomes the mean of the rows made for the head and for the input; a tied
    head is that already."""

    convert_by_matching: bool = True
    """Copy the rows of tokens with the same bytes. false: they are made like all other tokens."""

    convert_by_special: bool = True
    """Copy special tokens by role (end of turn, pad, ...) or string. false: the mean of all rows."""

    convert_bos_eos: bool = True
    """Copy BOS and EOS by role. false: the mean of all rows."""

    clone_all_layers: bool = False
    """Change a copy of the model, with all of its layers, instead of the loaded one: twice the memory, the
    same folder."""

    output_embeddings_mode: Literal["preserve", "untie"] = "preserve"
    """preserve: tied stays tied; untie: the head gets its own matrix."""

    tokens_to_add: tuple[str, ...] = ()
    """Special tokens appended to the target tokenizer."""

    pad_to_multiple_of: int = 64
    """The vocabulary rows are padded to a multiple of this, with the mean of all rows."""

    def __post_init__(self) -> None:
        """Check what excludes each other."""
        if not 1 <= self.pad_to_multiple_of <= MAX_PADDING:
            raise ConfigError(
                f"pad_to_multiple_of must lie in [1, {MAX_PADDING}], got {self.pad_to_multiple_of}"
            )
        asked = {
            "extend_output_embeddings=false (ties the head)": not self.extend_output_embeddings,
            "combine_output_embed_with_input": self.combine_output_embed_with_input,
            "output_embeddings_mode=untie": self.output_embeddings_mode == "untie",
        }
        if sum(asked.values()) > 1:
            both = " and ".join(name for name, is_asked in asked.items() if is_asked)
            raise ConfigError(f"{both} exclude each other: keep the one that is meant")

    @property
    def output_mode(self) -> OutputEmbeddings:
        """What becomes of the head."""
        if not self.extend_output_embeddings:
            return "tie"
        return "combine" if self.combine_output_embed_with_input else self.output_embeddings_mode


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What some methods need beside the two tokenizers."""

    data: str | None = None
    """focus, omp: text (file, folder or hub name) from which an auxiliary space of the target tokens is
    learned: a truncated SVD of positive pointwise mutual information, window 5, 128 dimensions."""

    auxiliary_model: str | None = None
    """focus, omp: model that has the target tokenizer; its input embedding is the auxiliary space."""

    num_atoms: int = 16
    """omp: old rows that a new row is made of, at most."""

    hypernet: str | None = None
    """hypernet: what `tokenkit train-hypernet` wrote."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least("num_atoms", self.num_atoms, 1)
        if self.data is not None and self.auxiliary_model is not None:
            raise ConfigError("data and auxiliary_model both give an auxiliary space: keep one of them")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Score methods instead of writing a model."""

    compare: tuple[MethodName, ...] | None = None
    """Write compare.json and compare.png instead of a model: bits per byte of each listed method; no name:
    of all that have what they need."""

    ppl_eval_data: str | None = None
    """Text that compare scores (file, folder or hub name)."""

    max_eval_documents: int = 60
    """Documents of it that are read."""

    max_length: int = 512
    """Tokens of a document that are read, at most; less where the model has fewer positions."""

    def __post_init__(self) -> None:
        """Check what compare needs."""
        at_least("max_eval_documents", self.max_eval_documents, 1)
        at_least("max_length", self.max_length, 2)
        if self.compare is not None and self.ppl_eval_data is None:
            raise ConfigError("compare needs a text to score: set ppl_eval_data")


@dataclass(frozen=True, kw_only=True)
class ZettConfig:
    """Move a model to another tokenizer without training, or compare the ways to do so."""

    model: ModelSource
    target_tokenizer_name: str
    """Tokenizer that the model gets: spec, path or `byte`."""

    output: str
    """Folder that is written; it must be empty or absent."""

    method: MethodName = "fvt"
    """fvt: mean of the old pieces of a token; mean: mean of all rows; overlap: copies, else the mean of all;
    random_normal: copies, else drawn like the old rows; omp: sparse sum of shared tokens; focus: shared
    tokens by similarity; hypernet: by a trained network."""

    rows: Rows = flat(Rows)
    sources: Sources = flat(Sources)
    comparison: Compare = flat(Compare)

    dtype: Dtype | None = None
    """Of the weights, read and written. None: as they are stored."""

    seed: int = 0
    """Of what is drawn at random, and of the auxiliary space's sketch."""

    trust_remote_code: bool = False
    """Run code that comes with a model or tokenizer."""

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        names_a_folder("output", self.output)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in [0, 2**63), got {self.seed}")
        if self.comparison.compare is None:
            self._check_read()
        elif self.method != "fvt":
            raise ConfigError(
                f"compare names the methods itself, and method is {self.method}: list it behind compare, or "
                "leave compare out"
            )

    def _check_read(self) -> None:
        """Refuse what the method would not read: whoever names a hypernetwork does not want `fvt`."""
        readers = {"data": ("focus", "omp"), "auxiliary_model": ("focus", "omp"), "hypernet": ("hypernet",)}
        for name, methods in readers.items():
            if getattr(self.sources, name) is not None and self.method not in methods:
                raise ConfigError(
                    f"{name} is read by method {' and '.join(methods)}, and the method is {self.method}: set "
                    f"method to {' or '.join(methods)}, or leave {name} out"
                )
        if self.method in ("focus", "omp") and (self.sources.data or self.sources.auxiliary_model) is None:
            raise ConfigError(f"{self.method}: give a text with --data, or --auxiliary-model, for its space")
        if self.comparison.ppl_eval_data is not None:
            raise ConfigError("ppl_eval_data is what compare scores: set compare, or leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: zett(parse_command_line(ZettConfig, argv, program="tokenkit zett", aliases=ALIASES)))


def zett(config: ZettConfig) -> None:
    """Transfer and write, or compare.

    Raises:
        ValueError, FileNotFoundError: model, tokenizers or texts that cannot be read or do not fit.
        FileExistsError: the output is not empty.
    """
    from tokenkit.disk import check_vacant

    folder = Path(config.output).expanduser()
    check_vacant(folder)
    from tokenkit.tokenization.chat.advice import explain_changed_bos, explain_template
    from tokenkit.tokenization.files.saving import explain_saving

    tokenizers = load_tokenizers(config)
    new = tokenizers[1]
    for note in (explain_changed_bos(*tokenizers), explain_template(new), explain_saving(new)):
        if note is not None:
            print(note, file=sys.stderr)
    is_comparison = config.comparison.compare is not None
    names = list(config.comparison.compare or available(config)) if is_comparison else [config.method]
    with blaming_data():
        options = init_options(config, tokenizers[1], names)
        model = load_model(config, tokenizers[0])
        if is_comparison:
            compare(config, folder, model, tokenizers, names, options)
        else:
            transfer_and_write(config, folder, model, tokenizers, options)


def load_tokenizers(config: ZettConfig) -> tuple[Tokenizer, Tokenizer]:
    """Return the model's tokenizer and the target.

    Raises:
        DataError, ConfigError: they cannot be read or share nothing, or the first is not the model's.
    """
    from tokenkit.embeddings.rows import need_something
    from tokenkit.tokenization.spec import parse_spec
    from tokenkit.tokenization.tokenizer import load_tokenizer
    from tokenkit.training.pair import check_is_the_models_own

    source, target = config.model, config.target_tokenizer_name
    spec = source.tokenizer_name or source.pretrained_model_name_or_path
    for written in (spec, target):
        parse_spec(written)  # a mistake in the spec is one of the configuration
    remote, to_add = config.trust_remote_code, config.rows.tokens_to_add
    with blaming_data():
        old = load_tokenizer(spec, revision=source.revision, trust_remote_code=remote)
        new = load_tokenizer(target, tokens_to_add=to_add, trust_remote_code=remote)
    check_is_the_models_own(old, source)
    with blaming_data():
        need_something(old, new)
    return old, new


def available(config: ZettConfig) -> list[str]:
    """The methods that have what they need."""
    from tokenkit.embeddings.transfer import METHODS

    sources = config.sources
    has_space = sources.data is not None or sources.auxiliary_model is not None
    needs = {"focus": has_space, "omp": has_space, "hypernet": sources.hypernet is not None}
    return [name for name in METHODS if needs.get(name, True)]


def init_options(config: ZettConfig, new: Tokenizer, names: Sequence[str]) -> InitOptions:
    """What the methods `names` may be told; the auxiliary space is made where one of them reads it."""
    from tokenkit.embeddings.auxiliary import vectors_of_model, vectors_of_text
    from tokenkit.embeddings.rows import Matching
    from tokenkit.embeddings.transfer import InitOptions
    from tokenkit.tokenization.tokenizer import load_tokenizer

    rows, sources, auxiliary = config.rows, config.sources, None
    if {"focus", "omp"} & set(names) and sources.auxiliary_model is not None:
        own = load_tokenizer(sources.auxiliary_model, trust_remote_code=config.trust_remote_code)
        model = _load(config, sources.auxiliary_model, own)
        auxiliary = vectors_of_model(model.embedding.weight, own, new)
    elif {"focus", "omp"} & set(names) and sources.data is not None:
        texts = [document.text for document in read_texts(sources.data)]
        auxiliary = vectors_of_text(new, [text for text in texts if text], seed=config.seed)
    return InitOptions(
        matching=Matching(
            same_bytes=rows.convert_by_matching, special=rows.convert_by_special, bos_eos=rows.convert_bos_eos
        ),
        seed=config.seed,
        auxiliary=auxiliary,
        num_atoms=sources.num_atoms,
        hypernet=sources.hypernet,
    )


def read_texts(name: str, limit: int | None = None) -> list[Document]:
    """Return the documents of a file, folder or hub data set, in order."""
    from tokenkit.data.mix import read_documents
    from tokenkit.data.options import SourceOptions

    return read_documents(SourceOptions(path=name), limit)


def load_model(config: ZettConfig, old: Tokenizer) -> CausalLM:
    """Load the model that is moved, in its own dtype unless told otherwise."""
    model = _load(config, config.model.pretrained_model_name_or_path, old, config.model.revision)
    widths = [module.weight.shape[1] for module in (model.embedding, model.output)]
    if config.rows.output_mode in ("combine", "tie") and widths[0] != widths[1]:
        raise ConfigError(
            f"input and output embedding have different widths, {widths[0]} and {widths[1]}: leave out "
            "extend_output_embeddings and combine_output_embed_with_input"
        )
    return model


def _load(config: ZettConfig, name: str, tokenizer: Tokenizer, revision: str | None = None) -> CausalLM:
    from tokenkit.models.causal_lm import DTYPES, LoadOptions, load_causal_lm

    options = LoadOptions(
        revision=revision,
        dtype="auto" if config.dtype is None else DTYPES[config.dtype],
        trust_remote_code=config.trust_remote_code,
    )
    return load_causal_lm(name, tokenizer.vocab_size, options)


def move(
    config: ZettConfig, model: CausalLM, tokenizers: Tokenizers, method: str, options: InitOptions
) -> dict[str, int]:
    """Give the model the target's rows, in place, as the options of the configuration say."""
    from tokenkit.embeddings.transfer import transfer_vocabulary

    rows = config.rows
    return transfer_vocabulary(
        model,
        *tokenizers,
        pad_to_multiple_of=rows.pad_to_multiple_of,
        output_embeddings=rows.output_mode,
        method=method,
        options=options,
    )


def transfer_and_write(
    config: ZettConfig, folder: Path, model: CausalLM, tokenizers: Tokenizers, options: InitOptions
) -> None:
    """Move the model and write its folder."""
    from tokenkit.export.card import CardFacts
    from tokenkit.export.huggingface import ExportRequest, export_huggingface, rehearse

    began = time.perf_counter()
    if config.rows.clone_all_layers:
        model = copy.deepcopy(model)
    report = move(config, model, tokenizers, config.method, options)
    rehearse(model, tokenizers[1])
    seconds = time.perf_counter() - began
    counts = ", ".join(f"{count} {label}" for label, count in report.items() if count)
    facts = CardFacts(
        base=config.model.pretrained_model_name_or_path,
        sources={"tokenizer": [config.target_tokenizer_name]},
        lines={"rows": f"{config.method}: {counts}"},
    )
    dtype = model.embedding.weight.dtype
    request = ExportRequest(folder=folder, dtype=dtype, facts=facts, is_consumed=True)
    export_huggingface(model, None, tokenizers[1], request)
    print(f"{sum(report.values())} rows by {config.method} in {seconds:.1f} s ({counts}): {folder}")


def compare(
    config: ZettConfig,
    folder: Path,
    model: CausalLM,
    tokenizers: Tokenizers,
    names: Sequence[str],
    options: InitOptions,
) -> None:
    """Score methods on a text and write what they are worth."""
    from tokenkit.evaluation.compare_methods import compare_methods, table, write_comparison

    comparison = config.comparison
    assert comparison.ppl_eval_data is not None
    documents = read_texts(comparison.ppl_eval_data, comparison.max_eval_documents)

    transfers = dict.fromkeys(names, lambda method: move(config, model, tokenizers, method, options))
    scores = compare_methods(model, tokenizers, documents, comparison.max_length, transfers)
    about = {
        "model": config.model.pretrained_model_name_or_path,
        "target": config.target_tokenizer_name,
        "text": comparison.ppl_eval_data,
    }
    write_comparison(folder, {**about, **scores})
    print(table(scores))


if __name__ == "__main__":
    raise SystemExit(main())
