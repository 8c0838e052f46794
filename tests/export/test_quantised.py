"""An int8 folder is loaded by plain transformers; `bash tests/quantised.sh` runs what needs torchao."""

import importlib.util
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import TEXT, tiny_folder
from tokenkit.cli import main
from tokenkit.errors import ExitCode

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not in this environment")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("int8") / "model")


@needs_torchao
def test_the_folder_is_loaded_by_transformers_and_smaller(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    words = ["optimize_for_inference", f"model_path={model}", f"output_path={tmp_path / 'out'}"]
    words += ["quantization=int8", "device=cuda", f"text={tmp_path / 'text.txt'}"]
    assert main(words) == ExitCode.DONE
    said = capsys.readouterr().out
    for part in ("MB of weights before", "largest difference of a logit", "bits per byte"):
        assert part in said
        assert part in (tmp_path / "out" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    ids_BT = torch.arange(40)[None] + 20
    with torch.no_grad():
        got, wanted = loaded(input_ids=ids_BT).logits, plain(input_ids=ids_BT).logits
    assert 0 < (got - wanted).abs().max() < 0.05 * wanted.abs().max()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kinds = [file.get_tensor(name).dtype for name in file.keys() if "qdata" in name]  # noqa: SIM118
    assert kinds == [torch.int8] * 14
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 300
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]

    again = ["export", str(tmp_path / "out"), "--output", str(tmp_path / "again"), "--format"]
    for kind in ("int8", "onnx", "gguf"):
        assert main([*again, kind]) == ExitCode.DATA
        assert "is quantised already (method torchao)" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.skipif(HAS_TORCHAO, reason="torchao is in this environment")
def test_without_torchao_the_line_that_installs_it_is_said(model, tmp_path, capsys):
    words = ["export", str(model), "--format", "int8", "--output", str(tmp_path / "out")]
    assert main(words) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert "needs torchao, which is not installed: pip install 'tokenkit-torch[quantize]'" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--format", "int8", "--dtype", "float16"], "leave dtype out"),
        (["--format", "int8", "--text", "/nowhere.txt"], "/nowhere.txt does not exist"),
        (["--text", "x"], "text is for --format int8"),
        (["--format", "int4"], "int4"),
    ],
)
def test_a_mistake_is_one_line(model, tmp_path, more, reason, capsys):
    assert main(["export", str(model), "--output", str(tmp_path / "out"), *more]) != ExitCode.DONE
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
