"""TRL's trainers with this library's losses."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.integrations.material import distance
from tests.integrations.test_trainer import KeepGradients, one_batch

pytest.importorskip("trl")
from trl import SFTConfig
from trl.experimental.gold import GOLDConfig

from tokenkit.data.collate import AlignedCollator
from tokenkit.integrations import DistillationGOLDTrainer, DistillationSFTTrainer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_steps": 1,
    "learning_rate": 1e-3,
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
LOSSES = {"clm": 1.0, "alm_unconstrained": 20.0}


@pytest.fixture
def hf_tokenizers(folders):
    found = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    for tokenizer in found:
        tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, "</s>"
    return found


def test_sft(models, make_collator, rows, tmp_path, hf_tokenizers):
    _, wanted = one_batch(models, make_collator(), rows, LOSSES)
    kept = KeepGradients()
    trainer = DistillationSFTTrainer(
        models[0],
        SFTConfig(str(tmp_path), **COMMON),
        teacher=models[1],
        losses=LOSSES,
        data_collator=make_collator(),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=hf_tokenizers[0],
        callbacks=[kept],
    )
    trainer.train()
    assert distance(kept.steps[0], wanted) < 1e-5
    assert trainer.evaluate()["eval_clm"] == pytest.approx(trainer.state.log_history[0]["clm"], rel=0.1)


def test_sft_with_its_own_peft_config(models, make_collator, rows, tmp_path, hf_tokenizers):
    from peft import LoraConfig

    kept = KeepGradients()
    trainer = DistillationSFTTrainer(
        models[0],
        SFTConfig(str(tmp_path), **COMMON),
        teacher=models[1],
        losses=LOSSES,
        data_collator=make_collator(),
        train_dataset=Dataset.from_list(rows),
        processing_class=hf_tokenizers[0],
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        callbacks=[kept],
    )
    trainer.train()
    assert bool(kept.steps[0].any())
    assert len(kept.steps[0]) < sum(p.numel() for p in models[0].parameters()) / 10


CHATS = [
    {
        "messages": [
            {"role": "user", "content": "The cats sat on the mat"[: 5 + n]},
            {"role": "assistant", "content": "and the dog ran after the cats."[: 3 + 3 * n]},
        ]
    }
    for n in range(8)
]
PAIRS = [
    {"prompt": chat["messages"][0]["content"], "completion": chat["messages"][1]["content"]} for chat in CHATS
]


def make_gold(models, collator, tmp_path, tokenizer, data, **changes):
    settings = {**COMMON, "lmbda": 0.0, "max_length": 64, "max_completion_length": 8, **changes}
    kept = KeepGradients()
    trainer = DistillationGOLDTrainer(
        models[0],
        GOLDConfig(str(tmp_path), **settings),
        teacher=models[1],
        losses=LOSSES,
        data_collator=collator,
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[kept],
    )
    return trainer, kept


def chat_collator(student, teacher):
    return AlignedCollator(student, teacher, max_length_student=64, max_length_teacher=64)


@pytest.mark.parametrize("data", [CHATS, PAIRS], ids=["chats", "pairs"])
def test_gold_off_policy(data, models, tmp_path, hf_tokenizers):
    values, wanted = one_batch(models, chat_collator(*hf_tokenizers), data, LOSSES)
    trainer, kept = make_gold(models, chat_collator(*hf_tokenizers), tmp_path, hf_tokenizers[0], data)
    rows_before = trainer.distiller.teacher.embedding.weight.shape
    trainer.train()
    assert distance(kept.steps[0], wanted) < 1e-5
    assert trainer.state.log_history[0]["clm"] == pytest.approx(values["clm"], rel=1e-5)
    assert trainer.distiller.teacher.embedding.weight.shape == rows_before
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


def test_gold_on_its_own_text_with_a_sentencepiece_student(models, tmp_path, hf_tokenizers, monkeypatch):
    collator = chat_collator(hf_tokenizers[1], hf_tokenizers[0])
    trainer, kept = make_gold(
        (models[1], models[0]), collator, tmp_path, hf_tokenizers[1], CHATS, lmbda=1.0, max_steps=2
    )
    seen = []
    collate = collator.collate
    monkeypatch.setattr(collator, "collate", lambda rows: seen.extend(rows) or collate(rows))
    trainer.train()
    answers = [row["messages"][-1]["content"] for row in seen]
    given = {row["messages"][-1]["content"] for row in CHATS}
    assert len(answers) == 16
    assert not given & set(answers)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in kept.steps)


def test_what_cannot_act_is_refused(models, make_collator, rows, tmp_path, hf_tokenizers):
    def sft(collator, **settings):
        DistillationSFTTrainer(
            models[0],
            SFTConfig(str(tmp_path), **COMMON, **settings),
            teacher=models[1],
            losses=LOSSES,
            data_collator=collator,
            train_dataset=Dataset.from_list(rows),
            processing_class=hf_tokenizers[0],
        )

    with pytest.raises(ValueError, match="packing has no effect"):
        sft(make_collator(), packing=True)
    with pytest.raises(TypeError, match="data_collator must be an AlignedCollator"):
        sft(None)
