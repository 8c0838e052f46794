"""Forward-mode derivatives: custom operations would return 0 for them, so all of them refuse."""

import pytest
import torch
from torch.autograd import forward_ad

from tokenkit.kernels.alm_difference import alm_difference
from tokenkit.kernels.chunk_likelihood import chunk_likelihood, lay_out
from tokenkit.kernels.hybrid_distance import hybrid_distance
from tokenkit.kernels.linear_divergence import linear_divergence
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.kernels.projected_divergence import make_projection, projected_divergence
from tokenkit.kernels.sorted_distance import sorted_distance
from tokenkit.structs import Head

TARGET = torch.tensor([1, 0, 3])
TEACHER = torch.linspace(-1, 1, 12).view(3, 4)
FROZEN = Head(torch.linspace(1, -1, 20).view(5, 4))
PROJECTION = make_projection(torch.arange(5), torch.arange(5), torch.ones(5), 5, 5)
IDS = torch.tensor([[0, 1, 1]])
LAYOUT = lay_out(IDS, IDS, torch.ones(1, 3) > 0, torch.ones(1, 3) > 0)

OPERATIONS = {
    "linear_logprob": lambda x, w: linear_logprob(x, Head(w), TARGET).logp_N,
    "linear_divergence": lambda x, w: linear_divergence(x, Head(w), TEACHER, FROZEN, "js"),
    "projected_divergence": lambda x, w: projected_divergence(
        x, Head(w), TEACHER, FROZEN, PROJECTION, torch.ones(3)
    ),
    "hybrid_distance": lambda x, w: hybrid_distance(
        (x, Head(w), torch.zeros(3)), (TEACHER, FROZEN, torch.zeros(3)), torch.ones(3)
    ),
    "hybrid_distance of log c": lambda x, w: hybrid_distance(
        (TEACHER, FROZEN, -x.abs().sum(1) - w.sum()), (TEACHER, FROZEN, torch.zeros(3)), torch.ones(3)
    ),
    "sorted_distance": lambda x, w: sorted_distance(x, Head(w), TEACHER, FROZEN),
    "alm_difference": lambda x, w: alm_difference(-TEACHER.abs(), -x.abs() - w.sum()),
    "chunk_likelihood": lambda x, w: chunk_likelihood(-x.sum(1)[None].abs() - w.sum(), LAYOUT.student),
}


@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_silent_zero(name, which):
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    operation = OPERATIONS[name]

    def of_one(value):
        return operation(value, w) if which == "hidden" else operation(x, value)

    primal = x if which == "hidden" else w
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(of_one, (primal,), (torch.ones_like(primal),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        of_one(forward_ad.make_dual(primal, torch.ones_like(primal)))
    assert of_one(primal).isfinite().all()
