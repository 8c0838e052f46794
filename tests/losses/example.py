"""A small batch with everything in it: one-sided tokens, unscored chunks, padding, two vocabularies."""

import torch

from tokenkit.structs import Batch, Chunks, Head, HiddenStates, Side

STUDENT_CHUNKS = [[0, 1, 1, 2, 3, 4, 4, 5], [0, -1, 1, 2, 2, 4, -1, -1]]
TEACHER_CHUNKS = [[0, 1, 2, 2, -1, 3, 4, 5, 5], [-1, 0, 1, 1, 2, 3, 4, -1, -1]]


def side(ids, length, trained, vocabulary, eos):
    space = torch.zeros(vocabulary, dtype=torch.bool)
    space[2::3] = True
    return Side(ids, torch.tensor(length), trained, space, eos)


def make_batch(*, trained=None):
    """Return a batch of two rows; the second is shorter than its padding on both sides."""
    torch.manual_seed(1)
    student_chunks, teacher_chunks = torch.tensor(STUDENT_CHUNKS), torch.tensor(TEACHER_CHUNKS)
    student_trained = torch.ones(2, 8, dtype=torch.bool)
    student_trained[1, 6:] = False
    teacher_trained = torch.ones(2, 9, dtype=torch.bool)
    teacher_trained[1, 7:] = False
    if trained is not None:
        student_trained &= trained
    chunks = Chunks(student_chunks.int(), teacher_chunks.int())
    student = side(torch.randint(40, (2, 8)), [8, 6], student_trained, 40, 3)
    teacher = side(torch.randint(50, (2, 9)), [9, 7], teacher_trained, 50, 4)
    return Batch(student, teacher, {"unconstrained": chunks, "space": chunks})


def make_states(batch, *, dtype=torch.float64, width=6, head_dtype=None):
    """Return random hidden states and heads of both models; everything wants a gradient."""
    torch.manual_seed(2)
    states = []
    for one in (batch.student, batch.teacher):
        B, T = one.ids_BT.shape
        hidden = torch.randn(B, T, width, dtype=torch.float64).to(dtype).requires_grad_()
        weight = torch.randn(len(one.space_V), width, dtype=torch.float64)
        states.append(HiddenStates(hidden, Head(weight.to(head_dtype or dtype).requires_grad_())))
    return states
