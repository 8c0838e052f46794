"""A PEER + MLA model is a student, and a teacher, as any other model is. 4 s: two trainings are built."""

import torch

from tests.models.test_peer_mla import tiny_peer
from tests.tiny import byte_level_bpe
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
