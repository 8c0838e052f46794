"""What the shipped configuration asks for: a teacher that is heard, and one learning rate."""

from pathlib import Path

import pytest
import torch

from tests.training.test_gradients import SINGLE, passes_of
from tokenkit.config import ALIASES, TrainConfig, parse_command_line, read_config
from tokenkit.training.build import build
from tokenkit.training.gradients import trained_parameters

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = CONFIGS / "cross_tokenizer_distill.yaml"
SMALL = (
    "--dtype float32 --batch-size 4 --gradient-accumulation-steps 1 --model-lora-rank 4 --max-length-new 48 "
    "--max-length-teacher 64 --data.heldout.fraction 0.1 --data.num-workers 0"
).split()


@pytest.fixture
def shares(workspace, tmp_path, monkeypatch):
    """Return a function from configuration files and flags to the losses' shares of the first gradient."""
    for name, file in {"STUDENT": "model", "DATA": "data.jsonl"}.items():
        monkeypatch.setenv(name, str(workspace / file))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    models = ["--student.pretrained-model-name-or-path", str(workspace / "model")]
    models += ["--target-tokenizer-name", str(workspace / "target")]

    def measure(files, *flags):
        words = ["--config", *map(str, files), *models, *SMALL, *flags]
        config = parse_command_line(TrainConfig, words, program="test", aliases=ALIASES)
        torch.manual_seed(0)
        parts = build(config, SINGLE)
        passes = passes_of(parts, SINGLE)
        parameters = trained_parameters(parts.run.model)
        weights = parts.run.objective.weights(0)
        norms = {}
        for (name, weight), mean in zip(weights.items(), passes.means(0), strict=True):
            grads = torch.autograd.grad(mean, parameters, retain_graph=True, allow_unused=True)
            norms[name] = weight * sum(x.square().sum() for x in grads if x is not None).sqrt().item()
        return {name: norm / sum(norms.values()) for name, norm in norms.items()}

    return measure


@pytest.mark.parametrize("stage", [None, "1_embeddings.yaml", "2_lora.yaml"])
def test_the_teacher_is_heard_in_the_first_step(shares, stage):
    files = [SHIPPED] + ([CONFIGS / "two_stage" / stage] if stage else [])
    share = shares(files)
    assert share.keys() == {"clm", "alm_unconstrained"}
    assert 0.1 < share["alm_unconstrained"] < 0.9


def test_weight_and_temperature_are_one_number():
    run = read_config(TrainConfig, [SHIPPED])
    assert run.objective.loss_weights == {
        "clm": 1.0,
        "alm_unconstrained": run.objective.options.alm.binarization_temp,
    }


def test_the_learning_rate_is_the_same_wherever_it_is_written():
    rates = {
        file.name: read_config(TrainConfig, [SHIPPED, file]).optimizer.learning_rate
        for file in [SHIPPED, CONFIGS / "optimizer" / "adamw.yaml", *(CONFIGS / "two_stage").glob("2_*.yaml")]
    }
    assert len(set(rates.values())) == 1, rates
