"""A model from nothing, of packed rows, through the loop that all trainings share."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import TEXT, byte_level_bpe, tiny_model
from tokenkit.config import ConfigError, TrainConfig, read_config
from tokenkit.data.batches import Batches
from tokenkit.data.collate import AlignedCollator
from tokenkit.data.mix import open_data
from tokenkit.data.options import DataOptions
from tokenkit.data.packing import PackedRows
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.check import check_packing
from tokenkit.models.float8 import use_float8
from tokenkit.models.new import architecture, new_model
from tokenkit.parallel import World
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.training.build import build
from tokenkit.training.loop import train

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
SINGLE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    byte_level_bpe(folder / "tokenizer")
    rows = [{"text": f"{number} {text}"} for number, text in enumerate(TEXT * 10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def config_of(folder, tmp_path):
    def make(**changes):
        settings = {
            "student.pretrained_model_name_or_path": "a new Llama", "student.from_config": LLAMA,
            "student.tokenizer_name": str(folder / "tokenizer"), "losses": ["clm"], "pack": True,
            "train_model_mode": "full", "max_length_new": 48, "max_length_teacher": 48, "batch_size": 4,
            "steps": 6, "save_interval": 3, "logging_interval": 1, "optimizer.learning_rate": 0.01,
            "data.dataset_name": str(folder / "rows.jsonl"), "data.num_workers": 0,
            "data.heldout.fraction": 0.1, "output_dir": str(tmp_path / "run"),
        }  # fmt: skip
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        return read_config(TrainConfig, (), settings | changes, say=lambda line: None)

    return make


def test_a_model_from_nothing_is_trained_exported_and_resumed_to_the_same_bits(config_of, tmp_path):
    assert train(config_of()) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    bits = [line["bits_per_byte/student"] for line in lines if "bits_per_byte/student" in line]
    assert losses[6] < losses[1]
    assert bits[-1] < bits[0]
    card = (tmp_path / "run" / "export" / "README.md").read_text(encoding="utf-8")
    assert "trained from random ones" in card
    assert "base_model" not in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert model.config.vocab_size == 320, "300 ids, padded"

    again = {"output_dir": str(tmp_path / "again"), "resume": True}
    half = config_of(**again, steps=6)
    parts = build(half, SINGLE)
    assert parts.run.model.student.embedding.weight.requires_grad
    import tokenkit.training.loop as loop

    step = loop._one_step

    def until_three(training):
        step(training)
        if training.parts.run.step == 3:
            training.session.stop.asked = "a test"

    loop._one_step = until_three
    try:
        assert train(half) == 75
    finally:
        loop._one_step = step
    assert train(half) == 0
    weights = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_rows_are_full_and_hold_every_token_once_also_after_a_resume(folder):
    data = DataOptions(dataset_name=str(folder / "rows.jsonl"))

    def packed():
        mix, _ = open_data(data, 0)
        rows = PackedRows(mix, AlignedCollator(load_tokenizer(str(folder / "tokenizer"))), 40)
        return Batches(rows, rows, 4, accumulation=2, prefetch=0)

    batches = packed()
    first = [next(batches) for _ in range(7)]
    state = json.loads(json.dumps(batches.state_dict()))
    rest = [next(batches) for _ in range(40)]
    again = packed()
    again.load_state_dict(state)
    for one, two in zip(rest, (next(again) for _ in range(40)), strict=True):
        assert all(torch.equal(a.student.ids_BT, b.student.ids_BT) for a, b in zip(one, two, strict=True))
    batches.close()
    again.close()

    sides = [batch.student for step in first for batch in step]
    ids = np.concatenate([side.ids_BT.numpy().ravel() for side in sides])
    mix, _ = open_data(data, 0)
    flat = AlignedCollator(load_tokenizer(str(folder / "tokenizer"))).tokens_of(mix.take(64))
    both = min(len(ids), len(flat.ids_N))
    assert (ids[:both] == flat.ids_N[:both]).all()
    for side in sides:
        assert side.ids_BT.shape == (2, 40)
        begins_BT = side.position_BT == 0
        assert begins_BT[:, 0].all()
        assert (side.position_BT.diff(dim=1)[~begins_BT[:, 1:]] == 1).all()
        assert not side.trained_BT[begins_BT].any(), "nothing predicts the first token of a document"
        assert (side.ids_BT[:, 1:][begins_BT[:, 1:]] == 0).all(), "a document begins with BOS"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_documents_of_a_row_do_not_see_each_other(architecture):
    model = CausalLM(tiny_model(architecture), 300)
    check_packing(model, 4)
    ids_BT = torch.arange(24).reshape(1, -1) + 5
    position_BT = torch.tensor([[*range(10), *range(14)]])
    together = model(ids_BT, position_BT=position_BT).hidden_BTD
    changed = ids_BT.clone()
    changed[0, :10] = 7
    assert torch.allclose(
        model(changed, position_BT=position_BT).hidden_BTD[0, 10:], together[0, 10:], atol=1e-6
    )
    assert not torch.allclose(model(changed).hidden_BTD[0, 10:], together[0, 10:], atol=1e-3)


def test_what_sees_across_documents_is_refused():
    mamba = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(
        ValueError, match=r"pack: (documents of one row see each other|.* takes no positions)"
    ):
        check_packing(CausalLM(new_model(mamba, 300).eval(), 300), 1)
    flash = CausalLM(tiny_model(), 300)
    flash.causal_lm.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="only in micro-batches of one row, and these have 2"):
        check_packing(flash, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student__tokenizer_name": None}, "name one as student.tokenizer_name"),
        ({"train_model_mode": "lora"}, "set it to full"),
        ({"losses": ["alm_unconstrained"], "target_tokenizer_name": "byte"}, "which teach nothing"),
        ({"losses": ["alm_unconstrained"], "teacher__pretrained_model_name_or_path": "org/x"}, "pack joins"),
    ],
)
def test_what_a_model_from_nothing_cannot_go_with_is_refused(config_of, changes, words):
    with pytest.raises(ConfigError, match=words):
        config_of(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "did you mean llama"),
        ({"num_hiden_layers": 2}, "did you mean num_hidden_layers"),
        ({"num_attention_heads": 5}, "llama refuses"),
        ({"vocab_size": 100}, "vocab_size is 100, and the tokenizer has 300 ids"),
    ],
)
def test_a_mistake_in_the_architecture_is_one_line(changes, words):
    with pytest.raises(ConfigError, match=words):
        new_model(LLAMA | changes, 300)
    assert architecture(LLAMA).num_hidden_layers == 2


def test_tf32_is_of_the_gpus_products(config_of):
    before = torch.get_float32_matmul_precision()
    try:
        assert train(config_of(tf32=True, dry_run=True)) == 0
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_float8_is_refused_with_its_reason(config_of, monkeypatch):
    with pytest.raises(ConfigError, match=r"float8 .tensorwise. needs dtype bfloat16"):
        config_of(float8="tensorwise")
    float8 = {"float8": "rowwise", "dtype": "bfloat16"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU, and there is none"):
        build(config_of(**float8), SINGLE)
    model = CausalLM(tiny_model(), 300)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(ConfigError, match=r"capability 9.0, and an old one has 8.9"):
        use_float8(model, "rowwise")
    odd = CausalLM(tiny_model(hidden_size=24, intermediate_size=40), 300)
    with pytest.raises(ConfigError, match="multiples of 16, and no linear layer"):
        use_float8(odd, "tensorwise")
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match="pip install torchao"):
        use_float8(model, "tensorwise")
