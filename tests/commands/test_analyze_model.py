"""`tokenkit analyze-model`: counts by hand, and the guide's model, whose weights would fill 32 GB."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.test_peer_mla import tiny_config, tiny_peer
from tests.models.test_peer_mla_settings import GUIDE
from tests.tiny import tiny_model
from tokenkit.cli import main
from tokenkit.errors import ExitCode
from tokenkit.evaluation.parameters import count_parameters
from tokenkit.models.peer_mla import PeerMlaForCausalLM


def test_the_guides_model_has_the_parameters_that_its_settings_say(tmp_path, capsys):
    if not GUIDE.is_file():
        pytest.skip(f"the guide is absent: {GUIDE}")
    block = next(part for part in GUIDE.read_text().split("```yaml")[1:] if "model_config:" in part)
    (tmp_path / "config.yaml").write_text(block.split("```")[0])
    files = ["--output", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    assert main(["analyze_model", "--config", str(tmp_path / "config.yaml"), *files]) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    parts = {name: numbers["total"] for name, numbers in found["parts"].items()}
    router = 768 * 2048 + 2048 + 512 + 2 * 1024 * 128
    assert parts["experts"] == 10 * 2**20 * 2 * 768
    assert parts["router"] == 10 * router
    assert parts["attention"] == 12 * 7_915_520
    assert parts["embedding"] == 50272 * 768
    assert found["parts"]["experts"]["active"] == 10 * 128 * 2 * 768
    assert 16.26e9 < found["total"] < 16.28e9
    assert 163e6 < found["active"] < 164e6
    assert len(found["layers"]) == 12
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "16,267,581,440" in capsys.readouterr().out


@pytest.mark.parametrize("share", [False, True])
def test_every_parameter_is_counted_once(share):
    with torch.device("meta"):
        model = PeerMlaForCausalLM(tiny_config(peer_config={"share_experts": share}))
    found = count_parameters(model)
    assert found["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["parts"]["experts"]["total"] == (1 if share else 2) * 144 * 2 * 32
    assert found["parts"]["experts"]["active"] == round((1 if share else 2) * 144 * 2 * 32 * 8 / 144)


def test_other_models_are_counted_too(tmp_path, capsys):
    found = count_parameters(tiny_model(tie_word_embeddings=False))
    assert set(found["parts"]) == {"embedding", "attention", "mlp", "norm", "head"}
    assert found["parts"]["embedding"] == {"total": 300 * 32, "active": 32}
    sizes = {
        "hidden_size": 32, "moe_intermediate_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 99,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **sizes))
    experts = count_parameters(model)["parts"]["experts"]
    assert experts == {"total": 8 * 3 * 8 * 32, "active": 2 * 3 * 8 * 32}
    tiny_peer().save_pretrained(tmp_path / "model")
    assert main(["analyze-model", str(tmp_path / "model")]) == 0
    assert "router" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        ([], "model_config: {peer_config: {num_experts: 3}}", "multiplies to 1048576, but num_experts is 3"),
        (
            [],
            "model_config: {hiden_size: 3}",
            "hiden_size is no setting of this model; did you mean hidden_size?",
        ),
        (["--output", "x.png"], "{}", "name a picture with --plot"),
        (["--plot", "there.png"], "{}", "there.png exists"),
        ([], "{}", "has no model_config"),
        ([], "student: {pretrained_model_name_or_path: m}", "has no model_config"),
    ],
)
def test_bad_input_is_one_line(words, text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    (tmp_path / "there.png").write_bytes(b"")
    assert main(["analyze-model", "c.yaml", *words]) in (ExitCode.CONFIG, ExitCode.DATA)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
