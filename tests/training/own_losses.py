"""Losses as a user would write them, named `tests.training.own_losses:function`."""

import torch

from tokenkit.losses import clm_loss
from tokenkit.structs import LossTerm


def double_clm(student, teacher, batch):
    """Twice the cross entropy, over the default count."""
    term = clm_loss(student, batch)
    return LossTerm(2 * term.total, term.count)


def wrong_count(student, teacher, batch):
    """Sums over documents, but does not say so before the student runs."""
    return LossTerm(clm_loss(student, batch).total, torch.tensor(len(batch.student.length_B)))


def not_finite(student, teacher, batch):
    """NaN in value and gradient."""
    term = clm_loss(student, batch)
    return LossTerm(term.total * float("nan"), term.count)


def counted_by_number(student, teacher, batch):
    """Sums over documents, and says so with a plain number."""
    return LossTerm(clm_loss(student, batch).total, counted_by_number.count(teacher, batch))


counted_by_number.count = lambda teacher, batch: len(batch.student.length_B)


class _NotFiniteBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * float("nan")


def not_finite_backward(student, teacher, batch):
    """A finite loss with a gradient that is NaN, whatever the scale."""
    term = clm_loss(student, batch)
    return LossTerm(_NotFiniteBackward.apply(term.total), term.count)


def nothing(student, teacher, batch):
    """A batch in which there was nothing to compare: no graph at all."""
    return LossTerm(torch.zeros(()), torch.tensor(0))


nothing.count = lambda teacher, batch: torch.tensor(0)


def of_the_head_alone(student, teacher, batch):
    """A penalty on the head: it does not see what the layers do."""
    return LossTerm(student.head.weight_VD.square().sum(), torch.tensor(1))


of_the_head_alone.count = lambda teacher, batch: torch.tensor(1)
