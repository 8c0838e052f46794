"""What a PEER + MLA model may be told: the guide's own values, and one error for each that cannot be."""

import subprocess
import sys

import pytest
import yaml

from tests.conftest import SHARED_DATA
from tokenkit.models.peer_mla import PeerMlaConfig
from tokenkit.models.peer_mla.settings import MLA, PEER, model_settings, peer_layers

GUIDE = SHARED_DATA.parent / "guides" / "lm_trainer_configuration.md"


def test_the_guides_values_are_taken_as_they_are_written():
    if not GUIDE.is_file():
        pytest.skip(f"the guide is absent: {GUIDE}")
    block = next(part for part in GUIDE.read_text().split("```yaml")[1:] if "model_config:" in part)
    given = yaml.safe_load(block.split("```")[0])["model_config"]
    assert given["layer_norm_eps"] == "1e-5"  # PyYAML reads a word
    settings = model_settings(given)
    assert settings["layer_norm_eps"] == 1e-5
    assert settings["peer_config"] == PEER | {"query_norm": "layer", "log_expert_usage": True}
    assert settings["mla_config"] == MLA
    assert peer_layers(settings) == list(range(2, 12))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"peer_config": {"product_key_dim": [1024, 512]}},
            "multiplies to 524288, but num_experts is 1048576",
        ),
        ({"peer_config": {"query_dim": 255}}, "query_dim must be divisible by the 2 parts .*, got 255"),
        (
            {"peer_config": {"num_experts": 64, "product_key_dim": [16, 4], "num_experts_per_tok": 5}},
            "num_experts_per_tok must be at most 4, the smallest of product_key_dim, got 5",
        ),
        ({"num_layers": 3}, "num_layers is no setting of this model; did you mean num_hidden_layers"),
        ({"peer_config": {"num_expert": 3}}, r"peer_config.num_expert is no setting .* mean num_experts\?"),
        ({"mla_config": {"q_rank": 3}}, "mla_config.q_rank is no setting of this model"),
        ({"mla_config": {"qk_rope_head_dim": 7}}, "must be even, got 7"),
        (
            {"mla_config": {"kv_lora_rank": None}},
            "mla_config.kv_lora_rank must be a whole number .* got None",
        ),
        (
            {"peer_config": {"gate": "max"}},
            "peer_config.gate must be one of softmax, relu, sigmoid, got 'max'",
        ),
        ({"peer_config": {"product_key_dim": 1024}}, r"as \[1024, 1024\], got 1024"),
        ({"peer_config": [1]}, r"peer_config must hold fields, got \[1\]"),
        ({"peer_start_layer": 12}, "peer_start_layer must be below num_hidden_layers, which is 12, got 12"),
        ({"peer_layers": [12]}, r"layers from 0 to 11, got \[12\]"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps must be a positive number, got 'small'"),
        ({"hidden_size": True}, "hidden_size must be a whole number from 1 to .*, got True"),
        ({"dropout": 0.1}, "dropout is no setting of this model: this model has no dropout"),
        ({"peer_config": {"exact_topk": True}}, "exact_topk .*: the best experts are always found exactly"),
        ({"peer_config": {"backend": "auto"}}, "backend .*: the device decides"),
        ({"peer_config": {"query_norm": "batch"}}, "none, layer, rms, got 'batch': .* take layer"),
        ({"peer_config": {"sharding": "rows"}}, "one of auto, columns, gathered, got 'rows'"),
        ({"use_peer": "yes"}, "use_peer must be true or false, got 'yes'"),
    ],
)
def test_one_error_for_what_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        model_settings(given)
    with pytest.raises(ValueError, match=message):
        PeerMlaConfig(**given)


def test_settings_are_checked_without_torch():
    program = (
        "import sys\n"
        "from tokenkit.models.peer_mla.settings import model_settings\n"
        "model_settings({})\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
