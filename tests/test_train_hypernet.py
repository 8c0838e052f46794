"""The door `tokenkit train-hypernet`, on a tiny model, and what `tokenkit zett` makes of its folder."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.faults.registry import fault
from tests.tiny import TEXT, byte_level_bpe, sentencepiece_bpe, tiny_folder
from tokenkit.commands.zett import main as zett
from tokenkit.embeddings.hypernet_files import hypernet_rows, load_hypernet
from tokenkit.embeddings.transfer import InitOptions, transfer_vocabulary
from tokenkit.errors import ExitCode
from tokenkit.models.causal_lm import LoadOptions, load_causal_lm
from tokenkit.run.metrics import without_times
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.train_hypernet import main


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hypernet")
    tiny_folder(root / "model", tie_word_embeddings=False)
    sentencepiece_bpe(root / "target")
    sentencepiece_bpe(root / "small", 290)
    (root / "text.txt").write_text("\n<|endoftext|>\n".join(TEXT), encoding="utf-8")
    assert main(flags(root, "first")) == 0
    return root


def flags(root, output, *more):
    return [
        "--model.pretrained-model-name-or-path", str(root / "model"), "--data.dataset-name",
        str(root / "text.txt"), "--output", str(root / output), "--steps", "12", "--warmup-steps", "2",
        "--batch-size", "4", "--max-length", "48", "--sampling.texts", "8", "--sampling.max-tokens", "200",
        "--sampling.distractors", "20", "--logging-interval", "1", "--hypernet.num-heads", "4", *more,
    ]  # fmt: skip


def figures(root, output):
    return [json.loads(line) for line in (root / output / "metrics.jsonl").read_text().splitlines()]


def test_it_writes_what_transfer_reads(root):
    lines = figures(root, "first")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[0]["loss/lexical"] < 1e-12 < lines[-1]["loss/lexical"], "it begins as FVT"
    assert lines[0]["count/clm"] > 1 == lines[0]["count/lexical"], "bytes, and one distance"
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss/clm"] + 0.1 * lines[0]["loss/lexical"])
    assert (root / "first" / "curves.png").is_file()
    old, new = load_tokenizer(str(root / "model")), load_tokenizer(str(root / "target"))
    made = {}
    for method in ("fvt", "hypernet"):
        model = load_causal_lm(str(root / "model"), old.vocab_size, LoadOptions())
        options = InitOptions(hypernet=str(root / "first"))
        transfer_vocabulary(model, old, new, method=method, options=options)
        made[method] = model
    assert made["hypernet"].embedding.weight.shape == made["fvt"].embedding.weight.shape
    assert not torch.equal(made["hypernet"].output.weight, made["fvt"].output.weight)


def test_it_learns_under_one_tokenizer(root):
    assert main(flags(root, "one", "--steps", "30", "--resample-every", "30")) == 0
    clm = [line["loss/clm"] for line in figures(root, "one")]
    assert sum(clm[-5:]) < 0.9 * sum(clm[:5])


def test_the_same_seed_gives_the_same_weights(root):
    assert main(flags(root, "again")) == 0
    states = [load_file(root / name / "hypernet.safetensors") for name in ("first", "again")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def outcome(root, output):
    said = json.loads((root / output / "outcome.json").read_text())
    return said["code"], said["reason"], said["step"]


@fault(
    "train-hypernet stopped by a signal, failed or done",
    "outcome.json and config.yaml as of train",
    code="as of train",
    kept="every step",
)
def test_a_stopped_run_is_resumed_to_the_same_bits(root, monkeypatch, capsys):
    from tokenkit.training import hypernet_loop

    take, words = hypernet_loop.take, ("--resample-every", "2", "--save-interval", "4")

    def stopping_at(step):
        def and_stop(run, *more):
            take(run, *more)
            if run.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        return and_stop

    assert main(flags(root, "whole", *words)) == 0
    monkeypatch.setattr(hypernet_loop, "take", stopping_at(5))  # between two draws of a tokenizer
    assert main(flags(root, "stopped", *words)) == 75
    assert outcome(root, "stopped") == (75, "stopped by SIGTERM after step 5: go on with --resume", 5)
    monkeypatch.setattr(hypernet_loop, "take", take)
    assert sorted(p.name for p in (root / "stopped" / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000005",
    ]
    assert main(flags(root, "stopped", *words, "--resume")) == 0
    assert "resuming after step 5" in capsys.readouterr().err
    states = [load_file(root / name / "hypernet.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    whole, stopped = figures(root, "whole"), figures(root, "stopped")
    assert [without_times(line) for line in whole] == [without_times(line) for line in stopped]
    assert outcome(root, "stopped") == (0, "12 steps done", 12)
    assert "resample_every: 2" in (root / "stopped" / "config.yaml").read_text()
    assert main(flags(root, "stopped", *words, "--resume")) == 0
    assert "nothing to resume" in capsys.readouterr().err
    assert main(flags(root, "stopped", *words, "--resume", "--steps", "13")) == 64
    assert "steps: 12 -> 13" in capsys.readouterr().err


def test_a_crash_between_weights_and_json_is_resumed(root, monkeypatch):
    from tokenkit.embeddings import hypernet_files

    write = hypernet_files.write_durably

    def crash(path, content):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(hypernet_files, "write_durably", crash)
        assert main(flags(root, "crashed", "--save-interval", "4")) == 130
    assert (root / "crashed" / "hypernet.safetensors").is_file()
    assert main(flags(root, "crashed", "--save-interval", "4", "--resume")) == 0
    states = [load_hypernet(root / name)[0].state_dict() for name in ("first", "crashed")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_several_processes_are_refused(root, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(flags(root, "two")) == 64
    assert "runs in one process: start it without torchrun" in capsys.readouterr().err


def test_another_configuration_is_not_resumed(root, capsys):
    assert main(flags(root, "half", "--save-interval", "4")) == 0
    (root / "half" / "hypernet.json").rename(root / "half.json")
    assert main(flags(root, "half", "--save-interval", "4", "--resume", "--learning-rate", "1")) == 64
    assert "learning_rate: 0.003 -> 1.0" in capsys.readouterr().err


def test_what_diverges_or_has_nothing_to_predict_says_so(root, capsys):
    assert main(flags(root, "wild", "--learning-rate", "1e30")) == 70
    assert "lower learning_rate" in capsys.readouterr().err
    (root / "empty.txt").write_text("\n<|endoftext|>\n".join("ab"), encoding="utf-8")
    about = tiny_folder(root / "no_bos") / "tokenizer_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "bos_token": None}))
    words = ["--data.dataset-name", str(root / "empty.txt")]
    words += ["--model.pretrained-model-name-or-path", str(root / "no_bos")]
    assert main(flags(root, "nothing", *words)) == 64
    assert "has two tokens: give longer texts" in capsys.readouterr().err


def test_the_base_model_is_not_changed(root):
    about = json.loads((root / "first" / "hypernet.json").read_text())
    from tokenkit.models.reading import model_fingerprint

    assert about["base_model"]["fingerprint"] == model_fingerprint(str(root / "model"), None)
    assert about["old_tokenizer"]["fingerprint"] == load_tokenizer(str(root / "model")).fingerprint()


def test_the_warm_up_learns_fvt_s_rows(root):
    words = ("--identity-steps", "40", "--steps", "40", "--hypernet.residual", "false")
    assert main(flags(root, "identity", *words, "--hypernet.architecture", "mlp")) == 0
    lines = figures(root, "identity")
    assert "loss/clm" not in lines[-1]
    assert lines[-1]["phase"] == "identity"
    assert lines[-1]["loss/identity"] < 0.7 * lines[0]["loss/identity"]
    assert not load_hypernet(root / "identity")[0].options.residual


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "{root}/first"], "must be empty for a new run"),
        (["--hypernet.num-heads", "5"], "num_heads must divide the embeddings' width, 32: got 5"),
        (["--hypernet.architecture", "identity"], "identity, which has nothing to train"),
        (["--save-interval", "0"], "save_interval must be at least 1, got 0"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--sampling.max-tokens", "3"], "sampling.max_tokens must be at least 64, got 3"),
        (["--model.pretrained-model-name-or-path", "/absent/model"], "/absent/model"),
        (["--data.dataset-name", "/absent.txt"], "/absent.txt"),
        (["--max-length", "129"], "max_length is 129, but the model has 128 positions"),
        (["--model.tokenizer-name", "{root}/small"], "is not the tokenizer of"),
        (["--hypernet.residual-alpha", "0"], "hypernet.residual_alpha must be finite and not 0, got 0"),
    ],
)
def test_bad_input_is_one_line(root, capsys, words, message):
    assert main(flags(root, "other", *(word.format(root=root) for word in words))) != 0
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    left = os.listdir(root / "other") if (root / "other").exists() else []
    assert left in ([], ["outcome.json"]), "a folder that a new run may take"


def zett_flags(root, output, *more, model="model"):
    return [
        "--model.pretrained-model-name-or-path", str(root / model), "--target-tokenizer-name",
        str(root / "target"), "--output", str(root / output), "--method", "hypernet",
        "--hypernet", str(root / "first"), *more,
    ]  # fmt: skip


def test_the_door_of_zett_applies_it(root, capsys):
    assert zett(zett_flags(root, "moved", "--pad-to-multiple-of", "64")) == 0
    out = capsys.readouterr().out
    assert "400 rows by hypernet" in out
    moved = AutoModelForCausalLM.from_pretrained(root / "moved")
    old, new = load_tokenizer(str(root / "model")), load_tokenizer(str(root / "target"))
    network, _ = load_hypernet(root / "first")
    model = load_causal_lm(str(root / "model"), old.vocab_size, LoadOptions())
    matrices = [model.embedding.weight, model.output.weight]
    rows = hypernet_rows(network, old, new, matrices, 448)
    made = moved.get_input_embeddings().weight, moved.get_output_embeddings().weight
    torch.testing.assert_close(made[0].detach(), rows.input_VD)
    torch.testing.assert_close(made[1][:400].detach(), rows.output_VD[:400])
    ids = AutoTokenizer.from_pretrained(root / "moved")("The cats sat", return_tensors="pt").input_ids
    assert moved.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_it_is_compared_with_the_others(root):
    text = ["--ppl-eval-data", str(root / "text.txt")]
    words = ["--method", "fvt", "--compare", "fvt", "hypernet", *text]
    assert zett(zett_flags(root, "compared", *words)) == 0
    scores = json.loads((root / "compared" / "compare.json").read_text())["methods"]
    assert scores["fvt"]["bits_per_byte"] != scores["hypernet"]["bits_per_byte"]


@pytest.mark.parametrize(
    ("model", "folder", "message"),
    [
        ("wide", "first", "width"),
        ("other", "first", "the hypernetwork was trained on another base model"),
        ("spelled", "first", "the hypernetwork was trained on another old tokenizer"),
        ("model", "model", "holds no hypernetwork"),
        ("model", "damaged", "no hypernetwork can be read from"),
        ("model", "absent", "absent does not exist"),
    ],
)
def test_the_door_of_zett_refuses_another_one(root, capsys, model, folder, message):
    if model == "wide":
        tiny_folder(root / "wide", tie_word_embeddings=False, hidden_size=64)
    elif model == "other":
        tiny_folder(root / "other", tie_word_embeddings=False, seed=1)
    elif model == "spelled":  # the same rows under another tokenizer
        shutil.copytree(root / "model", root / "spelled")
        byte_level_bpe(root / "spelled", 300, bos="<bos>")
    if folder == "damaged":
        shutil.copytree(root / "first", root / "damaged")
        (root / "damaged" / "hypernet.safetensors").write_bytes(b"no weights")
    words = zett_flags(root, "refused", "--hypernet", str(root / folder), model=model)
    assert zett(words) == ExitCode.DATA
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (root / "refused").exists()
