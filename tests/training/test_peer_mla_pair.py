"""A PEER + MLA model is a student, and a teacher, as any other model is. 4 s: two trainings are built."""

import torch

from tests.models.test_peer_mla import tiny_peer
from tests.tiny import byte_level_bpe
from tokenkit.optim import is_table
from tokenkit.parallel import World
from tokenkit.training.build import build
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)


def reports(config):
    torch.manual_seed(0)
    parts, found = build(config, SINGLE), []
    for _ in range(6):
        found.append(train_step(parts.run, next(parts.batches)))
        parts.run.step += 1
    return found


def test_adapters_train_and_the_tables_stay(make_config, tmp_path):
    folder = byte_level_bpe(tmp_path / "peer", 280)
    tiny_peer(vocab_size=280).save_pretrained(folder)
    config = make_config(
        student__pretrained_model_name_or_path=folder,
        target_tokenizer_name=folder,
        losses=["clm"],
        gradient_checkpointing="true",
        train_embeddings="false",
        optimizer__learning_rate=3e-2,
    )
    torch.manual_seed(0)
    parts, found = build(config, SINGLE), []
    named = dict(parts.run.model.student.named_parameters())
    adapted = [name for name in named if "lora_A" in name]
    for module in ("query_proj", "o_proj", "kv_b_proj", "up_proj"):
        assert any(f".{module}." in name for name in adapted), module
    assert not any(p.requires_grad for name, p in named.items() if is_table(name))
    for _ in range(4):
        found.append(train_step(parts.run, next(parts.batches)).loss)
        parts.run.step += 1
    assert found[-1] < found[0]


def test_it_learns_from_a_teacher_of_another_tokenizer_and_teaches_one(make_config, workspace, tmp_path):
    folder = byte_level_bpe(tmp_path / "peer", 280)
    tiny_peer(vocab_size=280).save_pretrained(folder)
    llama = workspace / "model"
    for student, teacher in ((folder, llama), (llama, folder)):
        config = make_config(
            train_model_mode="full",
            optimizer__learning_rate=3e-3,
            student__pretrained_model_name_or_path=student,
            teacher__pretrained_model_name_or_path=teacher,
            target_tokenizer_name=student,
            loss_schedules=["constant", "step(0,1,3)"],
        )
        found = reports(config)
        assert found[2].loss < found[0].loss
        assert found[-1].loss < found[3].loss
        alone, together = found[2], found[3]
        assert alone.loss == alone.losses["clm"], "the teacher comes after the third step"
        assert together.loss == sum(together.losses.values())
