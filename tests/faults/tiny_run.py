"""A tiny FSDP2 training run with dropout, tied weights and a frozen part: what the fault tests break.

It ends in `curve.jsonl` (loss and gradient norm of each step, as hexadecimal floats) and `final` (the
digest of all parameters and moments). Two runs are the same run if both files hold the same bytes.
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from tokenkit import parallel
from tokenkit.optim import LearningRate, build_optimizer, set_learning_rate
from tokenkit.optim_options import OptimizerOptions, ParamGroup
from tokenkit.run import checkpoint
from tokenkit.run.metrics import read_metrics, truncate_metrics
from tokenkit.run.saving import Background
from tokenkit.run.state import tensors_to_save

VOCAB, WIDTH, STEPS, SAVE_EVERY = 31, 12, 12, 3
CONFIG = {"optimizer": {"learning_rate": 0.02}, "steps": STEPS, "logging_interval": 1}


class Block(nn.Module):
    """A frozen matrix with a trainable low-rank correction, and dropout."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH)

    def forward(self, hidden):
        return hidden + F.dropout(
            torch.tanh(self.base(hidden) + self.up(self.down(hidden))), 0.2, self.training
        )


class Model(nn.Module):
    """Tied embeddings around two blocks; a buffer counts the batches seen."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, ids):
        self.batches += 1
        hidden = self.embedding(ids[:, :-1])
        for block in self.blocks:
            hidden = block(hidden)
        logits = hidden @ self.head.weight.T
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def build(world, learning_rate=0.02):
    """Return the run's state at step 0."""
    torch.manual_seed(5)
    model = Model()
    parallel.shard(model, model.blocks, world, param_dtype=None)
    options = OptimizerOptions(
        learning_rate=learning_rate,
        schedule="cosine",
        weight_decay=0.1,
        param_groups=(ParamGroup(pattern="embedding", lr_scale=0.5),),
    )
    optimizer = build_optimizer(model.named_parameters(), options)
    torch.manual_seed(100 + world.rank)
    return checkpoint.State(model, optimizer, 0, {"position": 0}), LearningRate(options, STEPS, 2)


def identity(**changes):
    """Return what makes a run this run."""
    return checkpoint.Identity(CONFIG | changes, {"tokenizer": "abc"})


def train_step(state, rate, world):
    """Do one step; return its loss and gradient norm."""
    generator = torch.Generator().manual_seed(state.extra["position"])
    ids = torch.randint(VOCAB, (8, 9), generator=generator).chunk(world.world_size)[world.rank]
    count = world.all_reduce({"tokens": torch.tensor(ids[:, 1:].numel())}, state.step)
    loss = state.module(ids) / count["tokens"].float()
    loss.backward()
    norm = parallel.clip_grad_norm(state.module.parameters(), 1.0)
    set_learning_rate(state.optimizer, rate(state.step))
    state.optimizer.step()
    state.optimizer.zero_grad()
    total = world.all_reduce({"loss": loss}, state.step)["loss"]
    state.step += 1
    state.extra = {"position": state.extra["position"] + 1}
    return total.item(), norm.item()


def digest(state):
    """Return the SHA-256 of everything a checkpoint would hold, gathered from all ranks."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors_to_save(state).items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        sha.update(name.encode() + whole.detach().numpy().tobytes())
    return sha.hexdigest()


def run(world, folder: str, steps=STEPS, *, in_background=False):
    """Train to the end, from the newest intact checkpoint if there is one; return the curve."""
    root, background = Path(folder), Background(world, 60.0) if in_background else None
    state, rate = build(world)
    checkpoint.restore(root / "checkpoints", state, identity(), world, may_differ=("logging_interval",))
    log = root / "metrics.jsonl"
    if world.is_main:
        root.mkdir(exist_ok=True)
        truncate_metrics(log, state.step)
    while state.step < steps:
        loss, norm = train_step(state, rate, world)
        if world.is_main:
            with log.open("a") as file:
                file.write(json.dumps({"step": state.step, "loss": loss, "grad_norm": norm}) + "\n")
        if state.step % SAVE_EVERY == 0 or state.step == steps:
            if background is None:
                checkpoint.save(root / "checkpoints", state, identity(), world)
            else:
                background.begin(root / "checkpoints", state, identity(), 2)
    if background is not None:
        background.finish()
    final = digest(state)
    if world.is_main:
        (root / "final").write_text(final)
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(log)] if world.is_main else []
