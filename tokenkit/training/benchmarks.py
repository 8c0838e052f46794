"""Benchmarks of lm-eval inside a training: the student is asked through the module that owns its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenkit.errors import ConfigError
from tokenkit.evaluation.lm_eval import asking_of, language_model
from tokenkit.evaluation.lm_eval_tasks import load_tasks, run_tasks
from tokenkit.evaluation.task_scores import scores_of
from tokenkit.training.requests import Score, ask

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
        device: where ids are handed over.
    """

    def __init__(self, model: nn.Module, positions: int | None, device: torch.device):
        self._model, self.positions, self.device = model, positions, device

    def score(self, ids_BT: Tensor, at_N: tuple[Tensor, Tensor], target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p of each target, nats, and whether no other token is more likely."""
        return ask(self._model, Score(ids_BT, at_N, target_N))

    def generate(
        self, prompts: Sequence[list[int]], stop: Stop, options: Mapping[str, Any]
    ) -> list[list[int]]:
        """Refuse: tasks whose answers are written are not taken."""
        raise NotImplementedError


@dataclass(frozen=True)
class Benchmarks:
    """The tasks of `eval.tasks`, their documents read."""

    options: LmEval
    tasks: list[Any]

    @classmethod
    def load(cls, options: LmEval) -> Benchmarks:
        """Read what will be asked, before any model is loaded.

        Raises:
            ConfigError: an unknown task, or one whose answers are written.
            DataError: documents that cannot be had.
        """
        tasks = load_tasks(options.tasks, options.task_data)
        leaves = [leaf for task in tasks for leaf in getattr(task, "get_all_tasks", lambda t=task: [t])()]
        for leaf in leaves:
            if leaf.get_config("output_type") == "generate_until":
                raise ConfigError(
                    f"eval.tasks: the answers of {leaf.task_name} are written by the model, and inside a "
                    "training only given answers are scored: ask for it with `tokenkit eval` on a checkpoint"
                )
        return cls(options, tasks)

    def run(self, model: nn.Module, tokenizer: Tokenizer, world: World) -> dict[str, float]:
        """Return every score of the student as it is now, by `TASK/METRIC`; every rank calls it."""
        was_training = model.training
        model.eval()
        config = getattr(model, "student").config  # noqa: B009
        positions = getattr(config, "max_position_embeddings", None)
        scorer = StudentScorer(model, positions, world.device)
        asking = asking_of(self.options, tokenizer)
        lm = language_model(scorer, tokenizer.to_huggingface(), asking, world)
        found = run_tasks(lm, self.tasks, self.options, seed=SEED, resamples=0)
        model.train(was_training)
        return {f"{score.task}/{score.metric}": score.value for score in scores_of(found)}


SEED = 1234
"""Of examples in front of a question: as of `tokenkit eval`, so that both give one score."""
