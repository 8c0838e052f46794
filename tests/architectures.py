"""Every causal language model of the installed transformers, tiny and with random parameters, tried.

    python -m tests.architectures                 # all; writes the table of docs/architectures.md
    python -m tests.architectures gemma2 bloom    # these; prints their rows

Each is saved, loaded as a student is, given a vocabulary whose ids are permuted, exported and loaded again
by transformers alone. "logits": whether the model's own are those of hidden states and head. "permuted": how
far the logits of the moved model are from those of the model as it was, relative to their size. "adapters":
whether LoRA with default targets trains.

Parameters of 0 and 1, as most begin, hide faults: all are drawn here, and so are scales in the configuration.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.tiny import byte_level_bpe

VOCAB = 300
PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
BEGIN, END = "<!-- begin: python -m tests.architectures -->", "<!-- end -->"
TEXT = "Once upon a time the cats sat on 東京 and ran home to her mother, and 1984 was a year."

SMALL: dict[str, Any] = {
    "vocab_size": 320, "vocab_size_per_layer_input": 320, "pad_token_id": 2,
    "bos_token_id": 0, "eos_token_id": 1,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "embedding_size": 32, "lru_width": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "d_inner": 48, "n_inner": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "encoder_layers": 1, "num_encoder_layers": 1, "decoder_layers": 2, "num_decoder_layers": 2,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_kv_shared_layers": 0,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128,
    "sliding_window": 16, "attention_window_size": 16,
    "head_dim": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 16,
    "q_lora_rank": 16, "rotary_dim": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_expand": 2, "mamba_chunk_size": 8, "state_size": 8, "time_step_rank": 4, "ssm_state_size": 8,
    "chunk_size": 8,
    "final_logit_softcapping": 8.0, "lm_head_multiplier": 0.7, "logits_scaling": 3.0, "logit_scale": 0.25,
    "output_multiplier": 0.8, "embedding_multiplier": 2.5, "residual_multiplier": 0.6,
    "router_aux_loss_coef": 0.0, "attention_dropout": 0.0, "dropout": 0.0,
}  # fmt: skip
MLA = {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "axk1": MLA, "axk2": MLA, "deepseek_v2": MLA, "deepseek_v3": MLA, "deepseek_v32": MLA, "glm_moe_dsa": MLA,
    "glm4_moe_lite": MLA, "longcat_flash": MLA,
    "youtu": {**MLA, "pad_token_id": 310},  # loading it sets that row to 0
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 0, "sliding_window": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma3_text": {"final_logit_softcapping": None},  # read by the text model alone, and null in all folders
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "kimi_linear": {"linear_num_heads": 2, "layer_types": ["linear_attention", "full_attention"], **MLA},
    "mamba2": {"head_dim": 16, "num_heads": 4, "expand": 2, "n_groups": 1},
    "zamba": {"n_mamba_heads": 2, "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
}  # fmt: skip
"""What some architectures need beside, or instead."""
SEEING: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "image_size": 16, "patch_size": 8, "depth": 1, "num_heads": 2,
    "out_hidden_size": 32, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
}  # fmt: skip
"""Sizes of the part that sees, where a model has one."""


@dataclass(frozen=True)
class Row:
    """What came of one architecture."""

    kind: str
    logits: str
    permuted: str = ""
    adapters: str = ""


class NotBuiltError(Exception):
    """No tiny model of this kind was made."""


def tiny(kind: str, **changes: Any) -> Any:
    """Return a tiny model of a type, all of its parameters drawn.

    Raises:
        NotBuiltError: transformers refuses, or the model is not small.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        known = {
            **AutoConfig.for_model(kind).to_dict(),
            **getattr(AutoConfig.for_model(kind), "attribute_map", {}),
        }
        sizes = fitting(SMALL, known)
        for part, small in (("text_config", SMALL), ("vision_config", SEEING), ("audio_config", SEEING)):
            if isinstance(inner := known.get(part), dict):
                more = OTHERS.get(f"{kind}_text", {}) if part == "text_config" else {}
                sizes[part] = {"model_type": inner["model_type"], **fitting(small, inner), **more}
        config = AutoConfig.for_model(kind, **{**sizes, **OTHERS.get(kind, {}), **changes})
        with torch.device("meta"):
            count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if count > 6e6:
            raise NotBuiltError(f"{count:,} parameters at these sizes")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(one_line(error)) from error
    return randomise(model)


def fitting(sizes: dict[str, Any], known: Any) -> dict[str, Any]:
    """Return those of `sizes` that a configuration knows."""
    return {key: value for key, value in sizes.items() if key in known}


@torch.no_grad()
def randomise(model: Any) -> Any:
    """Draw every parameter; return the model, for evaluation."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(0.15 * noise if tensor.ndim > 1 else tensor + 0.3 * noise)
    return model.eval()


def tokenizers(root: Path) -> tuple[Any, Any, torch.Tensor]:
    """Return a tokenizer, the same with other ids, and the new id of each old one."""
    from tokenkit.tokenization.tokenizer import load_tokenizer

    old, new = root / "old", root / "new"
    for folder in (old, new):
        byte_level_bpe(folder, VOCAB)
    path = new / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    place = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))
    vocab = raw["model"]["vocab"]
    raw["model"]["vocab"] = {token: int(place[i]) for token, i in vocab.items()}
    for token in raw["added_tokens"]:
        token["id"] = int(place[token["id"]])
    for special in raw["post_processor"]["special_tokens"].values():
        special["ids"] = [int(place[i]) for i in special["ids"]]
    path.write_text(json.dumps(raw), encoding="utf-8")
    return load_tokenizer(str(old)), load_tokenizer(str(new)), place


def study(kind: str, root: Path, **changes: Any) -> Row:
    """Put one architecture through the door that a student takes, and out again."""
    from tokenkit.embeddings.transfer import transfer_vocabulary
    from tokenkit.export.huggingface import ExportRequest, export_huggingface, rehearse
    from tokenkit.models.causal_lm import LoadOptions, load_causal_lm

    old, new, place_V = tokenizers(root / "tokenizers")
    try:
        model = tiny(kind, **changes)
    except NotBuiltError as error:
        return Row(kind, f"not built: {error}")
    try:
        model.save_pretrained(root / "model")
        student = load_causal_lm(str(root / "model"), VOCAB, LoadOptions())
    except Exception as error:
        return Row(kind, refused(error, root))
    logits = "equal" if student.form.transform is None else f"equal, through `{student.form.transform}`"
    ids_T = torch.from_numpy(old.encode(TEXT).ids).long()
    with torch.no_grad():  # of the model as it was saved: what was lost on the way in is seen too
        before_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :, :VOCAB]
    adapters = adapted(str(root / "model"), ids_T)
    try:
        transfer_vocabulary(student, old, new, pad_to_multiple_of=64)
        rehearse(student, new)
        export_huggingface(student, None, new, ExportRequest(folder=root / "out"))
        permuted = f"{moved(root / 'out', ids_T, place_V, before_TV):.0e}"
    except Exception as error:
        permuted = refused(error, root)
    return Row(kind, logits, permuted, adapters)


@torch.no_grad()
def moved(folder: Path, ids_T: torch.Tensor, place_V: torch.Tensor, before_TV: torch.Tensor) -> float:
    """Return how far the exported logits are from the old ones, relative to their size."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    after_TV = model(input_ids=place_V[ids_T][None], use_cache=False).logits[0][:, place_V]
    return ((after_TV - before_TV).abs().max() / before_TV.abs().max()).item()


def adapted(folder: str, ids_T: torch.Tensor) -> str:
    """Say whether adapters can be placed and get a gradient."""
    from tokenkit.models.causal_lm import LoadOptions, load_causal_lm
    from tokenkit.models.lora import add_lora
    from tokenkit.models.options import LoraOptions

    student = load_causal_lm(folder, VOCAB, LoadOptions())
    try:
        add_lora(student, LoraOptions(rank=2))
        student.train()
        student(ids_T[None]).hidden_BTD.square().sum().backward()
    except Exception as error:
        return refused(error)
    trained = [p.grad for p in student.parameters() if p.requires_grad]
    return "train" if any(g is not None and bool(g.any()) for g in trained) else "no gradient"


def refused(error: Exception, root: Path | None = None) -> str:
    """Say an error in one line; those that are no refusals stand out by their kind."""
    plain = isinstance(error, ValueError) or type(error).__name__ == "ExportError"
    text = one_line(error).replace(f"{root}/model: ", "").replace(str(root), "")
    return f"refused: {text}" if plain else f"FAILED: {type(error).__name__} {text}"


def one_line(error: BaseException) -> str:
    """Return the first line of an error, cut."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].replace("|", "/")


def kinds() -> list[str]:
    """Return the types of models that transformers calls causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def study_all(names: Iterable[str]) -> list[Row]:
    """Study each, a minute at most."""

    def late(*_: Any) -> None:
        raise TimeoutError("took over a minute")

    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, late)
    rows = []
    for name in names:
        signal.alarm(60)
        with tempfile.TemporaryDirectory() as root:
            try:
                row = study(name, Path(root))
            except Exception as error:
                row = Row(name, f"FAILED: {type(error).__name__} {one_line(error)}")
        signal.alarm(0)
        rows.append(row)
        print(f"| {row.kind} | {row.logits} | {row.permuted} | {row.adapters} |", flush=True)
    return rows


def main() -> None:
    """Study what the command line names, or all, and then write the page's table."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if sys.argv[1:]:
        study_all(sys.argv[1:])
        return
    rows = study_all(kinds())
    lines = ["| type | logits | permuted | adapters |", "|---|---|---|---|"]
    lines += [f"| `{r.kind}` | {r.logits} | {r.permuted} | {r.adapters} |" for r in rows]
    held = sum(r.logits.startswith("equal") for r in rows)
    built = sum(not r.logits.startswith("not built") for r in rows)
    about = (
        f"transformers {transformers.__version__}, torch {torch.__version__}: {len(rows)} types, "
        f"{built} built, {held} taken, {built - held} refused."
    )
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    table = "\n".join([about, "", *lines])
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
