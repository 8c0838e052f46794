"""`tokenkit export`: what it writes is, bit for bit, what the run writes at its end."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ranks import run_ranks
from tests.tiny import TEXT, sentencepiece_bpe, tiny_folder
from tests.training.test_resume import run_in_rank
from tokenkit.cli import DOORS, OTHER_NAMES, main
from tokenkit.config import ALIASES, TrainConfig, from_dict, parse_command_line, to_dict
from tokenkit.errors import ExitCode
from tokenkit.run.safe_dcp import read_manifest
from tokenkit.training.loop import train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tiny_folder(folder / "model")
    sentencepiece_bpe(folder / "target")
    rows = [json.dumps({"text": text}) for text in TEXT] * 2
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def configured(root, name, *more):
    flags = [
        "--student", str(root / "model"), "--target", str(root / "target"), "--data",
        str(root / "data.jsonl"), "--output", str(root / name), "--steps", "4", "--save-interval", "2",
        "--eval-interval", "2", "--batch-size", "4", "--losses", "clm", "--max-length-new", "32",
        "--max-length-teacher", "32", "--model-lora-rank", "4", "--lr", "0.01", "--data.num-workers", "0",
        "--data.heldout.fraction", "0.2",
    ]  # fmt: skip
    return parse_command_line(TrainConfig, [*flags, *more], program="test", aliases=ALIASES)


@pytest.fixture(scope="module")
def lora_run(root):
    assert train(configured(root, "run", "--dtype", "bfloat16")) == ExitCode.DONE
    return root / "run"


def tensors(folder):
    return load_file(folder / "model.safetensors")


def assert_same(folder, other):
    got, wanted = tensors(folder), tensors(other)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in got)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    "more",
    [
        ("--dtype", "bfloat16"),
        ("--train-model-mode", "full", "--hypernet.architecture", "linear"),
        ("--target", "byte", "--expand-input-ids"),
    ],
    ids=["lora", "full with a hypernetwork", "byte expansion, verified"],
)
def test_a_finished_run_is_written_as_at_its_end(root, lora_run, tmp_path, more):
    """Seconds long: each form is trained for four steps and written twice."""
    run = lora_run
    if "bfloat16" not in more:
        run = tmp_path / "run"
        assert train(configured(root, run, *more)) == ExitCode.DONE
    verify = ["--verify"] if "byte" in more else []
    assert main(["export", str(run), "--output", str(tmp_path / "out"), *verify]) == 0
    assert_same(tmp_path / "out", run / "export")
    assert (tmp_path / "out" / "README.md").read_text() == (run / "export" / "README.md").read_text()


def test_a_checkpoint_in_the_middle_is_written_with_its_own_figures(root, lora_run, tmp_path):
    """By its folder, as others call it, in another dtype; the run's folder and its files have moved."""
    shutil.copytree(lora_run, tmp_path / "moved")
    shutil.copytree(root / "model", tmp_path / "base")
    words = ["--checkpoint_path", str(tmp_path / "moved" / "step_2"), "--dtype", "float32"]
    words += [f"base_model={tmp_path / 'base'}", "--with_pt", f"output_path={tmp_path / 'out'}"]
    assert main(["export_checkpoint", *words]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    lines = [json.loads(line) for line in (lora_run / "metrics.jsonl").read_text().splitlines()]
    bits = next(line["bits_per_byte/student"] for line in lines if line["step"] == 2 and len(line) < 6)
    for words in ("2 of 4", f"student {bits:.4f}", "transformers", "clm", "- **command**: `"):
        assert words in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 400
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(tensors(tmp_path / "out")[name], tensors(lora_run / "export")[name].float())


def test_sharded_adapters_of_four_ranks_are_read_in_one_process_and_verified_in_another(
    root, tmp_path, capsys
):
    """Seconds long: four ranks train, and a fresh process loads what was written."""
    config = configured(root, tmp_path / "run", "--steps", "2")
    assert run_ranks(run_in_rank, 4, config, None) == [ExitCode.DONE] * 4
    assert read_manifest(tmp_path / "run" / "checkpoints" / "step_00000002").world_size == 4
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--verify"]) == 0
    assert_same(tmp_path / "out", tmp_path / "run" / "export")


def test_a_configuration_is_read_back_from_a_manifest(root):
    for more in ((), ("--hypernet.architecture", "mlp"), ("--loss-weights", "clm=0.5"), ("--name", r"\${x}")):
        config = configured(root, "x", *more)
        assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def spoiled(root, run, folder, how):
    """A copy of a run with one fault; returns the words of the command."""
    shutil.copytree(run, folder)
    steps = sorted((folder / "checkpoints").iterdir())
    name, more = folder, []
    if how in ("newest torn", "all torn"):
        for step in steps[1 if how[0] == "n" else 0 :]:
            (step / "__0_0.distcp").write_bytes(b"torn")
    elif how == "one torn":
        name = steps[0]
        (name / "manifest.json").unlink()
    elif how == "none saved":
        shutil.rmtree(folder / "checkpoints")
        (folder / "checkpoints").mkdir()
    elif how == "a model":
        name = root / "model"
    elif how == "occupied":
        more = ["--output", str(folder)]
    elif how == "dangling":
        (folder / "link").symlink_to(folder / "nowhere")
        more = ["--output", str(folder / "link")]
    elif how == "other base":
        more = ["--base-model", str(tiny_folder(folder / "other", seed=5))]
    elif how == "other tokenizer":
        more = ["--target-tokenizer-name", str(root / "model")]
    return [str(name), *more]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("all torn", "is intact"),
        ("one torn", "its saving was never finished"),
        ("none saved", "holds no checkpoint"),
        ("a model", "is a model in Hugging Face layout already"),
        ("occupied", "is not empty"),
        ("dangling", "is a link that leads nowhere"),
        ("other base", "was trained with another model than"),
        ("other tokenizer", "was trained with another target tokenizer than"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(
    root, lora_run, tmp_path, capsys, how, words
):
    command = ["export", "--output", str(tmp_path / "out"), "--checkpoint-path"]
    assert main(command + spoiled(root, lora_run, tmp_path / "run", how)) == ExitCode.DATA
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out-*"))


def test_of_a_run_the_newest_whole_checkpoint_is_taken_and_said(root, lora_run, tmp_path, capsys):
    words = spoiled(root, lora_run, tmp_path / "run", "newest torn")
    assert main(["export", *words, "--output", str(tmp_path / "out")]) == 0
    assert "step_00000004 is not whole: step_00000002 is taken" in capsys.readouterr().err
    assert "2 of 4" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["./nowhere", "--format", "onnx"], "model folder ./nowhere does not exist"),
        (
            ["nowhere", "--format", "onnx"],
            "model folder nowhere does not exist, and offline (HF_HUB_OFFLINE)",
        ),
        (["generate", "org/nowhere", "hi"], "model folder org/nowhere does not exist, and offline"),
        (["draft", ".", "nowhere", "--text", "t.txt"], "target_model: . has no config.json"),
        (["eval-ensemble", "nowhere", "b", "--text", "t"], "models: model folder nowhere does not exist"),
        (["merge-lora", "nowhere", "ADAPTER"], "base_model: model folder nowhere does not exist"),
        (["x", "--format", "onnx", "--dtype", "float16"], "onnx is written in float32"),
        (["export_to_onnx", "x", "dynamic_axes=false"], "no graph of fixed sizes is written"),
        (["x", "--format", "onnx", "--as-adapter"], "leave one out"),
    ],
)
def test_a_mistake_in_the_words_comes_before_torch(words, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ADAPTER").mkdir()
    (tmp_path / "ADAPTER" / "adapter_config.json").write_text("{}")
    words = words if words[0] in DOORS or words[0] in OTHER_NAMES else ["export", *words]
    assert main([*words, "--output", str(tmp_path / "out")]) in (ExitCode.CONFIG, ExitCode.DATA)
    assert reason in capsys.readouterr().err


def test_the_card_of_a_checkpoint_in_another_format_says_how_it_was_trained(lora_run, tmp_path):
    words = ["export", str(lora_run / "checkpoints" / "step_00000002"), "--format", "gguf"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by training with tokenkit (PyTorch): clm." in card
    for line in ("- **steps**: 2 of 4", "- **made from**: model", "- **bits per byte, held out**: student"):
        assert line in card
    assert card.count("- **versions") == 2


def test_code_of_a_models_own_must_be_trusted_here_too(root, lora_run, tmp_path, monkeypatch, capsys):
    from tokenkit.training import exporting

    manifest = read_manifest(lora_run / "checkpoints" / "step_00000004")
    manifest.config["trust_remote_code"] = True
    monkeypatch.setattr(exporting, "find_checkpoint", lambda name: (tmp_path, manifest))
    assert main(["export", str(lora_run), "--output", str(tmp_path / "out")]) == ExitCode.CONFIG
    assert "--trust-remote-code" in capsys.readouterr().err


def logits(model):
    ids = torch.arange(40)[None] + 20
    with torch.no_grad():
        return model(input_ids=ids).logits[0, :, :300]


@pytest.mark.parametrize(("tied", "target"), [(True, "target"), (False, "null")])
def test_adapters_are_written_for_peft_with_the_embeddings_that_moved(root, tmp_path, tied, target):
    """Seconds long: two runs of two steps; the one moves to another vocabulary, the other keeps its own."""
    tiny_folder(tmp_path / "base", tie_word_embeddings=tied)
    own = ["--teacher", str(root / "model")] if target == "null" else []
    words = ["--target-tokenizer-name", target if own else str(root / target), "--steps", "2", *own]
    config = configured(root, tmp_path / "run", "--student", str(tmp_path / "base"), *words)
    assert train(config) == ExitCode.DONE
    assert main(["export", str(tmp_path / "run"), "--as-adapter", "--output", str(tmp_path / "adapter")]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if not own:
        assert "resize_token_embeddings(400)" in (tmp_path / "adapter" / "README.md").read_text()
        base.resize_token_embeddings(400, mean_resizing=False)
    got = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export"))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    words = ["merge_lora", f"base_model={tmp_path / 'base'}", f"lora_model={tmp_path / 'adapter'}"]
    assert main([*words, f"output_path={tmp_path / 'merged'}"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) is tied
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--train-model-mode", "none"), "the run trained no adapters"),
        (("--target", "byte", "--expand-input-ids"), "no adapter holds code"),
    ],
)
def test_what_no_adapter_can_hold_is_refused(root, tmp_path, more, reason, capsys):
    assert train(configured(root, tmp_path / "run", *more, "--steps", "1")) == ExitCode.DONE
    capsys.readouterr()
    command = ["export", str(tmp_path / "run"), "--as-adapter", "--output", str(tmp_path / "adapter")]
    assert main(command) == ExitCode.DATA
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()
