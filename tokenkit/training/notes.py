"""What a run says of itself in words before its first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter

from tokenkit.config import TrainConfig
from tokenkit.models.causal_lm import CausalLM, Vocabulary
from tokenkit.tokenization.chat.advice import explain_pair
from tokenkit.tokenization.chat.documents import Document, Message
from tokenkit.tokenization.chat.encode import encode_flat
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.training.build import Parts


def describe(parts: Parts, config: TrainConfig) -> str:
    """Return the lines that a run begins with: what is trained, what teaches, what was made, what to know."""
    tokenizers, text = parts.tokenizers, config.text
    lines = [
        f"student: {config.student.pretrained_model_name_or_path}, {_trained(parts.student.parameters())} "
        f"({config.training.train_model_mode})",
        f"teacher: {_teacher(parts, config)}",
        f"tokenizers: {tokenizers.old.vocab_size:,} ids -> {tokenizers.target.vocab_size:,} ids",
    ]
    if parts.transfer:
        made = ", ".join(f"{count:,} {method.replace('_', ' ')}" for method, count in parts.transfer.items())
        lines.append(f"new embedding rows: {made}")
    if parts.student.projector is not None:
        size = sum(p.numel() for p in parts.student.projector.parameters() if p.requires_grad)
        lines.append(f"hypernetwork: {size:,} parameters write the embedding rows")
    own = [p.numel() for name, p in parts.run.model.named_parameters() if name.startswith("parts.")]
    if own:
        lines.append(f"losses: {sum(own):,} parameters of their own are trained beside the student")
    teacher = None if parts.run.model.teacher is None else tokenizers.teacher
    mode, uses_template = text.chat_template_mode, text.use_chat_template
    lines += explain_pair(tokenizers.target, teacher, mode, use_chat_template=uses_template)
    return "\n".join([*lines, *_idle(parts, config)])


def facts(parts: Parts) -> dict[str, Any]:
    """Return what `run.facts` keeps of a run beside its command and versions."""
    sizes = [(p.numel(), p.requires_grad) for p in parts.student.parameters()]
    world = parts.run.world
    return {
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else world.device.type,
        "ranks": world.world_size,
        "parameters": sum(n for n, _ in sizes),
        "trained": sum(n for n, is_trained in sizes if is_trained),
        "embedding_rows": dict(parts.transfer),
    }


def _trained(parameters: Iterable[Parameter]) -> str:
    sizes = [(p.numel(), p.requires_grad) for p in parameters]
    trained, total = sum(n for n, is_trained in sizes if is_trained), sum(n for n, _ in sizes)
    return f"{trained:,} of {total:,} parameters are trained"


def _teacher(parts: Parts, config: TrainConfig) -> str:
    teacher = parts.run.model.teacher
    if teacher is None:
        named = config.teacher and config.teacher.pretrained_model_name_or_path
        return "none: no loss reads one" + (f", {named} is not loaded" if named else "")
    if isinstance(teacher, Vocabulary):
        return "the student as it was, under its old vocabulary"
    source = config.teacher or config.student
    assert isinstance(teacher, CausalLM)
    size = sum(p.numel() for p in teacher.parameters())
    return f"{source.pretrained_model_name_or_path}, {size:,} parameters beside the student's"


def _idle(parts: Parts, config: TrainConfig) -> list[str]:
    """Return lines about options of which only the loaded model and tokenizers show that they do nothing."""
    found = []
    student, training = parts.student, config.training
    if training.output_embeddings_mode == "untie" and not parts.was_tied:
        found.append("output_embeddings_mode (untie: the head has its own matrix anyway)")
    network = training.hypernet
    if training.has_hypernet and network is not None and not network.shared and len(student.matrices()) == 1:
        found.append("hypernet.shared (false: one matrix is written)")
    if config.text.special_tokens_mode == "ignore_pad" and not any(
        _writes_padding(t, config) for t in (parts.tokenizers.target, parts.tokenizers.teacher)
    ):
        found.append("special_tokens_mode (ignore_pad: the templates here write no padding token)")
    return [f"without effect here: {'; '.join(found)}"] if found else []


def _writes_padding(tokenizer: Tokenizer, config: TrainConfig) -> bool:
    """Whether some turn of a conversation, or a plain text, brings a padding token along."""
    if tokenizer.pad_id is None or tokenizer.pad_id in {
        token_id for role, token_id in tokenizer.special_ids.items() if role != "pad"
    }:
        return False
    talk = tuple(Message(role, "a") for role in ("system", "user", "assistant", "user", "assistant"))
    for document in (Document(messages=talk), Document(messages=talk[1:]), Document(text="a")):
        try:
            (side,) = encode_flat(
                [document],
                (tokenizer,),
                mode=config.text.chat_template_mode,
                use_chat_template=config.text.use_chat_template,
            )
        except ValueError:  # it has no template, or none for a system text
            continue
        if (side.ids_N == tokenizer.pad_id).any():
            return True
    return False
