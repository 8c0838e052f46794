"""A small batch with everything in it: one-sided tokens, unscored chunks, padding, two vocabularies."""

import torch

from tokenkit.kernels.projected_divergence import make_projection
from tokenkit.losses import make_loss
from tokenkit.structs import Batch, Chunks, Context, Head, HiddenStates, Side, Widths

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
    return Batch(student, teacher, {"unconstrained": chunks, "space": chunks, "unbiased": chunks})


def make_states(batch, *, dtype=torch.float64, width=6, head_dtype=None):
    """Return random hidden states and heads of both models; everything wants a gradient."""
    torch.manual_seed(2)
    states = []
    for one in (batch.student, batch.teacher):
        B, T = one.ids_BT.shape
        hidden = torch.randn(B, T, width, dtype=torch.float64).to(dtype).requires_grad_()
        weight = torch.randn(len(one.space_V), width, dtype=torch.float64)
        embedded = torch.randn(B, T, width, dtype=torch.float64).to(dtype)
        head = Head(weight.to(head_dtype or dtype).requires_grad_())
        states.append(HiddenStates(hidden, head, embedded_BTD=embedded.requires_grad_()))
    return states


STUDENT_PAIR_IDS, TEACHER_PAIR_IDS = torch.tensor([3, 0, 17, 39]), torch.tensor([4, 1, 49, 20])
NEAREST = torch.arange(40) * 7 % 45


def make(name, **changes):
    """Return a loss that fits the batch."""
    torch.manual_seed(3)
    pairs = {"student_index": STUDENT_PAIR_IDS, "teacher_index": TEACHER_PAIR_IDS}
    entries = (torch.arange(40).repeat(2), torch.cat([NEAREST, NEAREST + 1]), torch.rand(80) + 0.1)
    needed = {
        "alm_side_path": pairs,
        "baseline_mined": {"teacher_index": NEAREST},
        "baseline_gold_js": pairs,
        "baseline_xtoken": {"projection": make_projection(*entries, 40, 50)},
    }
    return make_loss(name, **(needed.get(name, {}) | changes))


def make_context(loss, student, teacher):
    """Return what the trainer would hand to a loss: heads, embeddings, trained parts."""
    torch.manual_seed(4)
    widths = [Widths(x.hidden_BTD.shape[2], x.hidden_BTD.shape[2], 2) for x in (student, teacher)]
    modules = loss.modules(*widths)
    if modules is not None:
        modules.to(student.hidden_BTD.dtype)
    return Context(teacher.head, student.head, student.embedded_BTD, modules)


def run_loss(name, batch, student, teacher, *, modules=None, **changes):
    """Return (LossTerm, context) of both halves of a loss."""
    loss = make(name, **changes)
    context = make_context(loss, student, teacher)
    prepared = loss.prepare(teacher, batch, context)
    return loss.loss(student, prepared, batch, context), context
