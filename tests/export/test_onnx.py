"""The ONNX graph of a model computes what the model does, with any past, and says what it cannot hold."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from tests.tiny import tiny_folder
from tokenkit.cli import main
from tokenkit.errors import DataError, ExitCode, ExportError
from tokenkit.export import converted, onnx_graph
from tokenkit.export.onnx_graph import cache_sizes, compare


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Seconds long: torch traces and translates a model of one layer, once for all tests."""
    folder = tmp_path_factory.mktemp("onnx")
    tiny_folder(folder / "model", num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnx_graph, "LARGEST_FILE", 0)
        words = [
            f"model_path={folder / 'model'}",
            f"output_path={folder / 'graph.onnx'}",
            "dynamic_axes=true",
        ]
        assert main(["export_to_onnx", *words]) == ExitCode.DONE
    return folder


def test_a_text_read_in_parts_has_the_logits_of_torch(exported):
    folder = exported / "graph"
    ids = AutoTokenizer.from_pretrained(folder)("The dog ran home to the cat.", return_tensors="np").input_ids
    ids = np.concatenate([ids, ids[:, ::-1]]).astype(np.int64)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    past = [entry.name for entry in session.get_inputs() if entry.name.startswith("past")]
    caches, logits, begin = [np.zeros((2, 2, 0, 8), np.float32)] * len(past), [], 0
    for end in (5, 6, ids.shape[1]):
        feed = {
            "input_ids": ids[:, begin:end],
            "attention_mask": np.ones((2, end), np.int64),
            "position_ids": np.broadcast_to(np.arange(begin, end), (2, end - begin)),
        }
        part, *caches = session.run(None, feed | dict(zip(past, caches, strict=True)))
        logits.append(part)
        begin = end
    model = AutoModelForCausalLM.from_pretrained(exported / "model")
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(np.concatenate(logits, 1), wanted, atol=1e-4)


def test_a_graph_without_a_cache_reads_whole_texts(exported, tmp_path):
    """Seconds long: a graph of its own."""
    words = ["export", str(exported / "model"), "--format", "onnx", "--use-cache", "false"]
    assert main([*words, "--output", str(tmp_path / "graph")]) == ExitCode.DONE
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "model.onnx")
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    ids = np.array([[5, 40, 7, 299], [9, 8, 70, 6]])
    places = np.broadcast_to(np.arange(4), (2, 4))
    feed = {"input_ids": ids, "attention_mask": np.ones((2, 4), np.int64), "position_ids": places}
    (got,) = session.run(None, {entry.name: feed[entry.name] for entry in session.get_inputs()})
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(exported / "model")(torch.from_numpy(ids)).logits
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)


def test_beside_the_graph_are_tokenizer_configuration_and_card(exported):
    names = {path.name for path in (exported / "graph").iterdir()}
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "config.json", "README.md"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    card = (exported / "graph" / "README.md").read_text(encoding="utf-8")
    assert "onnxruntime" in card
    for path in (exported / "graph").iterdir():
        assert str(exported).encode() not in path.read_bytes(), path.name
    assert b"site-packages" not in (exported / "graph" / "model.onnx").read_bytes()


def test_other_weights_are_noticed(exported):
    model = AutoModelForCausalLM.from_pretrained(exported / "model")
    sizes = cache_sizes(model, "model")
    assert compare(model, exported / "graph" / "model.onnx", sizes) <= 1e-4
    torch.nn.init.zeros_(model.model.norm.weight)
    with pytest.raises(ExportError, match="onnxruntime's logits are off by"):
        compare(model, exported / "graph" / "model.onnx", sizes)


def test_a_model_with_a_state_has_no_graph_with_a_cache():
    config = MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(DataError, match=r"of type mamba keeps .* --use-cache false"):
        cache_sizes(MambaForCausalLM(config), "some model")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised already (method gptq)"),
        ({"model_type": "byte_expansion_llama"}, "is a byte model with input-id expansion"),
    ],
)
def test_what_no_graph_holds_is_one_line_before_anything_is_read(exported, tmp_path, changes, reason, capsys):
    (tmp_path / "model").mkdir()
    config = json.loads((exported / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | changes))
    words = ["export", str(tmp_path / "model"), "--format", "onnx", "--output", str(tmp_path / "out")]
    assert main(words) == ExitCode.DATA
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_package_that_is_missing_is_named_with_its_extra(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(converted.importlib.util, "find_spec", lambda name: None)
    words = ["export", str(exported / "model"), "--format", "onnx", "--output", str(tmp_path / "out")]
    assert main(words) == ExitCode.CONFIG
    assert (
        "needs onnx, which is not installed: pip install 'tokenkit-torch[export]'" in capsys.readouterr().err
    )


def test_an_output_that_holds_something_is_left_alone(exported, capsys):
    words = ["export", str(exported / "model"), "--format", "onnx", "--output", str(exported / "graph.onnx")]
    assert main(words) == ExitCode.DATA
    assert "is not empty" in capsys.readouterr().err
