"""What a training takes, said before it is started: against counts by hand and against a real forward."""

import json

import pytest
import torch
from transformers import LlamaConfig

from tests.commands.test_pretrain import PEER
from tests.tiny import TEXT, byte_level_bpe, tiny_model
from tokenkit.cli import main
from tokenkit.config import TrainConfig, read_config
from tokenkit.errors import DataError, ExitCode
from tokenkit.models.causal_lm import CausalLM
from tokenkit.training.counting import saved
from tokenkit.training.estimate import estimate

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimate")
    LlamaConfig(vocab_size=320, max_position_embeddings=256, **SIZES).save_pretrained(folder / "model")
    byte_level_bpe(folder / "target", 300)
    (folder / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    return folder


def configured(root, **settings):
    named = {
        "student.pretrained_model_name_or_path": str(root / "model"),
        "target_tokenizer_name": str(root / "target"),
        "data.dataset_name": str(root / "text.txt"),
        "batch_size": 4,
        "max_length_new": 32,
        "pad_to_multiple_of": 64,
    }
    return read_config(TrainConfig, (), named | settings)


LAYER = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
BODY = 4 * LAYER + 64


@pytest.mark.parametrize(
    ("settings", "trained", "teacher"),
    [
        ({"train_model_mode": "full"}, BODY + 2 * 320 * 64, BODY + 2 * 320 * 64),
        ({"train_model_mode": "full", "losses": ["clm"]}, BODY + 2 * 320 * 64, 0),
        ({"train_model_mode": "none"}, 2 * 320 * 64, 2 * 320 * 64),
        ({"model_lora_rank": 4, "model_lora_targets": ["q_proj"], "train_embeddings": False},
         4 * 4 * (64 + 64), 2 * 320 * 64),
    ],
)  # fmt: skip
def test_parameters_are_those_that_training_has(root, settings, trained, teacher):
    found = estimate(configured(root, **settings), 1)
    assert found.counted.trained == trained
    assert found.memory["optimizer"] == 8 * trained
    assert found.memory["teacher"] == 4 * teacher
    assert found.traffic == found.memory["gathered"] == 0


def test_activations_are_those_that_a_real_forward_keeps(root):
    config = configured(root, train_model_mode="full", losses=["clm"])
    found = estimate(config, 1)
    model = CausalLM(tiny_model("llama", vocab_size=320, **SIZES).train(), 320)
    with saved(model.parameters()) as sizes:
        model(torch.zeros(4, 32, dtype=torch.int64))
    assert found.memory["activations"] == pytest.approx(sum(sizes.values()), rel=0.1)
    again = estimate(
        configured(root, train_model_mode="full", losses=["clm"], gradient_checkpointing=True), 1
    )
    assert again.memory["activations"] < 0.6 * found.memory["activations"]


def test_tables_of_experts_are_cut_and_never_gathered(root):
    """64 experts of 32 columns in one layer; 2 rows of 32 tokens on each of 2 processes, 4 picks a token."""

    def of(ranks, **peer):
        model = {"model_type": "peer_mla", **PEER, "peer_config": {**PEER["peer_config"], **peer}}
        own = {
            "student.pretrained_model_name_or_path": "new",
            "student.from_config": model,
            "losses": ["clm"],
        }
        own |= {"student.tokenizer_name": str(root / "target"), "target_tokenizer_name": None}
        return estimate(configured(root, train_model_mode="full", **own), ranks)

    tables, tokens, picks = 2 * 64 * 32, 2 * 32, 4
    one, two, gathered = of(1), of(2), of(2, sharding="gathered")
    assert two.counted.tables == 4 * tables
    assert one.counted.tables == gathered.counted.tables == 0
    assert gathered.counted.layers - two.counted.layers == 4 * tables
    assert two.memory["student"] == one.memory["student"] / 2
    columns = 4 * tokens * 32 * 4 / 2
    assert two.counted.exchanged == columns + tokens * picks * (8 + 4 * 4)
    saved_travel = (2 * 4 * tables + 4 * tables) / 2
    assert gathered.traffic - two.traffic == saved_travel - two.counted.exchanged
    assert two.counted.activations - gathered.counted.activations == tokens * picks * 12


def test_shares_of_several_processes(root):
    one, four = (estimate(configured(root, train_model_mode="full"), ranks) for ranks in (1, 4))
    for part in ("student", "teacher", "optimizer", "gradients"):
        assert four.memory[part] == one.memory[part] / 4
    assert four.memory["activations"] == pytest.approx(one.memory["activations"] / 4, rel=0.2)
    assert four.traffic > 0
    accumulated = estimate(configured(root, train_model_mode="full", gradient_accumulation_steps=2), 2)
    assert accumulated.memory["gradients"] == one.memory["gradients"]
    assert four.checkpoint == one.checkpoint


def test_a_command_prints_a_table_and_writes_the_figures(root, tmp_path, capsys):
    words = [
        "--student",
        str(root / "model"),
        "--target",
        str(root / "target"),
        "--data",
        str(root / "text.txt"),
    ]
    words += ["--batch-size", "16", "--gpus", "1,8", "--gpu", "h100", "--output", str(tmp_path / "e.json")]
    assert main(["estimate", *words]) == 0
    text = capsys.readouterr().out
    assert "peak of one GPU" in text
    assert "fits in 80 GiB" in text
    assert json.loads((tmp_path / "e.json").read_text())["8"]["traffic"] > 0
    assert main(["estimate", *words]) == ExitCode.DATA
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--gpu", "H1000"], "did you mean H100?"),
        (["--gpus", "many"], "'many' is no number"),
        (["--gpus"], "needs a value"),
        (["--gpus", "0"], "gpus must be at least 1"),
        (["--gpus", "3"], "batch_size (16) must be a multiple of 3"),
        (["--mfu", "2"], "mfu must be above 0"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(root, words, reason, capsys):
    base = ["--student", str(root / "model"), "--target", "byte", "--data", str(root / "text.txt")]
    assert main(["estimate", *base, "--batch-size", "16", *words]) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_a_model_without_a_configuration_is_named(tmp_path, root):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    config = configured(root, **{"student.pretrained_model_name_or_path": str(tmp_path / "empty")})
    with pytest.raises(DataError, match="empty"):
        estimate(config, 1)


def test_a_run_says_its_cost_before_it_loads_anything(root, capsys):
    words = ["--student", str(root / "model"), "--target", str(root / "target"), "--do-cost-analysis", "true"]
    words += ["--data", str(root / "text.txt"), "--output", str(root / "run")]
    assert main(["train", *words]) == ExitCode.DATA  # there are no weights, and no tokenizer
    error = capsys.readouterr().err
    assert error.index("peak of one GPU") < error.index("tokenkit: ")
