"""`gpu_checks` under pytest; on a CPU with tiny sizes, so that the checks themselves stay sound."""

import pytest
import torch

from tests.kernels.gpu_checks import CHECKS, TINY, Sizes

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BY_NAME = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@BY_NAME
@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu(check):
    check(Sizes())


@BY_NAME
def test_dry_run(check):
    check(TINY)
