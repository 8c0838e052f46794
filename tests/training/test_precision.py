"""16 bits in one process: the definition of FSDP2, and what stays float32.

Faults tried, each caught here: a layer's inputs left in float32; a tied matrix cast twice; weights not put
back after an error; a cast outside the checkpointed part.
"""

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from tests.training.test_ranks_agree import SINGLE, steps
from tokenkit.models.precision import compute_in


def close(got, expected, rtol):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("changes", [
    {"dtype": "bfloat16", "train_model_mode": "full", "gradient_checkpointing": "true"},
    {"dtype": "bfloat16", "losses": ["clm", "alm_latents", "baseline_dskd"], "batch_size": 8},
    {"dtype": "float16", "train_model_mode": "full"},
])  # fmt: skip
def test_one_process_computes_as_a_sharded_one(make_config, changes):
    config = make_config(**changes)
    (sizes, norms), (one_sizes, one_norms) = run_ranks(steps, 1, config)[0], steps(SINGLE, config)
    close(one_sizes, sizes, 1e-6)
    close(one_norms, norms, 1e-5)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, other=None, fails=False):
        assert {x.dtype, other.dtype, self.linear.weight.dtype} == {torch.bfloat16}
        if fails:
            raise RuntimeError("inside")
        return x + self.linear(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(16, 8), Layer(), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids, scale, **options):
        assert scale.dtype == torch.float32, "what the root is given is left alone"
        assert self.head.weight is self.embedding.weight
        return self.head(self.layer(self.embedding(ids), other=scale, **options))


def test_weights_stay_float32_and_are_shown_again_after_an_error():
    model = Model()
    before = dict(model.named_parameters())
    compute_in(model, [model.layer], torch.bfloat16)
    ids, scale = torch.arange(16)[None], torch.ones(1)
    with pytest.raises(RuntimeError, match="inside"):
        model(ids, scale, fails=True)
    out = model(ids, scale)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in after.values())
