"""Loops of one's own, Accelerate's and Lightning's: the gradient of a step is that of one big batch."""

import os

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import MambaConfig, MambaForCausalLM

from tests.integrations.material import distance, gradients
from tests.integrations.test_trainer import LOSSES, one_batch
from tests.ranks import run_ranks
from tokenkit.integrations import Distiller, FlatCollator, accelerate_step


def optimizer_that_keeps(found):
    """A stand-in for SGD that keeps the gradient it was given."""

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            if closure is not None:
                closure()
            found.append(
                torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"] if p.grad is not None])
            )

    return lambda parameters: Keep(list(parameters), 0.1)


def test_a_plain_loop(models, make_collator, rows):
    values, wanted = one_batch(models, make_collator(), rows)
    collator = make_collator()
    distiller = Distiller(*models, collator, LOSSES)
    again = distiller.backward(models[0], [collator.collate(rows[i : i + 2]) for i in range(0, 8, 2)])
    assert distance(gradients(models[0]), wanted) < 1e-5
    assert again == pytest.approx(values, rel=1e-5)


def test_a_plain_loop_over_fuller_rows(models, make_collator, rows):
    """Padding to a multiple moves no document, and a model without positions is not given two in a row."""
    values, wanted = one_batch(models, make_collator(), rows)
    collator = make_collator(pack_documents=True, pad_to_multiple_of=8)
    again = Distiller(*models, collator, LOSSES).backward(models[0], [collator.collate(rows)])
    assert distance(gradients(models[0]), wanted) < 1e-5
    assert again == pytest.approx(values, rel=1e-5)
    sizes = {"vocab_size": models[0].config.vocab_size, "hidden_size": 16, "num_hidden_layers": 1}
    recurrent = MambaForCausalLM(MambaConfig(**sizes, state_size=4))
    with pytest.raises(ValueError, match="pack_documents: documents of one row see each other in Mamba"):
        Distiller(recurrent, models[1], collator, LOSSES)
    assert recurrent.training
    with pytest.raises(ValueError, match="flat tensors"):
        FlatCollator(collator)


def _accelerated(world, models, make_collator, rows, precision):
    from accelerate import Accelerator

    if world is not None:
        os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(world.rank)}
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    distiller = Distiller(*models, make_collator(), LOSSES)
    loader = DataLoader(rows, 2, collate_fn=FlatCollator(distiller.collator))
    model, loader = accelerator.prepare(models[0], loader)
    values = accelerate_step(accelerator, distiller, model, list(loader))
    return gradients(models[0]), values


@pytest.mark.parametrize(
    ("ranks", "precision", "bound"), [(1, "no", 1e-5), (2, "no", 1e-5), (1, "bf16", 0.1)]
)
def test_accelerate(ranks, precision, bound, models, make_collator, rows):
    values, wanted = one_batch(models, make_collator(), rows)
    arguments = (models, make_collator, rows, precision)
    # always in processes of their own: Accelerate keeps its state for the life of one
    results = run_ranks(_alone if ranks == 1 else _accelerated, ranks, *arguments, always_shard=False)
    for gradient, found in results:
        assert distance(gradient, wanted) < bound
        assert found == pytest.approx(values, rel=bound)


def _alone(world, *arguments):
    return _accelerated(None, *arguments)


def test_accelerates_own_accumulation_is_refused(models, make_collator):
    class Own:
        gradient_accumulation_steps = 4

    with pytest.raises(ValueError, match="divides by a number of micro-batches"):
        accelerate_step(Own(), Distiller(*models, make_collator(), LOSSES), models[0], [])


def fit(models, make_collator, rows, folder, **changes):
    from lightning.pytorch import Trainer

    from tokenkit.integrations import DistillationModule

    found = []
    collator = make_collator()
    settings = {"accumulate": 4, "optimizer": optimizer_that_keeps(found), **changes.pop("module", {})}
    module = DistillationModule(*models, collator, LOSSES, **settings)
    loader = DataLoader(rows, 2, collate_fn=collator.collate)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, "num_sanity_val_steps": 0, **changes},
    )
    trainer.fit(module, loader, loader)
    return found, trainer


def test_lightning(models, make_collator, rows, tmp_path):
    values, wanted = one_batch(models, make_collator(), rows)
    found, trainer = fit(models, make_collator, rows, tmp_path, enable_checkpointing=True)
    assert [distance(gradient, wanted) < 1e-5 for gradient in found] == [True]
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name, value in values.items():
        assert measured[f"train_{name}"] == pytest.approx(value, rel=1e-5)
        assert measured[f"val_{name}"] == pytest.approx(value, rel=1e-5)  # Keep does not step
    saved = next(tmp_path.rglob("*.ckpt"))
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert set(state) == {f"student.{name}" for name in models[0].state_dict()}


def test_lightning_takes_a_short_last_step(models, make_collator, rows, tmp_path):
    found, _ = fit(models, make_collator, rows, tmp_path, module={"accumulate": 3})
    assert len(found) == 2


def test_lightning_in_bf16(models, make_collator, rows, tmp_path):
    _, wanted = one_batch(models, make_collator(), rows)
    found, _ = fit(models, make_collator, rows, tmp_path, precision="bf16-mixed")
    assert 1e-5 < distance(found[0], wanted) < 0.1


def _lightning_rank(world, models, make_collator, rows, folder):
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(world.rank)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    found, _ = fit(models, make_collator, rows, folder, devices=2, strategy="ddp", module={"accumulate": 2})
    return found[0]


def test_lightning_on_two_ranks(models, make_collator, rows, tmp_path):
    _, wanted = one_batch(models, make_collator(), rows)
    for gradient in run_ranks(_lightning_rank, 2, models, make_collator, rows, tmp_path, always_shard=False):
        assert distance(gradient, wanted) < 1e-5


def test_lightning_refuses_unknown_options(models, make_collator, rows, tmp_path):
    with pytest.raises(ValueError, match="there is no warmup"):
        fit(models, make_collator, rows, tmp_path, module={"warmup": 3})
