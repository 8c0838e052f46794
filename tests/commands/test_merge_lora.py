"""`tokenkit merge-lora`: adapters of PEFT and their base become a plain model, or one line says why not."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import byte_level_bpe, tiny_folder
from tokenkit.cli import main
from tokenkit.errors import ExitCode

IDS = torch.arange(40)[None] + 20


def adapters(base, folder, **changes):
    """Adapters with weights that do something, as peft itself writes them; and the logits with them."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj", "down_proj"], **changes})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    tiny_folder(folder / "base", tie_word_embeddings=True, dtype=torch.bfloat16)
    adapters(folder / "base", folder / "adapter")
    return folder


def words(root, *more, base="base", adapter="adapter"):
    return ["merge-lora", str(root / base), str(root / adapter), "--output", str(root / "out"), *more]


@pytest.mark.parametrize(
    "changes", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True, "use_rslora": True}]
)
def test_a_folder_of_peft_and_its_base_become_one_model(root, tmp_path, changes):
    expected = adapters(root / "base", tmp_path / "adapter", **changes)
    shutil.copytree(root / "base", tmp_path / "base")
    assert main(words(tmp_path, "--dtype", "float32")) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 300
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Adapters were merged" in card
    assert "another tokenizer" not in card


def test_what_the_card_of_the_adapters_says_of_their_training_stays(root, tmp_path):
    for name in ("base", "adapter"):
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / "adapter" / "README.md").write_text(
        "---\ntags: [tokenkit]\n---\n\n# x\n\n- **steps**: 7 of 9\n"
    )
    assert main(words(tmp_path)) == 0
    assert "- **steps**: 7 of 9\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_base_keeps_its_dtype(root, tmp_path):
    for name in ("base", "adapter"):
        shutil.copytree(root / name, tmp_path / name)
    assert main(words(tmp_path)) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def spoil(folder, how):
    """Give the base or the adapters in `folder` a fault."""
    if how == "quantised":
        config = json.loads((folder / "base" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (folder / "base" / "config.json").write_text(json.dumps(config))
    elif how == "other width":
        shutil.rmtree(folder / "base")
        tiny_folder(folder / "base", hidden_size=48)
    elif how == "fewer layers":
        shutil.rmtree(folder / "base")
        tiny_folder(folder / "base", num_hidden_layers=1)
    elif how == "a tensor is missing":
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    elif how == "torn":
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    elif how == "pickled":
        (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "adapter_model.bin")
    elif how == "no adapter":
        (folder / "adapter" / "adapter_config.json").unlink()
    elif how == "more ids":
        byte_level_bpe(folder / "adapter", 420)
    elif how == "occupied":
        (folder / "out").mkdir()
        (folder / "out" / "mine").touch()
    elif how == "a run":
        (folder / "adapter" / "checkpoints").mkdir()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("quantised", "is a quantised model"),
        ("other width", "is an adapter of another model"),
        ("fewer layers", "is an adapter of another model"),
        ("a tensor is missing", "is absent there"),
        ("torn", "holds no adapter that can be read"),
        ("pickled", "safetensors alone"),
        ("no adapter", "has no adapter_config.json"),
        ("more ids", "ids but the model's embedding only 300 rows"),
        ("occupied", "is not empty"),
        ("a run", "`tokenkit export` merges"),
    ],
)
def test_what_cannot_be_merged_is_one_line_and_nothing_is_written(root, tmp_path, capsys, how, reason):
    for name in ("base", "adapter"):
        shutil.copytree(root / name, tmp_path / name)
    spoil(tmp_path, how)
    assert main(words(tmp_path)) in (ExitCode.CONFIG, ExitCode.DATA)
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1
    assert how == "occupied" or not (tmp_path / "out").exists()
