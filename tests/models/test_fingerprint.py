import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_folder
from tokenkit.models.reading import model_fingerprint


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


def test_it_is_the_same_for_the_same_files_wherever_they_lie(folder, tmp_path):
    before = model_fingerprint(str(folder), None)
    moved = folder.rename(tmp_path / "elsewhere")
    assert model_fingerprint(str(moved), "abc") == before


def test_other_weights_of_the_same_shapes_have_another(folder):
    before = model_fingerprint(str(folder), None)
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, path, metadata={"format": "pt"})
    assert model_fingerprint(str(folder), None) != before


def test_weights_behind_the_head_of_a_large_file_count_too(folder):
    save_file({"a": torch.zeros(2**20)}, folder / "big.safetensors")
    before = model_fingerprint(str(folder), None)
    save_file({"a": torch.cat([torch.zeros(2**19), torch.ones(2**19)])}, folder / "big.safetensors")
    assert model_fingerprint(str(folder), None) != before


def test_another_configuration_has_another(folder):
    before = model_fingerprint(str(folder), None)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    assert model_fingerprint(str(folder), None) != before


def test_a_model_of_the_hub_is_its_commit():
    assert model_fingerprint("who/what", "abc") == "commit abc" != model_fingerprint("who/what", "abd")
