"""Benchmarks of lm-eval inside a training: the student is asked through the module that owns its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenkit.errors import ConfigError
from tokenkit.evaluation.lm_eval import NAMES_OF_LENGTH, asking_of, language_model
from tokenkit.evaluation.lm_eval_tasks import load_tasks, run_tasks
from tokenkit.evaluation.task_scores import scores_of
from tokenkit.training.requests import NextToken, Score, ask

if TYPE_CHECKING:
    from tokenkit.config.benchmarks import LmEval
    from tokenkit.evaluation.scorer import Stop
    from tokenkit.parallel import World
    from tokenkit.tokenization.tokenizer import Tokenizer


class StudentScorer:
    """The student of a `Distillation`, sharded or not.

    Args:
        model: the root that holds it; every rank asks as often as the others.
        positions: tokens that it reads at most.
        world: the processes that ask; ids are handed over on its device.
        ends: ids that end what is written.
    """

    def __init__(self, model: nn.Module, positions: int | None, world: World, ends: Collection[int] = ()):
        self._model, self.positions, self.device = model, positions, world.device
        self._world, self._ends = world, frozenset(ends)

    def score(self, ids_BT: Tensor, at_N: tuple[Tensor, Tensor], target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p of each target, nats, and whether no other token is more likely."""
        return ask(self._model, Score(ids_BT, at_N, target_N))

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], stop: Stop, options: Mapping[str, Any]
    ) -> list[list[int]]:
        """Return what is written behind each prompt, without its end token.

        Each token is a forward over all that is there: what a sharded module's forward gives back has no
        caches. Every rank takes as many steps as that which writes most.
        """
        texts, written = [list(ids) for ids in prompts], [list[int]() for _ in prompts]
        is_done = [False] * len(texts)
        for _ in range(options["max_new_tokens"]):
            if all(self._world.gather(all(is_done))):
                break
            longest = max(map(len, texts))
            ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in texts])
            last_B = torch.tensor([len(ids) - 1 for ids in texts])
            z_BV = ask(self._model, NextToken(ids_BT.to(self.device), last_B.to(self.device)))
            for row, new in enumerate(_choose(z_BV, options).tolist()):
                if is_done[row] or new in self._ends:
                    is_done[row] = True
                    continue
                texts[row].append(new)
                written[row].append(new)
                is_done[row] = stop(written[row])
        return written


def _choose(z_BV: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Return the likeliest token of each row, or one that is drawn."""
    if not options.get("do_sample"):
        return z_BV.argmax(-1)
    return torch.multinomial((z_BV / options["temperature"]).softmax(-1), 1)[:, 0]


@dataclass(frozen=True)
class Benchmarks:
    """The tasks of `eval.tasks`, their documents read."""

    options: LmEval
    tasks: list[Any]

    @classmethod
    def load(cls, options: LmEval) -> Benchmarks:
        """Read what will be asked, before any model is loaded.

        Raises:
            ConfigError: an unknown task, or one whose answers are written by beams or from a part of the ids.
            DataError: documents that cannot be had.
        """
        tasks = load_tasks(options.tasks, options.task_data)
        leaves = [leaf for task in tasks for leaf in getattr(task, "get_all_tasks", lambda t=task: [t])()]
        for leaf in leaves:
            if leaf.get_config("output_type") == "generate_until":
                _check_writing(leaf, options)
        return cls(options, tasks)

    def run(self, model: nn.Module, tokenizer: Tokenizer, world: World) -> dict[str, float]:
        """Return every score of the student as it is now, by `TASK/METRIC`; every rank calls it."""
        was_training = model.training
        model.eval()
        config = getattr(model, "student").config  # noqa: B009
        positions = getattr(config, "max_position_embeddings", None)
        known = (tokenizer.eos_id, tokenizer.special_ids.get("end_turn"))
        ends = {end for end in known if end is not None}
        scorer = StudentScorer(model, positions, world, ends)
        asking = asking_of(self.options, tokenizer)
        lm = language_model(scorer, tokenizer.to_huggingface(), asking, world)
        found = run_tasks(lm, self.tasks, self.options, seed=SEED, resamples=0)
        model.train(was_training)
        return {f"{score.task}/{score.metric}": score.value for score in scores_of(found)}


def _check_writing(task: Any, options: LmEval) -> None:
    """Raise ConfigError where a task's answers are written in a way that a training does not know."""
    asked = {**(task.get_config("generation_kwargs") or {}), **options.generation}
    others = [
        f"{name} {value}"
        for name, value in asked.items()
        if name not in (*WRITING, *NAMES_OF_LENGTH) and value != IDLE.get(name)
    ]
    if others:
        raise ConfigError(
            f"eval.tasks: {task.task_name} asks for {', '.join(others)}, and inside a training an answer is "
            "written of the likeliest tokens, or of tokens drawn by temperature: ask for it with "
            "`tokenkit eval` on a checkpoint"
        )


WRITING = ("until", "do_sample", "temperature")
IDLE = {"num_beams": 1, "top_p": 1, "top_k": 0}
"""What changes nothing."""

SEED = 1234
"""Of examples in front of a question: as of `tokenkit eval`, so that both give one score."""
