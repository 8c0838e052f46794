"""What FSDP2 gathers in a step, counted on gloo: each vocabulary once, the teacher's only where it is read.

Faults tried, each caught here or by test_ranks_agree.py: one group for both models; the teacher's head read
after it was freed; a second backward through a head that the first one freed.
"""

import pytest
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from tests.ranks import run_ranks
from tests.training.test_ranks_agree import assert_close, steps
from tokenkit.training.build import build
from tokenkit.training.step import train_step


def gathered(world, config):
    """Return how often what was gathered in the second step: a vocabulary or a layer."""
    parts, counts = build(config, world), {}
    original = DefaultAllGather.__call__

    def counting(self, output_tensor, *args, **kwargs):
        counts[output_tensor.numel()] = counts.get(output_tensor.numel(), 0) + 1
        return original(self, output_tensor, *args, **kwargs)

    train_step(parts.run, next(parts.batches))
    parts.run.step += 1
    DefaultAllGather.__call__ = counting  # this process ends with the function
    train_step(parts.run, next(parts.batches))
    sizes = {}
    for name, model in (("student", parts.run.model.student), ("teacher", parts.run.model.teacher)):
        inside = {id(p) for layer in model.layers for p in layer.parameters()}
        sizes[sum(p.numel() for p in model.parameters() if id(p) not in inside)] = name
    layer = min(counts)
    found = {sizes.get(size, "layer" if size == layer else "both"): n for size, n in counts.items()}
    return found


FULL = {"train_model_mode": "full", "batch_size": 8}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gradient_accumulation_steps": 2}, {"student": 1, "teacher": 1, "layer": 12}),
        ({"losses": ["clm", "baseline_uld"]}, {"student": 1, "teacher": 1, "layer": 6}),
        ({"reshard_after_forward": "false", "teacher_sharding": "replicated"}, {"student": 1, "layer": 2}),
    ],
)
def test_a_step_gathers_each_vocabulary_once(make_config, changes, expected):
    """Of two layers each: a teacher's once a micro-batch, a student's twice, or once where it stays."""
    assert run_ranks(gathered, 2, make_config(**FULL, **changes)) == [expected] * 2


@pytest.mark.parametrize("losses", [["clm", "alm_unconstrained"], ["clm", "baseline_uld", "baseline_dskd"]])
def test_a_replicated_teacher_teaches_the_same(make_config, losses):
    changes = {**FULL, "losses": losses, "gradient_accumulation_steps": 2}
    plain, other = (
        make_config(**changes),
        make_config(**changes, teacher_sharding="replicated", reshard_after_forward="false"),
    )
    assert_close(run_ranks(steps, 2, other, 2)[0], run_ranks(steps, 2, plain, 2)[0])


def types_of_the_teacher(world, config):
    teacher = build(config, world).run.model.teacher
    return [[str(t.dtype) for t in tensors] for tensors in (teacher.parameters(), teacher.buffers())]


def test_a_replicated_teacher_of_16_bits_turns_by_angles_in_float32(make_config):
    """As from_pretrained leaves them: rounded, the angles of far positions are off by a radian."""
    config = make_config(**FULL, dtype="bfloat16", teacher_sharding="replicated")
    ((weights, buffers),) = run_ranks(types_of_the_teacher, 1, config)
    assert set(weights) == {"torch.bfloat16"}
    assert set(buffers) == {"torch.float32"}
