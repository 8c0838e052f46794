"""torchtitan's interface of version 0.3, as its `Trainer` uses it, with this library's loss inside."""

import pytest
import torch

from tests.integrations.material import distance, gradients
from tests.integrations.test_trainer import LOSSES, one_batch
from tests.ranks import run_ranks
from tokenkit.integrations.torchtitan import DistillsTitan, TitanLoss, titan_inputs


class Decoder(torch.nn.Module):
    """A model of torchtitan's shape: it leaves its head out when told to."""

    def __init__(self, model):
        super().__init__()
        self.body, self.lm_head, self._skip_lm_head = model.model, model.lm_head, False

    def forward(self, tokens):
        hidden_BTD = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden_BTD if self._skip_lm_head else self.lm_head(hidden_BTD)


class Trainer:
    """The steps of torchtitan's: it counts labels, then runs forward and backward per micro-batch."""

    def __init__(self, model, loss, steps):
        self.model_parts, self.loss_fn, self.gradient_accumulation_steps = [model], loss, steps
        self.metrics = []

    def train_step(self, data_iterator):
        groups = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        global_valid_tokens = sum((labels != -100).sum() for _, labels in groups)
        for inputs, labels in groups:
            prediction = self.model_parts[0](inputs["input"])
            loss, metrics = self.loss_fn(prediction, labels, global_valid_tokens, positions=None)
            self.metrics.append(metrics)
            loss.backward()


class Distilling(DistillsTitan, Trainer):
    pass


def micro_batches(collator, rows, size=2):
    return [collator.collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def test_a_step_is_that_of_one_big_batch(models, make_collator, rows):
    values, wanted = one_batch(models, make_collator(), rows)
    collator = make_collator()
    loss = TitanLoss(models[1], collator, LOSSES, torch.device("cpu"))
    trainer = Distilling(Decoder(models[0]), loss, 4)
    trainer.train_step(iter(micro_batches(collator, rows)))
    assert distance(gradients(models[0]), wanted) < 1e-5
    for name in LOSSES:
        assert sum(float(part[name]) for part in trainer.metrics) == pytest.approx(values[name], rel=1e-5)


def _sharded(world, models, make_collator, rows):
    from torch.distributed.fsdp import fully_shard

    collator = make_collator()
    decoder = Decoder(models[0])
    for module in (*decoder.body.layers, decoder):
        fully_shard(module)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no product before a sum
    loss = TitanLoss(models[1], collator, LOSSES, torch.device("cpu"))
    trainer = Distilling(decoder, loss, 2)
    trainer.train_step(iter(micro_batches(collator, rows[4 * world.rank : 4 * world.rank + 4])))
    return torch.cat([p.grad.full_tensor().flatten() for p in models[0].parameters()])


def test_two_ranks_under_fsdp2(models, make_collator, rows):
    _, wanted = one_batch(models, make_collator(), rows)
    for gradient in run_ranks(_sharded, 2, models, make_collator, rows, always_shard=False):
        assert distance(gradient, wanted) < 1e-5


def test_what_does_not_fit_is_refused(models, make_collator, rows):
    collator = make_collator()
    loss = TitanLoss(models[1], collator, LOSSES, torch.device("cpu"))
    loss.set_lm_head(models[0].lm_head)
    batches = micro_batches(collator, rows)
    hidden_BTD = models[0].model(batches[0].student.ids_BT).last_hidden_state
    with pytest.raises(RuntimeError, match="no micro-batch waits"):
        loss(hidden_BTD, titan_inputs(batches[0])[1])
    loss.begin(batches)
    with pytest.raises(RuntimeError, match="labels are not those"):
        loss(hidden_BTD, titan_inputs(batches[1])[1])
    with pytest.raises(ValueError, match="baseline_dskd reads more than the last hidden states"):
        TitanLoss(models[1], collator, {"baseline_dskd": 1.0}, torch.device("cpu"))
